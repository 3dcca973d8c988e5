//! The entropy device (virtio 1.2, 5.4): random bytes from the host's kernel.

mod backend;
mod device;
mod metrics;
mod state;

pub use device::Rng;
pub use metrics::RngMetrics;
pub use state::RngState;
