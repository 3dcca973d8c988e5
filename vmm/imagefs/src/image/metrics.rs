//! Counters of an image's disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bounds of the histogram of waiting times, in microseconds, and their names.
const BOUNDS: [(u64, &str); 9] = [
    (250, "wait_le_250_us"),
    (1_000, "wait_le_1000_us"),
    (5_000, "wait_le_5000_us"),
    (25_000, "wait_le_25000_us"),
    (100_000, "wait_le_100000_us"),
    (500_000, "wait_le_500000_us"),
    (2_000_000, "wait_le_2000000_us"),
    (10_000_000, "wait_le_10000000_us"),
    (60_000_000, "wait_le_60000000_us"),
];

/// Since the device was made. Counted by the thread that serves it, read by the main thread.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Reads done, and bytes read.
    pub reads: AtomicU64,
    pub read_bytes: AtomicU64,
    /// Reads whose bytes were all there.
    pub hits: AtomicU64,
    /// Reads that had to wait, and bytes of those.
    pub misses: AtomicU64,
    pub missed_bytes: AtomicU64,
    /// Wishes sent to the image service, and blocks in them.
    pub fetches: AtomicU64,
    pub fetched_blocks: AtomicU64,
    /// Wishes that it could not fulfil.
    pub fetch_errors: AtomicU64,
    /// Reads that failed as their time was up.
    pub late: AtomicU64,
    /// Connections to the image service that ended.
    pub lost: AtomicU64,
    /// Requests that the host failed.
    pub host_errors: AtomicU64,
    /// Requests that made no sense, or that no image allows.
    pub bad_requests: AtomicU64,
    /// Reads that wait.
    pub waiting: AtomicU64,
    waited: [AtomicU64; BOUNDS.len()],
    waited_us: AtomicU64,
    waits: AtomicU64,
}

/// Adds to a counter.
pub fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Metrics {
    /// A read has been answered, well or not, that had waited so long.
    pub fn waited(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        for (count, (bound, _)) in self.waited.iter().zip(BOUNDS) {
            add(count, u64::from(us <= bound));
        }
        add(&self.waited_us, us);
        add(&self.waits, 1);
    }

    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let counters = [
            ("reads", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("hits", &self.hits),
            ("misses", &self.misses),
            ("missed_bytes", &self.missed_bytes),
            ("fetches", &self.fetches),
            ("fetched_blocks", &self.fetched_blocks),
            ("fetch_errors", &self.fetch_errors),
            ("late", &self.late),
            ("lost", &self.lost),
            ("host_errors", &self.host_errors),
            ("bad_requests", &self.bad_requests),
            ("waiting", &self.waiting),
            ("wait_sum_us", &self.waited_us),
            ("wait_count", &self.waits),
        ];
        let waited = self.waited.iter().zip(BOUNDS).map(|(count, (_, name))| (name, count));
        counters
            .into_iter()
            .chain(waited)
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
            .collect()
    }
}
