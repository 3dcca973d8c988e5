//! From a name to a node.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::mounts::Mount;
use super::node::{Key, Node};
use super::{Attr, Name, ROOT, Result, Share, attr};

/// A node that the guest is told of, which counts as one lookup.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Its number.
    pub node: u64,
    /// Its attributes.
    pub attr: Attr,
    /// How long the name leads to it.
    pub name_lifetime: Duration,
    /// How long the attributes count.
    pub attr_lifetime: Duration,
}

impl Share {
    /// Finds `name` in the directory `parent`.
    pub fn lookup(&self, parent: u64, name: Name<'_>) -> Result<Entry> {
        if parent == ROOT {
            return self.lookup_mount(name);
        }
        let parent = self.directory(parent)?;
        self.lookup_below(&parent, name)
    }

    /// Takes back `count` lookups of a node.
    pub fn forget(&self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    pub(super) fn lookup_below(&self, parent: &Node, name: Name<'_>) -> Result<Entry> {
        // Most are known already; then one call is enough.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(parent, name.as_cstr(), flags, attr::WANTED)?;
        if let Some(node) = self.nodes.refer(&Key::of(&parent.mount, &stat)) {
            return Ok(self.entry(&parent.mount, node, &stat));
        }
        // The kernel makes sure once more that a name leads one step down. What is opened here may not be what was
        // there a moment ago, so its own attributes count.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(parent, name.as_cstr(), flags, Mode::empty(), resolve)?;
        self.entry_of(&parent.mount, file)
    }

    /// The entry of the file that `file`, an `O_PATH` descriptor, holds.
    pub(super) fn entry_of(&self, mount: &Arc<Mount>, file: OwnedFd) -> Result<Entry> {
        let stat = attr::stat(&file)?;
        let node = Node::new(mount.clone(), file, attr::kind(&stat));
        let number = self.nodes.refer_or_insert(Key::of(mount, &stat), node)?;
        Ok(self.entry(mount, number, &stat))
    }

    /// The node, if it is a directory of the host.
    pub(super) fn directory(&self, node: u64) -> Result<Arc<Node>> {
        let node = self.nodes.get(node)?;
        if node.kind == FileType::Directory { Ok(node) } else { Err(Errno::NOTDIR) }
    }

    /// The text of a symbolic link.
    pub fn read_link(&self, node: u64) -> Result<Vec<u8>> {
        if node == ROOT {
            return Err(Errno::INVAL);
        }
        let node = self.nodes.get(node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        Ok(rustix::fs::readlinkat(node.as_fd(), c"", Vec::new())?.into_bytes())
    }

    fn lookup_mount(&self, name: Name<'_>) -> Result<Entry> {
        let number = self.mount_root(name).ok_or(Errno::NOENT)?;
        let root = self.nodes.get(number)?;
        let stat = attr::stat(&*root)?;
        let node = self.nodes.refer(&Key::of(&root.mount, &stat)).ok_or(Errno::NOENT)?;
        // The name must lead nowhere as soon as it is unmounted.
        Ok(Entry { name_lifetime: Duration::ZERO, ..self.entry(&root.mount, node, &stat) })
    }

    fn entry(&self, mount: &Mount, node: u64, stat: &rustix::fs::Statx) -> Entry {
        let (attr, cache) = (self.to_attr(stat), mount.options.cache);
        Entry { node, attr, name_lifetime: cache.lifetime(), attr_lifetime: cache.attr_lifetime(attr.mode) }
    }
}
