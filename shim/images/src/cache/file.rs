//! One cache file: a blob's bytes as far as they are there, shared with every VMM that reads it.
//!
//! ```text
//! blobs/<id>/<n>/data    the blob's bytes, sparse, and the ready map (vmm_api::image)
//!                chunks  what was verified with which digest (table.rs); replaced as a whole
//!                boot    the boot in which data was last written, `clean`, or `suspect` (scrub.rs found a chunk wrong)
//!                used    empty; its time is that of the last use
//! ```
//!
//! The order of writes is what makes it safe to be killed anywhere: `chunks` names a chunk before its bytes are written, and its
//! bit is written after its bytes. The page cache survives the service, so after kill -9 what is ready is right. A power loss may
//! keep the bit and lose the bytes: a file of another boot that was not left clean is verified, chunk by chunk, before it is used.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::fs::FlockOperation;
use vmm_api::image::{ready_map_bytes, ready_map_offset};

use super::flight::Flights;
use crate::rafs::BlobTable;
use crate::table::{Contradiction, Table};

const CLEAN: &str = "clean";
const SUSPECT: &str = "suspect";

/// One cache file. Whoever holds it keeps it in the cache.
#[derive(Debug)]
pub struct CacheFile {
    folder: PathBuf,
    boot: String,
    data: File,
    state: Mutex<State>,
}

/// What changes in a cache file.
#[derive(Debug)]
pub struct State {
    /// What is there.
    pub table: Table,
    /// What is on its way.
    pub flights: Flights,
    /// `boot` names this boot. Never false while the ready map on the disk may be ahead of the data.
    dirty: bool,
    /// Chunks written since the file was opened.
    writes: u64,
}

/// Why a cache file cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The disk.
    #[error("{what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The image means another blob by the name.
    #[error("the image contradicts what is known of the blob's chunk at {}", .0.offset)]
    Contradiction(Contradiction),
}

impl FileError {
    fn into_io(self) -> io::Error {
        match self {
            FileError::Io { source, .. } => source,
            FileError::Contradiction(_) => io::Error::other(self.to_string()),
        }
    }
}

