//! The console device (virtio 1.2, 5.3) with a single port: the guest's `hvc0`.
//!
//! Output goes to a descriptor, if there is one, and its tail is kept as the guest's last words. A host that does
//! not read never blocks the guest: what does not fit is dropped and counted. Input waits in its descriptor until the
//! guest offers buffers. No multiport, no size, no emergency write.

mod backend;
mod device;
mod metrics;
mod state;
mod tail;

pub use device::{Console, ConsoleError};
pub use metrics::ConsoleMetrics;
pub use state::ConsoleState;
