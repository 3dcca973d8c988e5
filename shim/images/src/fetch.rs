//! Bringing chunks into the cache: which are wanted, which are on their way, one read for neighbours, and nothing is ready that was
//! not verified.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use tokio::sync::{Notify, OnceCell};

use crate::cache::{Cache, CacheFile, Failure, Flight, Landed, Pilot, blocking};
use crate::codec::{Compressor, decompress};
use crate::rafs::blob_meta::Index;
use crate::rafs::{BlobTable, Chunk, Stored};
use crate::source::{Part, Source, SourceError};
use crate::stats::Stats;
use crate::zran;

/// Most stored bytes of one read.
const MAX_READ: u64 = 4 << 20;

/// Stored bytes between two chunks that are read and thrown away rather than asked for apart.
const MAX_GAP: u64 = 16 << 10;

/// Who wants chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A guest waits.
    Asked,
    /// It will be read, maybe.
    Ahead,
}

/// What all images fetch with.
#[derive(Debug)]
pub struct Fetcher {
    /// Where chunks go.
    pub cache: Arc<Cache>,
    /// What is counted.
    pub stats: Arc<Stats>,
    /// Bytes to fetch with what was asked for.
    pub read_ahead: u64,
    /// How many guests wait.
    waiting: AtomicUsize,
    nobody_waits: Notify,
}

impl Fetcher {
    /// Into `cache`.
    pub fn new(cache: Arc<Cache>, stats: Arc<Stats>, read_ahead: u64) -> Self {
        let (waiting, nobody_waits) = (AtomicUsize::new(0), Notify::new());
        Self { cache, stats, read_ahead, waiting, nobody_waits }
    }

    /// Notes that a guest waits, until the answer is dropped.
    pub fn waits(self: &Arc<Self>) -> Waiting {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Waiting(Arc::clone(self))
    }

    /// Waits until no guest waits: what is fetched ahead comes after what is asked for.
    pub async fn idle(&self) {
        loop {
            let notified = self.nobody_waits.notified();
            if self.waiting.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// A guest that waits.
#[derive(Debug)]
pub struct Waiting(Arc<Fetcher>);

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.nobody_waits.notify_waiters();
        }
    }
}

/// A blob of an open image. It keeps the blob's cache file from eviction.
#[derive(Debug)]
pub struct OpenBlob {
    /// Its chunks as the image has them.
    pub table: Arc<BlobTable>,
    /// Its cache file.
    pub file: Arc<CacheFile>,
    source: Arc<Source>,
    fetcher: Arc<Fetcher>,
    index: Arc<IndexCell>,
}

/// The index of a plain layer, once it was needed. All that have the image open share it.
pub type IndexCell = OnceCell<Arc<Index>>;

/// Chunks to be read in one go: their indices, and the part of the stored blob.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    chunks: Vec<usize>,
    start: u64,
    end: u64,
}

/// What an attempt to read has learned from the ones before.
#[derive(Debug, Default, Clone, Copy)]
struct Attempt {
    /// So many of the source's places had wrong bytes.
    avoid: usize,
    /// The cache was emptied of what nobody uses.
    made_room: bool,
    /// The bytes were wrong before, and are asked for a second time.
    again: bool,
}

impl OpenBlob {
    /// A blob whose cache file is `file`.
    pub fn new(
        table: Arc<BlobTable>,
        file: Arc<CacheFile>,
        source: Arc<Source>,
        fetcher: Arc<Fetcher>,
        index: Arc<IndexCell>,
    ) -> Self {
        Self { table, file, source, fetcher, index }
    }

    /// Brings chunks `wanted` into the cache file, as far as they are not there. However many ask, each comes once.
    pub async fn ensure(self: &Arc<Self>, wanted: Range<usize>, why: Why) -> Landed {
        let mut landed = self.try_ensure(wanted.clone(), why).await;
        // A flight that another image began failed by that image's back end. Ours may do better.
        if let Err((_, true)) = landed {
            landed = self.try_ensure(wanted, why).await;
        }
        landed.map_err(|(failure, _)| failure)
    }

