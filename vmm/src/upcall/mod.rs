//! The upcall channel: the guest's kernel dials the host over vsock and then does what it is asked, answering each request
//! once with what was reached.
//!
//! ```text
//! vm::change ── Ask ──> channel ── frame ──> abi ── vsock ──> kernel-config/upcall (guest)
//!            <─ Happened ──┘
//! ```
//!
//! `kernel-config/upcall/README.md` is the protocol. Not here: what to ask, and what an answer, or none, means for the VM
//! (`vm::change`).

pub mod abi;
mod channel;
mod frame;

#[cfg(test)]
mod tests;

pub use channel::{Channel, Counters, Happened};
pub use frame::{Ask, DevicePlace, Hello, Violation, available, first_failure, online};
