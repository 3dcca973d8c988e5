//! What the VMM says unasked.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Most bytes of the guest's console kept as its last words.
pub const LAST_WORDS: usize = 4096;

/// Something happened in the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The guest dialled one of [`crate::VsockConfig::ports`].
    VsockAccepted {
        /// The host port it dialled.
        port: u32,
        /// The guest port it dialled from.
        guest_port: u32,
        /// A connected stream socket.
        socket: FdIndex,
    },
    /// An image's connection to the image service has ended, or was ended for what came over it. Reads of what is in the cache
    /// go on; others wait for [`crate::Op::ImageChannel`].
    ImageLost {
        /// [`crate::DiskConfig::id`] of the disk.
        disk: String,
    },
    /// The last packet: the VM is gone and the process exits now. A VMM that ends without it has crashed.
    Exiting {
        /// Why.
        reason: ExitReason,
    },
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitReason {
    /// The owner asked for it.
    Shutdown,
    /// The owner went away.
    LeaseLost,
    /// The guest reset or powered itself off.
    GuestReset,
    /// The guest's kernel panicked.
    GuestPanic {
        /// The end of its console output, at most [`LAST_WORDS`] bytes, as text.
        last_words: String,
    },
    /// KVM could not go on running a vCPU.
    VcpuFailed {
        /// Which one.
        vcpu: u8,
        /// What KVM said.
        detail: String,
        /// The end of the guest's console output.
        last_words: String,
    },
    /// A thread of the VMM ended that must not.
    Internal {
        /// What happened.
        detail: String,
    },
}

impl ExitReason {
    /// Exit status of the VMM process for this reason.
    pub fn exit_status(&self) -> u8 {
        match self {
            ExitReason::Shutdown | ExitReason::GuestReset => 0,
            ExitReason::LeaseLost => 10,
            ExitReason::GuestPanic { .. } => 11,
            ExitReason::VcpuFailed { .. } => 12,
            ExitReason::Internal { .. } => 13,
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::Shutdown => f.write_str("shut down by its owner"),
            ExitReason::LeaseLost => f.write_str("its owner went away"),
            ExitReason::GuestReset => f.write_str("the guest powered off"),
            ExitReason::GuestPanic { last_words } => {
                write!(f, "guest kernel panic: {}", panic_line(last_words))
            }
            ExitReason::VcpuFailed { vcpu, detail, .. } => write!(f, "vCPU {vcpu} failed: {detail}"),
            ExitReason::Internal { detail } => write!(f, "internal error: {detail}"),
        }
    }
}

/// The line of the console that says why the kernel panicked, or the last line there is.
fn panic_line(last_words: &str) -> &str {
    let mut lines = last_words.lines().filter(|l| !l.trim().is_empty());
    let last = lines.clone().next_back().unwrap_or("(no console output)");
    lines.find(|l| l.contains("Kernel panic")).unwrap_or(last)
}
