//! Attributes: reading, folding inode numbers, changing.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, StatVfs, Statx, StatxFlags, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::handle::{Handle, Open};
use super::node::Node;
use super::{Cache, ROOT, Result, Share};

/// Set-user-id and set-group-id.
const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;
/// All permission bits.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// What `stat` tells of a file.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    /// Inode number that the guest sees.
    pub inode: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Number of names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device, in the kernel's 32-bit encoding (`new_encode_dev`).
    pub device: u32,
    /// Bytes.
    pub size: u64,
    /// Units of 512 bytes in use.
    pub blocks: u64,
    /// Preferred size of an access.
    pub block_size: u32,
    /// Access, modification and change.
    pub times: [Timespec; 3],
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// The present.
    Now,
    /// Seconds since 1970 and nanoseconds.
    At(i64, u32),
}

/// Which attributes to change to what.
#[derive(Debug, Clone, Copy, Default)]
pub struct SetAttr {
    /// Open file to truncate, rather than opening it again.
    pub handle: Option<u64>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// The truncation must clear set-id bits.
    pub clear_set_id: bool,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Access time.
    pub accessed: Option<Time>,
    /// Modification time.
    pub modified: Option<Time>,
}

/// Attributes of an open or `O_PATH` descriptor.
pub fn stat(file: impl AsFd) -> Result<Statx> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, WANTED)
}

/// What to ask `statx` for.
pub const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

/// The type of a file.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

impl Share {
    /// Attributes of a node, or of what is open as `handle`, and for how long they count.
    pub fn attr(&self, node: u64, handle: Option<u64>) -> Result<(Attr, Duration)> {
        if node == ROOT {
            return Ok((self.root_attr(), Duration::ZERO));
        }
        let open = handle.map(|handle| self.handles.get(node, handle)).transpose()?;
        let known = self.nodes.get(node);
        let cache = known.as_ref().map_or(Cache::Live, |node| node.mount.options.cache);
        let stat = match open.as_deref() {
            // Works even when its mount is gone.
            Some(Handle { open: Open::File(file), .. }) => stat(file)?,
            _ => stat(&*known?)?,
        };
        let attr = self.to_attr(&stat);
        Ok((attr, cache.attr_lifetime(attr.mode)))
    }

    /// Changes attributes: size, then owner (which clears set-id bits, as the host's kernel does, save those of a file that is being
    /// copied up), mode, times.
    pub fn set_attr(&self, node: u64, set: &SetAttr) -> Result<(Attr, Duration)> {
        let target = self.writable(node)?;
        let clears = set.size.is_some() || set.uid.is_some() || set.gid.is_some();
        let kept = if clears { self.kept_of_copy(&target)? } else { None };
        if let Some(size) = set.size {
            self.truncate(node, &target, set, size)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            let none = |id: u32| id != u32::MAX;
            let uid = set.uid.filter(|&id| none(id)).map(Uid::from_raw);
            let gid = set.gid.filter(|&id| none(id)).map(Gid::from_raw);
            rustix::fs::chownat(&*target, c"", uid, gid, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW)?;
        }
        kept.map_or(Ok(()), |kept| self.give_back(&target, &kept))?;
        if let Some(mode) = set.mode {
            self.set_mode(&target, mode & PERMISSIONS)?;
        }
        if set.accessed.is_some() || set.modified.is_some() {
            let times =
                Timestamps { last_access: timespec(set.accessed), last_modification: timespec(set.modified) };
            let path = Number::of(&target);
            rustix::fs::utimensat(&self.descriptors, path.as_str(), &times, AtFlags::empty())?;
        }
        self.attr(node, None)
    }

    /// Free space and the like of the file system that a node lies on.
    pub fn stat_fs(&self, node: u64) -> Result<Option<StatVfs>> {
        if node == ROOT {
            return Ok(None);
        }
        rustix::fs::fstatvfs(&*self.nodes.get(node)?).map(Some)
    }

    /// The node, if the guest may write there. The root of the share is ours.
    pub(super) fn writable(&self, node: u64) -> Result<std::sync::Arc<Node>> {
        if node == ROOT {
            return Err(Errno::ROFS);
        }
        let node = self.nodes.get(node)?;
        node.mount.check_writable()?;
        Ok(node)
    }

