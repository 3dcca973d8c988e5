//! Programs of others into the page cache, before anything is timed. In exact time the clock goes on to the next timer while the lab
//! waits for its own disks: of a program that is not there yet, five minutes are over in two seconds.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Folders with programs, and with a folder for each of containerd's releases.
const SYSTEM: [&str; 2] = ["/usr/bin", "/usr/sbin"];
const RELEASES: &str = "/opt/containerd";

/// What the names of those begin with that are measured, or run what is measured.
const MEASURED: [&str; 4] = ["containerd", "ctr", "runc", "qemu-system"];

/// Reads them. Not ours: how much of them is in a process's memory depends on how much of their files is in the cache.
pub fn programs() -> Result<()> {
    let mut folders: Vec<PathBuf> = SYSTEM.map(PathBuf::from).into();
    folders.extend(children(Path::new(RELEASES))?.into_iter().map(|release| release.join("usr/bin")));
    let mut programs = Vec::new();
    for folder in folders {
        let is_measured = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            MEASURED.iter().any(|begin| name.starts_with(begin))
        };
        programs.extend(children(&folder)?.into_iter().filter(is_measured));
    }
    for program in programs {
        let read = File::open(&program).and_then(|mut file| io::copy(&mut file, &mut io::sink()));
        read.with_context(|| format!("read {}", program.display()))?;
    }
    Ok(())
}

fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}
