//! The file system device (virtio 1.2, 5.11): hands requests of the guest's FUSE client to a server, on threads of its
//! own.
//!
//! A request may wait for the host's disk, so the main loop never serves one. The device's threads `fs0`, `fs1`, … take
//! requests from any queue: Linux before 6.10 uses only the first request queue, and one slow request there shall
//! not hold up the others. The device knows no FUSE; the server sees neither rings nor threads.
//!
//! ```text
//!              queue 0 hiprio ──┐
//!  guest ──>   queue 1 request ─┼──> fs0, fs1 … ── FsServer::handle ──> used ring, interrupt
//!              queue 2 …       ─┘
//! ```
//!
//! Not offered: the notification queue (`VIRTIO_FS_F_NOTIFICATION`; no Linux driver has it), the DAX window.

mod crew;
mod device;
mod state;

use std::fmt::Debug;
use std::io;

pub use device::{Fs, FsConfig, FsError};
pub use state::FsState;

use crate::queue::{Reader, Writer};

/// Who serves the requests. Called from all of the device's threads at once.
pub trait FsServer: Debug + Send + Sync {
    /// Called once on each thread before its first request, and before [`Threads::enter`](crate::device::Threads::enter): makes the thread what the
    /// server needs it to be.
    fn enter_thread(&self) -> io::Result<()> {
        Ok(())
    }

    /// Serves one request and tells how many bytes of answer it put into `reply`, counted from the start. May block.
    ///
    /// The request is whatever the guest wrote: nothing about it has been checked, save that both parts lie in guest
    /// memory. It must be answered or refused, never panic.
    fn handle(&self, request: Reader<'_>, reply: Writer<'_>) -> u32;

    /// The driver reset the device: what it held is gone. No thread is serving a request.
    fn reset(&self);

    /// Counters, by name.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}
