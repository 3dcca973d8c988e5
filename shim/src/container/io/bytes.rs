//! Bytes on their way from one descriptor to another.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;

/// Most bytes moved by one system call: what a pipe holds.
const CHUNK: usize = 64 * 1024;

/// Moves bytes from `from` to `to` until the first ends; one of them is a pipe. Counts them in `moved`.
pub async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>, moved: &AtomicU64) -> std::io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(from.get_ref(), None, to.get_ref(), None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                moved.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(Errno::INTR) => {}
            // One of the two was not ready, and the error does not say which.
            Err(Errno::AGAIN) => {
                let in_ready = is_ready(from, PollFlags::IN | PollFlags::HUP);
                let out_ready = is_ready(to, PollFlags::OUT | PollFlags::ERR);
                if !in_ready {
                    readable.clear_ready();
                }
                if !out_ready {
                    writable.clear_ready();
                }
                if in_ready && out_ready {
                    // Became ready in between; the next round will tell.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Bytes of a stream on their way to a file.
const BUFFER: usize = 16 * 1024;

/// Writes what comes from `from` to a file until it ends. A file is written to without waiting for it: there is no
/// telling when one is ready.
pub async fn append(from: &AsyncFd<OwnedFd>, mut to: &File, moved: &AtomicU64) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut readable = from.readable().await?;
        match rustix::io::read(from.get_ref(), &mut *buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&buffer[..n])?;
                moved.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => readable.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
}

fn is_ready(fd: &AsyncFd<OwnedFd>, wanted: PollFlags) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(fd.as_fd(), wanted)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut ready, Some(&now)).is_ok_and(|n| n > 0)
}
