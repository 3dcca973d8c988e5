//! Requests to the memory device of files, and buffers in the memory that it shows, which faults when it is written: devices read
//! it, and write elsewhere or not at all.
#![no_main]

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::device::VirtioDevice;
use virtio::memory::{BLOCK, Blocks, Region, is_writable};
use virtio::pmem::{Pmem, PmemConfig};
use virtio::testing::{Buffer, Descriptor, Guest, MEMORY_END, NEXT, WRITE};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

/// Right behind the guest's memory, so that buffers reach across.
const START: u64 = MEMORY_END;
const SIZE: u64 = 2 * BLOCK;

fn device() -> Pmem {
    Pmem::new(PmemConfig { start: START, size: SIZE, writes: Arc::new(AtomicU64::new(0)) })
}

thread_local! {
    static BENCH: RefCell<(Arc<Blocks>, Guest)> = RefCell::new(bench());
}

fn bench() -> (Arc<Blocks>, Guest) {
    let blocks = Arc::new(Blocks::new(SIZE / BLOCK));
    let mut guest = Guest::of(&device(), true);
    let mapping = MmapRegionBuilder::new(usize::try_from(SIZE).expect("4 MiB"))
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
        .build()
        .expect("4 MiB");
    let mapping = GuestRegionMmap::new(mapping, GuestAddress(START)).expect("4 MiB");
    let region = Region::read_only(mapping, Arc::clone(&blocks));
    guest.memory = guest.memory.insert_region(Arc::new(region)).expect("behind all others");
    (blocks, guest)
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| {
        let (blocks, guest) = &mut *bench.borrow_mut();
        let mut input = Input(data);
        let mut pmem = device();
        guest.restart(&pmem.queue_sizes());
        guest.activate(&mut pmem).expect("rings are in memory");
        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            match input.u8() % 8 {
                0 => disturb(guest, 0, &mut input),
                1 => blocks.set(0..2, input.u8() % 4 != 0),
                2 => pmem.read_config(u64::from(input.u8()), &mut [0; 16][..usize::from(input.u8() % 17)]),
                3 => {
                    pmem.pause();
                    let mut next = device();
                    let set_up = guest.activation_from::<Pmem>(&pmem.queues(), pmem.features());
                    next.restore(&pmem.save(), Some(set_up)).expect("what was saved fits");
                    pmem = next;
                    pmem.resume();
                }
                4 => {
                    // What the device would write lies there, in part.
                    let at = START - 4 + u64::from(input.u8() % 8);
                    let request = Descriptor { address: input.address(), len: 4, flags: NEXT, next: 1 };
                    let answer = Descriptor { address: at, len: 4, flags: WRITE, next: 0 };
                    assert_eq!(is_writable(&guest.memory, at, 4), at == START - 4);
                    if guest.queues[0].free() >= 2 {
                        guest.queues[0].add_raw(&[request, answer]);
                    }
                }
                kind => {
                    let request = input.bytes(usize::from(kind)).to_vec();
                    let room = usize::from(input.u8() % 8);
                    if guest.queues[0].free() >= 2 {
                        guest.send(0, &[Buffer::Out(request), Buffer::In(room)]);
                    }
                }
            }
            pmem.on_queue(0);
        }
        guest.settle(&mut pmem);
        pmem.reset();
    });
});
