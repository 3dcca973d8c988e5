//! Split virtqueues (virtio 1.2, 2.7), checked at the door.
//!
//! A thin layer over `virtio-queue`: it walks rings, follows chains and indirect tables; this module adds what a
//! device may rely on. [`Queue::pop`] gives only [`Chain`]s whose every buffer lies in guest memory, readable part
//! first, no longer than the queue; so device code never sees an address. What breaks these rules breaks the
//! queue: it yields nothing more, the driver sees `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2), one rate-limited line
//! tells why. That is decided here once, for all devices.
//!
//! The contents of a buffer may change under our hands, as the guest still runs: read what is decided upon once.
//!
//! Packed rings (2.8) and `VIRTIO_F_IN_ORDER` are not offered.

mod chain;
mod cursor;
mod room;
mod state;

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub use chain::Chain;
pub use cursor::{Reader, ShortChain, Writer};
pub use room::Room;
pub use state::{QueueState, SetupError};

use crate::GuestMemory;
use crate::irq::Interrupt;
use crate::rate::GUEST_ERRORS;
use chain::Walk;

/// Why a queue broke.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings themselves make no sense.
    #[error("ring cannot be read: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available index went backwards.
    #[error("available index went back behind {next_avail}")]
    AvailWentBack {
        /// Where we stood.
        next_avail: u16,
    },
    /// A buffer lies outside guest memory, at least in part.
    #[error("chain {head}: buffer of {len} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// First descriptor of the chain.
        head: u16,
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A buffer for the device to write, in memory that nobody may write.
    #[error("chain {head}: the {len} bytes at {address:#x} are to be written, and are read-only")]
    ReadOnlyMemory {
        /// First descriptor of the chain.
        head: u16,
        /// Guest physical address of the buffer.
        address: u64,
        /// Length of the buffer in bytes.
        len: u32,
    },
    /// A loop, an index beyond the table, a broken indirect table, or more than 2^32 bytes in all.
    #[error("chain {head}: no valid descriptor follows the first {count}")]
    BreaksOff {
        /// First descriptor of the chain.
        head: u16,
        /// Valid descriptors before.
        count: usize,
    },
    /// More descriptors than the queue has (virtio 1.2, 2.7.5.3.1).
    #[error("chain {head}: more than {limit} descriptors")]
    TooLong {
        /// First descriptor of the chain.
        head: u16,
        /// Queue size.
        limit: u16,
    },
    /// A readable buffer after a writable one (virtio 1.2, 2.7.4.2).
    #[error("chain {head}: readable buffer after a writable one")]
    ReadableAfterWritable {
        /// First descriptor of the chain.
        head: u16,
    },
}

/// A queue that the driver has set up, its rings checked to lie in guest memory.
///
/// Memory is an argument of each call rather than a field, so that a [`Chain`] borrows the memory and not the queue.
#[derive(Debug)]
pub struct Queue {
    ring: virtio_queue::Queue,
    interrupt: Interrupt,
    name: &'static str,
    index: usize,
    broken: bool,
    /// The driver was told not to notify us.
    quiet: bool,
    /// The used index that the last `notify` considered.
    announced: u16,
}

impl Queue {
    /// Takes over the queue that `state` describes, after checking it. `name` and `index` are for log lines.
    pub fn new(
        state: &QueueState,
        memory: &GuestMemory,
        interrupt: Interrupt,
        name: &'static str,
        index: usize,
    ) -> Result<Self, SetupError> {
        let ring = state.to_ring(memory)?;
        let announced = ring.next_used();
        Ok(Queue { ring, interrupt, name, index, broken: state.broken, quiet: false, announced })
    }

    /// Whether the driver uses this queue, and has not broken it.
    pub fn is_live(&self) -> bool {
        self.ring.ready() && !self.broken
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// As it stands, for a snapshot.
    pub fn state(&self) -> QueueState {
        QueueState::of(&self.ring, self.broken)
    }

    /// The next chain that the driver made available.
    ///
    /// While chains come, the driver need not notify us, and is told so. `None` means that the queue is empty **and**
    /// that the driver will notify us of the next chain (virtio 1.2, 2.7.10); a caller that stops before `None`
    /// must come back by itself. A broken queue is empty for ever.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Option<Chain<'m>> {
        if !self.is_live() {
            return None;
        }
        self.try_pop(memory).unwrap_or_else(|e| {
            self.fail(&e);
            None
        })
    }

