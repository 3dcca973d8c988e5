//! What the VMM does about threads of devices: filters them, and ends when one is gone.

use std::io;
use std::sync::Arc;

use virtio::device::Threads;

use crate::seccomp::{Role, confine};
use crate::vcpu::{End, Ends};

#[derive(Debug)]
struct Confined {
    role: Role,
    ends: Arc<Ends>,
}

/// Threads that filter their system calls, and whose death is the VM's.
pub(super) fn confined(role: Role, ends: &Arc<Ends>) -> Arc<dyn Threads> {
    Arc::new(Confined { role, ends: Arc::clone(ends) })
}

impl Threads for Confined {
    fn enter(&self, _: &str) -> io::Result<()> {
        confine(self.role).map_err(io::Error::other)
    }

    fn died(&self, name: &str) {
        self.ends.report(End::ThreadDied { name: name.to_owned() });
    }
}
