//! Opening an image: from a bootstrap and a configuration to blobs, cache files and descriptors.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use sha2::{Digest, Sha256};
use vmm_api::image::{Blob, OpenedImage};

use super::Service;
use super::trace::Trace;
use crate::cache::{FileError, blocking};
use crate::config::nydusd::{Daemon, DaemonError};
use crate::config::{Ahead, Backend};
use crate::fetch::{Fetcher, IndexCell, OpenBlob};
use crate::rafs::{BlobTable, ChunkRef, Image, MAX_BOOTSTRAP, RafsError, v5_as_erofs};
use crate::source::HttpError;

/// The version whose bootstraps are what a guest mounts.
const MOUNTED: u8 = 6;

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The bootstrap's file.
    #[error("read the bootstrap {path}")]
    Bootstrap {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("the bootstrap {path} is refused")]
    Rafs {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: RafsError,
    },
    /// The daemon's configuration.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// No configuration at all.
    #[error("the image comes without a daemon's configuration, and the service's own names no folders")]
    NoBackend,
    /// An image of version 5 as what a guest mounts.
    #[error("keep an EROFS of {bytes} bytes for the bootstrap {path} in memory")]
    Memory {
        /// Of which.
        path: String,
        /// Its size.
        bytes: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The back end.
    #[error(transparent)]
    Registry(#[from] HttpError),
    /// The cache.
    #[error("the cache file of blob {blob}")]
    Cache {
        /// Of which.
        blob: String,
        /// Why not.
        #[source]
        source: FileError,
    },
    /// A descriptor for the VMM.
    #[error("open the cache file of blob {blob} for a VM")]
    Reader {
        /// Of which.
        blob: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A bootstrap as read. All that have an image open share it: an image of many files has a table of many megabytes.
#[derive(Debug)]
pub struct Parsed {
    version: u8,
    /// What a guest mounts, where that is not the bootstrap itself: a sealed file in memory.
    mounted: Option<File>,
    blobs: Vec<Arc<BlobTable>>,
    /// Of each blob, where it is a plain layer.
    indexes: Vec<Arc<IndexCell>>,
    /// Its own list of what to fetch ahead.
    pub prefetch: Vec<ChunkRef>,
}

/// The bootstraps of open images, by their digest.
pub type Known = Mutex<HashMap<String, Weak<Parsed>>>;

/// An open image.
#[derive(Debug)]
pub struct OpenImage {
    /// For logs.
    pub name: String,
    /// Its blobs.
    pub blobs: Vec<Arc<OpenBlob>>,
    /// What its bootstrap says.
    pub parsed: Arc<Parsed>,
    /// What starts read.
    pub trace: Trace,
    /// Brings chunks.
    pub fetcher: Arc<Fetcher>,
}

impl OpenImage {
    /// Whether all its chunks are in the cache. A look into a table for each of them, up to the first that is not: 0.1 s for a million.
    /// Blocks.
    pub fn is_whole(&self) -> bool {
        self.blobs.iter().all(|blob| {
            let state = blob.file.lock();
            blob.table.chunks.iter().all(|chunk| state.table.is_done(chunk.offset))
        })
    }

    /// How many bytes a chunk is to bring. Of a plain layer, where the index knows it better: its size.
    pub fn stored_size(&self, chunk: ChunkRef) -> u64 {
        let blob = self.blobs.get(chunk.blob as usize);
        let found = blob.and_then(|blob| Some((blob, blob.table.chunks.get(chunk.chunk as usize)?)));
        found.map_or(0, |(blob, chunk)| match blob.table.zran {
            None => chunk.stored_size.into(),
            Some(_) => chunk.size.into(),
        })
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        self.fetcher.stats.images.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What opening gives: the image, the answer with its descriptors, and how far to fetch ahead.
#[derive(Debug)]
pub struct Opened {
    /// The image.
    pub image: Arc<OpenImage>,
    /// The answer.
    pub answer: OpenedImage,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// How far to fetch ahead.
    pub ahead: Ahead,
}

/// Opens the image of a bootstrap.
pub async fn open(service: &Service, bootstrap: &Path, config: &str) -> Result<Opened, OpenError> {
    let (backend, ahead) = backend(service, config)?;
    let source = service.sources.get(&backend)?;
    let (path, known) = (bootstrap.to_owned(), Arc::clone(&service.known));
    let (file, digest, image) = blocking(move || parse(&path, &known)).await?;
    let (traces, parsed) = (service.root.join("traces"), Arc::clone(&image));
    let trace = blocking(move || Trace::load(&traces, &digest, &parsed.blobs)).await;
    let Parsed { version, mounted, blobs, indexes, prefetch: _ } = &*image;
    let mut open = Vec::with_capacity(blobs.len());
    let again = |source| OpenError::Bootstrap { path: bootstrap.display().to_string(), source };
    let mounted = mounted.as_ref().map_or(Ok(file), File::try_clone).map_err(again)?;
    let mut fds = vec![OwnedFd::from(mounted)];
    // Whatever the image was, this is an EROFS.
    let mut answer = OpenedImage { version: MOUNTED, blobs: Vec::with_capacity(blobs.len()), ready: false };
    for (table, index) in blobs.iter().map(Arc::clone).zip(indexes.iter().map(Arc::clone)) {
        let file = service.fetcher.cache.get(&table).await;
        let file = file.map_err(|source| OpenError::Cache { blob: table.id.clone(), source })?;
        let reader = file.reader();
        fds.push(reader.map_err(|source| OpenError::Reader { blob: table.id.clone(), source })?);
        answer.blobs.push(Blob { id: table.id.clone(), bytes: table.bytes });
        let (source, fetcher) = (Arc::clone(&source), Arc::clone(&service.fetcher));
        open.push(Arc::new(OpenBlob::new(table, file, source, fetcher, index)));
    }
    service.fetcher.stats.images.fetch_add(1, Ordering::Relaxed);
    let name = bootstrap.display().to_string();
    log::info!("image {name}: version {version}, {} blobs, from {}", open.len(), source.name);
    let image = Arc::new(OpenImage {
        name,
        blobs: open,
        parsed: image,
        trace,
        fetcher: Arc::clone(&service.fetcher),
    });
    Ok(Opened { image, answer, fds, ahead })
}

fn backend(service: &Service, config: &str) -> Result<(Backend, Ahead), OpenError> {
    let ours = &service.config.fetch;
    let default = Ahead {
        listed: ours.prefetch,
        all: ours.background_fill,
        rate: ours.prefetch_rate_kib.saturating_mul(1024),
    };
    if config.trim().is_empty() {
        let folders = service.config.folders.clone();
        return if folders.is_empty() {
            Err(OpenError::NoBackend)
        } else {
            Ok((Backend::Folder { folders }, default))
        };
    }
    let daemon = Daemon::parse(config)?;
    for warning in &daemon.warnings {
        log::warn!("the daemon's configuration: {warning}");
    }
    // The node's operator has the last word on what is too much.
    let ahead = daemon.ahead.map_or(default, |asked| Ahead {
        listed: asked.listed && default.listed,
        all: asked.all || default.all,
        rate: [asked.rate, default.rate].into_iter().filter(|rate| *rate > 0).min().unwrap_or(0),
    });
    Ok((daemon.backend, ahead))
}

/// A file of these bytes that nobody can change any more.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(memfd_create("erofs", flags)?);
    file.write_all(bytes)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// Reads and parses a bootstrap: the file, its digest, and what it says. Blocks.
fn parse(path: &Path, known: &Known) -> Result<(File, String, Arc<Parsed>), OpenError> {
    let name = || path.display().to_string();
    let io = |source| OpenError::Bootstrap { path: name(), source };
    // A FIFO must not hold a thread for ever.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(io)?;
    if !file.metadata().map_err(io)?.is_file() {
        return Err(io(io::Error::other("it is no regular file")));
    }
    let mut bytes = Vec::new();
    (&mut file).take(MAX_BOOTSTRAP + 1).read_to_end(&mut bytes).map_err(io)?;
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let lock = || known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(parsed) = lock().get(&digest).and_then(Weak::upgrade) {
        return Ok((file, digest, parsed));
    }
    let refused = |source| OpenError::Rafs { path: name(), source };
    let image = Image::parse(&bytes).map_err(refused)?;
    let mounted = if image.version == MOUNTED {
        None
    } else {
        let erofs = v5_as_erofs(&bytes, &image).map_err(refused)?;
        let memory = |source| OpenError::Memory { path: name(), bytes: erofs.len(), source };
        Some(in_memory(&erofs).map_err(memory)?)
    };
    let Image { version, blobs, prefetch } = image;
    let indexes = blobs.iter().map(|_| Arc::default()).collect();
    let blobs = blobs.into_iter().map(Arc::new).collect();
    let parsed = Arc::new(Parsed { version, mounted, blobs, indexes, prefetch });
    let mut known = lock();
    known.retain(|_, parsed| parsed.strong_count() > 0);
    known.insert(digest.clone(), Arc::downgrade(&parsed));
    Ok((file, digest, parsed))
}
