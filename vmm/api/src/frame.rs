//! Packets: bytes and file descriptors over a `SOCK_SEQPACKET` socket.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

/// Longest message, in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Most file descriptors in one packet.
pub const MAX_FDS: usize = 160;

/// Position of a file descriptor in the packet that names it, 0 to [`MAX_FDS`] - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u8);

/// One message as it arrived: its bytes and the descriptors that came with it.
#[derive(Debug, Default)]
pub struct Packet {
    /// The message, JSON.
    pub bytes: Vec<u8>,
    /// Descriptors in the order they were sent, close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why a packet could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The socket failed; `WouldBlock` when it is non-blocking and not ready.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// The peer closed its end.
    #[error("the peer closed the control socket")]
    Closed,
    /// A message is longer than [`MAX_PACKET`].
    #[error("packet of more than {MAX_PACKET} bytes")]
    TooLong,
    /// A packet carries more than [`MAX_FDS`] descriptors.
    #[error("packet with more than {MAX_FDS} file descriptors")]
    TooManyFds,
}

impl FrameError {
    /// Whether the socket was merely not ready.
    pub fn would_block(&self) -> bool {
        matches!(self, FrameError::Socket(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

impl From<Errno> for FrameError {
    fn from(e: Errno) -> Self {
        FrameError::Socket(e.into())
    }
}

/// A connected pair of control sockets, blocking, close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one packet. A `SOCK_SEQPACKET` send is whole or not at all.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
    if bytes.len() > MAX_PACKET {
        return Err(FrameError::TooLong);
    }
    if fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        let fits = control.push(SendAncillaryMessage::ScmRights(fds));
        debug_assert!(fits, "the buffer is sized for MAX_FDS");
    }
    loop {
        // A closed peer is an error to handle here, not a signal.
        match sendmsg(&socket, &[io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(FrameError::Closed),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Receives one packet; [`FrameError::Closed`] at end of file.
///
/// A packet that breaks a limit is dropped whole, its descriptors closed.
pub fn recv(socket: impl AsFd) -> Result<Packet, FrameError> {
    let mut bytes = vec![0; MAX_PACKET];
    // Room for one descriptor more than allowed: excess is seen, not silently cut off.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut iov = [io::IoSliceMut::new(&mut bytes)];
        match recvmsg(&socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(r) => break r,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(FrameError::Closed),
            Err(e) => return Err(e.into()),
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err(FrameError::TooLong);
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Err(FrameError::TooManyFds);
    }
    if received.bytes == 0 && fds.is_empty() {
        return Err(FrameError::Closed);
    }
    bytes.truncate(received.bytes);
    Ok(Packet { bytes, fds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = pair().unwrap();
        let (r, w) = rustix::pipe::pipe().unwrap();
        send(&a, b"{}", &[w.as_fd()]).unwrap();
        drop(w);
        let packet = recv(&b).unwrap();
        assert_eq!(packet.bytes, b"{}");
        assert_eq!(packet.fds.len(), 1);
        rustix::io::write(&packet.fds[0], b"x").unwrap();
        let mut byte = [0];
        assert_eq!(rustix::io::read(&r, &mut byte).unwrap(), 1);
    }

    #[test]
    fn limits_hold_on_both_sides() {
        let (a, b) = pair().unwrap();
        assert!(matches!(send(&a, &vec![0; MAX_PACKET + 1], &[]), Err(FrameError::TooLong)));
        assert!(matches!(send(&a, b"x", &[a.as_fd(); MAX_FDS + 1]), Err(FrameError::TooManyFds)));
        // A peer that ignores the limit.
        rustix::net::send(&a, &vec![0; MAX_PACKET + 1], SendFlags::empty()).unwrap();
        assert!(matches!(recv(&b), Err(FrameError::TooLong)));
        send(&a, b"next", &[]).unwrap();
        assert_eq!(recv(&b).unwrap().bytes, b"next");
    }

    #[test]
    fn a_closed_peer_is_said_to_be_closed() {
        let (a, b) = pair().unwrap();
        drop(b);
        assert!(matches!(recv(&a), Err(FrameError::Closed)));
        assert!(matches!(send(&a, b"x", &[]), Err(FrameError::Closed)));
    }
}
