//! The host's control group of a VM: where containerd accounts for the pod, so the VMM is put there, the shim not.
//!
//! cgroup v2 with the file system driver only; on another host, or where the path is systemd's (`slice:prefix:name`),
//! the VMM stays where containerd runs, with a line in the log.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

const ROOT: &str = "/sys/fs/cgroup";

/// How long a group may take to become empty when its VMM is gone. KVM keeps a kernel thread of the VM in it, which ends
/// some time after the VMM's last descriptor.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

/// The directory that an OCI `cgroupsPath` names; `None` where we do not make one.
pub fn directory(cgroups_path: &str) -> Option<PathBuf> {
    below(Path::new(ROOT), cgroups_path).filter(|_| Path::new(ROOT).join("cgroup.controllers").exists())
}

fn below(root: &Path, cgroups_path: &str) -> Option<PathBuf> {
    let relative = Path::new(cgroups_path).strip_prefix("/").ok()?;
    let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
    (plain && relative.components().next().is_some() && !cgroups_path.contains(':'))
        .then(|| root.join(relative))
}

/// Makes the group and puts the process into it.
///
/// # Errors
/// When the kernel or another owner of the hierarchy refuses.
pub fn enter(directory: &Path, pid: u32) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    std::fs::write(directory.join("cgroup.procs"), pid.to_string())
}

/// Removes the group, and the directory of its containerd namespace when nothing else is in it.
///
/// # Errors
/// When the group is there and has processes for more than two seconds, or other groups below it.
pub fn remove(directory: &Path) -> io::Result<()> {
    let mut removed = std::fs::remove_dir(directory);
    if removed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy) {
        wait_until_empty(directory)?;
        removed = std::fs::remove_dir(directory);
    }
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // `ctr` names groups `/<namespace>/<id>`. Deeper ones belong to the kubelet and the like.
    if let Some(parent) = directory.parent()
        && parent.parent() == Some(Path::new(ROOT))
        && parent.extension().is_none()
    {
        // Fails while others are in it, as it should.
        let _ = std::fs::remove_dir(parent);
    }
    Ok(())
}

/// Waits for the last process to leave, [`EMPTY_WITHIN`] at most: the kernel tells by an exceptional condition on
/// `cgroup.events` (cgroups(7)).
fn wait_until_empty(directory: &Path) -> io::Result<()> {
    let deadline = Instant::now() + EMPTY_WITHIN;
    let mut events = File::open(directory.join("cgroup.events"))?;
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if text.lines().any(|line| line == "populated 0") || left.is_zero() {
            return Ok(());
        }
        let left = left.try_into().expect("two seconds fit");
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_removed_when_its_last_process_has_left() {
        let group = Path::new(ROOT).join(format!("ctvm-test-{}", std::process::id()));
        if std::fs::create_dir(&group).is_err() || !group.join("cgroup.procs").exists() {
            eprintln!("not tested: no control group of version 2 that this process may make");
            let _ = std::fs::remove_dir(&group);
            return;
        }
        let mut sleeper = std::process::Command::new("sleep").arg("0.3").spawn().unwrap();
        enter(&group, sleeper.id()).unwrap();
        remove(&group).unwrap();
        assert!(!group.exists());
        assert!(sleeper.wait().unwrap().success());
    }

    #[test]
    fn only_plain_paths_below_the_root_are_made() {
        let root = Path::new("/cg");
        assert_eq!(below(root, "/default/web").unwrap(), Path::new("/cg/default/web"));
        for path in ["", "/", "default/web", "/a/../b", "system.slice:containerd:web", "/a/b:c"] {
            assert_eq!(below(root, path), None, "{path:?}");
        }
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        remove(Path::new("/nonexistent/group")).unwrap();
    }
}
