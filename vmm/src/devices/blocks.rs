//! Blocks of memory come and go under all the other devices.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio::mem::MemBackend;

use super::{Bystanders, while_still};
use crate::memory::Hotplug;

/// The host's side of the memory device.
#[derive(Debug)]
pub(super) struct HostBlocks {
    hotplug: Arc<Hotplug>,
    bystanders: Bystanders,
}

impl HostBlocks {
    pub(super) fn new(hotplug: Arc<Hotplug>, bystanders: Bystanders) -> Self {
        HostBlocks { hotplug, bystanders }
    }
}

impl MemBackend for HostBlocks {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        self.hotplug.plug(&blocks)
    }

    /// On the main thread, which holds no transport's lock but the memory device's; so no lock is waited for in a circle.
    fn unplug(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        let bystanders = self.bystanders.lock().expect("nothing panics under this lock");
        let mut done = Ok(());
        if while_still(&bystanders, &mut || done = self.hotplug.unplug(runs)) {
            return done;
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the file server is at a long request"))
    }
}
