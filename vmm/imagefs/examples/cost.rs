//! What a request costs the server alone: `cargo run --release -p imagefs --example cost [DIRECTORY]`.
//!
//! Without rings, guest and interrupts. Prints the best of many batches, as other work on the machine only adds to it.

use std::fs::{self, File};
use std::hint::black_box;
use std::mem::size_of;
use std::path::PathBuf;
use std::time::Instant;

use imagefs::wire::*;
use imagefs::{FileServer, Limits, MountOptions};
use virtio::fs::FsServer;
use virtio::queue::{Reader, Writer};
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, IntoBytes};

const BATCHES: u32 = 200;
const BATCH: u32 = 100;

struct Bench {
    server: FileServer,
    reply: Vec<u8>,
}

impl Bench {
    fn ask(&mut self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> &[u8] {
        let mut request = request(opcode, node, parts);
        let len = self.send(&mut request);
        let (header, body) = OutHeader::read_from_prefix(&self.reply[..len]).expect("an answer");
        assert_eq!(header.error, 0, "{opcode:?}");
        body
    }

    fn send(&mut self, request: &mut [u8]) -> usize {
        // SAFETY: both buffers outlive the call, and nothing else touches them meanwhile.
        let slice = |bytes: &mut [u8]| vec![unsafe { VolatileSlice::new(bytes.as_mut_ptr(), bytes.len()) }];
        let len = self.server.handle(Reader::new(slice(request)), Writer::new(slice(&mut self.reply)));
        len as usize
    }

    fn measure(&mut self, name: &str, opcode: Opcode, node: u64, parts: &[&[u8]]) {
        let original = request(opcode, node, parts);
        let mut best = f64::MAX;
        for _ in 0..BATCHES {
            let start = Instant::now();
            for _ in 0..BATCH {
                let mut request = original.clone();
                black_box(self.send(&mut request));
            }
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(BATCH));
        }
        println!("{name:28} {:>10.2} us", best / 1000.0);
    }
}

fn request(opcode: Opcode, node: u64, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let len = u32::try_from(size_of::<InHeader>() + body.len()).expect("a short request");
    let header = InHeader { len, opcode: opcode as u32, nodeid: node, ..InHeader::default() };
    [header.as_bytes(), &body].concat()
}

fn main() -> std::io::Result<()> {
    let base = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(base)?;
    fs::write(dir.path().join("file"), vec![7; 1 << 20])?;
    for i in 0..1000 {
        fs::write(dir.path().join(format!("entry-{i:04}")), "")?;
    }
    let server = FileServer::new(Limits::of_process())?;
    server.enter_thread()?;
    server.mount("m", File::open(dir.path())?.into(), MountOptions::default()).expect("a directory");
    let mut bench = Bench { server, reply: vec![0; (1 << 20) + 4096] };

    let root =
        EntryOut::read_from_prefix(bench.ask(Opcode::Lookup, 1, &[b"m\0"])).expect("an entry").0.nodeid;
    let node =
        EntryOut::read_from_prefix(bench.ask(Opcode::Lookup, root, &[b"file\0"])).expect("an entry").0.nodeid;
    let flags = OpenIn { flags: libc::O_RDWR.cast_unsigned(), open_flags: 0 };
    let fh =
        OpenOut::read_from_prefix(bench.ask(Opcode::Open, node, &[flags.as_bytes()])).expect("a handle").0.fh;
    let listing = bench.ask(Opcode::Opendir, root, &[OpenIn::default().as_bytes()]);
    let listing = OpenOut::read_from_prefix(listing).expect("a handle").0.fh;

    bench.measure("lookup, known", Opcode::Lookup, root, &[b"file\0"]);
    bench.measure("lookup, not there", Opcode::Lookup, root, &[b"none\0"]);
    bench.measure("getattr", Opcode::Getattr, node, &[GetattrIn::default().as_bytes()]);
    let page = ReadIn { fh: listing, size: 4096, ..ReadIn::default() };
    bench.measure("readdir, a page", Opcode::Readdir, root, &[page.as_bytes()]);
    bench.measure("readdirplus, a page", Opcode::Readdirplus, root, &[page.as_bytes()]);
    for (name, size) in [("4 KiB", 4096), ("128 KiB", 128 << 10), ("1 MiB", 1 << 20)] {
        let read = ReadIn { fh, size, ..ReadIn::default() };
        bench.measure(&format!("read {name}"), Opcode::Read, node, &[read.as_bytes()]);
    }
    let write = WriteIn { fh, size: 4096, ..WriteIn::default() };
    bench.measure("write 4 KiB", Opcode::Write, node, &[write.as_bytes(), &[1; 4096]]);
    Ok(())
}
