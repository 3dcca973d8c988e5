//! Bandwidth limits.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// A rate of bytes. Whoever takes waits for those before, so that over time no more pass.
#[derive(Debug)]
pub struct Limit {
    /// Bytes a second; 0: no limit.
    rate: u64,
    /// When what was taken so far has passed.
    next: Mutex<Option<Instant>>,
}

impl Limit {
    /// A limit of `rate` bytes a second, none for 0.
    pub fn new(rate: u64) -> Self {
        Self { rate, next: Mutex::default() }
    }

    /// Waits until `bytes` may pass.
    pub async fn take(&self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        let turn = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let turn = next.map_or(now, |next| next.max(now));
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
            *next = Some(turn + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
            turn
        };
        sleep_until(turn).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_second_of_bytes_takes_a_second() {
        let limit = Limit::new(1000);
        let start = Instant::now();
        for _ in 0..5 {
            limit.take(500).await;
        }
        assert_eq!(start.elapsed().as_millis(), 2000, "the first passes at once");
        Limit::new(0).take(u64::MAX).await;
        assert_eq!(start.elapsed().as_millis(), 2000);
    }
}
