//! A file system that is soon full.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::run;

/// A tmpfs of a given size; unmounted when dropped.
#[derive(Debug)]
pub struct SmallFs(TempDir);

impl SmallFs {
    /// Mounts one of `bytes` in a folder of its own.
    pub fn mount(bytes: u64) -> Result<SmallFs> {
        let folder = tempfile::Builder::new().prefix("small").tempdir_in("/var/tmp")?;
        let size = format!("size={bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()))?.ok()?;
        Ok(SmallFs(folder))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves no room in it.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path().join("filler"))?;
        loop {
            match file.write_all(&[0; 4096]) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => return Ok(()),
                Err(error) => bail!("filling {}: {error}", self.path().display()),
            }
        }
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        // A lazy unmount always succeeds; the folder goes with the `TempDir`.
        let _ = run(Command::new("umount").arg("-l").arg(self.path()));
    }
}
