//! File systems of a test's own: one that is soon full, and one as on a disk.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use tempfile::TempDir;

use crate::run;

/// A file system of a given size; unmounted when dropped.
#[derive(Debug)]
pub struct SmallFs(TempDir);

impl SmallFs {
    /// Mounts a tmpfs of `bytes` in a folder of its own.
    pub fn mount(bytes: u64) -> Result<SmallFs> {
        let folder = tempfile::Builder::new().prefix("small").tempdir_in("/var/tmp")?;
        let size = format!("size={bytes}");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()))?.ok()?;
        Ok(SmallFs(folder))
    }

    /// Makes and mounts an ext4 of `bytes`, which can do more than a tmpfs: attributes of users, for example.
    pub fn ext4(bytes: u64) -> Result<SmallFs> {
        let folder = tempfile::Builder::new().prefix("ext4").tempdir_in("/var/tmp")?;
        let image = tempfile::NamedTempFile::new_in("/var/tmp")?;
        image.as_file().set_len(bytes)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(image.path()))?.ok()?;
        run(Command::new("mount").args(["-o", "loop"]).arg(image.path()).arg(folder.path()))?.ok()?;
        // The loop device holds the image, whose name goes here.
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
