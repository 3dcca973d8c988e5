//! Counters of the balloon.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonMetrics {
    /// Pages of 4 KiB that went into the balloon.
    pub inflated_pages: u64,
    /// Pages that the driver took out of it.
    pub deflated_pages: u64,
    /// Bytes of free pages reported.
    pub reported_bytes: u64,
    /// Bytes given back to the host, by inflating and by reports. A page may be given back often.
    pub bytes_given_back: u64,
    /// Bytes reported by a guest that would miss their pattern, and not given back.
    pub poisoned_bytes: u64,
    /// Pages named that are not in guest memory.
    pub bad_pages: u64,
    /// Requests of a strange length: what is too much of them was not looked at.
    pub bad_requests: u64,
    /// Calls that the host refused.
    pub host_errors: u64,
}

impl BalloonMetrics {
    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("inflated_pages", self.inflated_pages),
            ("deflated_pages", self.deflated_pages),
            ("reported_bytes", self.reported_bytes),
            ("bytes_given_back", self.bytes_given_back),
            ("poisoned_bytes", self.poisoned_bytes),
            ("bad_pages", self.bad_pages),
            ("bad_requests", self.bad_requests),
            ("host_errors", self.host_errors),
        ]
    }
}