    /// Clears set-id bits as a write by an unprivileged process does (kernel: `setattr_should_drop_suidgid`). File
    /// capabilities need no care: the host's kernel drops them at every write.
    pub(super) fn clear_set_id(&self, file: BorrowedFd<'_>) -> Result<()> {
        let mode = u32::from(stat(file)?.stx_mode);
        let mut cleared = mode & !SET_UID;
        if mode & GROUP_EXECUTE != 0 {
            cleared &= !SET_GID;
        }
        if cleared != mode { self.set_mode(&file, cleared & PERMISSIONS) } else { Ok(()) }
    }

    /// Opens what `file` is, again, by its number below `/proc/self/fd`. The caller has made sure of its type: to
    /// open a device or a fifo here would reach out of the share.
    pub(super) fn reopen(&self, file: impl AsFd, flags: OFlags) -> Result<std::os::fd::OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::openat(&self.descriptors, Number::of(&file).as_str(), flags, Mode::empty())
    }

    /// Attributes as the guest sees them.
    pub(super) fn to_attr(&self, stat: &Statx) -> Attr {
        let time =
            |t: rustix::fs::StatxTimestamp| Timespec { tv_sec: t.tv_sec, tv_nsec: i64::from(t.tv_nsec) };
        Attr {
            inode: self.fold((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino),
            mode: u32::from(stat.stx_mode),
            links: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            device: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            block_size: stat.stx_blksize,
            times: [time(stat.stx_atime), time(stat.stx_mtime), time(stat.stx_ctime)],
        }
    }

    /// The guest sees one device where the host may have several (two mounts, or the layers of an overlay): an inode
    /// number alone must tell files apart there. The first device's numbers stay as they are; those of the n-th have
    /// n in the upper 16 bits.
    pub(super) fn fold(&self, device: (u32, u32), inode: u64) -> u64 {
        let known = self.devices.read().expect("no thread panics while it holds the devices");
        let found = known.iter().position(|&known| known == device);
        drop(known);
        let index = found.unwrap_or_else(|| {
            let mut devices = self.devices.write().expect("no thread panics while it holds the devices");
            devices.iter().position(|&known| known == device).unwrap_or_else(|| {
                devices.push(device);
                devices.len() - 1
            })
        });
        inode ^ ((index as u64) << 48)
    }

    fn root_attr(&self) -> Attr {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let links = u32::try_from(self.mount_count()).unwrap_or(u32::MAX).saturating_add(2);
        let mode = 0o755 | FileType::Directory.as_raw_mode();
        Attr {
            inode: ROOT,
            mode,
            links,
            uid: 0,
            gid: 0,
            device: 0,
            size: 0,
            blocks: 0,
            block_size: 4096,
            times: [zero; 3],
        }
    }

    fn truncate(&self, number: u64, node: &Node, set: &SetAttr, size: u64) -> Result<()> {
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if set.clear_set_id {
            self.clear_set_id(node.as_fd())?;
        }
        match set.handle {
            Some(handle) => rustix::fs::ftruncate(self.handles.get(number, handle)?.file()?, size),
            None => rustix::fs::ftruncate(self.reopen(node, OFlags::WRONLY)?, size),
        }
    }

    pub(super) fn set_mode(&self, file: &impl AsFd, mode: u32) -> Result<()> {
        let path = Number::of(file);
        rustix::fs::chmodat(&self.descriptors, path.as_str(), Mode::from_raw_mode(mode), AtFlags::empty())
    }
}

/// The name of a descriptor in `/proc/self/fd`.
pub(super) struct Number(String);

impl Number {
    pub(super) fn of(file: &impl AsFd) -> Self {
        use std::os::fd::AsRawFd;
        Number(file.as_fd().as_raw_fd().to_string())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

fn timespec(time: Option<Time>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(Time::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        // What is no number of nanoseconds must not be taken for one of the two above.
        Some(Time::At(tv_sec, nsec)) => Timespec { tv_sec, tv_nsec: i64::from(nsec.min(999_999_999)) },
    }
}

fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor number from the kernel's 32-bit encoding.
pub fn decode_device(device: u32) -> (u32, u32) {
    ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_survive_the_encoding() {
        for (major, minor) in [(0, 0), (1, 3), (254, 255), (4095, 1), (8, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }

    #[test]
    fn a_strange_number_of_nanoseconds_is_neither_now_nor_omit() {
        for nsec in [u32::MAX, (1 << 30) - 1, (1 << 30) - 2, 1_000_000_000] {
            assert_eq!(timespec(Some(Time::At(1, nsec))).tv_nsec, 999_999_999);
        }
    }
}
