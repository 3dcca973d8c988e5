//! Putting an answer together.

use std::time::Duration;

use rustix::io::Errno;
use virtio::queue::Writer;
use zerocopy::{Immutable, IntoBytes};

use super::wire::{
    Attr, AttrOut, Dirent, EntryOut, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, OpenOut, OutHeader, StatfsOut,
};
use crate::share::{self, DirEntry, Entry, Listing, Opened, Result};

/// Where an answer goes. Its body is written first, its header last, when the outcome is known.
#[derive(Debug)]
pub struct Reply<'m> {
    header: Writer<'m>,
    /// Room behind the header.
    pub body: Writer<'m>,
}

impl<'m> Reply<'m> {
    /// `None` if there is no room for a header.
    pub fn new(mut room: Writer<'m>) -> Option<Self> {
        let body = room.split_off(size_of::<OutHeader>()).ok()?;
        Some(Reply { header: room, body })
    }

    /// Writes the header. Tells the length of the answer.
    pub fn finish(mut self, unique: u64, outcome: Result<()>) -> u32 {
        let (error, body) = match outcome {
            Ok(()) => (0, self.body.written()),
            Err(e) => (-e.raw_os_error(), 0),
        };
        let len =
            u32::try_from(size_of::<OutHeader>() + body).expect("no answer is longer than the largest read");
        self.header.write_obj(&OutHeader { len, error, unique }).expect("room for the header was split off");
        len
    }

    /// Writes a part of the body.
    pub fn put<T: IntoBytes + Immutable>(&mut self, part: &T) -> Result<()> {
        self.body.write_obj(part).map_err(|_| Errno::INVAL)
    }

    /// Writes bytes; fails with `ERANGE` if there is not room for all of them.
    pub fn put_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.body.write_all(bytes).map_err(|_| Errno::RANGE)
    }
}

/// A page of directory entries, with or without their nodes.
#[derive(Debug)]
pub struct Page<'p, 'm> {
    room: &'p mut Writer<'m>,
    left: usize,
    nodes: bool,
}

impl<'p, 'm> Page<'p, 'm> {
    /// At most `size` bytes of `room`.
    pub fn new(room: &'p mut Writer<'m>, size: u32, nodes: bool) -> Self {
        let left = room.left().min(size as usize);
        Page { room, left, nodes }
    }

    fn size(&self, name: usize) -> usize {
        let node = if self.nodes { size_of::<EntryOut>() } else { 0 };
        node + (size_of::<Dirent>() + name).next_multiple_of(8)
    }

    fn write<T: IntoBytes + Immutable + ?Sized>(&mut self, part: &T) {
        self.room.write_all(part.as_bytes()).expect("`fits` said so");
    }
}

impl Listing for Page<'_, '_> {
    fn wants_nodes(&self) -> bool {
        self.nodes
    }

    fn fits(&self, name_len: usize) -> bool {
        self.size(name_len) <= self.left
    }

    fn add(&mut self, entry: DirEntry<'_>, node: Option<Entry>) {
        let name = entry.name.to_bytes();
        let size = self.size(name.len());
        self.left -= size;
        if self.nodes {
            // Node 0 says that the guest is told the name only.
            self.write(&node.map_or(EntryOut::default(), |entry| EntryOut::from(&entry)));
        }
        let namelen = u32::try_from(name.len()).expect("a name of the host's is at most 255 bytes");
        self.write(&Dirent { ino: entry.inode, off: entry.next, namelen, kind: dirent_type(entry.kind) });
        self.write(name);
        let padding = name.len().next_multiple_of(8) - name.len();
        self.write(&[0u8; 8][..padding]);
    }
}

/// `DT_*`: the type bits of a mode, without the permission bits.
fn dirent_type(kind: rustix::fs::FileType) -> u32 {
    kind.as_raw_mode() >> 12
}

impl From<&share::Attr> for Attr {
    fn from(attr: &share::Attr) -> Self {
        let seconds = |i: usize| attr.times[i].tv_sec.cast_unsigned();
        let nanoseconds = |i: usize| u32::try_from(attr.times[i].tv_nsec).unwrap_or(0);
        Attr {
            ino: attr.inode,
            size: attr.size,
            blocks: attr.blocks,
            atime: seconds(0),
            mtime: seconds(1),
            ctime: seconds(2),
            atimensec: nanoseconds(0),
            mtimensec: nanoseconds(1),
            ctimensec: nanoseconds(2),
            mode: attr.mode,
            nlink: attr.links,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.device,
            blksize: attr.block_size,
            flags: 0,
        }
    }
}

impl From<&Entry> for EntryOut {
    fn from(entry: &Entry) -> Self {
        EntryOut {
            nodeid: entry.node,
            generation: 0,
            entry_valid: entry.name_lifetime.as_secs(),
            attr_valid: entry.attr_lifetime.as_secs(),
            entry_valid_nsec: entry.name_lifetime.subsec_nanos(),
            attr_valid_nsec: entry.attr_lifetime.subsec_nanos(),
            attr: Attr::from(&entry.attr),
        }
    }
}

impl From<&(share::Attr, Duration)> for AttrOut {
    fn from((attr, lifetime): &(share::Attr, Duration)) -> Self {
        let attr_valid_nsec = lifetime.subsec_nanos();
        AttrOut { attr_valid: lifetime.as_secs(), attr_valid_nsec, dummy: 0, attr: Attr::from(attr) }
    }
}

impl OpenOut {
    /// What the guest is told of an open file or directory.
    pub fn new(opened: &Opened, directory: bool) -> Self {
        let flags = match (opened.keep_cache, directory) {
            (false, _) => 0,
            (true, false) => FOPEN_KEEP_CACHE,
            (true, true) => FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR,
        };
        OpenOut { fh: opened.handle, flags, padding: 0 }
    }
}

impl From<&rustix::fs::StatVfs> for StatfsOut {
    fn from(stat: &rustix::fs::StatVfs) -> Self {
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: narrow(stat.f_bsize),
            namelen: narrow(stat.f_namemax),
            frsize: narrow(stat.f_frsize),
            ..StatfsOut::default()
        }
    }
}
