//! What the owner of a microVM (the shim, `ctvm run`, a pool keeper) and its monitor say to each other.
//!
//! One VMM process serves one VM. At exec its fd 3 is one end of an `AF_UNIX` `SOCK_SEQPACKET` pair; the other
//! end is the owner's *lease*: when it closes, the VMM flushes, powers off and exits. One packet is one JSON
//! message of at most [`frame::MAX_PACKET`] bytes, and carries up to [`frame::MAX_FDS`] file descriptors:
//!
//! ```text
//! owner ── Request{id, op}            + fds ──> ctvm-vmm
//!       <─ Message::Reply{id, result} + fds ──
//!       <─ Message::Event{event}      + fds ──   unasked
//! ```
//!
//! A request is answered exactly once, possibly after later ones. Paths never cross the socket: every file the
//! VM uses is opened by the owner and named by its [`FdIndex`] in the packet.
//!
//! Not here: how the VMM carries an operation out, and anything of the guest agent's protocol (`agent-api`).

#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod error;
pub mod event;
pub mod exit;
pub mod frame;
pub mod hotplug;
pub mod image;
pub mod op;
pub mod resize;
pub mod stats;

pub use client::{Client, ClientError};
pub use config::{
    BlobConfig, ConsoleConfig, DiskConfig, FsConfig, GuestMemoryBacking, ImageConfig, KernelConfig,
    MemoryConfig, NetConfig, VmConfig, VsockConfig,
};
pub use error::{ApiError, ErrorCode};
pub use event::{Event, ExitReason};
pub use frame::{FdIndex, Packet};
pub use hotplug::{Attached, DeviceName, MemoryRange, NewDevice};
pub use op::{FsCache, Message, Op, Outcome, Reply, Request};
pub use resize::{Ending, Reached, Resized, Vcpus};
pub use stats::{Size, Stats, Timeline};

/// The file descriptor on which `ctvm-vmm` finds its control socket.
pub const CONTROL_FD: i32 = 3;

/// Version of this protocol. A VMM answers `Configure` from another version with `FailedPrecondition`.
pub const PROTOCOL_VERSION: u32 = 1;
