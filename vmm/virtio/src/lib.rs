//! virtio 1.2 devices behind the MMIO transport, for one VM in one process.
//!
//! The crate knows guest memory and rings, not KVM: a device gets guest memory, its queues and an interrupt at
//! activation, and its owner (the `vmm` crate) calls it when a queue was notified or a backend is ready.
//!
//! Everything a guest writes is checked at the door ([`queue`]); a device answers nonsense with a status, a
//! counter and a rate-limited line, never with a panic.

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod irq;
pub mod mem;
pub mod memory;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rate;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;
pub mod work;

pub use memory::GuestMemory;
