//! Requests to the memory device, their rings and buffers anywhere, in blocks that come and go too: devices reach what the
//! host has and nothing else, no more is plugged than was asked for, and what is saved is restored.
#![no_main]

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::device::VirtioDevice;
use virtio::mem::{Mem, MemBackend, MemConfig};
use virtio::memory::{BLOCK, Blocks, Region};
use virtio::testing::{Buffer, Guest, MEMORY_END};
use vm_memory::{GuestAddress, GuestRegionMmap};

/// Right behind the guest's memory, so that buffers reach across.
const ADDR: u64 = MEMORY_END;
const COUNT: u64 = 8;
const STEP: u64 = 2 * BLOCK;

/// What the host would have.
#[derive(Debug, Clone)]
struct Host {
    blocks: Arc<Blocks>,
    there: Arc<Mutex<[bool; COUNT as usize]>>,
    fails: Arc<Mutex<bool>>,
}

impl Host {
    fn change(&self, run: &Range<u64>, to: bool) {
        let mut there = self.there.lock().expect("one thread");
        for block in run.clone() {
            let block = &mut there[usize::try_from(block).expect("8 blocks")];
            assert_ne!(*block, to, "asked for what is so already");
            *block = to;
        }
    }

    fn answer(&self) -> io::Result<()> {
        if *self.fails.lock().expect("one thread") { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    fn device(&self) -> Mem {
        let config = MemConfig { addr: ADDR, most: (COUNT - 1) * BLOCK, step: STEP };
        Mem::new(config, Arc::clone(&self.blocks), Box::new(self.clone()))
    }

    fn check(&self, mem: &Mem) {
        let there = self.there.lock().expect("one thread");
        for (block, there) in (0..COUNT).zip(*there) {
            assert_eq!(self.blocks.are(block..block + 1, true), there, "block {block}");
        }
        let plugged = there.iter().filter(|there| **there).count() as u64;
        assert_eq!(mem.plugged(), plugged * BLOCK);
        assert!(mem.requested() <= mem.most());
    }
}

impl MemBackend for Host {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        assert!(self.blocks.are(blocks.clone(), false));
        self.answer()?;
        self.change(&blocks, true);
        Ok(())
    }

    fn unplug(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        runs.iter().for_each(|run| assert!(self.blocks.are(run.clone(), false)));
        self.answer()?;
        runs.iter().for_each(|run| self.change(run, false));
        Ok(())
    }
}

thread_local! {
    static BENCH: RefCell<(Host, Guest)> = RefCell::new(bench());
}

fn bench() -> (Host, Guest) {
    let host = Host {
        blocks: Arc::new(Blocks::new(COUNT)),
        there: Arc::default(),
        fails: Arc::default(),
    };
    let mut guest = Guest::of(&host.device(), true);
    let len = usize::try_from(COUNT * BLOCK).expect("16 MiB");
    let mapping = GuestRegionMmap::from_range(GuestAddress(ADDR), len, None).expect("16 MiB");
    let region = Region::in_blocks(mapping, Arc::clone(&host.blocks));
    guest.memory = guest.memory.insert_region(Arc::new(region)).expect("behind all others");
    (host, guest)
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| {
        let (host, guest) = &mut *bench.borrow_mut();
        let mut input = Input(data);
        host.blocks.set(0..COUNT, false);
        *host.there.lock().expect("one thread") = [false; COUNT as usize];
        *host.fails.lock().expect("one thread") = false;
        let mut mem = host.device();
        guest.restart(&mem.queue_sizes());
        guest.activate(&mut mem).expect("rings are in memory");

        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            let before = mem.plugged();
            match input.u8() % 12 {
                0 => disturb(guest, 0, &mut input),
                1 => drop(mem.set_requested(u64::from(input.u8() % 10) * BLOCK)),
                2 => *host.fails.lock().expect("one thread") = input.u8() % 2 == 1,
                3 => mem.read_config(u64::from(input.u8()), &mut [0; 16][..usize::from(input.u8() % 17)]),
                4 => {
                    mem.pause();
                    let mut next = host.device();
                    let set_up = guest.activation_from::<Mem>(&mem.queues(), mem.features());
                    next.restore(&mem.save(), Some(set_up)).expect("what was saved fits");
                    assert_eq!(next.save(), mem.save());
                    mem = next;
                    mem.resume();
                }
                _ => request(guest, &mut input),
            }
            mem.on_queue(0);
            assert!(mem.plugged() <= before.max(mem.requested()), "more than was asked for");
            host.check(&mem);
        }
        guest.settle(&mut mem);
        mem.reset();
        host.check(&mem);
    });
});

/// A request, sensible more often than not.
fn request(guest: &mut Guest, input: &mut Input<'_>) {
    let kind = input.u8();
    let place = input.u8();
    let addr = match place {
        0xf0.. => input.u64(),
        place => ADDR + u64::from(place % 16) * BLOCK + u64::from(place / 0xe0),
    };
    let count = match input.u8() {
        0xff => input.u16(),
        count => u16::from(count % 6),
    };
    let mut bytes = u16::from(kind % 5).to_le_bytes().to_vec();
    bytes.extend([kind; 6]);
    bytes.extend(addr.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend([place; 6]);
    let room = match input.u8() {
        0xf8.. => usize::from(input.u8()),
        _ => 10,
    };
    if guest.queues[0].free() >= 2 {
        guest.send(0, &[Buffer::Out(bytes), Buffer::In(room)]);
    }
}
