//! Counters of a disk.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlkMetrics {
    /// Reads done.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes done.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Discard requests done.
    pub discards: u64,
    /// Write-zeroes requests done.
    pub write_zeroes: u64,
    /// Requests that the host failed.
    pub host_errors: u64,
    /// Requests that made no sense, or that this disk does not allow.
    pub bad_requests: u64,
}

impl BlkMetrics {
    /// One more read of `len` bytes.
    pub fn count_read(&mut self, len: usize) {
        self.reads += 1;
        self.read_bytes += len as u64;
    }

    /// One more write of `len` bytes.
    pub fn count_write(&mut self, len: usize) {
        self.writes += 1;
        self.written_bytes += len as u64;
    }

    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("writes", self.writes),
            ("written_bytes", self.written_bytes),
            ("flushes", self.flushes),
            ("discards", self.discards),
            ("write_zeroes", self.write_zeroes),
            ("host_errors", self.host_errors),
            ("bad_requests", self.bad_requests),
        ]
    }
}
