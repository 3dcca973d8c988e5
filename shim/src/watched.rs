//! A file descriptor in the event loop.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Puts a non-blocking descriptor under the event loop's watch.
///
/// # Errors
/// When the kernel cannot poll it.
#[expect(
    deprecated,
    reason = "the successor is unsafe, for types whose descriptor can change under the loop; an OwnedFd that the loop owns cannot, and this crate forbids unsafe"
)]
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(fd)
}