impl CacheFile {
    /// Opens or makes the file in `folder` for `blob`, in the boot `boot`. What cannot be believed is thrown away; nobody may read
    /// the file yet. Blocks.
    pub fn open(folder: &Path, blob: &BlobTable, boot: &str) -> Result<Self, FileError> {
        let io = |what, name: &str| {
            let path = folder.join(name);
            move |source| FileError::Io { what, path, source }
        };
        fs::create_dir_all(folder).map_err(io("make", ""))?;
        let data = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join("data"))
            .map_err(io("open", "data"))?;
        let len = ready_map_offset(blob.bytes) + ready_map_bytes(blob.bytes);
        let known = fs::read(folder.join("chunks")).ok().and_then(|bytes| Table::from_bytes(&bytes));
        let mut dirty = false;
        let whole = data.metadata().map_err(io("look at", "data"))?.len() == len;
        let mut table = match known {
            Some(mut table) if whole && table.bytes() == blob.bytes => {
                let mut map = vec![0; table.ready().len()];
                data.read_exact_at(&mut map, ready_map_offset(blob.bytes)).map_err(io("read", "data"))?;
                table.load_ready(&map);
                let written = fs::read_to_string(folder.join("boot")).unwrap_or_default();
                dirty = written != CLEAN;
                if dirty && written != boot {
                    verify(&data, &mut table, folder);
                    // So that it is not verified again at the next opening of this boot.
                    replace(folder, "boot", boot.as_bytes())?;
                }
                if table.ready() != map {
                    data.write_all_at(table.ready(), ready_map_offset(blob.bytes))
                        .map_err(io("write", "data"))?;
                }
                table
            }
            // A sound file of another size: the image means another blob.
            Some(table) if whole_for(&data, table.bytes()) => {
                return Err(FileError::Contradiction(Contradiction { offset: 0 }));
            }
            _ => {
                data.set_len(0).and_then(|()| data.set_len(len)).map_err(io("make", "data"))?;
                Table::new(blob.bytes)
            }
        };
        let fresh = table.merge(blob).map_err(FileError::Contradiction)?;
        let state = State { table, flights: Flights::default(), dirty, writes: 0 };
        let (folder, boot) = (folder.to_owned(), boot.to_owned());
        let file = Self { folder, boot, data, state: Mutex::new(state) };
        if fresh {
            file.save_chunks(&file.lock().table)?;
        }
        file.touch();
        Ok(file)
    }

    /// Adds an image's chunks to those of a file that is in use.
    pub fn merge(&self, blob: &BlobTable) -> Result<(), FileError> {
        let mut state = self.lock();
        if state.table.merge(blob).map_err(FileError::Contradiction)? {
            self.save_chunks(&state.table)?;
        }
        Ok(())
    }

    /// The changing part.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held cannot leave it half changed: every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A descriptor for a VMM: read-only, with a shared lock that lasts as long as the last copy of it. So what a VMM uses is not
    /// evicted, whatever became of the service that gave it out.
    pub fn reader(&self) -> io::Result<OwnedFd> {
        let file = File::open(self.folder.join("data"))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)?;
        Ok(file.into())
    }

    /// Writes a verified chunk, then its bits. Blocks.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)?;
        let mut state = self.lock();
        if !state.dirty {
            // On the disk before any bit can be.
            self.leave_clean().map_err(FileError::into_io)?;
            state.dirty = true;
        }
        state.writes += 1;
        // Under the lock: two writers of one byte of the map must not undo each other.
        let (at, map) = state.table.set_done(offset);
        self.data.write_all_at(&map, ready_map_offset(state.table.bytes()) + at)
    }

    /// Leaves the file so that a later boot may believe it, unless it is being written. Blocks.
    pub fn make_clean(&self) {
        self.touch();
        let (dirty, writes) = {
            let state = self.lock();
            (state.dirty, state.writes)
        };
        if !dirty || self.data.sync_data().is_err() {
            return;
        }
        let mut state = self.lock();
        if state.writes == writes
            && !is_suspect(&self.folder)
            && replace(&self.folder, "boot", CLEAN.as_bytes()).is_ok()
        {
            state.dirty = false;
        }
    }

    /// Notes that the file is not clean; a suspect one stays that.
    fn leave_clean(&self) -> Result<(), FileError> {
        if is_suspect(&self.folder) {
            return Ok(());
        }
        replace(&self.folder, "boot", self.boot.as_bytes())
    }

    /// Notes the time of use, by which eviction chooses.
    fn touch(&self) {
        let path = self.folder.join("used");
        let _ = OpenOptions::new() // then it is older than it is
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .and_then(|file| file.set_modified(SystemTime::now()));
    }

    fn save_chunks(&self, table: &Table) -> Result<(), FileError> {
        replace(&self.folder, "chunks", &table.to_bytes())
    }
}

fn whole_for(data: &File, bytes: u64) -> bool {
    data.metadata().is_ok_and(|m| m.len() == ready_map_offset(bytes) + ready_map_bytes(bytes))
}

/// Replaces a small file so that it is whole at any time.
fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), FileError> {
    let (path, new) = (folder.join(name), folder.join(format!("{name}.new")));
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(folder)?.sync_all()
    });
    written.map_err(|source| {
        let _ = fs::remove_file(&new); // the next one replaces it
        FileError::Io { what: "write", path, source }
    })
}

/// Has the file verified when it is next opened. Blocks.
pub(super) fn mark_suspect(folder: &Path) -> io::Result<()> {
    replace(folder, "boot", SUSPECT.as_bytes()).map_err(FileError::into_io)
}

fn is_suspect(folder: &Path) -> bool {
    fs::read(folder.join("boot")).is_ok_and(|boot| boot == SUSPECT.as_bytes())
}

/// Offsets of the chunks that are there and are not what was verified. Blocks.
pub(super) fn wrong_chunks(data: &File, table: &Table) -> Vec<u64> {
    let mut buffer = Vec::new();
    let mut wrong = Vec::new();
    for (offset, size, digester, digest) in table.done() {
        buffer.resize(size as usize, 0);
        let read = data.read_exact_at(&mut buffer, offset);
        if read.is_err() || digester.digest(&buffer) != digest {
            wrong.push(offset);
        }
    }
    wrong
}

/// Drops the chunks whose bytes are not what they were verified to be.
fn verify(data: &File, table: &mut Table, folder: &Path) {
    let count = table.done().count();
    let wrong = wrong_chunks(data, table);
    table.drop_chunks(&wrong);
    let dropped = wrong.len();
    log::info!("{}: not left clean: {count} chunks verified, {dropped} dropped", folder.display());
}
