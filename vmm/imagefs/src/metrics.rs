//! Counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::share::Result;

/// What happened since the server was made.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: AtomicU64,
    failed: AtomicU64,
    malformed: AtomicU64,
}

impl Metrics {
    /// A request came.
    pub fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// It was answered.
    pub fn outcome(&self, outcome: &Result<()>) {
        if outcome.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A request could not be answered at all.
    pub fn malformed(&self) {
        self.malformed.fetch_add(1, Ordering::Relaxed);
    }

    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", count(&self.requests)),
            // Errors are part of normal life: most are names that are not there.
            ("failed", count(&self.failed)),
            ("malformed", count(&self.malformed)),
        ]
    }
}
