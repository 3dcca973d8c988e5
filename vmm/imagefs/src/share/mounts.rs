//! Which host directories the guest sees, under which names.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::node::{Key, Node};
use super::{Name, Share, attr};

/// For how long the guest may believe what it was told about files, and whether it keeps their contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Others may write too: attributes and names count for a second; contents count from open to open.
    #[default]
    Shared,
    /// Others write and the guest must see it at once: attributes and names are asked for each time.
    Live,
    /// Nobody but this guest writes, through this mount alone: everything counts until the guest changes it.
    Exclusive,
}

impl Cache {
    /// How long a name counts.
    pub fn lifetime(self) -> Duration {
        match self {
            Cache::Shared => Duration::from_secs(1),
            Cache::Live => Duration::ZERO,
            Cache::Exclusive => Duration::from_secs(3600),
        }
    }

    /// How long the attributes of a file with this mode count.
    ///
    /// A write by an unprivileged process takes set-id bits away on the host, and the guest's kernel does not look for
    /// that (`HANDLE_KILLPRIV_V2`). It must not run the file with what it remembers, so it may not remember.
    pub fn attr_lifetime(self, mode: u32) -> Duration {
        let set_id = mode & (libc::S_ISUID | libc::S_ISGID) != 0 && mode & libc::S_IFMT == libc::S_IFREG;
        if set_id { Duration::ZERO } else { self.lifetime() }
    }

    /// Whether contents seen at one open still count at the next.
    pub fn keeps_contents(self) -> bool {
        self == Cache::Exclusive
    }
}

/// How a directory is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MountOptions {
    /// Everything that would change it fails with `EROFS`.
    pub read_only: bool,
    /// How far the guest may trust its caches.
    pub cache: Cache,
    /// It is a layer of an overlay that the guest mounts with `userxattr`: what is opaque there is opaque to overlays of the
    /// host, and the other way round.
    pub layer: bool,
}

/// A directory cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Not a name for a directory.
    #[error("mount name {at:?} must be 1 to 255 bytes without '/', and not '.' or '..'")]
    Name {
        /// Name asked for.
        at: String,
    },
    /// The name is taken.
    #[error("{at:?} is mounted already")]
    Exists {
        /// Name asked for.
        at: String,
    },
    /// Not a directory.
    #[error("what is to be mounted at {at:?} is not a directory")]
    NotADirectory {
        /// Name asked for.
        at: String,
    },
    /// The directory's attributes cannot be read.
    #[error("reading the attributes of the directory to mount at {at:?}")]
    Stat {
        /// Name asked for.
        at: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A directory cannot be taken out.
#[derive(Debug, thiserror::Error)]
pub enum UnmountError {
    /// No such mount.
    #[error("nothing is mounted at {at:?}")]
    NotFound {
        /// Name asked for.
        at: String,
    },
}

/// A host directory that the guest sees.
#[derive(Debug)]
pub struct Mount {
    /// Counts up over the share's life.
    pub number: u64,
    /// How it is shown.
    pub options: MountOptions,
    /// Taken out of the share. Written under the lock of the nodes, so that no node is added afterwards.
    pub gone: AtomicBool,
}

impl Mount {
    /// Fails with `EROFS` when the guest may not write here.
    pub fn check_writable(&self) -> Result<(), Errno> {
        if self.options.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }
}

/// Mounts by their number, which is the order in which the root lists them.
#[derive(Debug, Default)]
pub struct Mounts {
    by_number: BTreeMap<u64, Mounted>,
    last: u64,
}

#[derive(Debug)]
struct Mounted {
    name: CString,
    mount: Arc<Mount>,
    /// Node of its root.
    root: u64,
}

impl Share {
    /// Shows the directory `dir` as `at` in the share's root. `dir` may be an `O_PATH` descriptor.
    pub fn mount(&self, at: &str, dir: OwnedFd, options: MountOptions) -> Result<(), MountError> {
        let bad_name = || MountError::Name { at: at.to_owned() };
        let name = CString::new(at).map_err(|_| bad_name())?;
        Name::check(&name).map_err(|_| bad_name())?;
        let stat = attr::stat(&dir).map_err(|e| MountError::Stat { at: at.to_owned(), source: e.into() })?;
        let kind = attr::kind(&stat);
        if kind != FileType::Directory {
            return Err(MountError::NotADirectory { at: at.to_owned() });
        }

        let mut mounts = self.mounts();
        if mounts.find(name.as_bytes()).is_some() {
            return Err(MountError::Exists { at: at.to_owned() });
        }
        mounts.last += 1;
        let mount = Arc::new(Mount { number: mounts.last, options, gone: AtomicBool::new(false) });
        let root = self.nodes.pin(Key::of(&mount, &stat), Node::new(mount.clone(), dir, kind));
        mounts.by_number.insert(mount.number, Mounted { name, mount, root });
        Ok(())
    }

    /// Takes the directory `at` out and lets go of every descriptor below it, save those of files and directories
    /// that the guest has open: they stay usable until it closes them. Tells how many those are.
    pub fn unmount(&self, at: &str) -> Result<usize, UnmountError> {
        let mut mounts = self.mounts();
        let number = mounts.find(at.as_bytes()).map(|mounted| mounted.mount.number);
        let gone = number.and_then(|number| mounts.by_number.remove(&number));
        drop(mounts);
        let mounted = gone.ok_or_else(|| UnmountError::NotFound { at: at.to_owned() })?;
        let below = |node| self.nodes.get(node).is_ok_and(|node| node.mount.number == mounted.mount.number);
        let open = self.handles.count(below);
        self.nodes.release_mount(&mounted.mount);
        Ok(open)
    }

    /// Names and root nodes of the mounts after number `after`, with their numbers.
    pub(super) fn mounts_after(&self, after: u64) -> Vec<(u64, CString, u64)> {
        let mounts = self.mounts();
        let rest = mounts.by_number.range(after.saturating_add(1)..);
        rest.map(|(&number, mounted)| (number, mounted.name.clone(), mounted.root)).collect()
    }

    /// Root node of the mount called `name`.
    pub(super) fn mount_root(&self, name: Name<'_>) -> Option<u64> {
        self.mounts().find(name.as_cstr().to_bytes()).map(|mounted| mounted.root)
    }

    pub(super) fn mount_count(&self) -> usize {
        self.mounts().by_number.len()
    }

    fn mounts(&self) -> MutexGuard<'_, Mounts> {
        self.mounts.lock().expect("no thread panics while it holds the mounts")
    }
}

impl Mounts {
    fn find(&self, name: &[u8]) -> Option<&Mounted> {
        self.by_number.values().find(|mounted| mounted.name.as_bytes() == name)
    }
}
