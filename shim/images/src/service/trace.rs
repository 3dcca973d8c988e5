//! What a start read: recorded once, fetched ahead the next time.
//!
//! Only misses are seen here (a VMM reads what is ready without asking), so a trace is the union of what was missed at starts: a
//! replayed start misses little, and what it misses is added. One file a bootstrap, replaced as a whole; a broken one is no trace.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::rafs::{BlobTable, ChunkRef};

/// How long after the opening reads belong to the start.
const START: Duration = Duration::from_secs(30);

/// Most chunks of a trace.
const MAX_CHUNKS: usize = 65_536;

/// Most traces that are kept.
const MAX_TRACES: usize = 1024;

const MAGIC: &[u8; 8] = b"ctvmtrc1";

/// The trace of one image, as known and as it is being added to.
#[derive(Debug)]
pub struct Trace {
    file: PathBuf,
    opened: Instant,
    known: Vec<ChunkRef>,
    fresh: Mutex<(Vec<ChunkRef>, HashSet<ChunkRef>)>,
}

impl Trace {
    /// The trace of the image whose bootstrap has this digest, in `folder`. What does not fit to the image is left out. Blocks.
    pub fn load(folder: &Path, bootstrap: &str, blobs: &[Arc<BlobTable>]) -> Self {
        let file = folder.join(bootstrap);
        let known = fs::read(&file).ok().and_then(|bytes| parse(&bytes)).unwrap_or_default();
        let exists = |r: &ChunkRef| {
            blobs.get(r.blob as usize).is_some_and(|blob| (r.chunk as usize) < blob.chunks.len())
        };
        let known: Vec<ChunkRef> = known.into_iter().filter(exists).collect();
        let seen = known.iter().copied().collect();
        Self { file, opened: Instant::now(), known, fresh: Mutex::new((Vec::new(), seen)) }
    }

    /// What earlier starts read, in their order.
    pub fn known(&self) -> &[ChunkRef] {
        &self.known
    }

    /// A guest missed these chunks.
    pub fn missed(&self, chunks: impl Iterator<Item = ChunkRef>) {
        if self.opened.elapsed() > START {
            return;
        }
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        let (list, seen) = &mut *fresh;
        for chunk in chunks {
            if seen.len() < MAX_CHUNKS && seen.insert(chunk) {
                list.push(chunk);
            }
        }
    }

    /// Writes down what was added. Blocks.
    pub fn save(&self) {
        let fresh = std::mem::take(&mut self.fresh.lock().unwrap_or_else(PoisonError::into_inner).0);
        if fresh.is_empty() {
            return;
        }
        let mut bytes = MAGIC.to_vec();
        for chunk in self.known.iter().chain(&fresh) {
            bytes.extend_from_slice(&chunk.blob.to_le_bytes());
            bytes.extend_from_slice(&chunk.chunk.to_le_bytes());
        }
        // A process number in the name: two VMs of one image may end at once.
        let new = self.file.with_extension(format!("{:?}.new", std::thread::current().id()));
        let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, &self.file));
        if let Err(error) = written {
            let _ = fs::remove_file(&new); // the next start removes it
            log::warn!("write the access trace {}: {error}", self.file.display());
        }
    }
}

/// Removes the oldest traces where there are too many, and what a killed service left half written. Blocks.
pub fn tidy(folder: &Path) {
    let mut found: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort();
    let surplus = found.len().saturating_sub(MAX_TRACES);
    for (index, (_, path)) in found.iter().enumerate() {
        if index < surplus || path.extension().is_some() {
            let _ = fs::remove_file(path); // the next start tries again
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Vec<ChunkRef>> {
    let (records, []) = bytes.strip_prefix(MAGIC)?.as_chunks::<8>() else { return None };
    let number = |four: &[u8]| four.first_chunk().map_or(0, |four| u32::from_le_bytes(*four));
    let chunk = |record: &[u8; 8]| ChunkRef { blob: number(&record[..4]), chunk: number(&record[4..]) };
    Some(records.iter().take(MAX_CHUNKS).map(chunk).collect())
}
