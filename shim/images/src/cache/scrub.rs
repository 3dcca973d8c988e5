//! A look at all that is in a cache: is it still what was verified? Disks change bytes, and so may who has access to them. Reads only,
//! so a service may be at work meanwhile.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmm_api::image::ready_map_offset;

use super::file::{mark_suspect, wrong_chunks};
use crate::table::Table;

/// What was found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Scrubbed {
    /// Cache files.
    pub files: u64,
    /// Chunks that are there.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of them, those that are not what was verified: the folder of the cache file, and the offset in the blob.
    pub wrong: Vec<(PathBuf, u64)>,
}

/// Verifies every chunk of the cache below `root`. A file with a wrong one is marked, so that it is verified and the chunk
/// fetched again when the file is next opened; who reads it now reads on, since a bit is never taken back. Blocks.
///
/// # Errors
/// Those of reading `root`, and of marking a file. A file that is no cache file is left out, as the service would not believe it.
pub fn scrub(root: &Path) -> io::Result<Scrubbed> {
    let mut scrubbed = Scrubbed::default();
    for blob in fs::read_dir(root.join("blobs"))? {
        for variant in fs::read_dir(blob?.path()).into_iter().flatten().flatten() {
            let folder = variant.path();
            let Some((data, table)) = open(&folder) else { continue };
            let wrong = wrong_chunks(&data, &table);
            let (bytes, chunks, _) = table.filled();
            scrubbed.files += 1;
            scrubbed.chunks += chunks as u64;
            scrubbed.bytes += bytes;
            // It may have been evicted meanwhile.
            if !wrong.is_empty() && folder.exists() {
                mark_suspect(&folder)?;
            }
            scrubbed.wrong.extend(wrong.into_iter().map(|offset| (folder.clone(), offset)));
        }
    }
    Ok(scrubbed)
}

/// A cache file as the service would believe it.
fn open(folder: &Path) -> Option<(File, Table)> {
    // A chunk is named before its bits are set: the names first, so that each bit that is seen may be one without a name.
    let mut table = Table::from_bytes(&fs::read(folder.join("chunks")).ok()?)?;
    let data = File::open(folder.join("data")).ok()?;
    let mut map = vec![0; table.ready().len()];
    data.read_exact_at(&mut map, ready_map_offset(table.bytes())).ok()?;
    table.load_ready(&map);
    Some((data, table))
}
