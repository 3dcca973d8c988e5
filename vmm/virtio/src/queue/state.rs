//! What the driver writes to set a queue up, what of it is checked, and what is saved of it.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::GuestMemory;
use crate::memory::is_writable;

/// A queue's set-up and position. Unchecked: it comes from the driver's register writes or from a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose, in descriptors.
    pub size: u16,
    /// The driver uses the queue.
    pub ready: bool,
    /// The driver broke the queue; it waits for a reset.
    pub broken: bool,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Next entry of the available ring to read.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

/// A driver's set-up of a queue is not acceptable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SetupError {
    /// Not a power of two, or out of range (virtio 1.2, 2.7).
    #[error("queue size {size} is not a power of two between 1 and {max}")]
    Size {
        /// Size asked for.
        size: u16,
        /// Largest offered.
        max: u16,
    },
    /// Wrong alignment (virtio 1.2, 2.7).
    #[error("{part} at {address:#x} is not aligned to {align}")]
    Alignment {
        /// Part of the queue.
        part: &'static str,
        /// Guest physical address.
        address: u64,
        /// Alignment needed, in bytes.
        align: u64,
    },
    /// The part is not in guest memory, at least in part.
    #[error("{part} of {len} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Part of the queue.
        part: &'static str,
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: usize,
    },
    /// The device could not write where it must.
    #[error("used ring at {address:#x} is in read-only memory")]
    ReadOnlyMemory {
        /// Guest physical address.
        address: u64,
    },
}

impl QueueState {
    /// A queue as it is after reset.
    pub fn unused(max_size: u16) -> Self {
        QueueState { max_size, size: max_size, ..Self::default() }
    }

    /// Checks the set-up (virtio 1.2, 2.7: sizes and alignments of the three parts; 2.7.10.1 and 2.7.7.1: the two
    /// bytes of `used_event` and `avail_event` belong to the rings whether or not they are used).
    pub fn check(&self, memory: &GuestMemory) -> Result<(), SetupError> {
        if !self.size.is_power_of_two() || self.size > self.max_size {
            return Err(SetupError::Size { size: self.size, max: self.max_size });
        }
        if !self.ready {
            return Ok(());
        }
        let size = usize::from(self.size);
        let parts = [
            ("descriptor table", self.desc_table, 16, 16 * size),
            ("available ring", self.avail_ring, 2, 6 + 2 * size),
            ("used ring", self.used_ring, 4, 6 + 8 * size),
        ];
        for (part, address, align, len) in parts {
            if address % align != 0 {
                return Err(SetupError::Alignment { part, address, align });
            }
            // virtio-queue takes an available ring at 0 for one that was never set.
            if address == 0 || !memory.check_range(GuestAddress(address), len) {
                return Err(SetupError::OutsideMemory { part, address, len });
            }
        }
        // The one part that the device writes.
        if !is_writable(memory, self.used_ring, 6 + 8 * u64::from(self.size)) {
            return Err(SetupError::ReadOnlyMemory { address: self.used_ring });
        }
        Ok(())
    }

    /// The ring that this describes, checked.
    pub(super) fn to_ring(self, memory: &GuestMemory) -> Result<virtio_queue::Queue, SetupError> {
        self.check(memory)?;
        let wrong_size = SetupError::Size { size: self.size, max: self.max_size };
        let mut ring = virtio_queue::Queue::new(self.max_size).map_err(|_| wrong_size)?;
        ring.set_size(self.size);
        ring.set_desc_table_address(Some(low(self.desc_table)), Some(high(self.desc_table)));
        ring.set_avail_ring_address(Some(low(self.avail_ring)), Some(high(self.avail_ring)));
        ring.set_used_ring_address(Some(low(self.used_ring)), Some(high(self.used_ring)));
        ring.set_event_idx(self.event_idx);
        ring.set_next_avail(self.next_avail);
        ring.set_next_used(self.next_used);
        ring.set_ready(self.ready);
        Ok(ring)
    }

