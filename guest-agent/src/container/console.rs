//! How the master of a container's terminal comes out of it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::boot::BUNDLES;
use crate::sys;

/// A socket on which the library hands over the master of the terminal that it makes inside the container.
pub struct Console {
    /// For the library to connect to.
    pub path: PathBuf,
    listener: UnixListener,
}

impl Console {
    /// To be called before the container is made.
    pub fn listen() -> std::io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(BUNDLES).join(format!(".console-{number}"));
        let listener = UnixListener::bind(&path)?;
        // The launcher sends before it reports success, so there is never anything to wait for.
        listener.set_nonblocking(true)?;
        Ok(Self { path, listener })
    }

    /// When it is made.
    pub fn receive(&self) -> std::io::Result<OwnedFd> {
        let (connection, _) = self.listener.accept()?;
        sys::receive_fd(connection.as_fd())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Made above; the worst that a failure leaves is a file in a tmpfs.
        let _ = std::fs::remove_file(&self.path);
    }
}
