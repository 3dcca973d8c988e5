//! The node's cache of image chunks: which files there are, who uses them, and what goes when there is no room.

mod file;
mod flight;
mod scrub;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use tokio::sync::Mutex;

pub use file::{CacheFile, FileError};
pub use flight::{Failure, Flight, Landed, Pilot};
pub use scrub::{Scrubbed, scrub};

use crate::rafs::BlobTable;
use crate::table::Contradiction;

/// Most files of one blob: each beyond the first is of images that contradict each other.
const MAX_VARIANTS: u32 = 64;

/// How long after one that found nothing the next search for files to remove is made.
const EVICT_AGAIN: Duration = Duration::from_secs(1);

/// How large the cache may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes on the disk above which what nobody uses is removed, the least recently used first.
    pub max_bytes: u64,
    /// Bytes of the file system that stay free: below, a chunk that does not fit is refused.
    pub min_free: u64,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    boot: String,
    limits: Limits,
    /// Those in use. The lock also keeps eviction and opening apart.
    files: Mutex<HashMap<PathBuf, Weak<CacheFile>>>,
    /// Bytes on the disk, as last counted and written since.
    used: AtomicU64,
    /// Files removed for room.
    evicted: AtomicU64,
    trash: AtomicU64,
    /// When there was last nothing to remove.
    idle: std::sync::Mutex<Option<Instant>>,
}

impl Cache {
    /// The cache below `root`, in the boot `boot` (the kernel's boot id). Blocks.
    pub fn open(root: &Path, boot: &str, limits: Limits) -> io::Result<Self> {
        for folder in ["blobs", "trash"] {
            fs::create_dir_all(root.join(folder))?;
        }
        for rest in fs::read_dir(root.join("trash"))?.flatten() {
            fs::remove_dir_all(rest.path())?;
        }
        let cache = Self {
            root: root.to_owned(),
            boot: boot.to_owned(),
            limits,
            files: Mutex::default(),
            used: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            trash: AtomicU64::new(0),
            idle: std::sync::Mutex::default(),
        };
        let used = cache.scan().iter().map(|found| found.bytes).sum();
        cache.used.store(used, Ordering::Relaxed);
        Ok(cache)
    }

    /// A file for `blob`: the first of its variants that the image does not contradict.
    pub async fn get(self: &Arc<Self>, blob: &Arc<BlobTable>) -> Result<Arc<CacheFile>, FileError> {
        let mut files = self.files.lock().await;
        let mut contradiction = Contradiction { offset: 0 };
        for variant in 0..MAX_VARIANTS {
            let folder = self.root.join("blobs").join(&blob.id).join(variant.to_string());
            let tried = if let Some(file) = files.get(&folder).and_then(Weak::upgrade) {
                file.merge(blob).map(|()| file)
            } else {
                let (place, blob, boot) = (folder.clone(), Arc::clone(blob), self.boot.clone());
                let opened = blocking(move || CacheFile::open(&place, &blob, &boot)).await;
                opened.map(Arc::new)
            };
            match tried {
                Err(FileError::Contradiction(found)) => contradiction = found,
                Err(error) => return Err(error),
                Ok(file) => {
                    if variant > 0 {
                        log::warn!(
                            "blob {}: the image contradicts others of the same name and has a cache file of its own",
                            blob.id
                        );
                    }
                    files.retain(|_, file| file.strong_count() > 0);
                    files.insert(folder, Arc::downgrade(&file));
                    return Ok(file);
                }
            }
        }
        Err(FileError::Contradiction(contradiction))
    }

    /// Whether `bytes` more have room, after removing what nobody uses where that helps.
    pub async fn has_room(self: &Arc<Self>, bytes: u64) -> bool {
        if self.used.load(Ordering::Relaxed) + bytes > self.limits.max_bytes {
            self.evict(self.limits.max_bytes.saturating_sub(bytes)).await;
        }
        let fits = || self.free() >= self.limits.min_free.saturating_add(bytes);
        if fits() {
            return true;
        }
        // The disk is full of other things too: all that can go does.
        self.evict(0).await;
        fits()
    }

    /// Brings the cache back to its limit, where what is over it is not used any more.
    pub async fn trim(self: &Arc<Self>) {
        if self.used.load(Ordering::Relaxed) > self.limits.max_bytes {
            self.evict(self.limits.max_bytes).await;
        }
    }

    /// Notes that `bytes` were written.
    pub fn wrote(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes on the disk (about), and how many files were removed for room.
    pub fn usage(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.evicted.load(Ordering::Relaxed))
    }

    fn free(&self) -> u64 {
        rustix::fs::statvfs(&self.root).map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
    }

    /// Removes files that nobody uses, the least recently used first, until `target` bytes are left. What is used may be more.
    pub async fn evict(self: &Arc<Self>, target: u64) {
        let files = self.files.lock().await;
        {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            // There was nothing to remove just now, and there is not for every chunk.
            if idle.is_some_and(|since| since.elapsed() < EVICT_AGAIN) {
                return;
            }
            *idle = None;
        }
        let cache = Arc::clone(self);
        let used: Vec<PathBuf> =
            files.iter().filter(|(_, file)| file.strong_count() > 0).map(|(path, _)| path.clone()).collect();
        let removed = blocking(move || cache.remove_unused(&used, target)).await;
        if removed == 0 {
            *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        } else {
            log::info!("cache: removed {removed} files that nobody uses");
        }
        drop(files); // so long nobody could open what was being removed
    }

    fn remove_unused(&self, used: &[PathBuf], target: u64) -> u64 {
        let mut found = self.scan();
        found.sort_by_key(|found| found.last_used);
        let mut total: u64 = found.iter().map(|found| found.bytes).sum();
        let mut removed = 0;
        for file in found {
            if total <= target {
                break;
            }
            if used.contains(&file.folder) || self.discard(&file.folder).is_err() {
                continue;
            }
            total -= file.bytes;
            removed += 1;
        }
        self.used.store(total, Ordering::Relaxed);
        self.evicted.fetch_add(removed, Ordering::Relaxed);
        removed
    }

    /// Removes a cache file unless a VMM holds it. A rename first: what is half removed must not be found as a cache file.
    fn discard(&self, folder: &Path) -> io::Result<()> {
        let data = File::open(folder.join("data"))?;
        rustix::fs::flock(&data, FlockOperation::NonBlockingLockExclusive)?;
        let number = self.trash.fetch_add(1, Ordering::Relaxed);
        let trash = self.root.join("trash").join(number.to_string());
        fs::rename(folder, &trash)?;
        if let Some(blob) = folder.parent() {
            let _ = fs::remove_dir(blob); // fails while it has other variants
        }
        fs::remove_dir_all(&trash)
    }

    fn scan(&self) -> Vec<Found> {
        let blobs = fs::read_dir(self.root.join("blobs")).into_iter().flatten().flatten();
        let variants = blobs.flat_map(|blob| fs::read_dir(blob.path()).into_iter().flatten().flatten());
        variants
            .filter_map(|variant| {
                let folder = variant.path();
                let data = fs::metadata(folder.join("data")).ok()?;
                let used = fs::metadata(folder.join("used")).and_then(|used| used.modified());
                let last_used = used.unwrap_or(SystemTime::UNIX_EPOCH);
                Some(Found { folder, bytes: data.blocks() * 512, last_used })
            })
            .collect()
    }
}

struct Found {
    folder: PathBuf,
    bytes: u64,
    last_used: SystemTime,
}

/// Runs what waits for the disk or computes for long where it holds nobody up.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The service is ending.
        Err(_) => std::future::pending().await,
    }
}
