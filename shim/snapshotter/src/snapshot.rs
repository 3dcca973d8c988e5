//! One snapshot, and what of it is on disk.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Labels, as containerd gave them.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Read-only, of a container or of somebody who looks.
    View,
    /// Writable, of a container or of a layer that is being unpacked.
    Active,
    /// A layer: never changes again, others may stand on it.
    Committed,
}

impl Kind {
    /// containerd's word, which filters use.
    pub fn word(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// What a snapshot takes by itself, without its parents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Files and folders, those with several names once.
    pub inodes: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its folder's name.
    pub id: u64,
    /// containerd's key while it is active, its name when it is committed.
    pub name: String,
    /// What it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What it is for.
    pub kind: Kind,
    /// When it was made, since 1970.
    pub created: Duration,
    /// When its labels or its kind last changed.
    pub updated: Duration,
    /// Its labels.
    #[serde(default)]
    pub labels: Labels,
    /// What it took when it was committed.
    #[serde(default)]
    pub usage: Usage,
}

/// The time, since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
