//! Regular files: opening, and everything done by handle.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use virtio::queue::{Reader, Writer};

use super::handle::{Handle, Open};
use super::mounts::Mount;
use super::{ROOT, Result, Share};
use crate::sys;

/// Flags of open(2) as the guest gave them.
#[derive(Debug, Clone, Copy)]
pub struct OpenFlags {
    raw: OFlags,
    clear_set_id: bool,
}

/// What a successful open tells the guest.
#[derive(Debug, Clone, Copy)]
pub struct Opened {
    /// Handle number.
    pub handle: u64,
    /// Cached contents of the file still count.
    pub keep_cache: bool,
}

/// How a write is done.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteFlags {
    /// Behind the end, wherever that is.
    pub append: bool,
    /// The writer is unprivileged: clear set-id bits.
    pub clear_set_id: bool,
}

impl OpenFlags {
    /// `raw` as in open(2); `clear_set_id` if truncation must clear set-id bits.
    pub fn new(raw: u32, clear_set_id: bool) -> Result<Self> {
        let raw = OFlags::from_bits_retain(raw);
        if raw & OFlags::RWMODE == OFlags::RWMODE {
            return Err(Errno::INVAL);
        }
        Ok(OpenFlags { raw, clear_set_id })
    }

    /// Those that mean something to the host:
    /// - not `O_APPEND`: a write says itself whether it appends, and pages of the guest's cache never do;
    /// - not `O_DIRECT`: the guest goes past its own cache, but its buffers are not aligned for ours;
    /// - not what creates, follows or blocks: the node says what is opened.
    pub(super) fn for_host(self) -> OFlags {
        self.raw & (OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME)
    }

    pub(super) fn is_exclusive(self) -> bool {
        self.raw.contains(OFlags::EXCL)
    }

    fn writes(self) -> bool {
        self.raw & OFlags::RWMODE != OFlags::RDONLY || self.raw.contains(OFlags::TRUNC)
    }
}

impl Share {
    /// Opens a regular file.
    pub fn open(&self, node: u64, flags: OpenFlags) -> Result<Opened> {
        if node == ROOT {
            return Err(Errno::ISDIR);
        }
        let file = self.nodes.get(node)?;
        match file.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            // The guest's kernel serves fifos, sockets and devices itself. To open one here would be to open the
            // host's.
            _ => return Err(Errno::NXIO),
        }
        if flags.writes() {
            file.mount.check_writable()?;
        }
        self.handles.check_room()?;
        if flags.clear_set_id && flags.raw.contains(OFlags::TRUNC) {
            self.clear_set_id(file.as_fd())?;
        }
        let opened = self.reopen(&*file, flags.for_host())?;
        self.opened(node, &file.mount, opened)
    }

    pub(super) fn opened(&self, node: u64, mount: &Mount, file: std::os::fd::OwnedFd) -> Result<Opened> {
        let handle = self.handles.insert(node, Open::File(file))?;
        Ok(Opened { handle, keep_cache: mount.options.cache.keeps_contents() })
    }

    /// Closes a handle of either kind.
    pub fn release(&self, node: u64, handle: u64) -> Result<()> {
        self.handles.remove(node, handle)
    }

    /// Reads at most `size` bytes at `offset` into `out`; fewer only at the file's end, which is what fewer mean to
    /// the guest.
    pub fn read(
        &self,
        node: u64,
        handle: u64,
        offset: u64,
        size: usize,
        out: &mut Writer<'_>,
    ) -> Result<usize> {
        let open = self.handles.get(node, handle)?;
        let file = open.file()?.as_fd();
        let size = size.min(out.left());
        let mut done = 0;
        while done < size {
            let at = position(offset, done)?;
            let got = out.with_iovecs(size - done, |iovecs| sys::preadv(file, iovecs, at));
            match got.map_err(|e| sys::errno(&e))? {
                0 => break,
                more => done += more,
            }
        }
        Ok(done)
    }

    /// Writes `size` bytes of `data` at `offset`. Tells how many were written, if any were.
    pub fn write(
        &self,
        node: u64,
        handle: u64,
        offset: u64,
        size: usize,
        flags: WriteFlags,
        data: &mut Reader<'_>,
    ) -> Result<usize> {
        let open = self.handles.get(node, handle)?;
        let file = open.file()?.as_fd();
        if size > data.left() {
            return Err(Errno::INVAL);
        }
        if flags.clear_set_id {
            self.clear_set_id(file)?;
        }
        let mut done = 0;
        while done < size {
            let at = position(offset, done)?;
            match data.with_iovecs(size - done, |iovecs| sys::pwritev(file, iovecs, at, flags.append)) {
                Ok(0) => break,
                Ok(more) => done += more,
                Err(_) if done > 0 => break,
                Err(e) => return Err(sys::errno(&e)),
            }
        }
        Ok(done)
    }

    /// Makes written data durable; all attributes too unless `data_only`.
    pub fn sync(&self, node: u64, handle: u64, data_only: bool) -> Result<()> {
        let open = self.handles.get(node, handle)?;
        match &open.open {
            Open::File(file) if data_only => rustix::fs::fdatasync(file),
            Open::File(file) => rustix::fs::fsync(file),
            Open::Directory(stream) => {
                let stream = stream.lock().expect("no thread panics while it holds a listing");
                rustix::fs::fsync(stream.as_fd())
            }
            Open::Root => Ok(()),
        }
    }

    /// fallocate(2).
    pub fn allocate(&self, node: u64, handle: u64, mode: u32, offset: u64, len: u64) -> Result<()> {
        let open = self.handles.get(node, handle)?;
        rustix::fs::fallocate(open.file()?, FallocateFlags::from_bits_retain(mode), offset, len)
    }

    /// The next data or hole at or behind `offset`. The other kinds of seeking need no server.
    pub fn seek(&self, node: u64, handle: u64, offset: u64, whence: u32) -> Result<u64> {
        let open = self.handles.get(node, handle)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::NXIO)?;
        let to = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset.unsigned_abs()),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset.unsigned_abs()),
            _ => return Err(Errno::INVAL),
        };
        // Moves the descriptor's position, which nothing else uses.
        rustix::fs::seek(open.file()?, to)
    }

    /// copy_file_range(2): the host's file system copies, or shares the blocks.
    pub fn copy_range(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> Result<usize> {
        let (source, target) = (self.handle_of(from)?, self.handle_of(to)?);
        let (mut read_at, mut write_at) = (from.2, to.2);
        // The answer holds 32 bits; the guest comes back for the rest.
        let len = usize::try_from(len.min(1 << 30)).expect("at most 2^30");
        rustix::fs::copy_file_range(
            source.file()?,
            Some(&mut read_at),
            target.file()?,
            Some(&mut write_at),
            len,
        )
    }

    fn handle_of(&self, (node, handle, _): (u64, u64, u64)) -> Result<Arc<Handle>> {
        self.handles.get(node, handle)
    }
}

/// A position in a file, as system calls take it.
fn position(offset: u64, done: usize) -> Result<i64> {
    offset.checked_add(done as u64).and_then(|at| i64::try_from(at).ok()).ok_or(Errno::INVAL)
}
