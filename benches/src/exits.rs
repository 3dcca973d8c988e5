//! Exits to user space, counted by the kernel itself (tracepoint `kvm:kvm_userspace_exit`), so that every VMM is
//! counted alike.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Tracing of one event, off again when dropped.
#[derive(Debug)]
pub struct Exits {
    folder: PathBuf,
}

impl Exits {
    /// Starts counting for all VMs of the machine.
    pub fn count() -> Result<Exits> {
        let folder = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
            .map(Path::new)
            .into_iter()
            .find(|f| f.join("events/kvm").exists())
            .context("no kvm events in tracefs: is it mounted, and kvm loaded?")?
            .to_owned();
        let exits = Exits { folder };
        exits.write("trace", "")?;
        exits.write("buffer_size_kb", "8192")?;
        exits.write("events/kvm/kvm_userspace_exit/enable", "1")?;
        exits.write("tracing_on", "1")?;
        Ok(exits)
    }

    /// How many there were so far. Stops counting.
    pub fn stop(&self) -> Result<usize> {
        self.write("tracing_on", "0")?;
        let trace = fs::read_to_string(self.folder.join("trace"))?;
        Ok(trace.lines().filter(|l| l.contains("kvm_userspace_exit:")).count())
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }
}

impl Drop for Exits {
    fn drop(&mut self) {
        // Left on, it would only slow later runs down.
        let _ = self.write("events/kvm/kvm_userspace_exit/enable", "0");
    }
}
