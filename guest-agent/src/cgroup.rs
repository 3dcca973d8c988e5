//! A container's control group: who is in it, whether they run, and the end of it. `libcontainer` makes it, fills it
//! and sets limits.

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
/// How long processes may take to stand still. One that waits for the host's files cannot before they come.
const FREEZE: Duration = Duration::from_secs(5);

const FREEZER: &str = "cgroup.freeze";
const MEMORY_EVENTS: &str = "memory.events";
const OOM_KILL: &str = "oom_kill";

/// One container's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    dir: PathBuf,
}

/// The group of container `id` as a path within the hierarchy.
pub fn path_in_hierarchy(id: &str) -> String {
    format!("/{PARENT}/{id}")
}

/// The group of all containers.
pub fn of_all() -> PathBuf {
    Path::new(ROOT).join(PARENT)
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

    /// Stops every process in the group where it is, and waits until all stand still. When they do not, or nobody waits
    /// for it any more, they go on.
    pub async fn freeze(&self) -> io::Result<()> {
        let mut undo = Undo(Some(self));
        fs::write(self.dir.join(FREEZER), "1")?;
        let frozen =
            self.until("cgroup.events", |events| (value_of(events, "frozen") == Some(1)).then_some(()));
        tokio::time::timeout(FREEZE, frozen).await.map_err(|_| {
            let (dir, limit) = (self.dir.display(), FREEZE.as_millis());
            let text = format!("{dir} has processes that still run after {limit} ms");
            io::Error::new(io::ErrorKind::TimedOut, text)
        })??;
        undo.0 = None;
        Ok(())
    }

    /// Lets them go on.
    pub fn thaw(&self) -> io::Result<()> {
        fs::write(self.dir.join(FREEZER), "0")
    }

    /// Whether they were told to stand still.
    pub fn is_frozen(&self) -> bool {
        fs::read_to_string(self.dir.join(FREEZER)).is_ok_and(|text| text.trim_end() == "1")
    }

    /// How many processes of the group the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> io::Result<u64> {
        Ok(value_of(&fs::read_to_string(self.dir.join(MEMORY_EVENTS))?, OOM_KILL).unwrap_or(0))
    }

    /// Waits until there are more of them than `seen`.
    pub async fn oom_kills_beyond(&self, seen: u64) -> io::Result<u64> {
        self.until(MEMORY_EVENTS, |events| value_of(events, OOM_KILL).filter(|&kills| kills > seen)).await
    }

    /// Where the group's files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until nobody is left in the group.
    async fn emptied(&self) -> io::Result<()> {
        self.until("cgroup.events", |events| (value_of(events, "populated") == Some(0)).then_some(())).await
    }

    /// Waits until `found` finds what it looks for in `file`, whose readers the kernel wakes when it changes: so it
    /// does those of `cgroup.events` and `memory.events` (admin-guide/cgroup-v2, "[Un]populated Notification" and
    /// "Memory Interface Files").
    async fn until<T>(&self, file: &str, found: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        let path = self.dir.join(file);
        let events = crate::sys::register(File::open(&path)?.into(), Interest::PRIORITY)?;
        loop {
            if let Some(found) = found(&fs::read_to_string(&path)?) {
                return Ok(found);
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}

/// Lets a group's processes go on that were to stand still, and do not all do so.
struct Undo<'a>(Option<&'a Cgroup>);

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(cgroup) = self.0
            && let Err(error) = cgroup.thaw()
        {
            log::warn!("{} stays frozen: {error}", cgroup.dir.display());
        }
    }
}

/// The number in the line `<key> <number>` of one of the group's files ("flat keyed").
pub fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
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
        assert!(!Cgroup::of("no-such").is_frozen());
    }

    #[test]
    fn values_are_found_by_their_whole_key() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value_of(events, "oom"), Some(3));
        assert_eq!(value_of(events, OOM_KILL), Some(2));
        assert_eq!(value_of(events, "oom_group"), None);
        assert_eq!(value_of("populated 1\nfrozen 0\n", "frozen"), Some(0));
    }
}