    /// Whether all of these are there.
    pub fn has(&self, wanted: Range<usize>) -> bool {
        let state = self.file.lock();
        self.table.chunks[wanted].iter().all(|chunk| state.table.is_done(chunk.offset))
    }

    async fn try_ensure(self: &Arc<Self>, wanted: Range<usize>, why: Why) -> Result<(), (Failure, bool)> {
        if self.has(wanted.clone()) {
            return Ok(());
        }
        let index = self.index().await.map_err(|failure| (failure, false))?;
        let waits = self.take_off(wanted, why, index.as_ref());
        for flight in waits {
            let foreign = flight.source != self.source.number;
            flight.landed().await.map_err(|failure| (failure, foreign))?;
        }
        Ok(())
    }

    /// Begins what has to be begun. The flights to wait for.
    fn take_off(self: &Arc<Self>, wanted: Range<usize>, why: Why, index: Option<&Arc<Index>>) -> Vec<Flight> {
        let mut waits = Vec::new();
        let mut started = Vec::new();
        {
            let mut state = self.file.lock();
            let mut fresh = Vec::new();
            let mut more = 0;
            // Behind what is wanted, neighbours that are not there either, up to so many bytes.
            let ahead = if why == Why::Asked { self.fetcher.read_ahead } else { 0 };
            for at in wanted.start..self.table.chunks.len() {
                let chunk = &self.table.chunks[at];
                let asked = at < wanted.end;
                if !asked {
                    more += u64::from(chunk.stored_size);
                    if fresh.is_empty() || more > ahead || self.table.zran.is_some() {
                        break;
                    }
                }
                if state.table.is_done(chunk.offset) {
                    continue;
                }
                match state.flights.get(chunk.offset) {
                    Some(flight) if asked => waits.push(flight),
                    Some(_) => {}
                    None => fresh.push(at),
                }
            }
            for run in self.runs(&fresh, index) {
                let mut pilots = Vec::with_capacity(run.chunks.len());
                for at in &run.chunks {
                    let (pilot, flight) =
                        state.flights.begin(self.table.chunks[*at].offset, self.source.number);
                    if wanted.contains(at) {
                        waits.push(flight);
                    }
                    pilots.push((*at, pilot));
                }
                started.push((run, pilots));
            }
        }
        for (run, pilots) in started {
            // On its own: who began it may go away, others wait too.
            let (blob, index) = (Arc::clone(self), index.cloned());
            tokio::spawn(async move { blob.fly(run, pilots, why, index).await });
        }
        waits
    }

    /// Cuts chunks into reads: neighbours in the stored blob together, or those of one zran context.
    fn runs(&self, chunks: &[usize], index: Option<&Arc<Index>>) -> Vec<Run> {
        let mut places: Vec<(u64, u64, usize)> = chunks
            .iter()
            .map(|at| {
                if let Some(index) = index {
                    let context = &index.contexts[index.places[*at].context as usize];
                    (context.offset, context.offset + u64::from(context.stored_size), *at)
                } else {
                    let chunk = &self.table.chunks[*at];
                    (chunk.stored_offset, chunk.stored_offset + u64::from(chunk.stored_size), *at)
                }
            })
            .collect();
        places.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for (start, end, at) in places {
            let joins = |run: &Run| {
                if index.is_some() {
                    run.start == start && run.end == end
                } else {
                    start <= run.end.saturating_add(MAX_GAP) && end.max(run.end) - run.start <= MAX_READ
                }
            };
            match runs.last_mut().filter(|run| joins(run)) {
                Some(run) => {
                    run.end = run.end.max(end);
                    run.chunks.push(at);
                }
                None => runs.push(Run { chunks: vec![at], start, end }),
            }
        }
        runs
    }

