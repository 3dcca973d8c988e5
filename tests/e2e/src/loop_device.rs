//! Block devices of a test's own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::run;

/// A loop device with a file behind it; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    node: PathBuf,
    image: NamedTempFile,
}

impl LoopDevice {
    /// Makes one with this content, of whole sectors of 512 bytes.
    pub fn with(content: &[u8]) -> Result<LoopDevice> {
        Self::attach(content, &[])
    }

    /// The same, which cannot be written.
    pub fn read_only(content: &[u8]) -> Result<LoopDevice> {
        Self::attach(content, &["--read-only"])
    }

    fn attach(content: &[u8], options: &[&str]) -> Result<LoopDevice> {
        let image = NamedTempFile::new_in("/var/tmp")?;
        std::fs::write(image.path(), content)?;
        let mut losetup = Command::new("losetup");
        let node = run(losetup.args(["--find", "--show"]).args(options).arg(image.path()))?.ok()?;
        Ok(LoopDevice { node: node.into(), image })
    }

    /// Its node below `/dev`.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// The same as an argument.
    pub fn name(&self) -> &str {
        self.node.to_str().expect("losetup prints text")
    }

    /// What is on it, once it has taken what was written to it.
    pub fn content(&self) -> Result<Vec<u8>> {
        run(Command::new("blockdev").arg("--flushbufs").arg(&self.node))?.ok()?;
        Ok(std::fs::read(self.image.path())?)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // It goes when its last user goes, if there is one.
        let _ = run(Command::new("losetup").arg("--detach").arg(&self.node));
    }
}
