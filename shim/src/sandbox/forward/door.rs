//! The pod's loopback on the host: two listeners in the pod's network namespace, to which the kernel steers every
//! connection that comes there.

use std::fs::File;
use std::future::pending;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd as _;
use std::path::Path;

use rtnetlink::{Handle, LinkUnspec};
use rustix::io::Errno;
use sk_lookup::{Steering, SteeringError};
use tokio::net::{TcpListener, TcpStream};

use crate::sandbox::net::{NetError, within};

/// Number of the loopback in every network namespace (the kernel's `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// What the namespace cannot have.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// It cannot be entered, or its loopback cannot be set up.
    #[error(transparent)]
    Namespace(#[from] NetError),
    /// No socket.
    #[error("listening on {0} in the pod's network namespace")]
    Listen(IpAddr, #[source] io::Error),
    /// No steering.
    #[error(transparent)]
    Steering(#[from] SteeringError),
}

/// Where connections to the namespace's loopback come in, for as long as this lives.
#[derive(Debug)]
pub struct Door {
    v4: TcpListener,
    v6: Option<TcpListener>,
    _steering: Steering,
}

/// The same, not yet in the event loop: that of the thread which made it is gone with it.
struct Made {
    v4: std::net::TcpListener,
    v6: Option<std::net::TcpListener>,
    steering: Steering,
}

impl Door {
    /// Makes it in the namespace at `path`. Blocks for about a millisecond; within a runtime, which waits on it later.
    ///
    /// # Errors
    /// See [`DoorError`].
    pub fn open(path: &Path) -> Result<Self, DoorError> {
        let made = within(path, async |handle| {
            set_loopback_up(&handle).await?;
            Ok(make())
        })??;
        let watched = |listener: std::net::TcpListener, ip: IpAddr| {
            TcpListener::from_std(listener).map_err(|e| DoorError::Listen(ip, e))
        };
        Ok(Door {
            v4: watched(made.v4, Ipv4Addr::LOCALHOST.into())?,
            v6: made.v6.map(|v6| watched(v6, Ipv6Addr::LOCALHOST.into())).transpose()?,
            _steering: made.steering,
        })
    }

    /// Whether it is there for IPv6 as well.
    pub fn has_ipv6(&self) -> bool {
        self.v6.is_some()
    }

    /// The next connection. Its own address is the one that was dialled.
    ///
    /// # Errors
    /// Those of accept(2).
    pub async fn accept(&self) -> io::Result<TcpStream> {
        let v6 = async {
            match &self.v6 {
                Some(v6) => v6.accept().await,
                None => pending().await,
            }
        };
        let (client, _) = tokio::select! {
            client = self.v4.accept() => client?,
            client = v6 => client?,
        };
        Ok(client)
    }
}

/// A CNI plugin has done that, unless none was asked to.
async fn set_loopback_up(handle: &Handle) -> Result<(), NetError> {
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    let failed = |source| NetError::Netlink { what: "set the loopback up".into(), source };
    handle.link().set(up).execute().await.map_err(failed)
}

/// On a thread that is in the namespace.
fn make() -> Result<Made, DoorError> {
    let v4 = listen(Ipv4Addr::LOCALHOST.into())?;
    let v6 = match listen(Ipv6Addr::LOCALHOST.into()) {
        Ok(v6) => Some(v6),
        // No IPv6 in this kernel or this namespace: then nobody can dial it either.
        Err(DoorError::Listen(_, e)) if is_absent(&e) => None,
        Err(e) => return Err(e),
    };
    let path = "/proc/thread-self/ns/net";
    let failed = |source| NetError::Namespace { path: path.into(), source };
    let namespace = File::open(path).map_err(failed)?;
    let steering = Steering::attach(namespace.as_fd(), v4.as_fd(), v6.as_ref().map(|v6| v6.as_fd()))?;
    Ok(Made { v4, v6, steering })
}

fn listen(ip: IpAddr) -> Result<std::net::TcpListener, DoorError> {
    let listener = std::net::TcpListener::bind((ip, 0)).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    listener.map_err(|e| DoorError::Listen(ip, e))
}

fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::ADDRNOTAVAIL, Errno::AFNOSUPPORT];
    error.raw_os_error().is_some_and(|code| absent.iter().any(|errno| errno.raw_os_error() == code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_ipv6_is_no_failure() {
        assert!(is_absent(&Errno::ADDRNOTAVAIL.into()));
        assert!(is_absent(&Errno::AFNOSUPPORT.into()));
        assert!(!is_absent(&Errno::MFILE.into()));
    }

    #[tokio::test]
    async fn what_is_no_namespace_is_named() {
        let error = Door::open(Path::new("/nonexistent/ns")).unwrap_err();
        assert_eq!(error.to_string(), "network namespace /nonexistent/ns");
    }
}
