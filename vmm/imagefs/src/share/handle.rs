//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;

use super::Result;
use super::dir::Stream;

/// What is open.
#[derive(Debug)]
pub enum Open {
    /// A regular file.
    File(OwnedFd),
    /// A directory of the host.
    Directory(Mutex<Stream>),
    /// The root of the share.
    Root,
}

/// One open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// The node that it was opened by; each request must name both.
    pub node: u64,
    /// What is open.
    pub open: Open,
}

#[derive(Debug, Default)]
struct Table {
    handles: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// Every handle, by number. Numbers are never used twice.
#[derive(Debug)]
pub struct Handles {
    table: Mutex<Table>,
    limit: usize,
}

impl Handles {
    pub fn new(limit: usize) -> Self {
        Handles { table: Mutex::default(), limit }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no thread panics while it holds the handles")
    }

    pub fn len(&self) -> usize {
        self.table().handles.len()
    }

    /// Fails with `ENFILE` when the guest has opened all it may, before anything is opened for it.
    pub fn check_room(&self) -> Result<()> {
        if self.len() < self.limit { Ok(()) } else { Err(Errno::NFILE) }
    }

    pub fn insert(&self, node: u64, open: Open) -> Result<u64> {
        let mut table = self.table();
        if table.handles.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        table.handles.insert(number, Arc::new(Handle { node, open }));
        Ok(number)
    }

    /// The handle `number`, if it was opened by `node`.
    pub fn get(&self, node: u64, number: u64) -> Result<Arc<Handle>> {
        let table = self.table();
        table.handles.get(&number).filter(|handle| handle.node == node).cloned().ok_or(Errno::BADF)
    }

    /// Closes a handle, once nobody uses it.
    pub fn remove(&self, node: u64, number: u64) -> Result<()> {
        self.get(node, number)?;
        let gone = self.table().handles.remove(&number);
        drop(gone);
        Ok(())
    }

    pub fn clear(&self) {
        let gone: Vec<_> = self.table().handles.drain().collect();
        drop(gone);
    }

    /// Counts the handles of nodes that `is_one` of them.
    pub fn count(&self, is_one: impl Fn(u64) -> bool) -> usize {
        self.table().handles.values().filter(|handle| is_one(handle.node)).count()
    }
}

impl Handle {
    /// The regular file that is open.
    pub fn file(&self) -> Result<&OwnedFd> {
        match &self.open {
            Open::File(file) => Ok(file),
            Open::Directory(_) | Open::Root => Err(Errno::ISDIR),
        }
    }
}
