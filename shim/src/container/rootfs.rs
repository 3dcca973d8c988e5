//! Host directories for the guest: a container's root file system put together from containerd's mounts, and single
//! files and directories for bind mounts.
//!
//! What comes out is a descriptor of a *detached* mount (`open_tree(2)` with `OPEN_TREE_CLONE`): it is in no mount
//! table, so there is nothing to unmount, it costs the host's other processes nothing, and the kernel takes it apart
//! when its last holder (the VMM) ends, however it ends. An overlay has to be mounted at the bundle's `rootfs` for a
//! moment to be cloned: `fsconfig(2)` takes strings of 255 bytes at most, which a handful of layers exceeds.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use agent_api::users::IdMaps;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount};

use crate::container::image::ImageError;

mod assemble;
mod bind;
mod id_map;
mod parse;

pub use assemble::assemble;
pub use bind::{HostTree, HugePages, host_tree, huge_pages, tmpfs_size};
pub use parse::{Layer, Root, parse};

use assemble::MAX_DATA;

/// A root file system or bind that cannot be shown to the guest.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A file system we do not mount.
    #[error(
        "mount of type {kind:?} for the root file system is not supported; supported are overlay, bind and fuse.nydus-overlayfs"
    )]
    Kind {
        /// Its type.
        kind: String,
    },
    /// An image whose bytes come as they are read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An image among others.
    #[error("{count} mounts for the root file system, of which one is an image: it must be the only one")]
    NotAlone {
        /// How many.
        count: usize,
    },
    /// An option that asks for something we do not do.
    #[error("option {option:?} of the {kind} mount for the root file system is not supported")]
    Option {
        /// Type of the mount.
        kind: String,
        /// The option.
        option: String,
    },
    /// A mount below the root.
    #[error("mount at {target:?} below the root file system is not supported")]
    Target {
        /// Where it should go.
        target: String,
    },
    /// A mount without a source, an overlay without lower directories.
    #[error("the {kind} mount for the root file system has no {what}")]
    Incomplete {
        /// Type of the mount.
        kind: String,
        /// What is missing.
        what: &'static str,
    },
    /// Options longer than a page, even with short names for the layers.
    #[error("the overlay's options are {length} bytes long, at most {MAX_DATA} fit")]
    TooLong {
        /// How long they are.
        length: usize,
    },
    /// Owners cannot be shifted there.
    #[error(
        "id-mapped mount of {path}: its file system, or this kernel, may have none (overlay, NFS; tmpfs before Linux 6.3)"
    )]
    IdMap {
        /// Of what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error("{what} {path}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A bind of something that has no meaning on the other side of a file share.
    #[error("bind mount of {path}: a {kind} of the host cannot be used from the guest{}", instead(.kind))]
    Special {
        /// On the host.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
}

/// What can be used.
fn instead(kind: &str) -> &'static str {
    if kind == BLOCK_DEVICE { "; give it to the container as a device (volumeDevices, --device)" } else { "" }
}

const BLOCK_DEVICE: &str = "block device";

/// A detached mount of `path`, with what is mounted below it or without.
///
/// # Errors
/// [`RootfsError::Os`].
pub fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, RootfsError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags).map_err(errno("cloning the tree at", path))
}

/// A detached mount of `path`, the owners of its files shifted where there are `maps`.
///
/// # Errors
/// [`RootfsError::Os`] and [`RootfsError::IdMap`].
pub fn layer(path: &Path, maps: Option<&IdMaps>) -> Result<OwnedFd, RootfsError> {
    let tree = clone_tree(path, false)?;
    if let Some(maps) = maps {
        id_map::shift(&tree, path, maps, false)?;
    }
    Ok(tree)
}

/// Unmounts what was mounted at `path`, when the clone is taken and when it was not to be.
struct MountPoint<'a> {
    path: &'a Path,
    count: usize,
}

impl Drop for MountPoint<'_> {
    fn drop(&mut self) {
        for _ in 0..self.count {
            if let Err(e) = unmount(self.path, UnmountFlags::DETACH) {
                log::warn!("unmounting {}: {e}", self.path.display());
            }
        }
    }
}

fn os<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> RootfsError + use<'a> {
    move |source| RootfsError::Os { what, path: path.to_owned(), source }
}

fn errno<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(rustix::io::Errno) -> RootfsError + use<'a> {
    move |e| os(what, path)(e.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Runs with root's rights only; says so when it did not.
    pub fn may_mount() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            eprintln!("not run: mounting needs root");
        }
        root
    }

    pub fn mounts_below(path: &Path) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|l| l.contains(path.to_str().unwrap())).count()
    }

    pub fn read_below(dir: &OwnedFd, name: &str) -> std::io::Result<String> {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, rustix::fs::Mode::empty())?;
        let mut text = String::new();
        std::fs::File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }
}
