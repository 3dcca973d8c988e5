//! What a container does to its guest when it means harm.

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// CID of the host and the port on which it takes processes' streams.
const HOST: u32 = 2;
const PORT: u32 = 1025;

/// Threads that have the highest priority there is, and spin.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

/// Takes every CPU from everybody for ever: real-time threads of the highest priority, and no share left for others.
pub fn spin() -> Result<()> {
    std::fs::write("/proc/sys/kernel/sched_rt_runtime_us", "-1").context("sched_rt_runtime_us")?;
    let cpus = std::thread::available_parallelism()?.get();
    announce()?;
    // What was written takes its way to the host before nothing does any more.
    std::thread::sleep(Duration::from_secs(1));
    join(spinners(cpus))
}

/// The same on so many threads, but others have the twentieth part of the time that the kernel keeps for them by default.
pub fn spin_on(threads: usize) -> Result<()> {
    let spinners = spinners(threads);
    // When every CPU has one, the rest may wait for ever.
    let enough = threads.min(std::thread::available_parallelism()?.get());
    while SPINNING.load(Ordering::Relaxed) < enough {
        if spinners.iter().any(JoinHandle::is_finished) {
            return join(spinners);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    announce()?;
    join(spinners)
}

fn announce() -> Result<()> {
    println!("spinning");
    Ok(std::io::stdout().flush()?)
}

fn spinners(threads: usize) -> Vec<JoinHandle<Result<()>>> {
    (0..threads).map(|_| std::thread::spawn(spin_one)).collect()
}

fn join(spinners: Vec<JoinHandle<Result<()>>>) -> Result<()> {
    for spinner in spinners {
        spinner.join().expect("a spinner does not panic")?;
    }
    bail!("no CPU spins");
}

fn spin_one() -> Result<()> {
    let highest = libc::sched_param { sched_priority: 99 };
    // SAFETY: `highest` is the structure that the call reads; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const highest) } != 0 {
        return Err(std::io::Error::last_os_error()).context("SCHED_FIFO");
    }
    SPINNING.fetch_add(1, Ordering::Relaxed);
    loop {
        std::hint::spin_loop();
    }
}

/// Dials the host so many times and holds what it gets.
pub fn vsock(count: usize) -> Result<()> {
    raise_limit(count);
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..count {
        match dial() {
            Ok(connection) => held.push(connection),
            Err(_) => refused += 1,
        }
    }
    println!("held {} refused {refused}", held.len());
    Ok(())
}

fn dial() -> Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(std::io::Error::last_os_error()).context("socket");
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK.try_into().expect("families are small numbers"),
        svm_reserved1: 0,
        svm_port: PORT,
        svm_cid: HOST,
        svm_zero: [0; 4],
    };
    let length = size_of::<libc::sockaddr_vm>().try_into().expect("an address is small");
    // SAFETY: `address` is an address of that family, of that length.
    if unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(std::io::Error::last_os_error()).context("connect");
    }
    Ok(socket)
}

/// Connects to itself so many times and holds both ends of all.
pub fn tcp(count: usize) -> Result<()> {
    raise_limit(2 * count);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..count {
        match TcpStream::connect(address).and_then(|client| Ok((client, listener.accept()?.0))) {
            Ok(ends) => held.push(ends),
            Err(_) => refused += 1,
        }
    }
    println!("held {} refused {refused}", held.len());
    Ok(())
}

/// As many descriptors as are needed, if the kernel agrees; else it refuses some.
fn raise_limit(descriptors: usize) {
    let wanted = descriptors as u64 + 100;
    let limit = rustix::process::Rlimit { current: Some(wanted), maximum: Some(wanted) };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit); // refused where it is lower for good
}
