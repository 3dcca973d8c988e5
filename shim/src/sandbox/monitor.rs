//! A VMM that has no VM yet: its process, and what is opened for it beforehand.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::config::Config;
use crate::sandbox::boot::{BootCause, BootError, Stage};
use crate::sandbox::console::Console;
use crate::sandbox::timeline::Timeline;
use crate::sandbox::{net, vmm_log};
use crate::vmm::{self, ControlSlot, Events, Vmm};

/// Whose network namespace the VMM's process is in. It uses neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// That of this process.
    Ours,
    /// A new one, for others to find by its process number.
    Own,
}

/// A VMM without a VM.
#[derive(Debug)]
pub struct Monitor {
    /// Its process.
    pub vmm: Vmm,
    /// What it will tell.
    pub events: Events,
    /// What the guest's console will say.
    pub console: Console,
    /// Where that comes from.
    pub console_fd: OwnedFd,
    /// The guest's kernel.
    pub kernel: File,
    /// The guest's image.
    pub image: File,
}

impl Monitor {
    /// Starts one. `spawned` is told its process before anything else is done with it.
    ///
    /// # Errors
    /// [`Stage::Files`] and [`Stage::Spawn`]; no process is left then.
    pub fn spawn(
        config: &Config,
        slot: &mut ControlSlot,
        place: Place,
        timeline: &Timeline,
        spawned: impl FnOnce(u32),
    ) -> Result<Self, BootError> {
        let files = |cause: BootCause| BootError::early(Stage::Files, cause);
        let failed = |cause: BootCause| BootError::early(Stage::Spawn, cause);
        let os = |what| move |source| BootCause::Os { what, source };
        let (console, console_fd) = Console::open().map_err(os("a pipe for the console")).map_err(files)?;
        let kernel = open("kernel", &config.kernel).map_err(files)?;
        let image = open("image", &config.image).map_err(files)?;

        let binary = vmm::find_binary(config.vmm.as_deref()).map_err(|e| failed(e.into()))?;
        let log = vmm_log::open().map_err(os("a pipe for the VMM's log")).map_err(failed)?;
        let spawn = || vmm::spawn(&binary, slot, log);
        let process = match place {
            Place::Ours => spawn(),
            Place::Own => {
                net::in_new(spawn).map_err(os("a network namespace for the VMM")).map_err(failed)?
            }
        };
        let (child, socket) = process.map_err(|e| failed(e.into()))?;
        timeline.reached("vmm exec");
        spawned(child.id());
        // Without this end of its socket it ends.
        let (vmm, events) = Vmm::adopt(child, socket).map_err(|e| failed(e.into()))?;
        Ok(Monitor { vmm, events, console, console_fd, kernel, image })
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, BootCause> {
    let file = File::open(path).and_then(|file| match file.metadata()?.is_dir() {
        true => Err(std::io::ErrorKind::IsADirectory.into()),
        false => Ok(file),
    });
    file.map_err(|source| BootCause::File { what, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_had_is_named() {
        let error = open("kernel", Path::new("/nonexistent/vmlinux")).unwrap_err();
        assert_eq!(error.to_string(), "kernel /nonexistent/vmlinux");
        assert!(open("image", Path::new("/tmp")).is_err());
    }
}
