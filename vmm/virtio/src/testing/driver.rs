//! The driver's half of one queue.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::{Bytes, GuestAddress};

use super::Heap;
use crate::GuestMemory;
use crate::queue::QueueState;

/// `VIRTQ_DESC_F_NEXT`: another descriptor follows (virtio 1.2, 2.7.5).
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes the buffer.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Debug, Clone)]
pub enum Buffer {
    /// The device reads these bytes.
    Out(Vec<u8>),
    /// The device may write that many bytes.
    In(usize),
}

/// A descriptor as it lies in memory, sense or nonsense.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

/// A chain that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// First descriptor, as given by `add`.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
    /// The [`Buffer::In`]s, one after the other, whole.
    pub data: Vec<u8>,
}

#[derive(Debug)]
struct InFlight {
    descriptors: Vec<u16>,
    writable: Vec<(u64, usize)>,
}

/// The driver's half of one split queue (virtio 1.2, 2.7), as a careful driver keeps it: it notifies only when the
/// device wants that, and insists that each chain comes back once.
#[derive(Debug)]
pub struct FakeQueue {
    memory: GuestMemory,
    state: QueueState,
    free: VecDeque<u16>,
    avail_idx: u16,
    notified_idx: u16,
    last_used: u16,
    in_flight: BTreeMap<u16, InFlight>,
}

impl FakeQueue {
    /// Lays the rings out at `base`, zeroed. 32 bytes a descriptor are enough for them, up from 16 descriptors.
    pub fn new(memory: &GuestMemory, base: u64, max_size: u16, event_idx: bool) -> Self {
        let size = u64::from(max_size);
        let desc_table = base;
        let avail_ring = desc_table + 16 * size;
        let used_ring = (avail_ring + 6 + 2 * size).next_multiple_of(4);
        let end = used_ring + 6 + 8 * size;
        let zeros = vec![0; usize::try_from(end - base).unwrap()];
        memory.write_slice(&zeros, GuestAddress(base)).expect("the rings lie in the test's memory");
        FakeQueue {
            memory: memory.clone(),
            state: QueueState {
                ready: true,
                event_idx,
                desc_table,
                avail_ring,
                used_ring,
                ..QueueState::unused(max_size)
            },
            free: (0..max_size).collect(),
            avail_idx: 0,
            notified_idx: 0,
            last_used: 0,
            in_flight: BTreeMap::new(),
        }
    }

    /// What the driver would write to the transport's queue registers.
    pub fn state(&self) -> QueueState {
        self.state
    }

    /// Chains that the device has not given back.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Descriptors that are not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a request available, its buffers on `heap`. Does not notify.
    pub fn add(&mut self, heap: &mut Heap, buffers: &[Buffer]) -> u16 {
        let indices = self.take_free(buffers.len());
        let mut writable = Vec::new();
        for (i, buffer) in buffers.iter().enumerate() {
            let mut descriptor = self.place(heap, buffer, &mut writable);
            if let Some(next) = indices.get(i + 1) {
                descriptor.flags |= NEXT;
                descriptor.next = *next;
            }
            self.write_descriptor(indices[i], descriptor);
        }
        self.publish(indices, writable)
    }

    /// As [`FakeQueue::add`], through an indirect table (virtio 1.2, 2.7.5.3).
    pub fn add_indirect(&mut self, heap: &mut Heap, buffers: &[Buffer]) -> u16 {
        let mut writable = Vec::new();
        let table = heap.take(16 * buffers.len());
        for (i, buffer) in buffers.iter().enumerate() {
            let mut descriptor = self.place(heap, buffer, &mut writable);
            if i + 1 < buffers.len() {
                descriptor.flags |= NEXT;
                descriptor.next = u16::try_from(i + 1).unwrap();
            }
            write_descriptor(&self.memory, table + 16 * i as u64, descriptor);
        }
        let indices = self.take_free(1);
        let len = u32::try_from(16 * buffers.len()).unwrap();
        self.write_descriptor(indices[0], Descriptor { address: table, len, flags: INDIRECT, next: 0 });
        self.publish(indices, writable)
    }

