//! The one clock of the timeline.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC` in microseconds.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).expect("monotonic time is not negative");
    part(now.tv_sec) * 1_000_000 + part(now.tv_nsec) / 1_000
}