    /// A chain that an earlier `pop` gave, by its head, and that has not been used yet: looked up and checked anew, since the
    /// driver may have changed it. For a device that answers later, and holds no slice of guest memory meanwhile. `None` if the
    /// queue is broken, or breaks over this.
    pub fn again<'m>(&mut self, memory: &'m GuestMemory, head: u16) -> Option<Chain<'m>> {
        if !self.is_live() {
            return None;
        }
        let walk = Walk::new(memory, self.ring.desc_table(), self.ring.size(), head);
        Chain::check(head, walk, memory, self.ring.size()).map_or_else(
            |e| {
                self.fail(&e);
                None
            },
            Some,
        )
    }

    /// Puts back the chain that the last `pop` gave, unused. It comes again with the next `pop`. Several calls put back as
    /// many chains, if none of them was used.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives a chain back to the driver with `len` bytes written to its writable part (virtio 1.2, 2.7.8).
    /// The driver learns of it at the next [`Queue::notify`].
    pub fn push_used(&mut self, memory: &GuestMemory, head: u16, len: u32) {
        if !self.is_live() {
            return;
        }
        if let Err(e) = self.ring.add_used(memory, head, len) {
            self.fail(&e.into());
        }
    }

    /// As [`Queue::push_used`], several chains that the driver must see at once or not at all, as those of one received
    /// frame are (virtio 1.2, 5.1.6.4).
    pub fn push_used_together(&mut self, memory: &GuestMemory, chains: &[(u16, u32)]) {
        let Some(((last, last_len), others)) = chains.split_last() else { return };
        if !self.is_live() {
            return;
        }
        let mut next = self.ring.next_used();
        for (head, len) in others {
            let element = self.ring.used_ring() + 4 + 8 * u64::from(next % self.ring.size());
            // 2.7.8: `le32 id`, `le32 len`.
            let used = (u64::from(*len) << 32 | u64::from(*head)).to_le();
            if let Err(e) = memory.write_obj(used, GuestAddress(element)) {
                return self.fail(&virtio_queue::Error::GuestMemory(e).into());
            }
            next = next.wrapping_add(1);
        }
        // The index shows them all with the last one.
        self.ring.set_next_used(next);
        self.push_used(memory, *last, *last_len);
    }

    /// Interrupts the driver if there are used buffers that it wants to hear of (virtio 1.2, 2.7.7). Cheap if not.
    /// Call it after a batch of `push_used`. Tells whether the interrupt was raised.
    pub fn notify(&mut self, memory: &GuestMemory) -> bool {
        let used = self.ring.next_used();
        if used == self.announced || !self.is_live() {
            return false;
        }
        let wanted = self.wants_interrupt(memory);
        self.announced = used;
        match wanted {
            Ok(true) => self.interrupt.used_buffer(),
            Ok(false) => return false,
            Err(e) => {
                self.fail(&e);
                return false;
            }
        }
        true
    }

    /// Declares the queue broken for a reason that only the device sees, as a request that makes no sense and has
    /// no room for a status.
    pub fn break_off(&mut self, reason: impl std::fmt::Display) {
        self.broken = true;
        self.interrupt.device_needs_reset();
        GUEST_ERRORS.warn(format_args!("{} queue {} needs a reset: {reason}", self.name, self.index));
    }

    fn fail(&mut self, error: &QueueError) {
        self.break_off(error);
    }

    fn try_pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        // Twice, as the driver may add a chain just before it is asked to notify us again. A second time there is
        // something, or it plays with the index.
        for _ in 0..2 {
            if let Some(chain) = self.ring.iter(memory)?.next() {
                if !self.quiet {
                    self.ring.disable_notification(memory)?;
                    self.quiet = true;
                }
                return Chain::check(chain.head_index(), chain, memory, self.ring.size()).map(Some);
            }
            self.quiet = false;
            if !self.ring.enable_notification(memory)? {
                return Ok(None);
            }
        }
        Err(QueueError::AvailWentBack { next_avail: self.ring.next_avail() })
    }

    /// What the driver says about the used buffers that no `notify` has considered yet.
    fn wants_interrupt(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let word = |offset: u64| -> Result<u16, QueueError> {
            let address = GuestAddress(self.ring.avail_ring() + offset);
            let word: u16 =
                memory.load(address, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?;
            Ok(u16::from_le(word))
        };
        // Between our used index and the driver's wishes.
        fence(Ordering::SeqCst);
        if self.ring.event_idx_enabled() {
            // 2.7.7.2: it wants to hear of the entry at `used_event`. Is that among the new ones?
            let event = word(4 + 2 * u64::from(self.ring.size()))?;
            let used = self.ring.next_used();
            return Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(self.announced));
        }
        // Without the event index, the available ring's flags say it.
        Ok(u32::from(word(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

#[cfg(test)]
mod tests;