    /// Makes the descriptors available as they are, as a hostile driver would: `next` counts from the first of
    /// them, and what points beyond them stays as it is.
    pub fn add_raw(&mut self, descriptors: &[Descriptor]) -> u16 {
        let indices = self.take_free(descriptors.len());
        for (index, descriptor) in indices.iter().zip(descriptors) {
            let next = indices.get(usize::from(descriptor.next)).copied().unwrap_or(descriptor.next);
            self.write_descriptor(*index, Descriptor { next, ..*descriptor });
        }
        self.publish(indices, Vec::new())
    }

    /// Puts any head index into the available ring.
    pub fn publish_head(&mut self, head: u16) {
        let entry = self.state.avail_ring + 4 + 2 * u64::from(self.avail_idx % self.state.size);
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    /// Writes any value to the available ring's index.
    pub fn set_avail_idx(&self, value: u16) {
        self.memory.store(value.to_le(), GuestAddress(self.state.avail_ring + 2), Ordering::Release).unwrap();
    }

    /// Whether the device must be notified of what was added since the last call (virtio 1.2, 2.7.10.1).
    pub fn must_notify(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.notified_idx, self.avail_idx);
        self.notified_idx = new;
        if self.state.event_idx {
            let event = self.load(self.state.used_ring + 4 + 8 * u64::from(self.state.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && u32::from(self.load(self.state.used_ring)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// The used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.load(self.state.used_ring + 2)
    }

    /// The next chain that came back, whether or not an interrupt told. Panics if it was not due.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let entry = self.state.used_ring + 4 + 8 * u64::from(self.last_used % self.state.size);
        let head = u16::try_from(self.memory.read_obj::<u32>(GuestAddress(entry)).unwrap()).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        // Interrupt me for the very next one (2.7.7.1).
        let used_event = self.state.avail_ring + 4 + 2 * u64::from(self.state.size);
        self.memory.store(self.last_used.to_le(), GuestAddress(used_event), Ordering::Relaxed).unwrap();
        fence(Ordering::SeqCst);

        let Some(chain) = self.in_flight.remove(&head) else {
            panic!("the device gave chain {head} back, which it did not have");
        };
        self.free.extend(chain.descriptors);
        let mut data = Vec::new();
        for (address, len) in chain.writable {
            let start = data.len();
            data.resize(start + len, 0);
            self.memory.read_slice(&mut data[start..], GuestAddress(address)).unwrap();
        }
        assert!(
            len as usize <= data.len(),
            "the device says it wrote {len} bytes into {} of room",
            data.len()
        );
        Some(Used { head, len, data })
    }

    fn take_free(&mut self, count: usize) -> Vec<u16> {
        assert!(
            self.free.len() >= count,
            "the test keeps more chains in flight than the queue has descriptors"
        );
        self.free.drain(..count).collect()
    }

    fn place(&self, heap: &mut Heap, buffer: &Buffer, writable: &mut Vec<(u64, usize)>) -> Descriptor {
        match buffer {
            Buffer::Out(bytes) => {
                let address = heap.take(bytes.len());
                self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                Descriptor { address, len: u32::try_from(bytes.len()).unwrap(), flags: 0, next: 0 }
            }
            Buffer::In(len) => {
                let address = heap.take(*len);
                // A pattern, so that what the device did not write is not taken for zeros that it wrote.
                self.memory.write_slice(&vec![0xa5; *len], GuestAddress(address)).unwrap();
                writable.push((address, *len));
                Descriptor { address, len: u32::try_from(*len).unwrap(), flags: WRITE, next: 0 }
            }
        }
    }

    fn publish(&mut self, descriptors: Vec<u16>, writable: Vec<(u64, usize)>) -> u16 {
        let head = descriptors[0];
        self.in_flight.insert(head, InFlight { descriptors, writable });
        self.publish_head(head);
        head
    }

    fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        write_descriptor(&self.memory, self.state.desc_table + 16 * u64::from(index), descriptor);
    }

    fn load(&self, address: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap())
    }
}

/// Writes a descriptor anywhere, as into an indirect table.
pub fn write_descriptor(memory: &GuestMemory, address: u64, descriptor: Descriptor) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&descriptor.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&descriptor.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&descriptor.next.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(address)).expect("descriptor lies in the test's memory");
}
