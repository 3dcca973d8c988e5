//! What the targets share: a guest that is made once and used for all runs, and input taken apart.
//!
//! A target is one file in `targets/`, a `[[bin]]` in the manifest and, where random bytes alone get nowhere, a few seeds in
//! `seeds/TARGET/`. It must leave nothing behind from one run to the next, else a crash cannot be repeated.

use virtio::GuestMemory;
use virtio::memory::is_writable;
use virtio::testing::{Descriptor, Guest, MEMORY_END, write_descriptor};
use vm_memory::{Bytes, GuestAddress};

/// The bytes of a run, taken from the front. What is missing reads as zero, so that every input means something.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// An address: of three bytes, which is in guest memory every other time; rarely any of eight.
    pub fn address(&mut self) -> u64 {
        let [low, middle, high] = self.array();
        match high {
            0xff => self.u64(),
            _ => u64::from(u32::from_le_bytes([low, middle, high & 0x7f, 0])),
        }
    }

    /// A length: mostly small, rarely any.
    pub fn len(&mut self) -> u32 {
        let [low, high] = self.array();
        match high {
            0xff => self.u32(),
            _ => u32::from(u16::from_le_bytes([low, high & 0x1f])),
        }
    }

    /// A descriptor, sensible or not.
    pub fn descriptor(&mut self) -> Descriptor {
        let flags = self.u8();
        Descriptor {
            address: self.address(),
            len: self.len(),
            flags: u16::from(flags & 7),
            next: u16::from(self.u8()),
        }
    }
}

/// What a guest may do to a queue of a device in use.
pub fn disturb(guest: &mut Guest, queue: usize, input: &mut Input<'_>) {
    let state = guest.queues[queue].state();
    match input.u8() % 8 {
        // Mostly: fill in descriptors and make the first of them available.
        0..=3 => {
            let first = input.u16() % state.size;
            for i in 0..=u64::from(input.u8() % 8) {
                let index = (u64::from(first) + i) % u64::from(state.size);
                write_descriptor(&guest.memory, state.desc_table + 16 * index, input.descriptor());
            }
            guest.queues[queue].publish_head(first);
        }
        4 => guest.queues[queue].publish_head(input.u16()),
        5 => guest.queues[queue].set_avail_idx(input.u16()),
        6 => {
            let address = input.address();
            let len = usize::from(input.u8());
            fill(&guest.memory, address, input.bytes(len));
        }
        _ => {
            let address = input.address();
            write_descriptor_if_inside(&guest.memory, address & !15, input.descriptor());
        }
    }
}

/// Writes to guest memory, as far as there is any. What a guest writes to memory that is not to be written never gets there.
pub fn fill(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    if is_writable(memory, address, bytes.len() as u64) {
        let _ = memory.write(bytes, GuestAddress(address));
    }
}

fn write_descriptor_if_inside(memory: &GuestMemory, address: u64, descriptor: Descriptor) {
    if address < MEMORY_END {
        write_descriptor(memory, address, descriptor);
    }
}
