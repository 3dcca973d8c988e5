//! Listing directories.
//!
//! The guest asks for a page at a time and names the position to go on from. The host gives entries by the buffer;
//! what did not fit the guest's page is kept for the next request, so that a large directory is read once and not once
//! a page.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::handle::Open;
use super::node::Node;
use super::{Entry, Name, Opened, ROOT, Result, Share, attr};

/// Bytes asked from the host at a time.
const BUFFER: usize = 8192;
/// Most listings that may keep entries between requests; about 12 KiB each.
const MOST_KEPT: usize = 256;

/// One entry of a directory.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// Inode number that the guest sees.
    pub inode: u64,
    /// Position behind the entry.
    pub next: u64,
    /// Its type.
    pub kind: FileType,
    /// Its name.
    pub name: &'a CStr,
}

/// Where entries go: the guest's page.
pub trait Listing {
    /// Whether each entry comes with its node.
    fn wants_nodes(&self) -> bool;
    /// Whether an entry with a name of this many bytes still fits.
    fn fits(&self, name_len: usize) -> bool;
    /// Takes an entry that fits. `node` is `None` for `.`, `..`, and what could not be looked up.
    fn add(&mut self, entry: DirEntry<'_>, node: Option<Entry>);
}

/// How many listings keep entries.
#[derive(Debug, Default)]
pub struct Kept(Arc<AtomicUsize>);

#[derive(Debug)]
struct Permit(Arc<AtomicUsize>);

#[derive(Debug)]
struct Pending {
    inode: u64,
    next: u64,
    kind: FileType,
    name: CString,
}

/// An open directory of the host, and where its reader stands.
#[derive(Debug)]
pub struct Stream {
    dir: OwnedFd,
    /// Entries that the host gave and the guest has not taken, the first of them at `position`.
    pending: VecDeque<Pending>,
    position: u64,
    at_end: bool,
    /// To keep what is pending from one request to the next.
    permit: Option<Permit>,
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Stream {
    fn new(dir: OwnedFd) -> Self {
        Stream { dir, pending: VecDeque::new(), position: 0, at_end: false, permit: None }
    }

    /// Goes to `offset`, unless it stands there. To go to the start is to see the directory afresh.
    fn seek(&mut self, offset: u64) -> Result<()> {
        if offset != self.position || offset == 0 {
            rustix::fs::seek(&self.dir, SeekFrom::Start(offset))?;
            self.pending.clear();
            self.position = offset;
            self.at_end = false;
        }
        Ok(())
    }

    /// The entry at the position, if there is one.
    fn peek(&mut self) -> Result<Option<&Pending>> {
        if self.pending.is_empty() && !self.at_end {
            self.fill()?;
        }
        Ok(self.pending.front())
    }

    fn take(&mut self) {
        if let Some(taken) = self.pending.pop_front() {
            self.position = taken.next;
        }
    }

    fn fill(&mut self) -> Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(self.dir.as_fd(), &mut buffer);
        loop {
            let Some(entry) = entries.next() else {
                self.at_end = true;
                return Ok(());
            };
            let entry = entry?;
            self.pending.push_back(Pending {
                inode: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
                name: entry.file_name().to_owned(),
            });
            if entries.is_buffer_empty() {
                return Ok(());
            }
        }
    }

    /// After a request: keeps what is pending if it may, and drops it otherwise; then the next request reads it again.
    fn settle(&mut self, kept: &Kept) {
        if self.pending.is_empty() {
            self.permit = None;
        } else if self.permit.is_none() {
            self.permit = kept.permit();
            if self.permit.is_none() {
                self.pending = VecDeque::new();
                // No position of the host's, so that the next request seeks.
                self.position = u64::MAX;
            }
        }
    }
}

impl Share {
    /// Opens a directory.
    pub fn open_directory(&self, node: u64) -> Result<Opened> {
        self.handles.check_room()?;
        let (open, keep_cache) = if node == ROOT {
            (Open::Root, false)
        } else {
            let dir = self.directory(node)?;
            let stream = Stream::new(self.reopen(&*dir, OFlags::RDONLY | OFlags::DIRECTORY)?);
            (Open::Directory(Mutex::new(stream)), dir.mount.options.cache.keeps_contents())
        };
        Ok(Opened { handle: self.handles.insert(node, open)?, keep_cache })
    }

