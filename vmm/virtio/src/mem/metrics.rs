//! Counters of the memory device.

/// Since the device was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemMetrics {
    /// PLUG requests done.
    pub plugs: u64,
    /// UNPLUG requests done.
    pub unplugs: u64,
    /// UNPLUG ALL requests done.
    pub unplug_alls: u64,
    /// STATE requests answered.
    pub states: u64,
    /// PLUG requests for more than what was asked for (NACK).
    pub refused: u64,
    /// Requests that the host could not do at the moment (BUSY).
    pub busy: u64,
    /// Requests that made no sense (ERROR).
    pub errors: u64,
    /// Bytes of all blocks ever plugged.
    pub bytes_plugged: u64,
    /// Bytes of all blocks ever given back.
    pub bytes_given_back: u64,
}

impl MemMetrics {
    /// By name.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("plugs", self.plugs),
            ("unplugs", self.unplugs),
            ("unplug_alls", self.unplug_alls),
            ("states", self.states),
            ("refused", self.refused),
            ("busy", self.busy),
            ("errors", self.errors),
            ("bytes_plugged", self.bytes_plugged),
            ("bytes_given_back", self.bytes_given_back),
        ]
    }
}
