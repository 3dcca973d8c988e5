//! The file server behind virtio-fs: host directories for one guest, in process, on the device's threads. And, in [`image`],
//! the disk of an image whose bytes come as they are read.
//!
//! ```text
//!  virtio::fs ── request, reply ──> fuse (messages) ──> share (nodes, handles, mounts) ──> system calls
//! ```
//!
//! The guest's kernel is not trusted: it may send any bytes at any time. It can reach what lies below the directories
//! that were mounted for it, as root there, and nothing else. What it gets wrong is answered with an error and
//! counted. See `README.md` for what this rests on and for what the surroundings must provide.

mod fuse;
pub mod image;
mod limits;
mod metrics;
mod share;
mod sys;
mod thread;

use std::io;
use std::os::fd::OwnedFd;

use virtio::queue::{Reader, Writer};

pub use fuse::wire;
pub use limits::{FURTHER_SERVERS, Limits, raise_descriptor_limit};
pub use share::{Cache, MountError, MountOptions, UnmountError};

/// A file server for one guest. Shared by its threads; every call may come on any of them.
#[derive(Debug)]
pub struct FileServer {
    share: share::Share,
    metrics: metrics::Metrics,
}

impl FileServer {
    /// A server with nothing mounted. Opens `/proc/self/fd`, and no other path ever.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Ok(FileServer { share: share::Share::new(limits)?, metrics: metrics::Metrics::default() })
    }

    /// Shows the directory `dir` (`O_PATH` will do) to the guest as `at`, a name in the share's root.
    pub fn mount(&self, at: &str, dir: OwnedFd, options: MountOptions) -> Result<(), MountError> {
        self.share.mount(at, dir, options)
    }

    /// Takes `at` out of the share. Its names lead nowhere from now on, and every descriptor below it is closed, save
    /// those of files and directories that the guest has open: they stay usable until it closes them. Tells how many
    /// those are; while there are any, the host cannot unmount a file system that they lie on.
    pub fn unmount(&self, at: &str) -> Result<usize, UnmountError> {
        self.share.unmount(at)
    }
}

impl virtio::fs::FsServer for FileServer {
    fn enter_thread(&self) -> io::Result<()> {
        thread::enter()
    }

    fn handle(&self, request: Reader<'_>, reply: Writer<'_>) -> u32 {
        fuse::serve(&self.share, &self.metrics, request, reply)
    }

    fn reset(&self) {
        self.share.reset();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let (nodes, handles) = self.share.in_use();
        let mut list = self.metrics.list();
        list.extend([("nodes", nodes as u64), ("handles", handles as u64)]);
        list
    }
}
