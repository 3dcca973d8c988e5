//! Pages, reports and statistics for a balloon: only whole pages of guest memory are given back, whatever is named.
#![no_main]

use std::cell::RefCell;
use std::io;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::balloon::{Balloon, BalloonBackend, PAGE};
use virtio::device::VirtioDevice;
use virtio::testing::{Buffer, Guest};
use vm_memory::VolatileSlice;

const QUEUES: usize = 5;

#[derive(Debug)]
struct Host {
    fails: bool,
}

impl BalloonBackend for Host {
    fn give_back(&mut self, pages: &VolatileSlice<'_>) -> io::Result<()> {
        let (at, len) = (pages.ptr_guard().as_ptr().addr() as u64, pages.len() as u64);
        assert!(len > 0 && len.is_multiple_of(PAGE) && at.is_multiple_of(PAGE), "{len} bytes at {at:#x}");
        // A byte at each end is there.
        let (mut first, mut last) = ([0], [0]);
        pages.copy_to(&mut first[..]);
        pages.offset(pages.len() - 1).expect("inside").copy_to(&mut last[..]);
        if self.fails { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
}

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::of(&balloon(false), true));
}

fn balloon(fails: bool) -> Balloon {
    Balloon::new(Box::new(Host { fails }))
}

fuzz_target!(|data: &[u8]| {
    GUEST.with(|guest| {
        let guest = &mut *guest.borrow_mut();
        let mut input = Input(data);
        let flags = input.u8();
        let mut device = balloon(flags & 1 == 1);
        guest.restart(&device.queue_sizes());
        let features = device.features() & if flags & 2 == 0 { u64::MAX } else { input.u64() };
        let states: Vec<_> = guest.queues.iter().map(|queue| queue.state()).collect();
        device.activate(guest.activation_from::<Balloon>(&states, features)).expect("rings are in memory");

        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            let queue = usize::from(input.u8()) % QUEUES;
            match input.u8() % 10 {
                0 => disturb(guest, queue, &mut input),
                1 => drop(device.set_target(u64::from(input.u32()))),
                2 => device.write_config(u64::from(input.u8() % 20), input.bytes(4)),
                3 => device.request_statistics(),
                4 => {
                    device.pause();
                    let mut next = balloon(false);
                    let set_up = guest.activation_from::<Balloon>(&device.queues(), features);
                    next.restore(&device.save(), Some(set_up)).expect("what was saved fits");
                    assert_eq!(next.save(), device.save());
                    device = next;
                    device.resume();
                }
                5 => {
                    let descriptor = input.descriptor();
                    if guest.queues[queue].free() > 0 {
                        guest.queues[queue].add_raw(&[descriptor]);
                    }
                }
                _ => pages(guest, queue, &mut input),
            }
            device.on_queue(queue);
        }
        guest.settle(&mut device);
        device.reset();
    });
});

/// Page numbers, which statistics look like, too.
fn pages(guest: &mut Guest, queue: usize, input: &mut Input<'_>) {
    let mut bytes = vec![];
    for _ in 0..input.u8() % 40 {
        let number = match input.u8() {
            0xf8.. => input.u32(),
            near => u32::from(near) * 5,
        };
        bytes.extend(number.to_le_bytes());
    }
    bytes.truncate(bytes.len().saturating_sub(usize::from(input.u8() / 0xf0)));
    if !bytes.is_empty() && guest.queues[queue].free() > 0 {
        guest.send(queue, &[Buffer::Out(bytes)]);
    }
}
