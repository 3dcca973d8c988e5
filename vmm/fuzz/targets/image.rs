//! The disk of an image between a guest and an image service that are both hostile: each request is answered at most once,
//! no more of them wait than the queue has, and what is answered well holds what the cache file holds.
#![no_main]

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::time::Duration;

use fuzz::{Input, disturb, fill};
use imagefs::image::{BlobFile, Channel, Files, turns};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::pwrite;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use virtio::testing::{Buffer, Guest};
use vmm_api::frame;
use vmm_api::image::{BLOCK, Fetch, Fetched, ready_map_bytes, ready_map_offset};

const BLOB: u64 = 40 * BLOCK + 7;
const SIZES: [u16; 1] = [256];

struct Bench {
    bootstrap: OwnedFd,
    blob: OwnedFd,
    guest: Guest,
}

fn file(bytes: u64) -> OwnedFd {
    let file = memfd_create("image", MemfdFlags::CLOEXEC).expect("a file in memory");
    ftruncate(&file, bytes).expect("some KiB");
    file
}

thread_local! {
    static BENCH: RefCell<Bench> = RefCell::new(Bench {
        bootstrap: file(BLOCK + 9),
        blob: file(ready_map_offset(BLOB) + ready_map_bytes(BLOB)),
        guest: Guest::new(&SIZES, true),
    });
}

fuzz_target!(|data: &[u8]| {
    BENCH.with(|bench| {
        let Bench { bootstrap, blob, guest } = &mut *bench.borrow_mut();
        let mut input = Input(data);
        guest.restart(&SIZES);
        write_map(blob, [0; 6]);
        let dup = |fd: &OwnedFd| fd.try_clone().expect("a descriptor");
        let files = Files::new(dup(bootstrap), vec![BlobFile { file: dup(blob), bytes: BLOB }]).expect("good files");
        let (theirs, service) = frame::pair().expect("a pair of sockets");
        let mut service = Some(service);
        let channel = Channel::new(theirs).expect("a connection");
        let patience = Duration::from_millis(u64::from(input.u8() % 4) * 1000);
        let device = guest.activation_from::<imagefs::image::ImageDisk>(&[guest.queues[0].state()], 0);
        let mut turn = turns(files, channel, patience, device).expect("an event");
        let mut wishes = Vec::new();
        for _ in 0..40 {
            if input.is_empty() {
                break;
            }
            match input.u8() % 8 {
                0 => disturb(guest, 0, &mut input),
                1 => fill(&guest.memory, input.address(), &header(&mut input)),
                2..=4 => request(guest, &mut input),
                5 => write_map(blob, std::array::from_fn(|_| input.u8())),
                6 => say(service.as_ref(), &wishes, &mut input),
                _ if input.u8() == 0 => service = None,
                _ => {}
            }
            assert!(turn() <= SIZES[0].into(), "more wait than the queue has");
            wishes.extend(service.as_ref().into_iter().flat_map(take_wishes));
        }
        // All that is there to have.
        write_map(blob, [0xff; 6]);
        for wish in wishes {
            if let Some(service) = &service {
                let _ = send(service, &Fetched { tag: wish.tag, errno: 0 }.to_bytes(), SendFlags::NOSIGNAL);
            }
            turn();
        }
    });
});

fn write_map(blob: &OwnedFd, map: [u8; 6]) {
    pwrite(blob, &map, ready_map_offset(BLOB)).expect("a file in memory");
}

/// The wishes that have come. Each is one that a service can take.
fn take_wishes(service: &OwnedFd) -> Vec<Fetch> {
    let mut wishes = Vec::new();
    let mut bytes = [0; 64];
    while let Ok((_, len @ 1..)) = recv(service, &mut bytes, RecvFlags::DONTWAIT) {
        let wish = Fetch::from_bytes(&bytes[..len]).expect("a wish");
        assert!(wish.blob == 0 && wish.blocks > 0, "{wish:?}");
        assert!(wish.first + u64::from(wish.blocks) <= BLOB.div_ceil(BLOCK), "{wish:?}");
        wishes.push(wish);
    }
    wishes
}

/// An answer, to a wish more often than not.
fn say(service: Option<&OwnedFd>, wishes: &[Fetch], input: &mut Input<'_>) {
    let Some(service) = service else { return };
    let kind = input.u8();
    let bytes = match wishes.get(usize::from(input.u8()) % wishes.len().max(1)) {
        Some(wish) if kind < 0xe0 => {
            let errno = if kind % 2 == 0 { 0 } else { u32::from(kind) };
            Fetched { tag: wish.tag, errno }.to_bytes().to_vec()
        }
        _ => input.bytes(usize::from(kind % 32)).to_vec(),
    };
    let _ = send(service, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}

fn header(input: &mut Input<'_>) -> Vec<u8> {
    let kind = input.u8();
    let kind = if kind < 0xc0 { 0 } else { u32::from(kind % 16) };
    let sector = input.u8();
    let sector = if sector == 0xff { input.u64() } else { u64::from(sector) * 2 };
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn request(guest: &mut Guest, input: &mut Input<'_>) {
    let mut buffers = vec![Buffer::Out(header(input))];
    let count = input.u8();
    for _ in 0..=count % 4 {
        let len = usize::try_from(input.len()).expect("32 bits") % 40_000;
        buffers.push(Buffer::In(if input.u8() % 8 == 0 { len } else { len / 512 * 512 }));
    }
    if count < 0xf0 {
        buffers.push(Buffer::In(1));
    }
    if guest.queues[0].free() >= buffers.len() {
        guest.send(0, &buffers);
    }
}