    /// Lists from position `offset` until `page` is full or the directory ends.
    pub fn list(&self, node: u64, handle: u64, offset: u64, page: &mut impl Listing) -> Result<()> {
        let open = self.handles.get(node, handle)?;
        match &open.open {
            Open::File(_) => Err(Errno::NOTDIR),
            Open::Root => {
                self.list_mounts(offset, page);
                Ok(())
            }
            Open::Directory(stream) => {
                let mut stream = stream.lock().expect("no thread panics while it holds a listing");
                self.list_host(node, &mut stream, offset, page)
            }
        }
    }

    fn list_host(&self, node: u64, stream: &mut Stream, offset: u64, page: &mut impl Listing) -> Result<()> {
        // Gone with its mount: names still list, but lead nowhere.
        let dir = self.nodes.get(node).ok();
        let device = attr::stat(stream.as_fd()).map(|stat| (stat.stx_dev_major, stat.stx_dev_minor))?;
        stream.seek(offset)?;
        let mut listed = 0;
        loop {
            let next = match stream.peek() {
                Ok(Some(next)) if page.fits(next.name.as_bytes().len()) => next,
                Ok(_) => break,
                // An error can be told only if nothing else is.
                Err(_) if listed > 0 => break,
                Err(e) => return Err(e),
            };
            let inode = self.fold(device, next.inode);
            let entry = DirEntry { inode, next: next.next, kind: next.kind, name: &next.name };
            let found =
                dir.as_deref().filter(|_| page.wants_nodes()).and_then(|dir| self.found(dir, &next.name));
            page.add(entry, found);
            listed += 1;
            stream.take();
        }
        stream.settle(&self.listings);
        Ok(())
    }

    /// The node of a listed name, unless there is reason not to.
    fn found(&self, dir: &Node, name: &CStr) -> Option<Entry> {
        let name = Name::check(name).ok()?;
        if !self.nodes.has_room_to_spare() {
            return None;
        }
        self.lookup_below(dir, name).ok()
    }

    /// The root lists `.`, `..` and the mounts; a mount's position is its number plus two.
    fn list_mounts(&self, offset: u64, page: &mut impl Listing) {
        for (position, name) in [(1, c"."), (2, c"..")] {
            if offset < position {
                if !page.fits(name.to_bytes().len()) {
                    return;
                }
                page.add(DirEntry { inode: ROOT, next: position, kind: FileType::Directory, name }, None);
            }
        }
        for (number, name, root) in self.mounts_after(offset.saturating_sub(2)) {
            if !page.fits(name.as_bytes().len()) {
                return;
            }
            let checked = Name::check(&name).ok().filter(|_| page.wants_nodes());
            let found = checked.and_then(|name| self.lookup(ROOT, name).ok());
            let inode = found.map_or(root, |found| found.attr.inode);
            page.add(DirEntry { inode, next: number + 2, kind: FileType::Directory, name: &name }, found);
        }
    }
}

impl Kept {
    /// Leave to keep entries, unless too many listings have it.
    fn permit(&self) -> Option<Permit> {
        let permit = Permit(self.0.clone());
        (self.0.fetch_add(1, Ordering::Relaxed) < MOST_KEPT).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_few_and_come_back() {
        let kept = Kept::default();
        let mut permits: Vec<Permit> =
            (0..MOST_KEPT).map(|_| kept.permit().expect("there are more")).collect();
        assert!(kept.permit().is_none());
        assert!(kept.permit().is_none(), "what was refused counts no more");
        permits.pop();
        assert!(kept.permit().is_some());
        drop(permits);
        assert_eq!(kept.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_listing_closed_half_way_gives_its_permit_back() {
        let (kept, dir) = (Kept::default(), std::fs::File::open(".").unwrap());
        let mut stream = Stream::new(dir.into());
        assert!(stream.peek().unwrap().is_some());
        stream.settle(&kept);
        assert_eq!(kept.0.load(Ordering::Relaxed), 1);
        stream.settle(&kept);
        assert_eq!(kept.0.load(Ordering::Relaxed), 1);
        drop(stream);
        assert_eq!(kept.0.load(Ordering::Relaxed), 0);
    }
}
