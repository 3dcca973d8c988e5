//! Counters of the device.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PmemMetrics {
    /// Flushes answered.
    pub flushes: u64,
    /// Requests of another kind, too short, or without room for an answer.
    pub bad_requests: u64,
}
