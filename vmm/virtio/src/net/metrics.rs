//! Counters of a network device.

/// Since the device was made. Lengths are without the header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetMetrics {
    /// Frames that the guest got.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for which the guest's buffers were too short.
    pub rx_too_long: u64,
    /// Frames that the tap took.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Chains of the guest that are no frame.
    pub tx_malformed: u64,
    /// Frames whose header the tap refused.
    pub tx_refused: u64,
    /// How often the tap had no room, and the guest had to wait.
    pub tx_waits: u64,
    /// Frames that the host failed to move, and reads that failed.
    pub host_errors: u64,
    /// Control commands done.
    pub commands: u64,
    /// Control commands refused.
    pub bad_commands: u64,
}

impl NetMetrics {
    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_frames", self.rx_frames),
            ("rx_bytes", self.rx_bytes),
            ("rx_too_long", self.rx_too_long),
            ("tx_frames", self.tx_frames),
            ("tx_bytes", self.tx_bytes),
            ("tx_malformed", self.tx_malformed),
            ("tx_refused", self.tx_refused),
            ("tx_waits", self.tx_waits),
            ("host_errors", self.host_errors),
            ("commands", self.commands),
            ("bad_commands", self.bad_commands),
        ]
    }
}
