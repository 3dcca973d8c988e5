//! The agent's only unsafe code: the few system calls that have no safe wrapper.
//!
//! Each function is safe to call under the conditions its documentation states; the callers are named where a
//! condition rests on them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::unistd::{ForkResult, Pid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which side of a fork this is.
#[derive(Debug)]
pub enum Fork {
    /// The new process. It must end in [`exit_now`] or in an exec.
    Child,
    /// The caller, with the new process's pid.
    Parent(Pid),
}

/// Copies the process.
///
/// The agent has one thread (the runtime is `current_thread`, and nothing here uses `spawn_blocking`), which is
/// what makes arbitrary code in the child sound; `Sandbox.Info` reports the thread count and a test checks it.
///
/// # Errors
/// What fork(2) says: out of pids or memory.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the process has a single thread (see above), so no lock can be held by a thread that the child lacks.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(Fork::Child),
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
    }
}

/// Ends the process at once: no destructors, no exit handlers, no flushing of what the parent had buffered.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor but 0, 1, 2 and those in `keep`. For a forked child only: the parent's objects that
/// own these descriptors were copied with it, and must not be used or dropped afterwards.
///
/// # Errors
/// What close_range(2) says.
pub fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> =
        keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).filter(|&fd| fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the kernel takes three integers. Closing descriptors that Rust objects own is sound because the
    // caller (`launch::child`) never returns to code that holds those objects.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Has `signal` do nothing; with SIGCHLD, the kernel collects children by itself.
///
/// # Errors
/// EINVAL for a signal that cannot be ignored.
pub fn ignore_signal(signal: Signal) -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so nothing of ours can run in signal context.
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }?;
    Ok(())
}

/// Gives `signal` its default meaning again.
///
/// # Errors
/// EINVAL for a signal that cannot be handled.
pub fn default_signal(signal: Signal) -> io::Result<()> {
    // SAFETY: SIG_DFL installs no handler, so nothing of ours can run in signal context.
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
    Ok(())
}

/// Sends a signal by number, real-time ones included, which `nix` does not name. 0 sends none and only asks.
///
/// # Errors
/// EINVAL for a number above 64; ESRCH for no such process.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop).map_err(io::Error::from)
}

/// Has the runtime watch `fd`, which it owns from here on.
///
/// # Errors
/// EPERM for what cannot be polled (a regular file).
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives, always the same, and `AsyncFd` keeps it
    // until it has deregistered it. (A forked child closes its copy, and ends without touching the `AsyncFd`.)
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Mixes `bytes` into the kernel's random pool and credits them as entropy (`RNDADDENTROPY`, random(4)).
///
/// # Errors
/// `InvalidInput` for more than [`agent_api::MAX_ENTROPY`] bytes; EPERM without CAP_SYS_ADMIN.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; agent_api::MAX_ENTROPY],
    }
    nix::ioctl_write_ptr!(rnd_add_entropy, b'R', 0x03, [libc::c_int; 2]);

    let mut info = PoolInfo { entropy_count: 0, buf_size: 0, buf: [0; agent_api::MAX_ENTROPY] };
    let Some(buf) = info.buf.get_mut(..bytes.len()) else {
        let limit = agent_api::MAX_ENTROPY;
        let text = format!("{} bytes of entropy given, {limit} at most", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    };
    buf.copy_from_slice(bytes);
    info.buf_size = libc::c_int::try_from(bytes.len()).expect("MAX_ENTROPY fits");
    info.entropy_count = info.buf_size * 8;
    let head = (&raw const info).cast::<[libc::c_int; 2]>();
    // SAFETY: the kernel reads two ints at `head` and then `buf_size` bytes after them: all inside `info`, which
    // is repr(C) without padding between these fields and outlives the call.
    unsafe { rnd_add_entropy(random.as_raw_fd(), head) }?;
    Ok(())
}

/// Brings the loopback interface up (`SIOCSIFFLAGS`, netdevice(7)).
///
/// # Errors
/// ENODEV when the kernel has no loopback.
pub fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    name[0] = b'l'.cast_signed();
    name[1] = b'o'.cast_signed();
    let flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("both flags are below 1 << 15");
    let request =
        libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which `request` is, for the length of the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Has a network device use as many pairs of queues as there are CPUs, and it has (`SIOCETHTOOL`, <linux/ethtool.h>).
///
/// # Errors
/// `InvalidInput` for what cannot be a device's name; EOPNOTSUPP by a device without a choice.
pub fn spread_over_queues(device: &str, cpus: u32) -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    const GET: u32 = 0x3c;
    const SET: u32 = 0x3d;
    /// `struct ethtool_channels`.
    #[repr(C)]
    #[derive(Default)]
    struct Channels {
        command: u32,
        max: [u32; 3],
        max_combined: u32,
        count: [u32; 3],
        combined: u32,
    }
    let mut name = [0; libc::IFNAMSIZ];
    if device.len() >= name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("device name {device:?}")));
    }
    name.iter_mut().zip(device.bytes()).for_each(|(to, from)| *to = from.cast_signed());
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut channels = Channels { command: GET, ..Channels::default() };
    let ask = |channels: &mut Channels| {
        let ifru_data = (&raw mut *channels).cast();
        let request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data } };
        // SAFETY: the call reads one `ifreq`, and reads and writes the structure at `ifru_data`, which for both commands is that
        // of `channels`; both live longer than the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw const request) };
        Errno::result(done).map(drop).map_err(io::Error::from)
    };
    ask(&mut channels)?;
    let wanted = channels.max_combined.min(cpus);
    if wanted > channels.combined {
        (channels.command, channels.combined) = (SET, wanted);
        ask(&mut channels)?;
    }
    Ok(())
}

