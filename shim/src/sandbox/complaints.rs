//! Lines in the log that a guest, or whoever talks to it, can cause: few.

use std::time::{Duration, Instant};

/// At most one line in this time.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lines about one kind of thing: one at first, then one every [`INTERVAL`] with a count.
#[derive(Debug)]
pub struct Complaints {
    about: &'static str,
    last: Option<Instant>,
    silent: u64,
}

impl Complaints {
    /// None yet about this.
    pub fn about(about: &'static str) -> Self {
        Complaints { about, last: None, silent: 0 }
    }

    /// Writes a line, or counts it.
    pub fn note(&mut self, why: std::fmt::Arguments<'_>) {
        if let Some(since_last) = self.admits(Instant::now()) {
            log::warn!("{}: {why} ({since_last} more since the last such line)", self.about);
        }
    }

    /// Whether a line may be written now; if so, how many were not before it.
    fn admits(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            self.silent += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.silent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_few_and_counted() {
        let mut complaints = Complaints::about("a test");
        let start = Instant::now();
        assert_eq!(complaints.admits(start), Some(0));
        for _ in 0..7 {
            assert_eq!(complaints.admits(start), None);
        }
        assert_eq!(complaints.admits(start + INTERVAL), Some(7));
        assert_eq!(complaints.admits(start + INTERVAL), None);
    }
}
