//! A container's control group: who is in it, and the end of it. `libcontainer` makes it, fills it and sets limits.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::Interest;

/// Where the cgroup v2 hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The containers' parent in it.
const PARENT: &str = "ctvm";

/// How long killed processes may take to go.
const EMPTY: Duration = Duration::from_secs(5);

/// One container's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    dir: PathBuf,
}

/// The group of container `id` as a path within the hierarchy.
pub fn path_in_hierarchy(id: &str) -> String {
    format!("/{PARENT}/{id}")
}

/// Whether the kernel accounts swap.
pub fn has_swap() -> bool {
    Path::new(ROOT).join(PARENT).join("memory.swap.max").exists()
}

/// Makes every controller available to containers: enabled below the root and below the containers' parent.
pub fn prepare() -> io::Result<()> {
    let root = Path::new(ROOT);
    let parent = root.join(PARENT);
    match fs::create_dir(&parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    for dir in [root, &parent] {
        fs::write(dir.join("cgroup.subtree_control"), enable.join(" "))?;
    }
    Ok(())
}

impl Cgroup {
    /// The group of container `id`, which may not exist yet.
    pub fn of(id: &str) -> Self {
        Self { dir: Path::new(ROOT).join(PARENT).join(id) }
    }

    /// Every process in the group and in groups below it.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        collect(&self.dir, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Sends `signal` to every process in the group. SIGKILL reaches also those that are being forked.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        if signal == libc::SIGKILL {
            return fs::write(self.dir.join("cgroup.kill"), "1");
        }
        for pid in self.pids()? {
            // One that has gone meanwhile needs no signal.
            let _ = crate::sys::kill(pid, signal);
        }
        Ok(())
    }

    /// Kills what is left in the group, waits until it is gone, and removes the group. No group is fine, too.
    pub async fn remove(&self) -> io::Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        self.signal(libc::SIGKILL)?;
        tokio::time::timeout(EMPTY, self.emptied()).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!(
                    "{} has processes {} ms after they were killed",
                    self.dir.display(),
                    EMPTY.as_millis()
                ),
            )
        })??;
        remove_tree(&self.dir)
    }

    /// Waits until `populated` in `cgroup.events` is 0; the kernel wakes readers when it changes
    /// (admin-guide/cgroup-v2, "[Un]populated Notification").
    async fn emptied(&self) -> io::Result<()> {
        let path = self.dir.join("cgroup.events");
        let events = crate::sys::register(File::open(&path)?.into(), Interest::PRIORITY)?;
        loop {
            if fs::read_to_string(&path)?.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

fn collect(dir: &Path, pids: &mut Vec<i32>) -> io::Result<()> {
    let procs = fs::read_to_string(dir.join("cgroup.procs"))?;
    pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
    for below in subgroups(dir)? {
        // A group that has gone meanwhile has no processes.
        let _ = collect(&below, pids);
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for below in subgroups(dir)? {
        remove_tree(&below)?;
    }
    fs::remove_dir(dir)
}

fn subgroups(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_that_is_not_there_has_no_pids_to_tell() {
        assert_eq!(Cgroup::of("no-such").pids().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