    async fn fly(
        self: Arc<Self>,
        run: Run,
        pilots: Vec<(usize, Pilot)>,
        why: Why,
        index: Option<Arc<Index>>,
    ) {
        // One bad chunk must not be its neighbours' misfortune: of many, each gets its second chance by itself.
        let apart = run.chunks.len() > 1 && index.is_none();
        let first = Attempt { again: apart, ..Attempt::default() };
        let mut landed = self.bring(&run, why, index.as_ref(), first).await.into_iter();
        for (at, pilot) in pilots {
            let mut end = landed.next().unwrap_or_else(|| Err(Failure::bad("the read brought too little")));
            if apart && matches!(end, Err(Failure::Bad(_) | Failure::NoSpace)) {
                let chunk = &self.table.chunks[at];
                let (start, stop) = (chunk.stored_offset, chunk.stored_offset + u64::from(chunk.stored_size));
                if matches!(end, Err(Failure::Bad(_))) {
                    self.warn_of_wrong_bytes(start);
                }
                let alone = Run { chunks: vec![at], start, end: stop };
                let second = Attempt { again: true, ..Attempt::default() };
                end = self.bring(&alone, why, None, second).await.pop().unwrap_or(end);
            }
            if let Err(failure) = &end {
                let chunk = &self.table.chunks[at];
                log::error!(
                    "blob {}: chunk at {} ({} bytes, stored at {} with {}) from {}: {failure}",
                    self.table.id,
                    chunk.offset,
                    chunk.size,
                    chunk.stored_offset,
                    chunk.stored_size,
                    self.source.name,
                );
            }
            self.file.lock().flights.end(self.table.chunks[at].offset);
            pilot.land(end);
        }
    }

    /// Reads, verifies and writes. An end for each chunk of the run, in its order.
    async fn bring(
        self: &Arc<Self>,
        run: &Run,
        why: Why,
        index: Option<&Arc<Index>>,
        attempt: Attempt,
    ) -> Vec<Landed> {
        let all = |failure: Failure| run.chunks.iter().map(|_| Err(failure.clone())).collect::<Vec<_>>();
        let bytes: u64 = run.chunks.iter().map(|at| u64::from(self.table.chunks[*at].size)).sum();
        if !self.fetcher.cache.has_room(bytes).await {
            return all(Failure::NoSpace);
        }
        let Ok(len) = usize::try_from(run.end - run.start) else {
            return all(Failure::bad("a read that is too long"));
        };
        let part = Part { blob: &self.table.id, offset: run.start, len };
        let (read, place) = match self.source.read(part, attempt.avoid).await {
            Ok(read) => read,
            Err(error @ SourceError::Broken(_)) => return all(Failure::bad(error)),
            Err(error) => return all(Failure::denied(error)),
        };
        let (blob, chunks, start, index_too) =
            (Arc::clone(self), run.chunks.clone(), run.start, index.cloned());
        let landed: Vec<Landed> =
            blocking(move || blob.store(&chunks, start, &read, index_too.as_deref(), why)).await;
        if landed.iter().any(|end| matches!(end, Err(Failure::Bad(_)))) {
            // A mirror with wrong bytes is not the end: the next place may have the right ones. And what was changed on its way
            // from the last one may come unchanged the next time.
            let next = if place < self.source.places() {
                Some(Attempt { avoid: place, ..attempt })
            } else if !attempt.again {
                Some(Attempt { avoid: place - 1, again: true, ..attempt })
            } else {
                None
            };
            if let Some(next) = next {
                self.warn_of_wrong_bytes(run.start);
                return Box::pin(self.bring(run, why, index, next)).await;
            }
        }
        if !attempt.made_room && landed.iter().any(|end| matches!(end, Err(Failure::NoSpace))) {
            self.fetcher.cache.evict(0).await;
            return Box::pin(self.bring(run, why, index, Attempt { made_room: true, ..attempt })).await;
        }
        landed
    }

    fn warn_of_wrong_bytes(&self, offset: u64) {
        log::warn!("blob {} at {offset} from {}: wrong bytes; asking again", self.table.id, self.source.name);
    }

