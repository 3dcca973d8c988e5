//! What is saved of the console: its last words.

use serde::{Deserialize, Serialize};

/// The guest cannot tell two consoles apart; their owner can.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// The last bytes that the guest wrote.
    pub last_words: Vec<u8>,
    /// It said that it panics.
    pub panicked: bool,
}
