//! What is saved of an image's disk. Its bytes are the owner's to open again.

use serde::{Deserialize, Serialize};

/// What the guest knows of the disk, and what it waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Heads of requests that were taken and have not been answered.
    pub waiting: Vec<u16>,
}
