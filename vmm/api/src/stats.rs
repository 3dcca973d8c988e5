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
    /// How large it is, from `Configure` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// Resizes, by how they ended ([`crate::Ending::name`]); how long those took that the guest had a say in, as
    /// `le_N_us`, each counting all that took at most N microseconds; and what the upcall channel counts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resizes: BTreeMap<String, u64>,
    /// Devices that came and went while the VM ran, by how it ended: `attached`, `detached`, `refused` by the host or the
    /// guest, `timed_out`, `reset`; `parked`: devices that the guest may have and that are to go.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub plugs: BTreeMap<String, u64>,
    /// Device counters: device name (`blk0`, `vsock`, …) to counter to value.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}

/// How large a VM is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// vCPUs last asked for.
    pub vcpus_asked: u8,
    /// vCPUs the guest has online; `None`: not known now.
    pub vcpus: Option<u8>,
    /// Most vCPUs.
    pub vcpus_max: u8,
    /// Memory last asked for, in MiB.
    pub memory_asked_mib: u32,
    /// Memory the guest has, in MiB.
    pub memory_mib: u32,
    /// Most memory, in MiB.
    pub memory_max_mib: u32,
    /// The guest's kernel has opened the upcall channel: a resize can begin at once.
    pub upcall: bool,
}
