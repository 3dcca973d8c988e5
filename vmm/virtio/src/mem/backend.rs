//! What makes memory of addresses.

use std::fmt::Debug;
use std::io;
use std::ops::Range;

/// The host's side of the region. Blocks are numbered from its start.
///
/// The device calls it on the main loop, and keeps the bits of [`Blocks`](crate::memory::Blocks): those of blocks that come are set
/// after `plug`, those of blocks that go are cleared before `unplug`.
pub trait MemBackend: Debug + Send {
    /// Makes `blocks`, none of which is there, memory of undefined content.
    ///
    /// # Errors
    /// The host has none left, or the like. Nothing has changed then, and the driver may try again.
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()>;

    /// Takes all of `runs` away, all of which are there, and gives their bytes back to the host. When it returns, no
    /// access to them succeeds, and nothing that could have been using them is.
    ///
    /// # Errors
    /// It cannot be done now. Nothing has changed then, content included, and the driver may try again.
    fn unplug(&mut self, runs: &[Range<u64>]) -> io::Result<()>;
}
