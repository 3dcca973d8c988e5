//! What there is: an index in memory, and for each snapshot a folder.
//!
//! ```text
//! ROOT/snapshots/ID/{meta.json,fs,work}     a snapshot; the folder comes and goes by rename
//! ROOT/new/ID                               one that is being made
//! ROOT/removed/ID                           what Cleanup deletes
//! ```
//!
//! Each change of a snapshot is one rename, of its folder or of its `meta.json`, so that a kill at any point leaves the state before or
//! after it. What `new` and `removed` hold at start is deleted.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::error::SnapshotError;
use crate::remap;
use crate::snapshot::{Kind, Labels, Snapshot, Usage, now};

const META: &str = "meta.json";

/// All snapshots below one folder.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    snapshots: BTreeMap<String, Snapshot>,
    next: u64,
}

impl Store {
    /// Opens what is below `root`, or makes it.
    pub fn open(root: &Path) -> Result<Store, SnapshotError> {
        let mut store = Store { root: root.to_owned(), snapshots: BTreeMap::new(), next: 1 };
        for folder in ["snapshots", "new", "removed"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(SnapshotError::at(&path))?;
        }
        // Below it, other people's set-uid programs.
        fs::set_permissions(root, fs::Permissions::from_mode(0o700)).map_err(SnapshotError::at(root))?;
        for (id, folder) in numbered(&root.join("snapshots"))? {
            store.next = store.next.max(id + 1);
            let path = folder.join(META);
            let text = fs::read(&path).map_err(SnapshotError::at(&path))?;
            let snapshot: Snapshot = serde_json::from_slice(&text)
                .map_err(|e| SnapshotError::Io { path: path.clone(), source: e.into() })?;
            store.snapshots.insert(snapshot.name.clone(), snapshot);
        }
        store.cleanup()?;
        for (_, folder) in numbered(&root.join("new"))? {
            fs::remove_dir_all(&folder).map_err(SnapshotError::at(&folder))?;
        }
        Ok(store)
    }

    /// A snapshot by its name.
    pub fn get(&self, name: &str) -> Result<&Snapshot, SnapshotError> {
        self.snapshots.get(name).ok_or_else(|| SnapshotError::NotFound(name.to_owned()))
    }

    /// All of them, by name.
    pub fn all(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values()
    }

    /// A snapshot and what it stands on, from the top.
    pub fn chain(&self, name: &str) -> Result<Vec<&Snapshot>, SnapshotError> {
        let mut chain = vec![self.get(name)?];
        while let Some(parent) = &chain[chain.len() - 1].parent {
            chain.push(self.get(parent)?);
        }
        Ok(chain)
    }

    /// Where a snapshot's files are.
    pub fn files(&self, snapshot: &Snapshot) -> PathBuf {
        self.folder(snapshot.id).join("fs")
    }

    /// overlayfs's own folder beside them.
    pub fn work(&self, snapshot: &Snapshot) -> PathBuf {
        self.folder(snapshot.id).join("work")
    }

    fn folder(&self, id: u64) -> PathBuf {
        self.root.join("snapshots").join(id.to_string())
    }

    /// Makes an empty snapshot on top of `parent`.
    pub fn create(
        &mut self,
        kind: Kind,
        name: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<&Snapshot, SnapshotError> {
        if name.is_empty() {
            return Err(SnapshotError::Invalid("a snapshot without a name".to_owned()));
        }
        if self.snapshots.contains_key(name) {
            return Err(SnapshotError::Exists(name.to_owned()));
        }
        let parent = (!parent.is_empty()).then(|| self.committed(parent)).transpose()?;
        // The root of the container has its owner from the layer below, if it is not another's there than here.
        let own = remap::root(&labels)?;
        let below = || parent.map(|parent| self.files(parent)).map(|from| owner(&from)).transpose();
        let owner = own.map_or_else(below, |own| Ok(Some(own)))?;
        let id = self.next;
        let (created, usage) = (now(), Usage::default());
        let snapshot = Snapshot {
            id,
            name: name.to_owned(),
            parent: parent.map(|parent| parent.name.clone()),
            kind,
            created,
            updated: created,
            labels,
            usage,
        };
        let folder = self.root.join("new").join(id.to_string());
        let files = folder.join("fs");
        fs::create_dir_all(&files).map_err(SnapshotError::at(&files))?;
        fs::set_permissions(&files, fs::Permissions::from_mode(0o755)).map_err(SnapshotError::at(&files))?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::chown(&files, Some(uid), Some(gid)).map_err(SnapshotError::at(&files))?;
        }
        if kind == Kind::Active {
            let work = folder.join("work");
            fs::create_dir(&work).map_err(SnapshotError::at(&work))?;
            fs::set_permissions(&work, fs::Permissions::from_mode(0o711))
                .map_err(SnapshotError::at(&work))?;
        }
        write_meta(&folder, &snapshot)?;
        let place = self.folder(id);
        fs::rename(&folder, &place).map_err(SnapshotError::at(&place))?;
        sync(&self.root.join("snapshots"))?;
        self.next += 1;
        Ok(self.snapshots.entry(name.to_owned()).or_insert(snapshot))
    }

