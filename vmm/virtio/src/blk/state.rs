//! What is saved of a disk. Its bytes are the owner's to save.

use serde::{Deserialize, Serialize};

/// What the guest knows of the disk; the one that takes over must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// The guest may not write.
    pub read_only: bool,
}
