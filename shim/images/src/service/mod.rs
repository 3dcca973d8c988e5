//! The service: its sockets, and what all connections share.

mod ahead;
mod connection;
mod open;
pub mod socket;
mod trace;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cache::{Cache, Limits};
use crate::config::Config;
use crate::fetch::Fetcher;
use crate::source::Sources;
use crate::stats::{Snapshot, Stats};

use socket::Listener;

/// Name of the socket below the root that counters are read from.
pub const STAT_SOCKET: &str = "stat.sock";

/// How often a cache that is over its limit is looked at: VMs end, and nobody tells when their files are free.
const TRIM: Duration = Duration::from_secs(5);

/// How long closing all images may take at the end.
const CLOSE: Duration = Duration::from_secs(20);

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Something of the disk or a socket.
    #[error("{what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is one already.
    #[error("another image service has the cache {}", .0.display())]
    Taken(PathBuf),
}

/// The service.
#[derive(Debug)]
pub struct Service {
    root: PathBuf,
    config: Config,
    sources: Sources,
    fetcher: Arc<Fetcher>,
    known: Arc<open::Known>,
    /// Locked as long as this is the service of this cache.
    _lock: File,
}

impl Service {
    /// The service of the cache below `root`. Blocks.
    pub fn new(root: &Path, config: Config) -> Result<Self, ServiceError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ServiceError::Io { what, path, source }
        };
        let traces = root.join("traces");
        fs::create_dir_all(&traces).map_err(io("make", &traces))?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(io("keep others out of", root))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(io("open", &path))?;
        // The one before may be about to end.
        let taken = || rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err();
        let pause = Duration::from_millis(50);
        if (0..20).all(|_| {
            taken() && {
                std::thread::sleep(pause);
                true
            }
        }) {
            return Err(ServiceError::Taken(root.to_owned()));
        }
        trace::tidy(&traces);
        let boot_id = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot_id).map_err(io("read", boot_id))?;
        let limits = Limits {
            max_bytes: config.cache.max_mib.saturating_mul(1 << 20),
            min_free: config.cache.min_free_mib.saturating_mul(1 << 20),
        };
        let cache = Arc::new(Cache::open(root, boot.trim(), limits).map_err(io("open the cache", root))?);
        let stats = Arc::new(Stats::default());
        let fetch = &config.fetch;
        let sources = Sources::new(
            config.registry.clone(),
            Duration::from_secs(fetch.patience_s),
            fetch.rate_kib.saturating_mul(1024),
            Arc::clone(&stats),
        );
        let fetcher = Arc::new(Fetcher::new(cache, stats, fetch.read_ahead_kib.saturating_mul(1024)));
        Ok(Self { root: root.to_owned(), config, sources, fetcher, known: Arc::default(), _lock: lock })
    }

    /// A copy of the counters.
    pub fn snapshot(&self) -> Snapshot {
        self.fetcher.stats.snapshot(self.fetcher.cache.usage())
    }

    /// Serves at `socket` until `stop` ends; then all that is open is closed in order.
    pub async fn serve(
        self: Arc<Self>,
        socket: &Path,
        stop: impl Future<Output = ()>,
    ) -> Result<(), ServiceError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ServiceError::Io { what, path, source }
        };
        // The lock on the cache is ours: what is there is of a service that was killed.
        let _ = fs::remove_file(socket);
        let listener = Listener::bind(socket).map_err(io("listen at", socket))?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
            .map_err(io("keep others out of", socket))?;
        let stat = self.root.join(STAT_SOCKET);
        let _ = fs::remove_file(&stat);
        let stats = UnixListener::bind(&stat).map_err(io("listen at", &stat))?;
        log::info!("image service: cache {}, socket {}", self.root.display(), socket.display());
        let mut connections = JoinSet::new();
        let (closing, _) = watch::channel(false);
        let mut trim = tokio::time::interval(TRIM);
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                accepted = listener.accept() => match accepted {
                    Ok(packets) => {
                        connections.spawn(connection::serve(Arc::clone(&self), packets, closing.subscribe()));
                    }
                    Err(error) => {
                        log::error!("accept a connection: {error}");
                        // Out of descriptors, most likely: some will come back.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                accepted = stats.accept() => if let Ok((mut stream, _)) = accepted {
                    let answer = serde_json::to_vec(&self.snapshot()).unwrap_or_default();
                    connections.spawn(async move {
                        let _ = stream.write_all(&answer).await; // whoever asked has gone
                    });
                },
                _ = trim.tick() => {
                    let cache = Arc::clone(&self.fetcher.cache);
                    connections.spawn(async move { cache.trim().await });
                }
                Some(_) = connections.join_next() => {}
            }
        }
        let _ = fs::remove_file(socket);
        let _ = fs::remove_file(&stat);
        closing.send_replace(true);
        let all = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(CLOSE, all).await.is_err() {
            log::warn!("image service: not all images were closed within {} s", CLOSE.as_secs());
        }
        log::info!("image service: ended");
        Ok(())
    }
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text.replace('\n', " ")
}