    pub(super) fn of(ring: &virtio_queue::Queue, broken: bool) -> Self {
        QueueState {
            max_size: ring.max_size(),
            size: ring.size(),
            ready: ring.ready(),
            broken,
            event_idx: ring.event_idx_enabled(),
            next_avail: ring.next_avail(),
            next_used: ring.next_used(),
            desc_table: ring.desc_table(),
            avail_ring: ring.avail_ring(),
            used_ring: ring.used_ring(),
        }
    }
}

fn low(address: u64) -> u32 {
    u32::try_from(address & 0xffff_ffff).expect("masked to 32 bits")
}

fn high(address: u64) -> u32 {
    u32::try_from(address >> 32).expect("shifted to 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        crate::memory::anonymous(&[(0, 0x1_0000), (0x2_0000, 0x1_0000)])
    }

    fn good() -> QueueState {
        QueueState {
            ready: true,
            desc_table: 0x1000,
            avail_ring: 0x2000,
            used_ring: 0x3000,
            ..QueueState::unused(256)
        }
    }

    #[test]
    fn a_good_queue_keeps_its_state() {
        let state = QueueState { next_avail: 7, next_used: 65_535, event_idx: true, size: 16, ..good() };
        let ring = state.to_ring(&memory()).unwrap();
        assert_eq!(QueueState::of(&ring, false), state);
    }

    #[test]
    fn sizes() {
        for (size, ok) in [(0, false), (1, true), (3, false), (255, false), (256, true), (512, false)] {
            assert_eq!(QueueState { size, ..good() }.check(&memory()).is_ok(), ok, "size {size}");
        }
    }

    #[test]
    fn parts_must_be_aligned_and_in_memory() {
        let cases = [
            QueueState { desc_table: 0x1008, ..good() },
            QueueState { avail_ring: 0x2001, ..good() },
            QueueState { used_ring: 0x3002, ..good() },
        ];
        for case in cases {
            assert!(matches!(case.check(&memory()), Err(SetupError::Alignment { .. })), "{case:?}");
        }
        let cases = [
            QueueState { desc_table: 0xf010, ..good() },   // runs into the hole
            QueueState { desc_table: 0x1_8000, ..good() }, // in the hole
            QueueState { avail_ring: 0, ..good() },        // never set
            QueueState { avail_ring: 0xfffe, ..good() },   // only the flags are inside
            QueueState { used_ring: 0x2_fffc, ..good() },  // only the first two fields are inside
            QueueState { used_ring: u64::MAX - 3, ..good() }, // wraps
            QueueState { desc_table: u64::MAX - 15, ..good() }, // wraps
            QueueState { used_ring: 0x3_0000, ..good() },  // right behind memory
        ];
        for case in cases {
            assert!(matches!(case.check(&memory()), Err(SetupError::OutsideMemory { .. })), "{case:?}");
        }
        // An unused queue may hold anything.
        assert_eq!(QueueState { ready: false, desc_table: 5, ..good() }.check(&memory()), Ok(()));
    }

    #[test]
    fn a_used_ring_is_where_the_device_may_write() {
        use crate::memory::{BLOCK, Blocks, Region};
        use std::sync::Arc;
        let mapping = vm_memory::GuestRegionMmap::from_range(GuestAddress(BLOCK), 2 << 20, None).unwrap();
        let blocks = Arc::new(Blocks::new(1));
        blocks.set(0..1, true);
        let memory = memory().insert_region(Arc::new(Region::read_only(mapping, blocks))).unwrap();
        // What the device only reads may be there.
        let read = QueueState { desc_table: BLOCK, avail_ring: BLOCK + 0x8000, ..good() };
        assert_eq!(read.check(&memory), Ok(()));
        let written = QueueState { used_ring: BLOCK + 0x1000, ..good() };
        assert_eq!(written.check(&memory), Err(SetupError::ReadOnlyMemory { address: BLOCK + 0x1000 }));
    }

    #[test]
    fn the_last_byte_of_memory_may_be_used() {
        // 6 + 8 * 256 = 2,054 bytes, aligned down to 4.
        let last = 0x3_0000 - 2056;
        assert_eq!(QueueState { used_ring: last, ..good() }.check(&memory()), Ok(()));
        assert!(QueueState { used_ring: last + 4, ..good() }.check(&memory()).is_err());
    }
}
