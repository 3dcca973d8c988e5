//! What is saved of the device.

use serde::{Deserialize, Serialize};

/// Its place: a guest that was told it has mappings there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}
