//! The host's control groups of a pod: where containerd and the kubelet account for it, so VMM and shim are put there.
//!
//! One directory with cgroup v2; with v1 and on hybrid hosts one for each hierarchy that accounts for something. A path
//! in systemd's notation (`slice:prefix:name`) is a scope below its slices, as systemd names them.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use crate::dirs;

const ROOT: &str = "/sys/fs/cgroup";

/// Controllers of v1 that account for processes or hold limits of a pod. Not `cpuset`: a new group of it takes no
/// process until somebody has given it CPUs.
const CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "blkio"];

/// How long a group may take to become empty when its VMM is gone. KVM keeps a kernel thread of the VM in it, which ends
/// some time after the VMM's last descriptor.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

/// How often it is looked at.
const PAUSE: Duration = Duration::from_millis(5);

/// Where this host's hierarchies are mounted: one for v2, several for v1.
fn roots() -> Vec<PathBuf> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return vec![ROOT.into()];
    }
    v1_roots(&std::fs::read_to_string("/proc/self/mounts").unwrap_or_default())
}

fn v1_roots(mounts: &str) -> Vec<PathBuf> {
    let root = |line: &str| {
        let mut words = line.split(' ');
        let (_, place, kind, options) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let counts = options.split(',').any(|option| CONTROLLERS.contains(&option));
        (kind == "cgroup" && counts).then(|| PathBuf::from(place))
    };
    let mut roots: Vec<PathBuf> = mounts.lines().filter_map(root).collect();
    roots.dedup();
    roots
}

/// The directories that an OCI `cgroupsPath` names; none where it names nothing below the root.
pub fn directories(cgroups_path: &str) -> Vec<PathBuf> {
    let Some(path) = relative(cgroups_path) else { return Vec::new() };
    roots().into_iter().map(|root| root.join(&path)).collect()
}

/// The path below the root of a hierarchy.
fn relative(cgroups_path: &str) -> Option<PathBuf> {
    let path = match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => scope(slice, prefix, name)?,
        [path] => Path::new(path).strip_prefix("/").ok()?.to_owned(),
        _ => return None,
    };
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

/// `a.slice/a-b.slice/PREFIX-NAME.scope` for the slice `a-b.slice` (systemd.slice(5)).
fn scope(slice: &str, prefix: &str, name: &str) -> Option<PathBuf> {
    let words = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    // `-.slice` is the root.
    if words != "-" {
        let mut so_far = String::new();
        for word in words.split('-') {
            if word.is_empty() {
                return None;
            }
            so_far.push_str(word);
            path.push(format!("{so_far}.slice"));
            so_far.push('-');
        }
    }
    let of = |part: &str| !part.is_empty() && !part.contains('/');
    (of(prefix) && of(name)).then(|| path.join(format!("{prefix}-{name}.scope")))
}

/// Where this process is now, to come back to before its group is removed.
pub fn current() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    roots().into_iter().filter_map(|root| place_in(&root, &text)).collect()
}

/// The group below `root` that a line `number:controllers:path` of cgroups(7) tells of.
fn place_in(root: &Path, own: &str) -> Option<PathBuf> {
    let mount = root.file_name()?.to_str()?;
    let of = |line: &str| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let unified = controllers.is_empty() && root == Path::new(ROOT);
        // A hierarchy is mounted under the names of its controllers.
        let here = unified || controllers == mount || controllers.split(',').any(|name| name == mount);
        here.then(|| root.join(path.trim_start_matches('/')))
    };
    own.lines().find_map(of)
}

/// Makes the groups and puts a process into each.
///
/// # Errors
/// The first that failed, when the kernel or another owner of the hierarchy refuses; the others are tried all the same.
pub fn enter(directories: &[PathBuf], pid: u32) -> io::Result<()> {
    let enter = |directory: &PathBuf| {
        dirs::make(directory)?;
        std::fs::write(directory.join("cgroup.procs"), pid.to_string())
    };
    directories.iter().map(enter).fold(Ok(()), io::Result::and)
}

/// Removes the groups, and the directories of their containerd namespace when nothing else is in them.
///
/// # Errors
/// The first that failed: a group that is there and has processes for more than two seconds, or other groups below it.
pub fn remove(directories: &[PathBuf]) -> io::Result<()> {
    let roots = roots();
    directories.iter().map(|directory| remove_one(directory, &roots)).fold(Ok(()), io::Result::and)
}

