//! What is saved of the entropy device: it remembers nothing.

use serde::{Deserialize, Serialize};

/// Nothing: two entropy devices cannot be told apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}
