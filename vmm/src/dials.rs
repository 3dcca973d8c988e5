//! Dials into the guest that wait for its answer. Each ends once: the guest answers, its time is up, or the VM ends.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Most dials at a time; the owner has its own reasons to make few.
const MAX: usize = 64;

/// Too many dials at a time.
#[derive(Debug, thiserror::Error)]
#[error("{MAX} connections to the guest are being made already")]
pub struct TooMany;

#[derive(Debug)]
struct Dial {
    request: u64,
    timeout: Duration,
    deadline: Instant,
}

/// Dials under way.
#[derive(Debug, Default)]
pub struct Dials {
    open: BTreeMap<u64, Dial>,
    made: u64,
}

impl Dials {
    /// Remembers the request `request`, which may take until `timeout` has passed. Gives the dial's number.
    pub fn begin(&mut self, request: u64, timeout: Duration, now: Instant) -> Result<u64, TooMany> {
        if self.open.len() >= MAX {
            return Err(TooMany);
        }
        self.made += 1;
        self.open.insert(self.made, Dial { request, timeout, deadline: now + timeout });
        Ok(self.made)
    }

    /// The dial has ended: the request to answer; `None` if it was answered before.
    pub fn end(&mut self, dial: u64) -> Option<u64> {
        Some(self.open.remove(&dial)?.request)
    }

    /// How long until the next dial's time is up.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        self.open.values().map(|dial| dial.deadline.saturating_duration_since(now)).min()
    }

    /// Ends the dials whose time is up: number, request and how long it had.
    pub fn expire(&mut self, now: Instant) -> Vec<(u64, u64, Duration)> {
        let late = self.open.extract_if(.., |_, dial| dial.deadline <= now);
        late.map(|(number, dial)| (number, dial.request, dial.timeout)).collect()
    }

    /// Ends all: the requests to answer.
    pub fn end_all(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.open).into_values().map(|dial| dial.request).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_dial_ends_once() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        let first = dials.begin(70, SECOND, now).unwrap();
        let second = dials.begin(71, 3 * SECOND, now).unwrap();
        assert_eq!(dials.next_timeout(now), Some(SECOND));
        assert_eq!(dials.end(first), Some(70));
        assert_eq!(dials.end(first), None);
        assert!(dials.expire(now + 2 * SECOND).is_empty());
        assert_eq!(dials.expire(now + 3 * SECOND), [(second, 71, 3 * SECOND)]);
        assert_eq!(dials.end(second), None);
        assert_eq!(dials.next_timeout(now), None);
    }

    #[test]
    fn the_end_of_the_vm_ends_all_and_the_number_is_bounded() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        for request in 0..MAX as u64 {
            dials.begin(request, SECOND, now).unwrap();
        }
        assert!(dials.begin(99, SECOND, now).is_err());
        assert_eq!(dials.end_all(), (0..MAX as u64).collect::<Vec<_>>());
        assert!(dials.end_all().is_empty());
    }
}