fn remove_one(directory: &Path, roots: &[PathBuf]) -> io::Result<()> {
    let mut removed = std::fs::remove_dir(directory);
    if removed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy) {
        wait_until_empty(directory);
        removed = std::fs::remove_dir(directory);
    }
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // `ctr` names groups `/<namespace>/<id>`. Deeper ones belong to the kubelet and the like, slices to systemd.
    if let Some(parent) = directory.parent()
        && parent.parent().is_some_and(|above| roots.iter().any(|root| root == above))
        && parent.extension().is_none()
    {
        dirs::leave_parent(directory);
    }
    Ok(())
}

/// Waits for the last process to leave, [`EMPTY_WITHIN`] at most. v1 has no event for it.
fn wait_until_empty(directory: &Path) {
    let deadline = Instant::now() + EMPTY_WITHIN;
    let has_some = || {
        // With v2 a kernel thread is in the group without being listed.
        let events = std::fs::read_to_string(directory.join("cgroup.events"));
        match events {
            Ok(events) => events.lines().any(|line| line == "populated 1"),
            Err(_) => std::fs::read_to_string(directory.join("tasks")).is_ok_and(|tasks| !tasks.is_empty()),
        }
    };
    while has_some() && Instant::now() < deadline {
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_entered_left_and_removed_when_the_last_process_has_gone() {
        let groups = directories(&format!("/ctvm-test-{}/x", std::process::id()));
        let mut sleeper = std::process::Command::new("sleep").arg("0.3").spawn().unwrap();
        if groups.is_empty() || enter(&groups, sleeper.id()).is_err() {
            eprintln!("not tested: no control group that this process may make");
            let _ = (remove(&groups), sleeper.kill(), sleeper.wait());
            return;
        }
        for group in &groups {
            let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap();
            assert_eq!(procs.trim(), sleeper.id().to_string(), "{}", group.display());
        }
        // Ended and not collected, a process is in its group still.
        let waiting = std::thread::spawn(move || sleeper.wait().unwrap().success());
        remove(&groups).unwrap();
        for group in &groups {
            assert!(!group.exists() && !group.parent().unwrap().exists(), "{}", group.display());
        }
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn this_process_is_where_it_is_said_to_be() {
        let own = std::process::id().to_string();
        for group in current() {
            let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            assert!(procs.lines().any(|pid| pid == own), "{}", group.display());
        }
    }

    #[test]
    fn paths_are_plain_or_systemds() {
        let path = |text: &str| relative(text).map(|path| path.display().to_string());
        assert_eq!(path("/default/web").as_deref(), Some("default/web"));
        let pod = "kubepods-burstable-pod1_2.slice:cri-containerd:abc";
        let scope = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope";
        assert_eq!(path(pod).as_deref(), Some(scope));
        assert_eq!(path("-.slice:runc:x").as_deref(), Some("runc-x.scope"));
        let wrong = [
            "",
            "/",
            "default/web",
            "/a/../b",
            "/a/b:c",
            "a--b.slice:x:y",
            "a.slice:x:",
            "a.slice:../x:y",
            "b:x:y",
        ];
        for text in wrong {
            assert_eq!(path(text), None, "{text:?}");
        }
    }

    #[test]
    fn hierarchies_that_account_are_found() {
        let mounts = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nshort\n";
        let roots = v1_roots(mounts);
        assert_eq!(roots, [Path::new("/sys/fs/cgroup/cpu,cpuacct"), Path::new("/sys/fs/cgroup/memory")]);
        let own = "4:memory:/user/a\n3:cpu,cpuacct:/\n1:name=systemd:/s\n0::/u\n";
        assert_eq!(place_in(&roots[1], own).unwrap(), Path::new("/sys/fs/cgroup/memory/user/a"));
        assert_eq!(place_in(&roots[0], own).unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct/"));
        assert_eq!(
            place_in(Path::new(ROOT), "0::/system.slice/x\n").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/x")
        );
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        remove(&["/nonexistent/group".into()]).unwrap();
    }
}
