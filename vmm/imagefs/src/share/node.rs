//! The nodes that the guest knows, each with the number of times it was told of it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::mounts::Mount;
use super::{ROOT, Result};

/// An inode of the host. The descriptor keeps it from being reused, so that it is the same one as long as we know it.
#[derive(Debug)]
pub struct Node {
    /// The mounted directory that it lies below.
    pub mount: Arc<Mount>,
    /// Regular file, directory, …: an inode never changes its type.
    pub kind: FileType,
    file: OwnedFd,
}

impl Node {
    /// A node held by `file`, an `O_PATH` descriptor.
    pub fn new(mount: Arc<Mount>, file: OwnedFd, kind: FileType) -> Self {
        Node { mount, kind, file }
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What makes two files the same: where the guest sees it, and the host's mount, device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    mount: u64,
    host_mount: u64,
    device: (u32, u32),
    inode: u64,
}

impl Key {
    /// The key of a file below `mount`.
    pub fn of(mount: &Mount, stat: &Statx) -> Self {
        Key {
            mount: mount.number,
            host_mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }
}

#[derive(Debug)]
struct Slot {
    key: Key,
    /// `None` once the mount is gone: the guest still knows the number, but it leads nowhere.
    node: Option<Arc<Node>>,
    /// How often the guest was told of it and has not forgotten it.
    lookups: u64,
    /// Root of a mount: stays without lookups.
    pinned: bool,
}

#[derive(Debug)]
struct Table {
    slots: HashMap<u64, Slot>,
    numbers: HashMap<Key, u64>,
    next: u64,
}

/// Every node, by its number and by what it is. Numbers are never used twice.
#[derive(Debug)]
pub struct Nodes {
    table: Mutex<Table>,
    limit: usize,
}

impl Nodes {
    pub fn new(limit: usize) -> Self {
        let table = Table { slots: HashMap::new(), numbers: HashMap::new(), next: ROOT + 1 };
        Nodes { table: Mutex::new(table), limit }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no thread panics while it holds the nodes")
    }

    pub fn len(&self) -> usize {
        self.table().slots.len()
    }

    /// Whether there is room for nodes that nobody asked for by name.
    pub fn has_room_to_spare(&self) -> bool {
        self.len() < self.limit - self.limit / 4
    }

    /// The node of this number. `ENOENT` if its mount is gone, `ESTALE` if the guest was never told of it.
    pub fn get(&self, number: u64) -> Result<Arc<Node>> {
        match self.table().slots.get(&number) {
            Some(Slot { node: Some(node), .. }) => Ok(node.clone()),
            Some(Slot { node: None, .. }) => Err(Errno::NOENT),
            None => Err(Errno::STALE),
        }
    }

    /// Counts one more lookup of a node already known.
    pub fn refer(&self, key: &Key) -> Option<u64> {
        self.table().refer(key)
    }

    /// Counts one more lookup of the node with this key, which is `node` if it is new.
    pub fn refer_or_insert(&self, key: Key, node: Node) -> Result<u64> {
        let mut table = self.table();
        if let Some(number) = table.refer(&key) {
            return Ok(number);
        }
        if node.mount.gone.load(Ordering::Relaxed) {
            return Err(Errno::NOENT);
        }
        if table.slots.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        Ok(table.insert(key, node, 1, false))
    }

    /// Adds the root of a mount.
    pub fn pin(&self, key: Key, node: Node) -> u64 {
        self.table().insert(key, node, 0, true)
    }

    /// Takes back `count` lookups.
    pub fn forget(&self, number: u64, count: u64) {
        let mut table = self.table();
        let Some(slot) = table.slots.get_mut(&number) else { return };
        slot.lookups = slot.lookups.saturating_sub(count);
        if slot.lookups == 0 && !slot.pinned {
            let gone = table.remove(number);
            drop(table);
            // Closing may be slow: not under the lock.
            drop(gone);
        }
    }

    /// Lets go of every node below `mount`. Numbers that the guest still knows lead nowhere from now on.
    pub fn release_mount(&self, mount: &Mount) {
        let mut table = self.table();
        mount.gone.store(true, Ordering::Relaxed);
        let below = table.slots.iter().filter(|(_, slot)| slot.key.mount == mount.number);
        let numbers: Vec<u64> = below.map(|(&number, _)| number).collect();
        let mut gone = Vec::with_capacity(numbers.len());
        for number in numbers {
            let slot = table.slots.get_mut(&number).expect("just listed");
            slot.pinned = false;
            gone.extend(slot.node.take());
            let (key, unknown) = (slot.key, slot.lookups == 0);
            table.numbers.remove(&key);
            if unknown {
                table.slots.remove(&number);
            }
        }
        drop(table);
        drop(gone);
    }

    /// Forgets every node but the roots of mounts.
    pub fn reset(&self) {
        let mut table = self.table();
        let numbers: Vec<u64> = table.slots.keys().copied().collect();
        let mut gone = Vec::new();
        for number in numbers {
            let slot = table.slots.get_mut(&number).expect("just listed");
            slot.lookups = 0;
            if !slot.pinned {
                gone.extend(table.remove(number));
            }
        }
        drop(table);
        drop(gone);
    }
}

impl Table {
    fn refer(&mut self, key: &Key) -> Option<u64> {
        let number = *self.numbers.get(key)?;
        let slot = self.slots.get_mut(&number).expect("`numbers` names slots that are there");
        slot.lookups = slot.lookups.saturating_add(1);
        Some(number)
    }

    fn insert(&mut self, key: Key, node: Node, lookups: u64, pinned: bool) -> u64 {
        let number = self.next;
        self.next += 1;
        self.slots.insert(number, Slot { key, node: Some(Arc::new(node)), lookups, pinned });
        self.numbers.insert(key, number);
        number
    }

    fn remove(&mut self, number: u64) -> Option<Arc<Node>> {
        let slot = self.slots.remove(&number)?;
        // A dead slot's key may belong to another by now (never today: mounts are numbered afresh).
        if self.numbers.get(&slot.key) == Some(&number) {
            self.numbers.remove(&slot.key);
        }
        slot.node
    }
}
