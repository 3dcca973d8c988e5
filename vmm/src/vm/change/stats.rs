//! What is counted of resizes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vmm_api::Ending;

/// Bounds of the latency histogram.
const BOUNDS_US: [u64; 12] =
    [250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 10_000_000];

/// Counters of one VM's resizes.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    endings: [u64; Ending::ALL.len()],
    /// How many took at most so long.
    took: [u64; BOUNDS_US.len()],
    sum: Duration,
    count: u64,
}

impl Counters {
    /// One has ended so.
    pub fn ended(&mut self, ending: Ending) {
        self.endings[ending as usize] += 1;
    }

    /// One has ended now that began then, if it began at all.
    pub fn took(&mut self, began: Option<Instant>, now: Instant) {
        let Some(began) = began else { return };
        let took = now.saturating_duration_since(began);
        for (count, bound) in self.took.iter_mut().zip(BOUNDS_US) {
            *count += u64::from(took <= Duration::from_micros(bound));
        }
        self.sum += took;
        self.count += 1;
    }

    /// For stats.
    pub fn list(&self) -> BTreeMap<String, u64> {
        let endings =
            Ending::ALL.iter().map(|ending| (ending.name().to_owned(), self.endings[*ending as usize]));
        let took = BOUNDS_US.iter().zip(self.took).map(|(bound, count)| (format!("le_{bound}_us"), count));
        let sum = u64::try_from(self.sum.as_micros()).unwrap_or(u64::MAX);
        endings.chain(took).chain([("sum_us".to_owned(), sum), ("count".to_owned(), self.count)]).collect()
    }
}
