//! The block device (virtio 1.2, 5.2) over a raw file or a host block device.
//!
//! ```text
//!  queue ──> request.rs: bytes -> Request (checked against the disk) ──> backend.rs: Disk ──> file
//!                                                                        status byte <──┘
//! ```
//!
//! Requests are done one after the other on the main loop, by `preadv`/`pwritev` straight from and to guest memory.
//! What that costs the other devices is bounded by the size of a request and by a budget for each turn.
//! The host's page cache is the write-back cache that `VIRTIO_BLK_F_FLUSH` is about; for a driver that does not know
//! the feature, each write is made durable.
//!
//! Not offered: geometry, topology, cache-mode switch (`CONFIG_WCE`), secure erase, lifetime, zones.

mod backend;
mod device;
mod metrics;
mod request;
mod space;
mod state;

pub use backend::{Disk, DiskError};
pub use device::Blk;
pub use metrics::BlkMetrics;
pub use request::{BadRequest, Limits, Range, Request};
pub use space::{MAX_DATA, QUEUE_SIZE, config_space};
pub use state::BlkState;

/// The unit of `capacity` and `sector`, whatever the block size (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;
