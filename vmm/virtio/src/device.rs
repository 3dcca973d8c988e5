//! The contract between a device, its transport and the VMM's main loop.
//!
//! ```text
//!             activate                    pause
//!  Inactive ────────────> Active  <──────────────────> Paused ── save ──> State
//!     ^                     │             resume          ^
//!     └────── reset ────────┘                 restore ────┘ (of a new device: Inactive -> Paused)
//! ```

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::irq::Interrupt;
use crate::queue::{Queue, QueueState};

/// What a driver has set up when it says `DRIVER_OK` (virtio 1.2, 3.1.1), checked by the transport.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The queues in the device's order, their rings checked to lie in memory. A queue that the driver left unused
    /// is there too, and never yields a chain.
    pub queues: Vec<Queue>,
    /// For each queue, the event that the guest's notification raises. Only devices with
    /// [`VirtioDevice::OWN_THREADS`] wait on them; for the others the main loop does. A device that stops before its
    /// queue is empty (to let others work) writes to the event itself, to be called again.
    pub kicks: Vec<EventFd>,
    /// How to interrupt the driver. [`Queue::notify`] does it for used buffers; a device needs this one only for
    /// changes of its configuration.
    pub interrupt: Interrupt,
    /// The features both sides agreed on.
    pub features: u64,
}

/// A device could not take up work. The transport answers with `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2).
#[derive(Debug, thiserror::Error)]
#[error("{device} cannot be activated: {reason}")]
pub struct ActivateError {
    /// Device name.
    pub device: &'static str,
    /// Why.
    pub reason: String,
}

/// One virtio device.
///
/// Register accesses of the guest come on vCPU threads, `on_queue` and `on_backend` on the main loop, all under
/// the transport's lock; so a device needs no lock of its own, and must not block in any of these calls.
pub trait VirtioDevice: Debug + Send {
    /// What [`VirtioDevice::save`] gives: everything the guest could tell a restored device apart by, save the
    /// transport's own registers and rings.
    type State: Serialize + DeserializeOwned + Debug + Clone + PartialEq;

    /// Name for logs and counters.
    const NAME: &'static str;
    /// Device id (virtio 1.2, 5).
    const ID: u32;
    /// The device waits on its queue events on threads of its own.
    const OWN_THREADS: bool = false;

    /// Largest size of each queue: a power of two, at most 32,768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Feature bits offered, without the transport's own (`VIRTIO_F_VERSION_1`, ring features).
    fn features(&self) -> u64;

    /// Reads the configuration space at `offset`; what lies beyond its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Takes up work. Called once after each reset.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The guest notified queue `index` (only while active; spurious calls are harmless).
    fn on_queue(&mut self, index: usize);

    /// A descriptor that is readable when a backend needs [`VirtioDevice::on_backend`] (an epoll instance where
    /// there are several backends). The same one for the device's life. The main loop waits for it by level while the
    /// device is not paused, active or not: a device that can do nothing about it now (as it has no buffers, or is
    /// inactive) must see to it that the descriptor is quiet meanwhile, as by taking sources out of its epoll instance.
    fn backend(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The backend descriptor is readable.
    fn on_backend(&mut self) {}

    /// Stops work between two requests: after it, nothing touches guest memory or rings until `resume`.
    fn pause(&mut self);

    /// Goes on; work that arrived meanwhile is done without a further notification.
    fn resume(&mut self);

    /// Queues as they stand, for the transport to save. Called when paused.
    fn queues(&self) -> Vec<QueueState>;

    /// The device's own state. Called when paused.
    fn save(&self) -> Self::State;

    /// Makes a new device what `save` saw, paused. `activation` is `None` if it was not active then.
    fn restore(&mut self, state: &Self::State, activation: Option<Activation>) -> Result<(), ActivateError>;

    /// The driver reset the device: forget the queues, stop all work, keep the backend. Ends a pause, too. When it
    /// returns, nothing touches guest memory or rings any more.
    fn reset(&mut self);

    /// Does `task` while no thread of the device's own holds anything of guest memory, and tells what came of it; `None`
    /// if a thread was at a request for too long, and `task` was not done. Called under the transport's lock, which is
    /// all that a device without threads of its own needs.
    fn while_still<T>(&mut self, task: impl FnOnce() -> T) -> Option<T>
    where
        Self: Sized,
    {
        Some(task())
    }

    /// Counters, by name, since the device was made.
    fn metrics(&self) -> Vec<(&'static str, u64)>;
}

/// What the VMM does about the threads of devices with [`VirtioDevice::OWN_THREADS`].
pub trait Threads: Send + Sync {
    /// Called once on each thread, last before its first request: the place to filter its system calls. The device
    /// cannot be made if this fails.
    fn enter(&self, name: &str) -> io::Result<()>;

    /// A thread panicked, and with it the request it was serving. Called on that thread. The device serves nothing
    /// more; the VMM ends.
    fn died(&self, name: &str);
}

/// [`VirtioDevice::read_config`] for a configuration space that lies in memory as `config`.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