/// How long a connect on this vsock socket may take before the kernel gives it up; by default two seconds (vsock(7)).
///
/// # Errors
/// What setsockopt(2) says.
pub fn set_connect_timeout(vsock: BorrowedFd<'_>, patience: Duration) -> io::Result<()> {
    // SO_VM_SOCKETS_CONNECT_TIMEOUT of <linux/vm_sockets.h>, in the form that every kernel since 3.9 knows.
    const CONNECT_TIMEOUT: libc::c_int = 6;
    let seconds = libc::time_t::try_from(patience.as_secs()).map_err(io::Error::other)?;
    let timeout = libc::timeval { tv_sec: seconds, tv_usec: 0 };
    let size = libc::socklen_t::try_from(size_of_val(&timeout)).expect("a small number");
    // SAFETY: setsockopt reads `size` bytes of `timeout`, which lives here; the descriptor is borrowed, so open.
    let done = unsafe {
        libc::setsockopt(
            vsock.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size,
        )
    };
    Errno::result(done)?;
    Ok(())
}

/// Sets a terminal's size in characters (`TIOCSWINSZ`, ioctl_tty(2)); the foreground process group gets SIGWINCH.
///
/// # Errors
/// ENOTTY when `tty` is no terminal.
pub fn set_window_size(tty: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one `winsize` for the length of the call.
    let done = unsafe { libc::ioctl(tty.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// Opens the other end of a pseudo-terminal from its master, whatever mount namespace the master comes from
/// (`TIOCGPTPEER`, ioctl_tty(2)).
///
/// # Errors
/// ENOTTY when `master` is no pseudo-terminal master.
pub fn pty_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value and touches no memory of ours.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Receives one message with one descriptor from a Unix socket (`SCM_RIGHTS`, unix(7)).
///
/// # Errors
/// `InvalidData` when the message has no descriptor; what recvmsg(2) says.
pub fn receive_fd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

    let mut text = [0; 64];
    let mut iov = [io::IoSliceMut::new(&mut text)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel installed this descriptor for this message, and `space` has room for one only,
            // so there is no other owner and none is leaked.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "message carries no descriptor"))
}

/// `BLKPG` (linux/blkpg.h) and what it does.
const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;

/// `struct blkpg_partition`. The names are not used any more.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct BlkpgArgument {
    operation: libc::c_int,
    flags: libc::c_int,
    data_len: libc::c_int,
    data: *mut BlkpgPartition,
}

/// Tells the kernel of a partition of `disk`: first byte and length, whole sectors.
///
/// # Errors
/// EBUSY if it overlaps one that there is, EINVAL if it is not on the disk.
pub fn add_partition(disk: BorrowedFd<'_>, number: u16, start: u64, bytes: u64) -> io::Result<()> {
    blkpg(disk, BLKPG_ADD_PARTITION, number, start, bytes)
}

/// Has the kernel forget a partition of `disk`.
///
/// # Errors
/// EBUSY if it is in use, ENXIO if there is none.
pub fn delete_partition(disk: BorrowedFd<'_>, number: u16) -> io::Result<()> {
    blkpg(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

fn blkpg(
    disk: BorrowedFd<'_>,
    operation: libc::c_int,
    number: u16,
    start: u64,
    bytes: u64,
) -> io::Result<()> {
    let whole = |value: u64| i64::try_from(value).map_err(|_| io::Error::from(Errno::EINVAL));
    let mut partition = BlkpgPartition {
        start: whole(start)?,
        length: whole(bytes)?,
        number: number.into(),
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let data_len = libc::c_int::try_from(size_of::<BlkpgPartition>()).expect("152 bytes");
    let argument = BlkpgArgument { operation, flags: 0, data_len, data: &raw mut partition };
    // SAFETY: both structures have the kernel's layout (blkpg.h) and outlive the call; the kernel reads them and keeps neither.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

    use super::*;

    #[test]
    fn a_loopback_has_no_queues_to_choose_from() {
        let error = spread_over_queues("lo", 2).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        assert_eq!(
            spread_over_queues("a name that is too long", 2).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn a_connect_may_take_as_long_as_asked() {
        let socket = match socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None) {
            Err(Errno::EAFNOSUPPORT) => {
                eprintln!("not run: this kernel has no vsock");
                return;
            }
            other => other.unwrap(),
        };
        set_connect_timeout(socket.as_fd(), Duration::from_secs(60)).unwrap();
        let mut got = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let mut size = libc::socklen_t::try_from(size_of_val(&got)).unwrap();
        // SAFETY: getsockopt writes at most `size` bytes to `got`.
        let done = unsafe {
            libc::getsockopt(socket.as_raw_fd(), libc::AF_VSOCK, 6, (&raw mut got).cast(), &raw mut size)
        };
        assert_eq!((done, got.tv_sec, got.tv_usec), (0, 60, 0));
    }
}
