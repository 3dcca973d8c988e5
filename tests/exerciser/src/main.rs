//! `exerciser FOLDER…`: runs inside a container and does to each folder what containers do to files. A line for each
//! operation: what came of it (`ok`, an errno, or `wrong`), where, its name, and more where it is not `ok`.
//!
//! It has no expectations. The test that runs it (`tests/cri/tests/exercise.rs`) has a table of them.
//!
//! `exerciser list FOLDER` and `exerciser reads FILE COUNT` look at files, for a comparison (`tests/cri/tests/contents.rs`).
//! `exerciser network TCP UDP` sends to a server that echoes. `exerciser spin`, `exerciser vsock COUNT` and `exerciser tcp COUNT` do to the guest what `tests/cri/tests/hostile.rs` is
//! about, `exerciser spin THREADS` what `tests/e2e/tests/vm_resize.rs` resizes under; `exerciser upcall FAULT` poses as the guest's upcall driver in `tests/e2e/tests/vm_faults.rs`; `exerciser hotplug`
//! is PID 1 of the peer's guest in `benches/src/q35.rs`; `exerciser read sequential FILE` and `exerciser read random FILE COUNT` time
//! reads for `benches/src/nydus/read.rs`; `exerciser direct FILE DISK` writes a file to a disk without a copy, and reads it back, for
//! `tests/e2e/tests/vm_pmem.rs`.

mod content;
mod hostile;
mod hotplug;
mod list;
mod map;
mod names;
mod read;
mod upcall;
mod watch;

use std::fs::File;
use std::io::Read as _;
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;

/// An operation by name. It gets a folder of its own.
type Operation = (&'static str, fn(&Path) -> Result<()>);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["spin"] => hostile::spin(),
        ["spin", threads] => hostile::spin_on(threads.parse()?),
        ["vsock", count] => hostile::vsock(count.parse()?),
        ["tcp", count] => hostile::tcp(count.parse()?),
        ["upcall", fault] => upcall::run(fault),
        ["hotplug"] => hotplug::witness(),
        ["read", "sequential", path] => read::sequential(path),
        ["read", "random", path, count] => read::random(path, count.parse()?),
        ["direct", file, disk] => map::direct(file.as_ref(), disk.as_ref()),
        ["list", folder] => list::list(folder.as_ref()),
        ["reads", file, count] => list::reads(file.as_ref(), count.parse()?),
        ["network", tcp, udp] => network(tcp, udp),
        _ => exercise(),
    }
}

fn exercise() -> Result<()> {
    let operations = [names::OPERATIONS, content::OPERATIONS, map::OPERATIONS, watch::OPERATIONS].concat();
    for folder in std::env::args_os().skip(1) {
        let base = Path::new(&folder).join("exercise");
        std::fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
        for (name, operation) in &operations {
            let own = base.join(name.replace([' ', '/'], "-"));
            let done = std::fs::create_dir(&own).map_err(Into::into).and_then(|()| operation(&own));
            println!("{} {} {name}{}", word(&done), folder.display(), explained(&done));
        }
        std::fs::remove_dir_all(&base).with_context(|| format!("removing {}", base.display()))?;
        println!("ok {} removing all", folder.display());
    }
    Ok(())
}

/// 4 MiB out of a file and back, and a datagram.
fn network(tcp: &str, udp: &str) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let bytes = vec![7; BYTES];
    std::fs::write("/sent", &bytes)?;
    let (file, mut connection) = (File::open("/sent")?, TcpStream::connect(tcp).context("connect")?);
    let mut offset = 0;
    while offset < BYTES as u64 {
        ensure!(rustix::fs::sendfile(&connection, &file, Some(&mut offset), BYTES)? > 0, "the file is short");
    }
    let mut back = vec![0; BYTES];
    connection.read_exact(&mut back).context("the way back")?;
    ensure!(back == bytes, "other bytes came back");
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    socket.send_to(b"datagram", udp)?;
    let mut room = [0; 100];
    let count = socket.recv(&mut room).context("the datagram's way back")?;
    ensure!(&room[..count] == b"datagram", "another datagram");
    Ok(())
}

/// `ok`, the name of the errno, or `wrong`.
fn word(done: &Result<()>) -> String {
    let Err(error) = done else { return "ok".into() };
    errno(error).map_or("wrong".into(), name)
}

/// As in errno(3), for those that are expected somewhere.
fn name(errno: Errno) -> String {
    const NAMES: [(Errno, &str); 12] = [
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::NAMETOOLONG, "ENAMETOOLONG"),
        (Errno::PERM, "EPERM"),
        (Errno::NOTTY, "ENOTTY"),
        (Errno::INVAL, "EINVAL"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::ACCESS, "EACCES"),
        (Errno::IO, "EIO"),
        (Errno::NODEV, "ENODEV"),
        (Errno::XDEV, "EXDEV"),
        (Errno::AGAIN, "EAGAIN"),
        (Errno::NODATA, "ENODATA"),
    ];
    let known = NAMES.iter().find(|(known, _)| *known == errno);
    known.map_or_else(|| format!("errno-{}", errno.raw_os_error()), |(_, name)| (*name).into())
}

fn explained(done: &Result<()>) -> String {
    done.as_ref().err().map_or(String::new(), |error| format!(": {error:#}"))
}

fn errno(error: &anyhow::Error) -> Option<Errno> {
    error.chain().find_map(|cause| {
        let by_std = || cause.downcast_ref::<std::io::Error>().and_then(Errno::from_io_error);
        cause.downcast_ref::<Errno>().copied().or_else(by_std)
    })
}
