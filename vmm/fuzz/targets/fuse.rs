//! Requests to the file server: no panic, no answer longer than its room, nothing outside the share touched, nothing
//! changed below a read-only mount.
#![no_main]

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Once;

use fuzz::Input;
use imagefs::wire::{InHeader, Opcode};
use imagefs::{FileServer, Limits, MountOptions};
use libfuzzer_sys::fuzz_target;
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;
use virtio::fs::FsServer;
use virtio::queue::{Reader, Writer};
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

const NAMES: [&str; 12] = ["f", "d", "l", "g", "h", "up", "..", ".", "", "d/f", "/etc/passwd", "a name"];

static START: Once = Once::new();

fuzz_target!(|data: &[u8]| {
    let world = world();
    let server = FileServer::new(Limits { nodes: 32, handles: 8 }).expect("/proc is mounted");
    START.call_once(|| {
        server.enter_thread().expect("the tests run where threads may be set up");
        // Files stay small, and to try otherwise is an error rather than a signal.
        let limit = Some(1 << 20);
        setrlimit(Resource::Fsize, Rlimit { current: limit, maximum: limit })
            .expect("a limit may be lowered");
        // SAFETY: no handler is installed, only a signal ignored.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    });
    for (at, dir, read_only) in [("rw", "share", false), ("ro", "frozen", true)] {
        let options = MountOptions { read_only, ..MountOptions::default() };
        server.mount(at, open(&world.path().join(dir)), options).expect("a directory");
    }

    let mut input = Input(data);
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let (mut request, room) = request(&mut input);
        let mut reply = vec![0; room];
        let cut = usize::from(input.u8()) % (request.len() + 1);
        let (first, second) = request.split_at_mut(cut);
        // SAFETY: all three buffers outlive the call, and nothing else touches them meanwhile.
        let slice = |part: &mut [u8]| unsafe { VolatileSlice::new(part.as_mut_ptr(), part.len()) };
        // As a chain: no buffer is empty.
        let slices = |parts: &mut [&mut [u8]]| {
            parts.iter_mut().filter(|part| !part.is_empty()).map(|part| slice(part)).collect()
        };
        let request = Reader::new(slices(&mut [first, second]));
        let len = server.handle(request, Writer::new(slices(&mut [&mut reply])));
        assert!(len as usize <= room, "{len} bytes in {room} of room");
    }
    if input.u8() == 1 {
        let _ = server.unmount("rw");
    }
    server.reset();

    assert_eq!(names(world.path()), ["frozen", "outside", "share"]);
    assert_eq!(fs::read(world.path().join("outside")).expect("it is there"), b"outside");
    assert_eq!(names(&world.path().join("frozen")), ["d", "f"]);
    assert_eq!(fs::read(world.path().join("frozen/f")).expect("it is there"), b"text");
});

/// A share, a share to be mounted read-only, and what lies beside them.
fn world() -> TempDir {
    let world = tempfile::tempdir_in("/dev/shm").expect("memory");
    let path = world.path();
    for dir in ["share", "frozen"] {
        fs::create_dir_all(path.join(dir).join("d")).expect("memory");
        fs::write(path.join(dir).join("f"), "text").expect("memory");
    }
    fs::write(path.join("outside"), "outside").expect("memory");
    std::os::unix::fs::symlink("../outside", path.join("share/up")).expect("memory");
    world
}

fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).expect("it is there").into()
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).expect("it is there");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("it is there").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A request which has the right shape more often than not, and room for its answer.
fn request(input: &mut Input<'_>) -> (Vec<u8>, usize) {
    let choice = usize::from(input.u8());
    let opcode =
        Opcode::ALL.get(choice % (Opcode::ALL.len() + 1)).map_or(input.u32(), |&opcode| opcode as u32);
    let node = match input.u8() {
        0xff => input.u64(),
        node => u64::from(node % 16),
    };
    let mut body = fixed(opcode, input);
    for _ in 0..input.u8() % 3 {
        body.extend(NAMES[usize::from(input.u8()) % NAMES.len()].as_bytes());
        body.push(0);
    }
    let rest = usize::from(input.u8());
    body.extend(input.bytes(rest));
    let len = size_of::<InHeader>() + body.len();
    let len = match input.u8() {
        0xff => input.u32(),
        _ => u32::try_from(len).expect("a short request"),
    };
    let uid = if input.u8() % 4 == 0 { input.u32() } else { 0 };
    let header = InHeader { len, opcode, nodeid: node, uid, gid: uid, ..InHeader::default() };
    let room = match input.u8() {
        0 => 0,
        1 => usize::from(input.u8()),
        _ => 4096,
    };
    ([header.as_bytes(), &body].concat(), room)
}

/// The part of fixed length: numbers that are small more often than not.
fn fixed(opcode: u32, input: &mut Input<'_>) -> Vec<u8> {
    let words = match Opcode::from_wire(opcode) {
        Some(Opcode::Setattr) => 11,
        Some(Opcode::CopyFileRange) => 7,
        Some(Opcode::Read | Opcode::Readdir | Opcode::Readdirplus | Opcode::Write) => 5,
        Some(Opcode::Fallocate) => 4,
        Some(Opcode::Lseek | Opcode::Release) => 3,
        Some(
            Opcode::Getattr
            | Opcode::Mknod
            | Opcode::Create
            | Opcode::Rename2
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Init,
        ) => 2,
        Some(
            Opcode::Forget
            | Opcode::BatchForget
            | Opcode::Mkdir
            | Opcode::Rename
            | Opcode::Link
            | Opcode::Open
            | Opcode::Opendir
            | Opcode::Setxattr
            | Opcode::Getxattr
            | Opcode::Listxattr,
        ) => 1,
        _ => 0,
    };
    let mut body = Vec::new();
    for word in 0..words {
        let value = match input.u8() {
            0xff => input.u64(),
            0xf0..0xff => u64::from(input.u32()) | u64::from(input.u32()) << 32,
            small => u64::from(small % 32),
        };
        // What is allocated is memory here.
        let reserve = opcode == Opcode::Fallocate as u32 && (1..3).contains(&word);
        body.extend(if reserve { value & 0xf_ffff } else { value }.to_le_bytes());
    }
    body
}
