//! A rate limit for log lines that a guest can cause: it may fill its own queue with nonsense, not our log.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines that may come at once.
const BURST: u32 = 10;
/// One more line may come after this long.
const REFILL: Duration = Duration::from_secs(1);

/// The limit that every line about a guest's misbehaviour goes through, whatever device it is about.
pub static GUEST_ERRORS: RateLimit = RateLimit::new();

/// A token bucket of [`BURST`] lines, refilled by one each [`REFILL`].
#[derive(Debug)]
pub struct RateLimit(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    spent: u32,
    refilled: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// A full bucket.
    pub const fn new() -> Self {
        RateLimit(Mutex::new(Bucket { spent: 0, refilled: None, suppressed: 0 }))
    }

    /// Whether a line may be written now; if so, how many were left out since the last one.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    /// Writes one warning, unless there were too many.
    pub fn warn(&self, line: impl std::fmt::Display) {
        match self.admit() {
            Some(0) => log::warn!("{line}"),
            Some(more) => log::warn!("{line} ({more} more lines left out)"),
            None => {}
        }
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().expect("no code panics while it holds this lock");
        let since = now.saturating_duration_since(*bucket.refilled.get_or_insert(now));
        let earned = u32::try_from(since.as_secs() / REFILL.as_secs()).unwrap_or(u32::MAX);
        if earned > 0 {
            bucket.spent = bucket.spent.saturating_sub(earned);
            bucket.refilled = Some(now);
        }
        if bucket.spent >= BURST {
            bucket.suppressed += 1;
            return None;
        }
        bucket.spent += 1;
        Some(std::mem::take(&mut bucket.suppressed))
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_a_burst_then_one_a_second_and_says_what_it_left_out() {
        let limit = RateLimit::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.admit_at(start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(limit.admit_at(start), None);
        }
        assert_eq!(limit.admit_at(start + REFILL), Some(3));
        assert_eq!(limit.admit_at(start + REFILL), None);
    }
}