    /// Makes what is active a layer named `name`. `parent`, where not empty, is what it is to stand on, if it was made to stand on
    /// nothing.
    pub fn commit(
        &mut self,
        name: &str,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> Result<&Snapshot, SnapshotError> {
        let active = self.get(key)?;
        if active.kind != Kind::Active {
            return Err(kind_error(active, Kind::Active));
        }
        if self.snapshots.contains_key(name) {
            return Err(SnapshotError::Exists(name.to_owned()));
        }
        let parent = match (parent, &active.parent) {
            ("", own) => own.clone(),
            (parent, None) => Some(self.committed(parent)?.name.clone()),
            (parent, Some(own)) if parent == own => Some(own.clone()),
            (parent, Some(own)) => {
                return Err(SnapshotError::Invalid(format!(
                    "{key:?} stands on {own:?}, and is to stand on {parent:?}"
                )));
            }
        };
        let mut all = active.labels.clone();
        all.extend(labels);
        let usage = disk_usage(&self.files(active))?;
        let snapshot = Snapshot {
            name: name.to_owned(),
            parent,
            kind: Kind::Committed,
            updated: now(),
            labels: all,
            usage,
            ..active.clone()
        };
        write_meta(&self.folder(snapshot.id), &snapshot)?;
        self.snapshots.remove(key);
        Ok(self.snapshots.entry(name.to_owned()).or_insert(snapshot))
    }

    /// Takes a snapshot away; its files go at the next [`Store::cleanup`].
    pub fn remove(&mut self, name: &str) -> Result<(), SnapshotError> {
        let id = self.get(name)?.id;
        if let Some(child) = self.snapshots.values().find(|other| other.parent.as_deref() == Some(name)) {
            return Err(SnapshotError::HasChild { name: name.to_owned(), child: child.name.clone() });
        }
        let to = self.root.join("removed").join(id.to_string());
        fs::rename(self.folder(id), &to).map_err(SnapshotError::at(&to))?;
        self.snapshots.remove(name);
        Ok(())
    }

    /// Deletes the files of what was removed.
    pub fn cleanup(&self) -> Result<(), SnapshotError> {
        for (_, folder) in numbered(&self.root.join("removed"))? {
            fs::remove_dir_all(&folder).map_err(SnapshotError::at(&folder))?;
        }
        Ok(())
    }

    /// Gives a snapshot other labels.
    pub fn relabel(&mut self, name: &str, labels: Labels) -> Result<&Snapshot, SnapshotError> {
        let snapshot = Snapshot { labels, updated: now(), ..self.get(name)?.clone() };
        write_meta(&self.folder(snapshot.id), &snapshot)?;
        self.snapshots.insert(name.to_owned(), snapshot);
        self.get(name)
    }

    /// What a snapshot takes now.
    pub fn usage(&self, name: &str) -> Result<Usage, SnapshotError> {
        let snapshot = self.get(name)?;
        if snapshot.kind == Kind::Committed { Ok(snapshot.usage) } else { disk_usage(&self.files(snapshot)) }
    }

    fn committed(&self, name: &str) -> Result<&Snapshot, SnapshotError> {
        let snapshot = self.get(name)?;
        let is = snapshot.kind == Kind::Committed;
        is.then_some(snapshot).ok_or_else(|| SnapshotError::ParentNotCommitted(name.to_owned()))
    }
}

pub(crate) fn kind_error(snapshot: &Snapshot, wanted: Kind) -> SnapshotError {
    SnapshotError::Kind { name: snapshot.name.clone(), is: snapshot.kind.word(), wanted: wanted.word() }
}

/// Folders whose name is a number.
fn numbered(folder: &Path) -> Result<Vec<(u64, PathBuf)>, SnapshotError> {
    let entries = fs::read_dir(folder).map_err(SnapshotError::at(folder))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(SnapshotError::at(folder))?;
        if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            found.push((id, entry.path()));
        }
    }
    Ok(found)
}

/// User and group.
pub(crate) fn owner(path: &Path) -> Result<(u32, u32), SnapshotError> {
    let metadata = fs::metadata(path).map_err(SnapshotError::at(path))?;
    Ok((metadata.uid(), metadata.gid()))
}

fn write_meta(folder: &Path, snapshot: &Snapshot) -> Result<(), SnapshotError> {
    let (new, path) = (folder.join("meta.json.new"), folder.join(META));
    let text = serde_json::to_vec(snapshot).expect("strings and numbers can be written");
    let mut file = File::create(&new).map_err(SnapshotError::at(&new))?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(SnapshotError::at(&new))?;
    fs::rename(&new, &path).map_err(SnapshotError::at(&path))?;
    sync(folder)
}

fn sync(folder: &Path) -> Result<(), SnapshotError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(SnapshotError::at(folder))
}

/// Of all that is below `folder`, itself included.
fn disk_usage(folder: &Path) -> Result<Usage, SnapshotError> {
    let (mut usage, mut seen, mut folders) = (Usage::default(), HashSet::new(), vec![folder.to_owned()]);
    let mut count = |metadata: &fs::Metadata| {
        if seen.insert((metadata.dev(), metadata.ino())) {
            usage.bytes += metadata.blocks() * 512;
            usage.inodes += 1;
        }
    };
    count(&fs::symlink_metadata(folder).map_err(SnapshotError::at(folder))?);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(SnapshotError::at(&folder))? {
            let entry = entry.map_err(SnapshotError::at(&folder))?;
            let metadata = entry.metadata().map_err(SnapshotError::at(&folder))?;
            count(&metadata);
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(usage)
}
