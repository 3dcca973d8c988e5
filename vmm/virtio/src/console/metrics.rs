//! Counters of the console.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsoleMetrics {
    /// Bytes that the guest wrote.
    pub output_bytes: u64,
    /// Of them, bytes that the output descriptor did not take.
    pub dropped_bytes: u64,
    /// Bytes that the guest got to read.
    pub input_bytes: u64,
}

impl ConsoleMetrics {
    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.output_bytes),
            ("dropped_bytes", self.dropped_bytes),
            ("input_bytes", self.input_bytes),
        ]
    }
}