    /// Decompresses, verifies and writes the chunks out of the bytes at `start` of the stored blob. Blocks.
    fn store(
        &self,
        chunks: &[usize],
        start: u64,
        read: &[u8],
        index: Option<&Index>,
        why: Why,
    ) -> Vec<Landed> {
        let inflated = index.and_then(|index| {
            let context = &index.contexts[index.places[*chunks.first()?].context as usize];
            let inflated = zran::inflate(context, index.dictionary(context), read);
            Some(inflated.map_err(Failure::bad))
        });
        chunks
            .iter()
            .map(|at| {
                let chunk = &self.table.chunks[*at];
                if self.file.lock().table.is_done(chunk.offset) {
                    return Ok(());
                }
                let bytes = match (&inflated, index) {
                    (Some(Err(failure)), _) => return Err(failure.clone()),
                    (Some(Ok(inflated)), Some(index)) => {
                        let from = index.places[*at].offset as usize;
                        let bytes = inflated.get(from..from + chunk.size as usize);
                        bytes.ok_or_else(|| Failure::bad("a chunk outside of its zran context"))?.to_vec()
                    }
                    _ => self.plain(chunk, start, read)?,
                };
                self.keep(chunk, &bytes, why)
            })
            .collect()
    }

    fn plain(&self, chunk: &Chunk, start: u64, read: &[u8]) -> Result<Vec<u8>, Failure> {
        let from = usize::try_from(chunk.stored_offset - start).unwrap_or(usize::MAX);
        let stored = from.checked_add(chunk.stored_size as usize).and_then(|end| read.get(from..end));
        let stored = stored.ok_or_else(|| Failure::bad("a chunk outside of what was read"))?;
        let compressor = match chunk.stored {
            Stored::Plain => Compressor::None,
            Stored::Compressed => self.table.compressor,
        };
        decompress(compressor, stored, chunk.size as usize).map_err(|error| {
            self.fetcher.stats.tampered.fetch_add(1, Ordering::Relaxed);
            Failure::bad(error)
        })
    }

    fn keep(&self, chunk: &Chunk, bytes: &[u8], why: Why) -> Landed {
        let stats = &self.fetcher.stats;
        if self.table.digester.digest(bytes) != chunk.digest {
            stats.tampered.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::bad(format!(
                "its {:?} digest is wrong: tampered or broken",
                self.table.digester
            )));
        }
        self.file.write(chunk.offset, bytes).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => Failure::NoSpace,
            _ => Failure::bad(format!("write the cache file: {error}")),
        })?;
        let len = bytes.len() as u64;
        self.fetcher.cache.wrote(len);
        stats.chunks.fetch_add(1, Ordering::Relaxed);
        stats.chunk_bytes.fetch_add(len, Ordering::Relaxed);
        if why == Why::Ahead {
            stats.ahead_bytes.fetch_add(len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The index of a plain layer, fetched when the first chunk is.
    async fn index(&self) -> Result<Option<Arc<Index>>, Failure> {
        let Some(zran) = &self.table.zran else { return Ok(None) };
        let index = self.index.get_or_try_init(|| async {
            let broken = |failure: Failure| {
                log::error!("blob {}: its zran index, blob {}: {failure}", self.table.id, zran.blob);
                failure
            };
            let len = usize::try_from(zran.blob_size).map_err(Failure::bad)?;
            let (mut avoid, mut again) = (0, false);
            loop {
                let part = Part { blob: &zran.blob, offset: 0, len };
                let read = self.source.read(part, avoid).await;
                let (read, place) = read.map_err(|error| broken(Failure::bad(error)))?;
                let table = Arc::clone(&self.table);
                match blocking(move || Index::open(&table, &read)).await {
                    Ok(index) => return Ok(Arc::new(index)),
                    Err(_) if place < self.source.places() => avoid = place,
                    Err(_) if !again => (avoid, again) = (place - 1, true),
                    Err(error) => return Err(broken(Failure::bad(error))),
                }
            }
        });
        index.await.map(|index| Some(Arc::clone(index)))
    }
}
