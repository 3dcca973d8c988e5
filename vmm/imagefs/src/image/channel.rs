//! The connection to the image service: packets out, packets in, neither ever waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, send};
use vmm_api::image::{Fetch, Fetched};

/// A descriptor is no connection to the image service.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// It is something else.
    #[error("the image's channel is not a Unix socket that keeps packets apart (SOCK_SEQPACKET)")]
    Kind,
    /// What it is cannot be asked.
    #[error("the image's channel cannot be examined")]
    Examine(#[source] io::Error),
}

/// Why a connection is at its end.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// The service closed it, or is gone.
    #[error("the image service has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection to the image service")]
    Socket(#[source] io::Error),
    /// A packet of another length than an answer has.
    #[error("the image service sent a packet that is not {} bytes long", Fetched::LEN)]
    Length,
    /// An answer to nothing.
    #[error("the image service answered request {tag}, which is not under way")]
    Stranger {
        /// Its tag.
        tag: u64,
    },
    /// Nothing has been answered for too long.
    #[error("the image service has left {count} requests without an answer")]
    Stuck {
        /// How many.
        count: usize,
    },
}

/// An open connection.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Takes a connection on which the image was opened.
    pub fn new(socket: OwnedFd) -> Result<Self, ChannelError> {
        let examine = |e: Errno| match e {
            Errno::NOTSOCK => ChannelError::Kind,
            e => ChannelError::Examine(e.into()),
        };
        let kind = (socket_domain(&socket).map_err(examine)?, socket_type(&socket).map_err(examine)?);
        match kind {
            (AddressFamily::UNIX, SocketType::SEQPACKET) => Ok(Channel(socket)),
            _ => Err(ChannelError::Kind),
        }
    }

    /// Sends a wish. False if there is no room for it now.
    pub fn send(&self, fetch: Fetch) -> Result<bool, Lost> {
        loop {
            // A packet is sent whole or not at all; a closed peer is an error to handle here, not a signal.
            match send(&self.0, &fetch.to_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(true),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Lost::Closed),
                Err(e) => return Err(Lost::Socket(e.into())),
            }
        }
    }

    /// The next answer, if there is one.
    pub fn receive(&self) -> Result<Option<Fetched>, Lost> {
        // A byte more than an answer has: a longer packet is seen to be one. Descriptors that come along are closed.
        let mut bytes = [0; Fetched::LEN + 1];
        loop {
            match recv(&self.0, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(Lost::Closed),
                Ok((_, len)) => return Fetched::from_bytes(&bytes[..len]).map(Some).ok_or(Lost::Length),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(Lost::Socket(e.into())),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
