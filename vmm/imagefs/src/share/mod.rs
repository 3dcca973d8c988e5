//! Host directories under one root, by node and handle.
//!
//! ```text
//!  root (node 1, ours)           mount()/unmount()
//!   ├── a ── node 2 ── host directory, given as a descriptor
//!   └── b ── node 7 ── …
//! ```
//!
//! A **node** is an inode that the guest has looked up and not yet forgotten, held by an `O_PATH` descriptor; a
//! **handle** is a file or directory that it has open. Every system call names a file by such a descriptor, or by one
//! checked name ([`Name`]) in a directory so held. So nothing above a mounted directory can be reached: there is no
//! path to walk, `..` is not a name, and symbolic links are read, never followed. Files are opened again through
//! `/proc/self/fd`, whose directory is opened once, at the start.
//!
//! This module knows no FUSE message; `fuse` decodes, calls, encodes.

mod attr;
mod copy_up;
mod create;
mod dir;
mod file;
mod handle;
mod lookup;
mod mounts;
mod name;
mod node;
mod xattr;

use std::os::fd::OwnedFd;
use std::sync::{Mutex, RwLock};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

pub use attr::{Attr, SetAttr, Time};
pub use dir::{DirEntry, Listing};
pub use file::{OpenFlags, Opened, WriteFlags};
pub use lookup::Entry;
pub use mounts::{Cache, MountError, MountOptions, UnmountError};
pub use name::Name;

use crate::limits::Limits;
use handle::Handles;
use mounts::Mounts;
use node::Nodes;

/// Result of what a guest asked for.
pub type Result<T> = std::result::Result<T, Errno>;

/// Node of the share's root (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// All that the guest sees.
#[derive(Debug)]
pub struct Share {
    mounts: Mutex<Mounts>,
    nodes: Nodes,
    handles: Handles,
    /// Host devices in the order they were met; see [`Share::fold`].
    devices: RwLock<Vec<(u32, u32)>>,
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    listings: dir::Kept,
}

impl Share {
    /// An empty share. Opens `/proc/self/fd`; no other path is ever opened.
    pub fn new(limits: Limits) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Share {
            mounts: Mutex::default(),
            nodes: Nodes::new(limits.nodes),
            handles: Handles::new(limits.handles),
            devices: RwLock::default(),
            descriptors: rustix::fs::openat(CWD, "/proc/self/fd", flags, Mode::empty())?,
            listings: dir::Kept::default(),
        })
    }

    /// Forgets what the guest holds: it starts anew. Mounts stay.
    pub fn reset(&self) {
        self.handles.clear();
        self.nodes.reset();
    }

    /// Nodes and handles in use.
    pub fn in_use(&self) -> (usize, usize) {
        (self.nodes.len(), self.handles.len())
    }
}
