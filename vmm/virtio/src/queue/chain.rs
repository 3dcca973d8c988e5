//! One request: the buffers of a descriptor chain, as slices of guest memory.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, VolatileSlice};

use super::{QueueError, Reader, Writer};
use crate::GuestMemory;
use crate::memory::is_writable;

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR: u32 = 16;

/// A chain whose buffers all lie in guest memory: first those that the device reads, then those it writes
/// (virtio 1.2, 2.7.4.2), no more of them than the queue has descriptors, no more than 2^32 bytes.
///
/// Buffers of length zero carry nothing and are left out.
#[derive(Debug)]
pub struct Chain<'m> {
    head: u16,
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
}

impl<'m> Chain<'m> {
    /// Checks the chain of `descriptors` that begins at `head`.
    pub(super) fn check(
        head: u16,
        descriptors: impl Iterator<Item = Descriptor>,
        memory: &'m GuestMemory,
        limit: u16,
    ) -> Result<Self, QueueError> {
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut count = 0;
        let mut complete = false;
        let mut writable = false;

        // The iterator ends silently where a chain breaks off; the last descriptor tells (2.7.5: NEXT).
        for descriptor in descriptors {
            if count == usize::from(limit) {
                return Err(QueueError::TooLong { head, limit });
            }
            count += 1;
            complete = !descriptor.has_next();
            if writable && !descriptor.is_write_only() {
                return Err(QueueError::ReadableAfterWritable { head });
            }
            writable = descriptor.is_write_only();

            let (address, len) = (descriptor.addr().0, descriptor.len());
            if writable && !is_writable(memory, address, len.into()) {
                return Err(QueueError::ReadOnlyMemory { head, address, len });
            }
            let part = if writable { &mut chain.writable } else { &mut chain.readable };
            // A buffer may span two regions of memory. The length fits, as `usize` has 64 bits.
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                part.push(slice.map_err(|_| QueueError::OutsideMemory { head, address, len })?);
            }
        }
        if complete { Ok(chain) } else { Err(QueueError::BreaksOff { head, count }) }
    }

    /// Names the chain in `push_used`.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote, and where the driver wants its answer.
    pub fn split(self) -> (Reader<'m>, Writer<'m>) {
        (Reader::new(self.readable), Writer::new(self.writable))
    }

    /// The writable part, for a device to which the buffers are what matters and not what they hold.
    pub fn writable(&self) -> &[VolatileSlice<'m>] {
        &self.writable
    }

    /// The writable part alone.
    pub(super) fn into_writable(self) -> Vec<VolatileSlice<'m>> {
        self.writable
    }

    /// Bytes that the device may read, and bytes that it may write.
    pub fn lens(&self) -> (usize, usize) {
        let bytes = |slices: &[VolatileSlice<'m>]| slices.iter().map(VolatileSlice::len).sum();
        (bytes(&self.readable), bytes(&self.writable))
    }
}

/// The descriptors of a chain by its head alone. `virtio-queue` walks chains too, but only one that it has just popped.
#[derive(Debug)]
pub(super) struct Walk<'m> {
    memory: &'m GuestMemory,
    /// Address and entries of the table.
    table: (GuestAddress, u32),
    /// Entry to come.
    next: Option<u16>,
    /// Entries that may still come from this table: more would be a loop.
    left: u32,
    bytes: u32,
    is_indirect: bool,
}

impl<'m> Walk<'m> {
    /// The chain that begins at `head` of a queue's table of `size` descriptors.
    pub(super) fn new(memory: &'m GuestMemory, table: u64, size: u16, head: u16) -> Self {
        let entries = u32::from(size);
        let table = (GuestAddress(table), entries);
        Walk { memory, table, next: Some(head), left: entries, bytes: 0, is_indirect: false }
    }

    fn load(&self) -> Option<Descriptor> {
        let index = self.next.filter(|index| u32::from(*index) < self.table.1 && self.left > 0)?;
        let at = self.table.0.0.checked_add(u64::from(index) * u64::from(DESCRIPTOR))?;
        self.memory.read_obj(GuestAddress(at)).ok()
    }
}

impl Iterator for Walk<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut found = self.load()?;
        if found.refers_to_indirect_table() {
            // 2.7.5.3.1: not in one, and of whole descriptors. 2^16 entries are all that `next` can name.
            let entries = found.len() / DESCRIPTOR;
            if self.is_indirect || found.len() % DESCRIPTOR != 0 || entries > u32::from(u16::MAX) {
                return None;
            }
            self.table = (found.addr(), entries);
            (self.next, self.left, self.is_indirect) = (Some(0), entries, true);
            found = self.load().filter(|first| !first.refers_to_indirect_table())?;
        }
        self.bytes = self.bytes.checked_add(found.len())?;
        self.left -= 1;
        self.next = found.has_next().then_some(found.next());
        Some(found)
    }
}
