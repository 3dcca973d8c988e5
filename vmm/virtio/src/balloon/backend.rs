//! What takes pages.

use std::fmt::Debug;
use std::io;

use vm_memory::VolatileSlice;

/// The host's side.
pub trait BalloonBackend: Debug + Send {
    /// Gives whole pages of guest memory back to the host. They are there, and zeros, when they are touched again.
    fn give_back(&mut self, pages: &VolatileSlice<'_>) -> io::Result<()>;
}
