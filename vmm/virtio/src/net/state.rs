//! What is saved of a network device. Frames on their way may be lost, as in any network.

use serde::{Deserialize, Serialize};

/// What the guest knows of the device; the one that takes over must be the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The guest's address.
    pub mac: [u8; 6],
    /// Longest payload of a frame, in bytes.
    pub mtu: u16,
    /// Queue pairs that there are.
    pub pairs: u16,
    /// Queue pairs that the guest uses.
    pub pairs_in_use: u16,
}
