//! The disk of an image whose bytes come as they are read (`docs/image.md`).
//!
//! ```text
//! guest ── virtio-blk ──> serving ── all there? ──> files: preadv from the cache files to guest memory
//!                            │ no                     ^ ready maps
//!                            └──> fetches ── Fetch ──> image service, which fills them
//!                                         <─ Fetched ─
//! ```
//!
//! One thread of the VM serves the images of all its disks. It never waits for the image service: a request whose bytes are
//! not there is put aside by its head, and looked up again when they are, or when its time is up. So nothing holds a slice of
//! guest memory from one turn to the next, and what waits can be saved as a list of heads.
//!
//! The guest is not trusted, and neither is the service beyond what the cache files hold: an answer that makes no sense ends
//! its connection. The bytes in the cache files are the service's to verify.

mod channel;
mod device;
mod fetches;
mod files;
mod metrics;
mod serving;
mod state;
mod thread;

pub use channel::{Channel, ChannelError};
#[cfg(feature = "testing")]
pub use device::turns;
pub use device::{ImageDisk, RebindError};
pub use files::{BlobFile, Files, FilesError};
pub use state::ImageState;
pub use thread::ImageThread;
