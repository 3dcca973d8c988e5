//! Packets (`SOCK_SEQPACKET`) and descriptors over Unix sockets, in tokio, whose stream sockets wait for them as well as for theirs.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Most descriptors of one packet (the kernel's `SCM_MAX_FD`).
const MAX_FDS: usize = 253;

const FLAGS: SocketFlags = SocketFlags::NONBLOCK.union(SocketFlags::CLOEXEC);

/// A socket that packets come from and go to.
#[derive(Debug)]
pub struct Packets(UnixStream);

impl Packets {
    /// Over a connected socket that does not block.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        UnixStream::from_std(fd.into()).map(Self)
    }

    /// Receives a packet into `buffer`. Its length, which is more than the buffer's where it did not fit; 0 at the end.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .async_io(Interest::READABLE, || {
                let (_, len) = rustix::net::recv(&self.0, &mut *buffer, RecvFlags::TRUNC)?;
                Ok(len)
            })
            .await
    }

    /// Sends a packet, with descriptors.
    pub async fn send(&self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(OwnedFd::as_fd).collect();
        if fds.len() > MAX_FDS {
            return Err(io::Error::other(format!("{} descriptors do not fit into a packet", fds.len())));
        }
        self.0
            .async_io(Interest::WRITABLE, || {
                let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                }
                rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
                Ok(())
            })
            .await
    }
}

/// A socket that connections come to.
#[derive(Debug)]
pub struct Listener(UnixListener);

impl Listener {
    /// Listens at `path`, of which the caller made sure that nobody else does.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 128)?;
        UnixListener::from_std(socket.into()).map(Self)
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<Packets> {
        self.0.accept().await.map(|(stream, _)| Packets(stream))
    }
}

/// Connects to the socket at `path`.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
