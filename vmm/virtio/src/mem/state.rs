//! What is saved of the memory device. The content of plugged blocks is guest memory, and saved with it.

use serde::{Deserialize, Serialize};

/// The region and what of it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest physical address of the region.
    pub addr: u64,
    /// Its length in bytes.
    pub region_size: u64,
    /// `usable_region_size`, in bytes.
    pub usable_size: u64,
    /// `requested_size`, in bytes.
    pub requested_size: u64,
    /// Plugged blocks, as runs: first block and number of blocks, ascending.
    pub plugged: Vec<(u64, u64)>,
}
