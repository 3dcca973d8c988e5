//! Counters of the entropy device.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: u64,
    /// Random bytes given.
    pub bytes: u64,
    /// Requests answered with nothing, as the host gave nothing.
    pub failures: u64,
}

impl RngMetrics {
    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![("requests", self.requests), ("bytes", self.bytes), ("failures", self.failures)]
    }
}
