//! What the service counts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Upper bounds of the waiting times' classes, in microseconds; the last class has none.
pub const BOUNDS_US: [u64; 11] =
    [100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000];

/// How long VMs waited for blocks.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// Waits in each class of [`BOUNDS_US`], and behind them those that were longer.
    pub classes: [u64; BOUNDS_US.len() + 1],
    /// Their sum in microseconds.
    pub total_us: u64,
    /// The longest.
    pub longest_us: u64,
}

impl Waits {
    fn add(&mut self, wait: Duration) {
        let us = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        let class = BOUNDS_US.partition_point(|bound| *bound < us);
        self.classes[class] += 1;
        self.total_us = self.total_us.saturating_add(us);
        self.longest_us = self.longest_us.max(us);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }
}

/// What came from one back end.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct From {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Reads that were tried again.
    pub retries: u64,
    /// Reads that failed for good.
    pub failures: u64,
}

/// A copy of all counters.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Images that are open.
    pub images: u64,
    /// Wishes of VMs, and how many were refused.
    pub wishes: u64,
    /// Wishes that ended with an error.
    pub refused: u64,
    /// Chunks put into the cache.
    pub chunks: u64,
    /// Their bytes, uncompressed.
    pub chunk_bytes: u64,
    /// Of them, fetched before anybody asked.
    pub ahead_bytes: u64,
    /// Chunks whose digest was wrong.
    pub tampered: u64,
    /// What came, by back end.
    pub from: BTreeMap<String, From>,
    /// How long VMs waited.
    pub waits: Waits,
    /// Bytes of the cache on the disk.
    pub cache_bytes: u64,
    /// Cache files removed for room.
    pub evicted: u64,
}

impl Snapshot {
    /// For people: what was fetched, from where, and how long VMs waited.
    pub fn report(&self) -> String {
        let mib = |bytes: u64| format!("{}.{} MiB", bytes >> 20, ((bytes >> 10) & 1023) * 10 / 1024);
        let mut lines = vec![
            format!("images open     {}", self.images),
            format!(
                "cache           {} on the disk, {} files removed for room",
                mib(self.cache_bytes),
                self.evicted
            ),
            format!(
                "chunks fetched  {}, {} (of them {} before anybody asked), {} with a wrong digest",
                self.chunks,
                mib(self.chunk_bytes),
                mib(self.ahead_bytes),
                self.tampered
            ),
        ];
        for (name, from) in &self.from {
            let From { reads, bytes, retries, failures } = from;
            lines.push(format!("from {name}"));
            lines.push(format!(
                "                {reads} reads, {}, {retries} tried again, {failures} failed",
                mib(*bytes)
            ));
        }
        let average = self.waits.total_us.checked_div(self.waits.count()).unwrap_or(0);
        lines.push(format!(
            "VMs waited      {} times, {} of them for an error; {} on average, {} at most",
            self.wishes,
            self.refused,
            time(average),
            time(self.waits.longest_us)
        ));
        for (at, count) in self.waits.classes.iter().enumerate().filter(|(_, count)| **count > 0) {
            let class = match BOUNDS_US.get(at) {
                Some(bound) => format!("up to {}", time(*bound)),
                None => "longer".to_owned(),
            };
            lines.push(format!("  {class:<14}{count}"));
        }
        lines.join("\n") + "\n"
    }
}

/// A time in the unit that suits it.
fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{} s", us / 1_000_000),
    }
}

/// The counters.
#[derive(Debug, Default)]
pub struct Stats {
    /// See [`Snapshot`].
    pub images: AtomicU64,
    /// See [`Snapshot`].
    pub chunks: AtomicU64,
    /// See [`Snapshot`].
    pub chunk_bytes: AtomicU64,
    /// See [`Snapshot`].
    pub ahead_bytes: AtomicU64,
    /// See [`Snapshot`].
    pub tampered: AtomicU64,
    refused: AtomicU64,
    from: Mutex<BTreeMap<String, From>>,
    waits: Mutex<Waits>,
}

impl Stats {
    /// A wish ended.
    pub fn waited(&self, wait: Duration, fine: bool) {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).add(wait);
        if !fine {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Something happened with a back end.
    pub fn from(&self, name: &str, change: impl FnOnce(&mut From)) {
        let mut from = self.from.lock().unwrap_or_else(PoisonError::into_inner);
        // Names come from configurations, and the map must not grow with them for ever.
        let name = if from.len() < 256 || from.contains_key(name) { name } else { "others" };
        change(from.entry(name.to_owned()).or_default());
    }

    /// A copy; `cache` is its bytes and how many files were removed.
    pub fn snapshot(&self, cache: (u64, u64)) -> Snapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Snapshot {
            images: get(&self.images),
            wishes: waits.count(),
            refused: get(&self.refused),
            chunks: get(&self.chunks),
            chunk_bytes: get(&self.chunk_bytes),
            ahead_bytes: get(&self.ahead_bytes),
            tampered: get(&self.tampered),
            from: self.from.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            waits,
            cache_bytes: cache.0,
            evicted: cache.1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_fall_into_their_class() {
        let stats = Stats::default();
        for us in [0, 100, 101, 10_000_000, 10_000_001] {
            stats.waited(Duration::from_micros(us), us != 0);
        }
        stats.from("a", |from| from.bytes += 7);
        let got = stats.snapshot((1, 2));
        assert_eq!((got.waits.classes[0], got.waits.classes[1]), (2, 1));
        assert_eq!((got.waits.classes[10], got.waits.classes[11]), (1, 1));
        let report = got.report();
        assert!(report.contains("up to 100 us  2\n") && report.contains("longer        1\n"), "{report}");
        assert!(report.contains("from a\n"), "{report}");
        assert_eq!((got.wishes, got.refused, got.from["a"].bytes, got.evicted), (5, 1, 7, 2));
    }
}
