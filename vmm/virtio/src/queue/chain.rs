//! One request: the buffers of a descriptor chain, as slices of guest memory.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory as _, VolatileSlice};

use super::{QueueError, Reader, Writer};
use crate::GuestMemory;

/// A chain whose buffers all lie in guest memory: first those that the device reads, then those it writes
/// (virtio 1.2, 2.7.4.2), no more of them than the queue has descriptors, no more than 2^32 bytes.
///
/// Buffers of length zero carry nothing and are left out.
#[derive(Debug)]
pub struct Chain<'m> {
    raw: DescriptorChain<&'m GuestMemory>,
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
}

impl<'m> Chain<'m> {
    pub(super) fn check(
        raw: DescriptorChain<&'m GuestMemory>,
        memory: &'m GuestMemory,
        limit: u16,
    ) -> Result<Self, QueueError> {
        let head = raw.head_index();
        let mut chain = Chain { raw: raw.clone(), readable: Vec::new(), writable: Vec::new() };
        let mut count = 0;
        let mut complete = false;
        let mut writable = false;

        // `DescriptorChain` ends silently where a chain breaks off; the last descriptor tells (2.7.5: NEXT).
        for descriptor in raw {
            if count == usize::from(limit) {
                return Err(QueueError::TooLong { head, limit });
            }
            count += 1;
            complete = !descriptor.has_next();
            if writable && !descriptor.is_write_only() {
                return Err(QueueError::ReadableAfterWritable { head });
            }
            writable = descriptor.is_write_only();

            let part = if writable { &mut chain.writable } else { &mut chain.readable };
            // A buffer may span two regions of memory. The length fits, as `usize` has 64 bits.
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let (address, len) = (descriptor.addr().0, descriptor.len());
                part.push(slice.map_err(|_| QueueError::OutsideMemory { head, address, len })?);
            }
        }
        if complete { Ok(chain) } else { Err(QueueError::BreaksOff { head, count }) }
    }

    /// Names the chain in `push_used`.
    pub fn head(&self) -> u16 {
        self.raw.head_index()
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

    /// The descriptors, for a library that walks the chain by itself. It reads them from guest memory again, where
    /// they may have changed, and so must check them again.
    pub fn descriptors(&self) -> DescriptorChain<&'m GuestMemory> {
        self.raw.clone()
    }
}
