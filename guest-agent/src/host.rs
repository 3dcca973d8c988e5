//! The host, as the agent reaches it: numbered ports that it dials and nothing that it listens on.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, socket,
    sockopt,
};

use crate::fd::Fd;

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
    /// ECONNRESET when the host does not serve the port; ETIMEDOUT after the kernel's two seconds.
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

    fn open(&self, port: u32, flags: SockFlag) -> io::Result<OwnedFd> {
        match self {
            Self::Vsock => start(AddressFamily::Vsock, &VsockAddr::new(agent_api::HOST_CID, port), flags),
            Self::Unix(dir) => {
                start(AddressFamily::Unix, &UnixAddr::new(&dir.join(port.to_string()))?, flags)
            }
        }
    }
}

fn start(family: AddressFamily, address: &dyn SockaddrLike, flags: SockFlag) -> io::Result<OwnedFd> {
    let fd = socket(family, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error.into()),
    }
}
