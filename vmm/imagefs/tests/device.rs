//! Server and device together: requests through rings in guest memory.

mod confine;

use std::fs;
use std::io;
use std::mem::size_of;
use std::sync::Arc;

use imagefs::wire::*;
use imagefs::{FileServer, Limits, MountOptions};
use virtio::device::{Threads, VirtioDevice};
use virtio::fs::{Fs, FsConfig};
use virtio::testing::{Buffer, Guest};
use zerocopy::{FromBytes, IntoBytes};

const REQUESTS: usize = 1;

struct Confined;

impl Threads for Confined {
    fn enter(&self, _: &str) -> io::Result<()> {
        confine::confine("fs");
        Ok(())
    }

    fn died(&self, name: &str) {
        panic!("{name} died");
    }
}

fn device(server: &Arc<FileServer>) -> Fs {
    let config = FsConfig { tag: "ctvm".to_owned(), threads: 2 };
    let threads: Arc<dyn Threads> = Arc::new(Confined);
    Fs::new(config, server.clone(), &threads).unwrap()
}

/// Asks as Linux does: header, body and data each in a buffer of their own.
fn ask(
    guest: &mut Guest,
    device: &mut Fs,
    opcode: Opcode,
    node: u64,
    body: &[u8],
    room: &[usize],
) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode: opcode as u32, nodeid: node, unique: 5, ..InHeader::default() };
    let mut buffers = vec![Buffer::Out(header.as_bytes().to_vec()), Buffer::Out(body.to_vec())];
    buffers.push(Buffer::In(size_of::<OutHeader>()));
    buffers.extend(room.iter().map(|&len| Buffer::In(len)));
    let used = guest.ask(device, REQUESTS, &buffers);
    let (header, body) = OutHeader::read_from_prefix(&used.data).unwrap();
    assert_eq!((header.error, header.unique, header.len), (0, 5, used.len), "{opcode:?}");
    body[..header.len as usize - size_of::<OutHeader>()].to_vec()
}

#[test]
fn a_file_is_read_through_the_rings_and_a_session_ends_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let text: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).take(1 << 20).collect();
    fs::write(dir.path().join("file"), &text).unwrap();
    let server = Arc::new(FileServer::new(Limits { nodes: 64, handles: 64 }).unwrap());
    server.mount("m", fs::File::open(dir.path()).unwrap().into(), MountOptions::default()).unwrap();
    let mut device = device(&server);
    let mut guest = Guest::with(&mut device);

    let init = InitIn { major: 7, minor: 38, max_readahead: 4096, flags: u32::MAX };
    ask(&mut guest, &mut device, Opcode::Init, 0, init.as_bytes(), &[size_of::<InitOut>()]);
    let mut node = 1;
    for name in ["m\0", "file\0"] {
        let room = [size_of::<EntryOut>()];
        let entry = ask(&mut guest, &mut device, Opcode::Lookup, node, name.as_bytes(), &room);
        node = EntryOut::read_from_bytes(&entry).unwrap().nodeid;
    }
    let room = [size_of::<OpenOut>()];
    let open = ask(&mut guest, &mut device, Opcode::Open, node, OpenIn::default().as_bytes(), &room);
    let fh = OpenOut::read_from_bytes(&open).unwrap().fh;
    // A megabyte into 256 pages.
    let read = ReadIn { fh, size: 1 << 20, ..ReadIn::default() };
    let got = ask(&mut guest, &mut device, Opcode::Read, node, read.as_bytes(), &[4096; 256]);
    assert!(got == text, "{} bytes came", got.len());

    // Requests without an answer, on the queue for them.
    let header = InHeader { len: 48, opcode: Opcode::Forget as u32, nodeid: node, ..InHeader::default() };
    let forget = [header.as_bytes(), ForgetIn { nlookup: 1 }.as_bytes()].concat();
    assert_eq!(guest.ask(&mut device, 0, &[Buffer::Out(forget)]).len, 0);

    let in_use = |device: &Fs, name: &str| {
        device.metrics().iter().find(|(known, _)| *known == name).map(|(_, count)| *count)
    };
    assert_eq!((in_use(&device, "nodes"), in_use(&device, "handles")), (Some(1), Some(1)));
    device.pause();
    assert!(device.save().session_lost);
    device.reset();
    assert_eq!((in_use(&device, "nodes"), in_use(&device, "handles")), (Some(1), Some(0)));
}
