//! Everything a sandbox could leave behind, counted by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long the system may take to come back to an earlier census.
const SETTLE: Duration = Duration::from_secs(60);

/// Folders whose files belong to sandboxes. Not `/run/containerd/fifo`: those are the client's, which removes them
/// when it deletes a task, and has none to delete after its shim was killed (so also with runc).
const FOLDERS: &[&str] = &["/run/ctvm", "/run/containerd/s", "/tmp", "/dev/shm"];

/// Name of a thing to how often it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeMap<String, usize>);

impl Census {
    /// Counts what is there now.
    pub fn take() -> Result<Census> {
        let mut count = BTreeMap::new();
        let mut see = |kind: &str, name: &str| *count.entry(format!("{kind} {name}")).or_insert(0) += 1;
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let is_process = path.file_name().is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit());
            // A process may end between the listing and the look; kernel threads have no command line.
            if let (true, Ok(name), Ok(cmdline)) =
                (is_process, fs::read_to_string(path.join("comm")), fs::read(path.join("cmdline")))
                && !cmdline.is_empty()
            {
                see("process", name.trim_end());
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            see("mount", line.split(' ').nth(4).unwrap_or("?"));
        }
        for entry in fs::read_dir("/sys/class/net")? {
            see("interface", &entry?.file_name().to_string_lossy());
        }
        walk(Path::new("/sys/fs/cgroup"), &mut |path, is_dir| {
            if is_dir {
                see("cgroup", &path.to_string_lossy());
            }
        });
        for folder in FOLDERS {
            walk(Path::new(folder), &mut |path, _| see("file", &path.to_string_lossy()));
        }
        Ok(Census(count))
    }

    /// Waits until everything is as it was at this census; else an error that names what is new and what is gone.
    pub fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let differences = self.differences(&Census::take()?);
            if differences.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("after {SETTLE:?} these counts differ from before:\n{}", differences.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn differences(&self, now: &Census) -> Vec<String> {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(now.0.keys()).collect();
        let of = |census: &Census, name: &String| census.0.get(name).copied().unwrap_or(0);
        names
            .into_iter()
            .filter(|name| of(self, name) != of(now, name))
            .map(|name| format!("  {name}: {} then, {} now", of(self, name), of(now, name)))
            .collect()
    }
}

fn walk(folder: &Path, see: &mut impl FnMut(&Path, bool)) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        see(&entry.path(), is_dir);
        if is_dir {
            walk(&entry.path(), see);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_named_with_both_counts() {
        let before = Census(BTreeMap::from([("mount /a".into(), 1), ("process x".into(), 2)]));
        let after = Census(BTreeMap::from([("mount /a".into(), 1), ("process x".into(), 3)]));
        assert_eq!(before.differences(&after), ["  process x: 2 then, 3 now"]);
        assert!(before.differences(&before.clone()).is_empty());
    }
}
