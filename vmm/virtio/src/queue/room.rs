//! Room for one message of a descriptor that keeps messages apart (a tap, a datagram socket), in one or in several
//! chains, filled without a copy.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use libc::iovec;
use vm_memory::VolatileSlice;

use super::Chain;
use super::cursor::{MAX_IOVECS, readv, retry};

/// Writable parts of chains, in the order in which they were popped.
///
/// It holds on to no queue: who stops before they are all [taken](Room::take) puts the rest back, by as many calls of
/// [`Queue::undo_pop`](super::Queue::undo_pop) as there are [`chains`](Room::chains).
#[derive(Debug, Default)]
pub struct Room<'m> {
    chains: VecDeque<Part<'m>>,
    bytes: usize,
    slices: usize,
}

#[derive(Debug)]
struct Part<'m> {
    head: u16,
    slices: Vec<VolatileSlice<'m>>,
    bytes: usize,
}

impl<'m> Room<'m> {
    /// Adds the writable part of a chain.
    pub fn push(&mut self, chain: Chain<'m>) {
        let head = chain.head();
        let slices = chain.into_writable();
        let bytes = slices.iter().map(VolatileSlice::len).sum();
        self.bytes += bytes;
        self.slices += slices.len();
        self.chains.push_back(Part { head, slices, bytes });
    }

    /// Bytes of room.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Chains it is made of.
    pub fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Whether more chains would not help, as one system call reaches no further.
    pub fn is_full(&self) -> bool {
        self.slices >= MAX_IOVECS - 1
    }

    /// Reads the next message of `from` to the front of the room, with one call. Tells its length, or `None` if it was
    /// longer than the room and is lost.
    pub fn receive(&self, from: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        // A message that is cut looks like one that just fits, but for this byte behind the room.
        let mut behind = [0_u8; 1];
        let mut iovecs = Vec::with_capacity(self.slices.min(MAX_IOVECS - 1) + 1);
        let mut room = 0;
        for slice in self.chains.iter().flat_map(|part| &part.slices).take(MAX_IOVECS - 1) {
            iovecs.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            room += slice.len();
        }
        iovecs.push(iovec { iov_base: behind.as_mut_ptr().cast(), iov_len: behind.len() });
        let len = retry(|| readv(from, &iovecs))?;
        Ok((len <= room).then_some(len))
    }

    /// Chains that the first `len` bytes lie in.
    pub fn chains_of(&self, len: usize) -> usize {
        let mut left = len;
        self.chains
            .iter()
            .take_while(|part| {
                let here = left > 0;
                left = left.saturating_sub(part.bytes);
                here
            })
            .count()
    }

    /// Writes `bytes` at `offset`, as far as there is room.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        let (mut skip, mut bytes) = (offset, bytes);
        for slice in self.chains.iter().flat_map(|part| &part.slices) {
            if bytes.is_empty() {
                break;
            }
            match slice.offset(skip) {
                Ok(rest) => {
                    let len = rest.len().min(bytes.len());
                    rest.copy_from(&bytes[..len]);
                    bytes = &bytes[len..];
                    skip = 0;
                }
                Err(_) => skip -= slice.len(),
            }
        }
    }

    /// Takes out the chains that the first `len` bytes lie in: name and bytes of each, for
    /// [`Queue::push_used_together`](super::Queue::push_used_together).
    pub fn take(&mut self, len: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::with_capacity(1);
        let mut left = len;
        while left > 0 {
            let Some(part) = self.chains.pop_front() else { break };
            self.bytes -= part.bytes;
            self.slices -= part.slices.len();
            let here = left.min(part.bytes);
            used.push((part.head, u32::try_from(here).expect("chains are shorter than 2^32 bytes")));
            left -= here;
        }
        used
    }
}
