//! Changes of a running VM, over the upcall channel: resizes, and devices that come and go. One transaction at a time, which
//! always ends.
//!
//! ```text
//!  request ──> wait for the channel ──> ask what is unknown ──> memory, vCPUs, one after the other ──> answer
//!                     │                        │                        │
//!                     └── deadline ────────────┴── deadline, channel lost ──> answer, with what is known
//! ```
//!
//! vCPUs are prepared (their threads wait for the guest to wake them) before the guest is asked, and put to rest only
//! after it said that it is rid of them: no answer means that nobody stops. What the guest has online is then unknown,
//! until it is asked again, or dials again, which says it too. Memory is never unknown: the device counts it.
//!
//! Requests wait for their turn in the order in which they came; a resize that waits is replaced by a later one, as the later
//! one says what its owner wants now. Not here: who may ask when (`lifecycle`), how vCPUs and devices come and go (`vcpu`,
//! `devices`), how a question becomes bytes (`upcall`).

mod changes;
mod plug;
mod resize;
mod stats;
mod transaction;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use vmm_api::Resized;

use crate::devices::DeviceKey;
use crate::upcall::{Ask, DevicePlace};
pub use crate::vcpu::CpuSet;
pub use changes::Changes;
pub use plug::{Crowded, Left, Plug, PlugAsked, PlugCounters, Plugged, Why};

/// What changes act on.
pub trait Machine {
    /// Whether the guest's kernel has opened the channel.
    fn is_open(&self) -> bool;
    /// Sends a request; `None` if the channel is not open (any more).
    fn send(&mut self, ask: &Ask, within: Duration) -> Option<u64>;
    /// Has the threads of these vCPUs wait for the guest. All or none.
    fn start_vcpus(&mut self, set: CpuSet) -> Result<(), String>;
    /// Stops these vCPUs, which the guest does not use.
    fn park_vcpus(&mut self, set: CpuSet);
    /// What the memory device says; `None` without one.
    fn memory(&self) -> Option<MemoryState>;
    /// Hangs up on a guest that does not answer as it must.
    fn hang_up(&mut self);
    /// Has the memory device ask for so many bytes besides those of the boot.
    fn request_memory(&mut self, bytes: u64) -> Result<(), String>;
    /// Whether the guest's kernel said that it serves requests of this type.
    fn serves(&self, kind: u16) -> bool;
    /// Where this device is; `None` if it is gone.
    fn place(&self, device: DeviceKey) -> Option<DevicePlace>;
    /// Its status register (virtio 1.2, 2.1); 0 if it is gone.
    fn driver_status(&self, device: DeviceKey) -> u32;
    /// Takes it out of the VM, which the guest does not use it in; `None` if it is gone already.
    fn unplug(&mut self, device: DeviceKey) -> Option<Gone>;
}

/// A device was taken out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gone {
    /// What the guest wrote to it may be lost, as the host could not make it durable.
    pub lost: Option<String>,
}

/// Memory besides that of the boot, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryState {
    /// Address of the device's registers.
    pub base: u64,
    /// What the device asks for.
    pub requested: u64,
    /// What the guest has taken.
    pub plugged: u64,
    /// The driver has read `requested` since it was set.
    pub seen: bool,
}

/// What is wanted. Checked: within the VM's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// vCPUs online.
    pub vcpus: Option<Cpus>,
    /// Bytes besides those of the boot.
    pub memory: Option<u64>,
}

/// Which vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpus {
    /// So many.
    Count(u8),
    /// These.
    These(CpuSet),
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// Names the answer.
    pub id: u64,
    /// What is wanted.
    pub target: Target,
    /// When it came.
    pub at: Instant,
    /// How long it may take.
    pub timeout: Duration,
}

impl Asked {
    fn deadline(&self) -> Instant {
        self.at + self.timeout
    }

    /// vCPUs asked for, as a number.
    fn vcpus(&self) -> Option<u32> {
        self.target.vcpus.map(|cpus| match cpus {
            Cpus::Count(count) => count.into(),
            Cpus::These(set) => set.len().into(),
        })
    }
}

/// The one answer to the request `id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Of the request.
    pub id: u64,
    /// How it ended.
    pub resized: Resized,
}

/// As the owner counts: MiB of memory in all.
pub(super) fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}
