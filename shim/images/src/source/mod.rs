//! Where the bytes of blobs come from.

pub mod auth;
mod bucket;
mod folder;
mod http;
mod limit;
mod registry;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Semaphore;

pub use bucket::Bucket;
pub use http::HttpError;
pub use limit::Limit;
pub use registry::{Endpoint, Registry};

use crate::config::{Backend, Proxy, RegistryBackend};
use crate::stats::Stats;

/// Why bytes did not come.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no such blob.
    #[error("{0} does not have the blob")]
    Missing(String),
    /// It may not be read.
    #[error("{0} forbids it")]
    Forbidden(String),
    /// It has other bytes than it shall.
    #[error("{0}")]
    Broken(String),
    /// Not now.
    #[error("{0}")]
    Unavailable(String),
}

impl SourceError {
    /// Whether it may be better a moment later.
    pub fn is_transient(&self) -> bool {
        matches!(self, SourceError::Unavailable(_))
    }
}

/// One back end, for as long as an image uses it.
#[derive(Debug)]
pub struct Source {
    /// To tell sources apart.
    pub number: u64,
    /// For logs and counters; without credentials.
    pub name: String,
    kind: Kind,
    stats: Arc<Stats>,
    patience: Duration,
    limit: Arc<Limit>,
    /// Reads at a time, and so the memory they take.
    places: Semaphore,
}

/// Most reads at a time from one back end.
const MAX_READS: usize = 24;

#[derive(Debug)]
enum Kind {
    Folder(folder::Folder),
    Registry(Box<Registry>),
    Bucket(Box<Bucket>),
}

/// A part of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'a> {
    /// The blob's SHA-256.
    pub blob: &'a str,
    /// Offset in it.
    pub offset: u64,
    /// How many bytes.
    pub len: usize,
}

impl Source {
    /// Reads a part, all of it. What is not available is tried again, with pauses that grow to five seconds, for as long as the
    /// service's patience lasts. `avoid`: of the back end's places, the first so many were tried and had wrong bytes.
    ///
    /// The bytes, and how many places are worth avoiding if they are wrong.
    pub async fn read(&self, part: Part<'_>, avoid: usize) -> Result<(Vec<u8>, usize), SourceError> {
        let deadline = tokio::time::Instant::now() + self.patience;
        let mut pause = Duration::from_millis(100);
        loop {
            self.limit.take(part.len as u64).await;
            let place = self.places.acquire().await;
            let read = match &self.kind {
                Kind::Folder(folder) => folder.read(part).await.map(|bytes| (bytes, 1)),
                Kind::Registry(registry) => registry.read(part, avoid).await,
                Kind::Bucket(bucket) => bucket.read(part).await.map(|bytes| (bytes, 1)),
            };
            drop(place);
            match read {
                Ok((bytes, place)) => {
                    self.stats.from(&self.name, |from| {
                        from.reads += 1;
                        from.bytes += bytes.len() as u64;
                    });
                    return Ok((bytes, place));
                }
                Err(error) if error.is_transient() && tokio::time::Instant::now() + pause < deadline => {
                    let Part { blob, offset, .. } = part;
                    log::warn!("blob {blob} at {offset}: {error}; again in {} ms", pause.as_millis());
                    self.stats.from(&self.name, |from| from.retries += 1);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
                Err(error) => {
                    self.stats.from(&self.name, |from| from.failures += 1);
                    return Err(error);
                }
            }
        }
    }

    /// How many places it can read from.
    pub fn places(&self) -> usize {
        match &self.kind {
            Kind::Folder(_) | Kind::Bucket(_) => 1,
            Kind::Registry(registry) => registry.places(),
        }
    }
}

/// The back ends in use: equal configurations share one, with its connections and tokens.
#[derive(Debug)]
pub struct Sources {
    known: Mutex<HashMap<Backend, Weak<Source>>>,
    registries: Vec<crate::config::RegistryRule>,
    next: AtomicU64,
    stats: Arc<Stats>,
    patience: Duration,
    limit: Arc<Limit>,
}

impl Sources {
    /// `registries`: what the node's operator says of some; `patience`: how long what is not available is tried again; `rate`: bytes
    /// a second that all of them together may bring, 0 for any number.
    pub fn new(
        registries: Vec<crate::config::RegistryRule>,
        patience: Duration,
        rate: u64,
        stats: Arc<Stats>,
    ) -> Self {
        let limit = Arc::new(Limit::new(rate));
        Self { known: Mutex::default(), registries, next: AtomicU64::new(1), stats, patience, limit }
    }

    /// The back end of a configuration.
    pub fn get(&self, backend: &Backend) -> Result<Arc<Source>, HttpError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = known.get(backend).and_then(Weak::upgrade) {
            return Ok(source);
        }
        let (name, kind) = match backend {
            Backend::Folder { folders } => {
                let name = folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(":");
                (name, Kind::Folder(folder::Folder::new(folders.clone())))
            }
            Backend::Registry(asked) => {
                let ruled = self.apply_rule(asked);
                let name = format!("{}://{}/{}", ruled.scheme, ruled.host, ruled.repo);
                (name, Kind::Registry(Box::new(Registry::new(&ruled)?)))
            }
            Backend::Bucket(asked) => (format!("{asked:?}"), Kind::Bucket(Box::new(Bucket::new(asked)?))),
        };
        let source = Arc::new(Source {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            name,
            kind,
            stats: Arc::clone(&self.stats),
            patience: self.patience,
            limit: Arc::clone(&self.limit),
            places: Semaphore::new(MAX_READS),
        });
        known.retain(|_, source| source.strong_count() > 0);
        known.insert(backend.clone(), Arc::downgrade(&source));
        Ok(source)
    }

    /// What the operator says of a registry adds to what an image's configuration says.
    fn apply_rule(&self, asked: &RegistryBackend) -> RegistryBackend {
        let mut ruled = asked.clone();
        for rule in self.registries.iter().filter(|rule| rule.host == asked.host) {
            if rule.plain_http {
                ruled.scheme = "http".into();
            }
            ruled.mirrors.splice(0..0, rule.mirrors.iter().cloned());
            if ruled.link.ca.is_none() {
                ruled.link.ca.clone_from(&rule.ca);
            }
            if ruled.auth.is_none() {
                ruled.auth.clone_from(&rule.auth);
            }
            if let (None, Some(url)) = (&ruled.link.proxy, &rule.proxy) {
                ruled.link.proxy = Some(Proxy { url: url.clone(), fallback: false });
            }
        }
        ruled
    }
}
