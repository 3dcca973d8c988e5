//! The host, as the agent reaches it: numbered ports that it dials and nothing that it listens on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use agent_api::stream::StreamId;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, socket,
    sockopt,
};

use crate::fd::Fd;
use crate::sys;

/// How long the kernel waits for the host to answer a connect. The VMM answers for every port, so an answer that is
/// late comes from a host that is busy; and one that comes after the kernel gave up leaves the host with a connection
/// that nobody has here. The host's own limits end what really hangs.
const ANSWER: Duration = Duration::from_secs(60);

/// Where the ports are.
#[derive(Debug, Clone)]
pub enum Host {
    /// The VMM's vsock device.
    Vsock,
    /// Unix sockets named by port number in a directory: for tests without a VM.
    Unix(PathBuf),
}

impl Host {
    /// Connects to `port`, waiting in the kernel. For the one connection that is made before the runtime exists.
    ///
    /// # Errors
    /// ECONNRESET when the host does not serve the port; ETIMEDOUT when it has not answered for [`ANSWER`].
    pub fn dial_now(&self, port: u32) -> io::Result<OwnedFd> {
        self.open(port, SockFlag::SOCK_CLOEXEC)
    }

    /// Connects to `port`.
    ///
    /// # Errors
    /// As [`Self::dial_now`].
    pub async fn dial(&self, port: u32) -> io::Result<Fd> {
        let connection = Fd::new(self.open(port, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?)?;
        connection.wait_writable().await?;
        match getsockopt(&connection, sockopt::SocketError)? {
            0 => Ok(connection),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Connects a stream and says which it is.
    ///
    /// # Errors
    /// As [`Self::dial_now`].
    pub async fn dial_stream(&self, id: StreamId) -> io::Result<Fd> {
        let stream = self.dial(agent_api::STREAM_PORT).await?;
        stream.write_all(&id.hello()).await?;
        Ok(stream)
    }

    fn open(&self, port: u32, flags: SockFlag) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock => {
                let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
                sys::set_connect_timeout(fd.as_fd(), ANSWER)?;
                start(fd, &VsockAddr::new(agent_api::HOST_CID, port))
            }
            Self::Unix(dir) => {
                let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
                start(fd, &UnixAddr::new(&dir.join(port.to_string()))?)
            }
        }
    }
}

fn start(fd: OwnedFd, address: &dyn SockaddrLike) -> io::Result<OwnedFd> {
    match connect(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error.into()),
    }
}
