//! The host's control group of a VM: where containerd accounts for the pod, so the VMM is put there, the shim not.
//!
//! cgroup v2 with the file system driver only; on another host, or where the path is systemd's (`slice:prefix:name`),
//! the VMM stays where containerd runs, with a line in the log.

use std::io;
use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

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
/// When the group is there and has processes, or other groups below it.
pub fn remove(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir(directory) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
