//! The host's side: socket pairs, one readiness descriptor for all of them, and sending straight from guest memory.
//!
//! Readiness is edge triggered, so that a connection which cannot go on for lack of credit or of buffers costs
//! nothing until that changes, and needs no system call to be silenced: what an edge told is kept in the
//! connection until a read or a write says "would block". Writability is watched only after that was said, or
//! each read of the host's reader would wake us.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown, socketpair,
};

use super::table::Token;
use crate::queue::Reader;

/// Most sockets looked at in one call; the rest stays ready.
const READY_AT_ONCE: usize = 64;

/// What one socket is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Which connection.
    pub token: Token,
    /// There are bytes, or an end of them.
    pub read: bool,
    /// There is room again, or there will never be any.
    pub write: bool,
    /// The other end neither sends nor receives any more.
    pub hung_up: bool,
}

/// Says which sockets are ready.
#[derive(Debug)]
pub struct Poll(OwnedFd);

impl Poll {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Self> {
        Ok(Poll(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Watches `socket` for bytes to read until it is closed.
    pub fn add(&self, socket: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, epoll::EventData::new_u64(token.to_u64()), READING)?)
    }

    /// Starts or stops to watch `socket` for room to write. Starting tells of room that is there already.
    pub fn watch_room(&self, socket: BorrowedFd<'_>, token: Token, watch: bool) -> io::Result<()> {
        let flags = if watch { READING | epoll::EventFlags::OUT } else { READING };
        Ok(epoll::modify(&self.0, socket, epoll::EventData::new_u64(token.to_u64()), flags)?)
    }

    /// What is ready now, of some of the sockets.
    pub fn ready(&self) -> Vec<Readiness> {
        let mut events = [MaybeUninit::uninit(); READY_AT_ONCE];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Only a signal makes it fail, and then the descriptor stays readable.
        let Ok((events, _)) = epoll::wait(&self.0, &mut events, Some(&at_once)) else { return Vec::new() };
        events.iter().map(|event| readiness(Token::from_u64(event.data.u64()), event.flags)).collect()
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const READING: epoll::EventFlags =
    epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP).union(epoll::EventFlags::ET);

fn readiness(token: Token, flags: epoll::EventFlags) -> Readiness {
    use epoll::EventFlags as F;
    Readiness {
        token,
        read: flags.intersects(F::IN | F::RDHUP | F::HUP | F::ERR),
        write: flags.intersects(F::OUT | F::HUP | F::ERR),
        hung_up: flags.contains(F::HUP),
    }
}

/// Two connected stream sockets which block neither here nor at the receiver of the other one.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Sends at most `limit` bytes of `payload` from where they lie. Never raises `SIGPIPE`.
pub fn send_payload(socket: BorrowedFd<'_>, payload: &mut Reader<'_>, limit: usize) -> io::Result<usize> {
    payload.with_iovecs(limit, |iovecs| {
        // SAFETY: all fields of `msghdr` are integers or pointers which may be null.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_ptr().cast_mut();
        message.msg_iovlen = iovecs.len();
        loop {
            // SAFETY: `message` names no address and no control data, only `iovecs`, which `sendmsg` does not
            // write to and which `with_iovecs` keeps valid for reading during this call.
            let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(sent) => return Ok(sent),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    })
}

/// Sends as many of `bytes` as there is room for.
pub fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| send(socket, bytes, SendFlags::NOSIGNAL))?)
}

/// The other end will read an end of file.
pub fn end_writing(socket: BorrowedFd<'_>) {
    // It can only fail if the other end is gone, which will be told in its own way.
    let _ = shutdown(socket, Shutdown::Write);
}

/// The other end can write no more. What it wrote before is thrown away: otherwise closing our end would show it a
/// reset connection in place of the end of file that the guest meant.
pub fn end_reading(socket: BorrowedFd<'_>) {
    // As above.
    let _ = shutdown(socket, Shutdown::Read);
    // Ends, as nothing can be added any more.
    let mut scrap = [0; 4096];
    while let Ok((1.., _)) = rustix::io::retry_on_intr(|| recv(socket, &mut scrap, RecvFlags::empty())) {}
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;

    use vm_memory::VolatileSlice;

    use super::*;

    const TOKEN: Token = Token::from_u64(7 << 32 | 5);

    fn quiet(poll: &Poll) -> bool {
        poll.ready().is_empty()
    }

    #[test]
    fn an_edge_is_told_once_and_room_only_when_asked_for() {
        let poll = Poll::new().unwrap();
        let (near, far) = pair().unwrap();
        let mut far = UnixStream::from(far);
        poll.add(near.as_fd(), TOKEN).unwrap();
        assert!(quiet(&poll));

        far.write_all(b"x").unwrap();
        let read = Readiness { token: TOKEN, read: true, write: false, hung_up: false };
        assert_eq!(poll.ready(), [read]);
        assert!(quiet(&poll), "nobody has read, yet the edge has passed");

        poll.watch_room(near.as_fd(), TOKEN, true).unwrap();
        assert_eq!(poll.ready(), [Readiness { write: true, ..read }]);
        poll.watch_room(near.as_fd(), TOKEN, false).unwrap();
        assert_eq!(poll.ready(), [read]);

        far.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(poll.ready(), [read], "half closed is not hung up");
        drop(far);
        assert_eq!(poll.ready(), [Readiness { write: true, hung_up: true, ..read }]);
        drop(near);
        assert!(quiet(&poll));
    }

    #[test]
    fn sends_from_scattered_memory_until_there_is_no_room() {
        let (near, far) = pair().unwrap();
        let mut far = UnixStream::from(far);
        let (mut a, mut b) = ([1_u8; 3], [2_u8; 4]);
        let mut payload = Reader::new(vec![VolatileSlice::from(&mut a[..]), VolatileSlice::from(&mut b[..])]);
        assert_eq!(send_payload(near.as_fd(), &mut payload, 5).unwrap(), 5);
        assert_eq!(payload.left(), 2);
        let mut got = [0; 16];
        assert_eq!(far.read(&mut got).unwrap(), 5);
        assert_eq!(got[..5], [1, 1, 1, 2, 2]);

        let mut big = vec![0_u8; 1 << 20];
        let mut payload = Reader::new(vec![VolatileSlice::from(&mut big[..])]);
        assert!(send_payload(near.as_fd(), &mut payload, 1 << 20).unwrap() < 1 << 20);
        let full = send_payload(near.as_fd(), &mut payload, 1 << 20).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::WouldBlock);

        drop(far);
        let gone = send_payload(near.as_fd(), &mut payload, 1).unwrap_err();
        assert!(matches!(gone.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{gone}");
    }

    #[test]
    fn ending_both_directions_looks_like_a_clean_end_to_the_other_end() {
        let (near, far) = pair().unwrap();
        let mut far = UnixStream::from(far);
        far.write_all(&[9; 100_000]).unwrap();
        assert_eq!(send_bytes(near.as_fd(), b"last").unwrap(), 4);
        end_reading(near.as_fd());
        end_writing(near.as_fd());
        drop(near);
        assert_eq!(far.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"last");
    }
}
