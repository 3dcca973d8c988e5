//! Everything a sandbox could leave behind, counted by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::command::wait_at_most;
use crate::containerd::{SHIM, pids_of};
use crate::run;

/// How long the system may take to come back to an earlier census.
const SETTLE: Duration = Duration::from_secs(60);

/// Folders whose files belong to sandboxes. Not `/run/containerd/fifo`: those are the client's, which removes them
/// when it deletes a task, and has none to delete after its shim was killed (so also with runc).
const FOLDERS: &[&str] = &["/run/ctvm", "/run/containerd/s", "/tmp", "/dev/shm"];

/// Where network namespaces have their names.
const NAMESPACES: &str = "/run/netns";

/// Name of a thing to how often it is there.
type Count = BTreeMap<String, usize>;

/// Counts one kind of thing, the folders' files if it is that.
type Part = fn(&[PathBuf]) -> Result<Count>;

/// What is quick to see comes first: who waits for a census looks no further than to the first difference.
const PARTS: [Part; 4] = [processes, mounts_and_sockets, files, networks];

/// What was there at one moment.
#[derive(Debug, Clone)]
pub struct Census {
    /// One for each of [`PARTS`].
    counts: Vec<Count>,
    folders: Vec<PathBuf>,
}

impl Census {
    /// Counts what is there now.
    pub fn take() -> Result<Census> {
        Self::take_with(&[])
    }

    /// The same, and the files in `folders`.
    pub fn take_with(folders: &[PathBuf]) -> Result<Census> {
        // Nobody waits for the process of a sandbox that is gone, so that of an earlier one may be seen on its way out.
        wait_at_most(SETTLE, "shims without a sandbox have ended", || Ok(!ending_shims()?))?;
        let counts = PARTS.iter().map(|part| part(folders)).collect::<Result<_>>()?;
        Ok(Census { counts, folders: folders.to_vec() })
    }

    /// Waits until everything is as it was at this census; else an error that names what is new and what is gone.
    pub fn settle(&self) -> Result<()> {
        if wait_at_most(SETTLE, "all is as before", || Ok(self.differences().next().is_none())).is_err() {
            let differences = self.differences().collect::<Result<Vec<_>>>()?.concat();
            let names = differences.join("\n");
            ensure!(names.is_empty(), "after {SETTLE:?} these counts differ from before:\n{names}");
        }
        Ok(())
    }

    /// What differs in each part in which something does.
    fn differences(&self) -> impl Iterator<Item = Result<Vec<String>>> {
        let compare = |(then, part): (&Count, Part)| Ok(differences(then, &part(&self.folders)?));
        let something = |part: &Result<Vec<String>>| part.as_ref().map_or(true, |names| !names.is_empty());
        self.counts.iter().zip(PARTS).map(compare).filter(something)
    }
}

fn differences(then: &Count, now: &Count) -> Vec<String> {
    let names: BTreeSet<_> = then.keys().chain(now.keys()).collect();
    let of = |count: &Count, name: &String| count.get(name).copied().unwrap_or(0);
    names
        .into_iter()
        .filter(|name| of(then, name) != of(now, name))
        .map(|name| format!("  {name}: {} then, {} now", of(then, name), of(now, name)))
        .collect()
}

fn see(count: &mut Count, kind: &str, name: &str) {
    *count.entry(format!("{kind} {name}")).or_insert(0) += 1;
}

fn processes(_: &[PathBuf]) -> Result<Count> {
    let mut count = Count::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let is_process = path.file_name().is_some_and(|n| n.as_encoded_bytes()[0].is_ascii_digit());
        // A process may end between the listing and the look; kernel threads have no command line.
        if let (true, Ok(name), Ok(cmdline)) =
            (is_process, fs::read_to_string(path.join("comm")), fs::read(path.join("cmdline")))
            && !cmdline.is_empty()
        {
            see(&mut count, "process", name.trim_end());
        }
    }
    Ok(count)
}

