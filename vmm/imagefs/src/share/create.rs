//! Making, naming, renaming and removing.

use std::ffi::CStr;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, makedev};
use rustix::io::Errno;

use super::attr::{Number, decode_device};
use super::{Entry, Name, OpenFlags, Opened, ROOT, Result, Share};
use crate::thread::{Caller, as_caller};

impl Share {
    /// Creates and opens a regular file. If it is there already, opens that, unless `O_EXCL` is among the flags.
    pub fn create(
        &self,
        parent: u64,
        name: Name<'_>,
        mode: u32,
        flags: OpenFlags,
        caller: Caller,
    ) -> Result<(Entry, Opened)> {
        let dir = self.parent(parent)?;
        self.handles.check_room()?;
        // Always exclusively: without it, `O_CREAT` would open whatever lies there, even a fifo or a device.
        let exclusive = flags.for_host() | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made =
            as_caller(caller, || rustix::fs::openat(&*dir, name.as_cstr(), exclusive, permissions(mode)));
        match made {
            Ok(file) => {
                let entry = self.entry_of(&dir.mount, self.reopen(&file, OFlags::PATH)?)?;
                let opened =
                    self.opened(entry.node, &dir.mount, file).inspect_err(|_| self.forget(entry.node, 1))?;
                Ok((entry, opened))
            }
            Err(Errno::EXIST) if !flags.is_exclusive() => {
                let entry = self.lookup_below(&dir, name)?;
                let opened = self.open(entry.node, flags).inspect_err(|_| self.forget(entry.node, 1))?;
                Ok((entry, opened))
            }
            Err(e) => Err(e),
        }
    }

    /// Creates a regular file, fifo, socket, or the device 0:0 by which overlay file systems mark a removed file.
    ///
    /// Other devices are refused: they would be the host's, within reach of whoever reaches the directory there.
    pub fn make_node(
        &self,
        parent: u64,
        name: Name<'_>,
        mode: u32,
        device: u32,
        caller: Caller,
    ) -> Result<Entry> {
        let dir = self.parent(parent)?;
        let kind = FileType::from_raw_mode(mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            FileType::CharacterDevice if decode_device(device) == (0, 0) => {}
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        as_caller(caller, || {
            rustix::fs::mknodat(&*dir, name.as_cstr(), kind, permissions(mode), makedev(0, 0))
        })?;
        self.lookup_below(&dir, name)
    }

    /// Creates a directory.
    pub fn make_directory(&self, parent: u64, name: Name<'_>, mode: u32, caller: Caller) -> Result<Entry> {
        let dir = self.parent(parent)?;
        as_caller(caller, || rustix::fs::mkdirat(&*dir, name.as_cstr(), permissions(mode)))?;
        self.lookup_below(&dir, name)
    }

    /// Creates a symbolic link. Its text is the guest's affair: here, nobody follows it.
    pub fn make_symlink(&self, parent: u64, name: Name<'_>, text: &CStr, caller: Caller) -> Result<Entry> {
        let dir = self.parent(parent)?;
        as_caller(caller, || rustix::fs::symlinkat(text, &*dir, name.as_cstr()))?;
        self.lookup_below(&dir, name)
    }

    /// Gives a file one more name.
    pub fn link(&self, node: u64, parent: u64, name: Name<'_>) -> Result<Entry> {
        let file = self.writable(node)?;
        let dir = self.parent(parent)?;
        if file.mount.number != dir.mount.number {
            return Err(Errno::XDEV);
        }
        if file.kind == FileType::Directory {
            return Err(Errno::PERM);
        }
        // The link in `/proc/self/fd` leads to the file itself, be it a symbolic link.
        let from = Number::of(&*file);
        rustix::fs::linkat(&self.descriptors, from.as_str(), &*dir, name.as_cstr(), AtFlags::SYMLINK_FOLLOW)?;
        self.lookup_below(&dir, name)
    }

    /// Removes a name; of a directory if `directory`, which must be empty.
    pub fn remove(&self, parent: u64, name: Name<'_>, directory: bool) -> Result<()> {
        let dir = self.parent(parent)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&*dir, name.as_cstr(), flags)
    }

    /// Renames, as renameat2(2).
    pub fn rename(&self, from: (u64, Name<'_>), to: (u64, Name<'_>), flags: u32) -> Result<()> {
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let (old, new) = (self.parent(from.0)?, self.parent(to.0)?);
        if old.mount.number != new.mount.number {
            return Err(Errno::XDEV);
        }
        rustix::fs::renameat_with(&*old, from.1.as_cstr(), &*new, to.1.as_cstr(), flags)
    }

    /// A directory in which the guest may make changes.
    fn parent(&self, node: u64) -> Result<std::sync::Arc<super::node::Node>> {
        if node == ROOT {
            return Err(Errno::ROFS);
        }
        let dir = self.directory(node)?;
        dir.mount.check_writable()?;
        Ok(dir)
    }
}

/// Permission bits of a mode, set-id bits and sticky bit among them.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
