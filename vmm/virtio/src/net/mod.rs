//! The network device (virtio 1.2, 5.1) over a tap of the host.
//!
//! ```text
//!  receive queue i <── receive.rs <── tap j (backend.rs), for each j with j mod (pairs in use) = i
//! transmit queue i ──> transmit.rs ──> tap i
//!    control queue <─> control.rs: how many pairs are in use
//! ```
//!
//! A frame goes by one `readv` or `writev` between tap and guest memory, its header (virtio 1.2, 5.1.6) before it: the tap
//! speaks the same header, so checksums and segments that guest and host leave to each other stay undone until they
//! leave this host. The host's kernel checks what a guest writes there, and refuses nonsense with `EINVAL`.
//!
//! The tap spreads frames over all its queues, whatever the guest uses. So those of a pair that the guest does not use go
//! to one that it does, and no queue of the tap needs to be taken off.
//!
//! Not offered: filters by address or VLAN (all frames reach the guest), RSS, hash reports, announcements, ECN and UDP
//! segments, switching offloads while in use (`CTRL_GUEST_OFFLOADS`), interrupt moderation.

mod backend;
mod control;
mod device;
mod metrics;
mod receive;
mod state;
mod transmit;

pub use backend::{TapError, Taps};
pub use device::Net;
pub use metrics::NetMetrics;
pub use state::NetState;

/// Bytes of the header before each frame: with `VIRTIO_F_VERSION_1`, `num_buffers` is always there (virtio 1.2, 5.1.6.1).
pub const HEADER: usize = 12;
/// Bytes before a frame's payload: addresses, type, a VLAN tag.
const ETHERNET: usize = 18;
/// Longest frame with its header: a TCP segment of 64 KiB that is yet to be cut (virtio 1.2, 5.1.6.3.1).
const LONGEST: usize = 65_550 + HEADER;

/// Frames moved at a stretch, before other devices have their turn.
const BUDGET_FRAMES: usize = 64;
/// Bytes moved at a stretch; the frame that goes past it is still moved.
const BUDGET_BYTES: usize = 1 << 20;
