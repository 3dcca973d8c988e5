//! What is saved of a balloon. What was given back is guest memory's business: it reads as zeros.

use serde::{Deserialize, Serialize};

/// The configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// `num_pages`: what the owner wants, in pages of 4 KiB.
    pub target_pages: u32,
    /// `actual`: what the driver says it gave.
    pub actual_pages: u32,
    /// `poison_val`.
    pub poison_val: u32,
}
