//! Growing and shrinking a running VM.

use serde::{Deserialize, Serialize};

/// Longest time a resize may take, in milliseconds.
pub const MAX_RESIZE_MS: u32 = 300_000;

/// Which vCPUs shall be online.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vcpus {
    /// So many: the lowest that are offline come, the highest that are online go.
    Count(u8),
    /// These, by index; vCPU 0 is one of them.
    These(Vec<u8>),
}

/// How a resize ended. The numbers say how far it came; where one is unknown, the next resize finds out first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resized {
    /// How.
    pub ending: Ending,
    /// vCPUs, if they were to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<Reached>,
    /// Memory in MiB, if it was to change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<Reached>,
    /// What was in the way; empty when all is done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// What was asked for and what was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reached {
    /// Asked for.
    pub asked: u32,
    /// Reached; `None`: the guest has not said.
    pub reached: Option<u32>,
}

/// Ways a resize ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// All that was asked for.
    Done,
    /// Some of it.
    Partial,
    /// None of it: the guest, or the host, said no.
    Refused,
    /// A later request took its place before it began; nothing was tried.
    Replaced,
    /// The guest did not answer in time.
    TimedOut,
    /// The guest's side of the channel went away before it answered.
    Reset,
}

impl Ending {
    /// All of them.
    pub const ALL: [Ending; 6] =
        [Ending::Done, Ending::Partial, Ending::Refused, Ending::Replaced, Ending::TimedOut, Ending::Reset];

    /// Name for counters and messages, as it is on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Ending::Done => "done",
            Ending::Partial => "partial",
            Ending::Refused => "refused",
            Ending::Replaced => "replaced",
            Ending::TimedOut => "timed_out",
            Ending::Reset => "reset",
        }
    }
}

impl std::fmt::Display for Resized {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.ending {
            Ending::Done => "resized",
            Ending::Partial => "resized in part",
            Ending::Refused => "not resized",
            Ending::Replaced => "a later resize took its place",
            Ending::TimedOut => "the guest did not answer in time",
            Ending::Reset => "the guest reset the upcall channel",
        })?;
        for (what, unit, number) in [("vCPUs", "", self.vcpus), ("memory", " MiB", self.memory_mib)] {
            let Some(Reached { asked, reached }) = number else { continue };
            match reached {
                Some(reached) => write!(f, ", {what} {reached} of {asked}{unit}")?,
                None => write!(f, ", {what} unknown of {asked}{unit}")?,
            }
        }
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}
