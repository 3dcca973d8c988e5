//! What the VMM does about the file server's threads: filters them, and ends when one is gone.

use std::io;
use std::sync::Arc;

use virtio::fs::FsThreads;

use crate::seccomp::{Role, confine};
use crate::vcpu::{End, Ends};

#[derive(Debug)]
struct Confined {
    ends: Arc<Ends>,
}

/// Threads that filter their system calls, and whose death is the VM's.
pub(super) fn confined(ends: &Arc<Ends>) -> Arc<dyn FsThreads> {
    Arc::new(Confined { ends: Arc::clone(ends) })
}

impl FsThreads for Confined {
    fn enter(&self, _: &str) -> io::Result<()> {
        confine(Role::Fs).map_err(io::Error::other)
    }

    fn died(&self, name: &str) {
        self.ends.report(End::ThreadDied { name: name.to_owned() });
    }
}
