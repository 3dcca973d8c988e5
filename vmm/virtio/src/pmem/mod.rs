//! The memory device of files (virtio 1.2, 5.19, "PMEM Device"): a range of guest physical addresses at which the guest finds
//! what the host has mapped there. Ours is read-only.
//!
//! ```text
//! driver ── start, size ──> a block device /dev/pmemN, with DAX: files that are mapped there are the host's page cache
//!        ── FLUSH ──> 0     nothing was written, so nothing is to be flushed
//! ```
//!
//! What lies at the addresses, and that the guest cannot write there, is the VMM's business (`vmm::memory`); this is the part that
//! a driver talks to. The one request there is, FLUSH, is for writers: the guest's kernel makes none on a file system that is
//! mounted read-only, and one that comes all the same is answered with success at once.
//!
//! Not offered: `VIRTIO_PMEM_F_SHMEM_REGION` (1.3), another way to say the same two numbers.

mod device;
mod metrics;
mod state;

pub use device::{Pmem, PmemConfig};
pub use metrics::PmemMetrics;
pub use state::PmemState;