fn mounts_and_sockets(_: &[PathBuf]) -> Result<Count> {
    let mut count = Count::new();
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
        see(&mut count, "mount", line.split(' ').nth(4).unwrap_or("?"));
    }
    for line in fs::read_to_string("/proc/net/unix")?.lines().skip(1) {
        // One that was accepted has the name of the one that listens, so each name counts once.
        if let Some(path) = line.split_whitespace().nth(7) {
            count.insert(format!("socket {path}"), 1);
        }
    }
    Ok(count)
}

fn files(folders: &[PathBuf]) -> Result<Count> {
    let mut count = Count::new();
    walk(Path::new("/sys/fs/cgroup"), &mut |path, is_dir| {
        if is_dir {
            see(&mut count, "cgroup", &path.to_string_lossy());
        }
    });
    for folder in FOLDERS.iter().map(Path::new).chain(folders.iter().map(PathBuf::as_path)) {
        walk(folder, &mut |path, _| see(&mut count, "file", &path.to_string_lossy()));
    }
    Ok(count)
}

fn networks(_: &[PathBuf]) -> Result<Count> {
    let mut count = Count::new();
    count_network(None, &mut count)?;
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        count.insert(format!("network namespace {name}"), 1);
        count_network(Some(&name), &mut count)?;
    }
    Ok(count)
}

/// Whether there is a shim of ours whose sandbox has no state folder (any more).
fn ending_shims() -> Result<bool> {
    for pid in pids_of(SHIM)? {
        // One that ends meanwhile has no command line.
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&str> = line.split('\0').collect();
        let after = |flag| words.iter().position(|&word| word == flag).and_then(|at| words.get(at + 1));
        // Others have the same name as far as the kernel keeps it.
        if words[0].ends_with(SHIM)
            && let (Some(namespace), Some(id)) = (after("-namespace"), after("-id"))
            && !Path::new("/run/ctvm").join(namespace).join(id).exists()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Interfaces (taps among them), queueing disciplines and redirections, in a namespace or in our own.
fn count_network(namespace: Option<&str>, count: &mut Count) -> Result<()> {
    let place = namespace.map_or(String::new(), |name| format!(" in {name}"));
    let mut see = |kind: &str, what: &str| see(count, kind, &format!("{what}{place}"));
    let command = |program: &str, words: &[&str]| {
        let mut command = Command::new(program);
        command.args(namespace.iter().flat_map(|name| ["-n", name])).args(words);
        // A namespace may lose its name meanwhile: then it has nothing.
        Ok::<_, anyhow::Error>(run(&mut command)?.text())
    };
    let links = command("ip", &["-o", "link", "show"])?;
    for line in links.lines() {
        // `3: eth0@if7: <…> mtu …`
        see("interface", line.split(' ').nth(1).unwrap_or("?").trim_end_matches(':'));
    }
    let disciplines = command("tc", &["qdisc", "show"])?;
    for line in disciplines.lines() {
        // `qdisc ingress ffff: dev eth0 parent …`; numbers are made up by the kernel.
        let words: Vec<&str> = line.split_whitespace().collect();
        let device = words.iter().position(|&word| word == "dev").and_then(|at| words.get(at + 1));
        let (kind, device) = (words.get(1).unwrap_or(&"?"), device.unwrap_or(&"?"));
        see("qdisc", &format!("{kind} of {device}"));
        if matches!(*kind, "ingress" | "clsact") {
            let filters = command("tc", &["filter", "show", "dev", device, "ingress"])?;
            filters.lines().for_each(|line| see("filter", &format!("{} of {device}", line.trim())));
        }
    }
    Ok(())
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
        let count = |processes| BTreeMap::from([("mount /a".into(), 1), ("process x".into(), processes)]);
        assert_eq!(differences(&count(2), &count(3)), ["  process x: 2 then, 3 now"]);
        assert!(differences(&count(2), &count(2)).is_empty());
    }
}
