//! Requests to a disk: the queue breaks or each is answered once, and nothing beyond the disk changes.
#![no_main]

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use fuzz::{Input, disturb, fill};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio::blk::{Blk, Disk};
use virtio::device::VirtioDevice;
use virtio::testing::{Buffer, Guest};

const BYTES: u64 = 64 * 512;

struct Bench {
    file: OwnedFd,
    guest: Guest,
    sizes: Vec<u16>,
}

impl Bench {
    fn new() -> Self {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory");
        ftruncate(&file, BYTES).expect("32 KiB");
        let mut bench = Bench { file, guest: Guest::new(&[], true), sizes: Vec::new() };
        bench.sizes = bench.device(false).queue_sizes();
        bench.guest = Guest::new(&bench.sizes, true);
        bench
    }

    fn device(&self, read_only: bool) -> Blk {
        let file = self.file.try_clone().expect("a descriptor");
        Blk::new(Disk::new(file, read_only, "fuzz").expect("a good disk"), 2)
    }
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| {
        let bench = &mut *bench.borrow_mut();
        let mut input = Input(data);
        let flags = input.u8();
        let mut blk = bench.device(flags & 1 == 1);
        let sizes = bench.sizes.clone();
        bench.guest.restart(&sizes);
        let guest = &mut bench.guest;
        guest.activate(&mut blk).expect("rings are in memory");

        for _ in 0..32 {
            if input.is_empty() {
                break;
            }
            let queue = usize::from(input.u8() % 2);
            match input.u8() % 4 {
                0 => disturb(guest, queue, &mut input),
                1 => fill(&guest.memory, input.address(), &header(&mut input)),
                _ => request(guest, queue, &mut input),
            }
            blk.on_queue(queue);
        }
        // Those that it put off.
        guest.settle(&mut blk);
        blk.pause();
        let state = blk.save();
        let mut other = Blk::new(
            Disk::new(bench.file.try_clone().expect("a descriptor"), flags & 1 == 1, "fuzz")
                .expect("still a good disk"),
            2,
        );
        other.restore(&state, None).expect("the disk has not changed its size");
    });
});

/// The start of a request: known types, and sectors about the end of the disk, more often than not.
fn header(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.u8();
    let kind = if kind == 0xff { input.u32() } else { u32::from(kind % 16) };
    let sector = input.u8();
    let sector = if sector == 0xff { input.u64() } else { u64::from(sector % 80) };
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// A request with a sensible shape, most of the time.
fn request(guest: &mut Guest, queue: usize, input: &mut Input<'_>) {
    let mut buffers = vec![Buffer::Out(header(input))];
    let count = input.u8();
    for _ in 0..count % 4 {
        let len = usize::try_from(input.len()).expect("32 bits") % 20_000;
        buffers.push(Buffer::Out(match input.u8() % 4 {
            // Ranges to discard or to fill with zeros.
            0 | 1 => {
                let mut range = u64::from(input.u8()).to_le_bytes().to_vec();
                range.extend(input.len().to_le_bytes());
                range.extend(u32::from(input.u8() % 4).to_le_bytes());
                range
            }
            2 => vec![7; len / 512 * 512],
            _ => vec![7; len],
        }));
    }
    for _ in 0..count / 4 % 4 {
        let len = usize::try_from(input.len()).expect("32 bits") % 20_000;
        buffers.push(Buffer::In(if input.u8() % 4 == 0 { len } else { len / 512 * 512 }));
    }
    if count < 0xf0 {
        buffers.push(Buffer::In(1));
    }
    if guest.queues[queue].free() >= buffers.len() {
        guest.send(queue, &buffers);
    }
}
