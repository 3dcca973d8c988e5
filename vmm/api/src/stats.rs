//! Counters and times.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// When each stage of a start ended, in microseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// First instruction of the VMM's `main`.
    pub main_us: u64,
    /// `Configure` arrived.
    pub configure_us: u64,
    /// KVM VM, memory, interrupt controller and vCPUs exist.
    pub kvm_ready_us: u64,
    /// Kernel, command line and tables are in guest memory; devices are made.
    pub loaded_us: u64,
    /// `Boot` was carried out: the first vCPU is about to enter the guest.
    pub running_us: u64,
}

/// What the VM has done so far. Counts since the VMM started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stats {
    /// Lifecycle state: `created`, `configured`, `running`, `paused`, `stopped`.
    pub state: String,
    /// Stages of the start.
    pub timeline: Timeline,
    /// Exits of all vCPUs to user space, by kind (`io_in`, `io_out`, `mmio_read`, `mmio_write`, `other`).
    pub exits: BTreeMap<String, u64>,
    /// Device counters: device name (`blk0`, `vsock`, …) to counter to value.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}
