//! `delete`: cleans up after a sandbox whose shim is dead, or is to be.
//!
//! containerd calls it for every container whose connection ended, also after a regular end, when there is nothing
//! to do, and for each container of a pod: only the one that gave the sandbox its name has a state file.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message as _, MessageField};
use rustix::mount::{UnmountFlags, unmount};

use crate::args::Args;
use crate::sandbox::state_file::State;
use crate::sandbox::{remove_leftovers, state_file};
use crate::{clock, dirs, paths};

/// How long a VMM has to flush and end after its lease did. containerd gives `delete` five seconds.
const VMM_GRACE: Duration = Duration::from_millis(1500);
/// How long a shim has to answer for its last containers and end.
const SHIM_GRACE: Duration = Duration::from_secs(1);
/// What the tasks of a dead shim ended with, as far as anyone can tell: SIGKILL.
const EXIT_STATUS: u32 = 128 + 9;

/// Carries `delete` out; the bytes to answer.
///
/// # Errors
/// When something is left that cannot be removed.
pub fn run(args: &Args) -> Result<Vec<u8>> {
    let bundle = args.bundle.clone().or_else(|| std::env::current_dir().ok());
    let state_dir = paths::state_dir(&args.namespace, &args.id);
    let pid = clean(&state_dir, bundle.as_deref())?;
    let mut response = DeleteResponse::new();
    response.pid = pid;
    response.exit_status = EXIT_STATUS;
    response.exited_at = MessageField::some(clock::timestamp());
    Ok(response.write_to_bytes().expect("a message of plain fields is always complete"))
}

/// Ends and removes everything of a sandbox; the number its VMM had, or 0.
///
/// # Errors
/// When something is left that cannot be removed.
pub fn clean(state_dir: &Path, bundle: Option<&Path>) -> Result<u32> {
    let mut pid = 0;
    if let Some(state) = State::read(state_dir).with_context(|| state_dir.display().to_string())? {
        // A shim that containerd gave up on may still run; its end ends the VMM's lease. Or it is about to end, of which
        // containerd, where several containers went at once, hears too early.
        if let Some(shim) = &state.shim {
            shim.end(SHIM_GRACE).context("ending the shim")?;
        }
        if let Some(vmm) = &state.vmm {
            pid = vmm.pid;
            vmm.end(VMM_GRACE).context("ending the VMM")?;
        }
        unmount_below(state_dir);
        remove_fifos(&state.fifos);
        remove_leftovers(&state, state_dir).context("removing what is left")?;
    }
    state_file::remove_dir(state_dir).with_context(|| state_dir.display().to_string())?;
    if let Some(bundle) = bundle {
        unmount_below(&bundle.join("rootfs"));
    }
    Ok(pid)
}

/// Removes the streams of processes that nobody will delete any more, with the directories that containerd's client
/// makes for them (`/run/containerd/fifo/<number>`).
fn remove_fifos(fifos: &[PathBuf]) {
    for fifo in fifos {
        let is_fifo = fifo.symlink_metadata().is_ok_and(|m| m.file_type().is_fifo());
        if is_fifo && let Err(e) = std::fs::remove_file(fifo) {
            eprintln!("removing {}: {e}", fifo.display());
        }
        if let Some(dir) = fifo.parent()
            && dir.parent().is_some_and(|d| d.ends_with("fifo"))
        {
            dirs::leave_parent(fifo);
        }
    }
}

/// Unmounts what is mounted at or below `dir`: a shim that is killed while it puts a root file system together may
/// leave one mount there.
fn unmount_below(dir: &Path) {
    for mount in mounts_below(dir, &std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
        if let Err(e) = unmount(&mount, UnmountFlags::DETACH) {
            // containerd logs our standard error as a warning.
            eprintln!("unmounting {}: {e}", mount.display());
        }
    }
}

/// Mount points at or below `dir`, the last mounted first.
fn mounts_below(dir: &Path, mountinfo: &str) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    below
}

/// mountinfo writes blanks and the like in octal.
fn unescape(field: &str) -> PathBuf {
    let mut path = field.to_owned();
    for (code, text) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        path = path.replace(code, text);
    }
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::state_file::ProcessId;

    #[test]
    fn mounts_are_found_by_whole_names_last_first() {
        let mountinfo = "22 1 0:20 / / rw - ext4 /dev/vda rw\n\
            30 22 0:30 / /run/b/rootfs rw - overlay overlay rw\n\
            31 30 0:31 / /run/b/rootfs/with\\040blank rw - tmpfs tmpfs rw\n\
            32 22 0:32 / /run/b/rootfs2 rw - tmpfs tmpfs rw\n";
        let found = mounts_below("/run/b/rootfs".as_ref(), mountinfo);
        assert_eq!(found, [Path::new("/run/b/rootfs/with blank"), Path::new("/run/b/rootfs")]);
    }

    #[test]
    fn nothing_to_clean_is_clean() {
        assert_eq!(clean("/nonexistent/ns/id".as_ref(), None).unwrap(), 0);
    }

    #[test]
    fn processes_and_files_of_a_dead_sandbox_go() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("web");
        let socket = root.path().join("socket");
        std::fs::write(&socket, "").unwrap();
        let (fifo, ordinary) = (root.path().join("fifo/7/x-stdout"), root.path().join("x-stderr"));
        std::fs::create_dir_all(fifo.parent().unwrap()).unwrap();
        std::fs::write(&ordinary, "").unwrap();
        let (mode, kind) = (rustix::fs::Mode::RUSR, rustix::fs::FileType::Fifo);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
        let mut vmm = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let state = State {
            shim: Some(ProcessId { pid: std::process::id(), start_ticks: 1 }),
            vmm: ProcessId::of(vmm.id()),
            socket: socket.clone(),
            cgroups: vec![],
            network: None,
            fifos: vec![fifo.clone(), ordinary.clone()],
        };
        std::fs::create_dir_all(&dir).unwrap();
        state.write(&dir).unwrap();
        assert_eq!(clean(&dir, Some(root.path())).unwrap(), vmm.id());
        assert!(!vmm.wait().unwrap().success());
        assert!(!socket.exists() && !dir.exists());
        assert!(!root.path().join("fifo/7").exists() && root.path().join("fifo").exists());
        assert!(ordinary.exists(), "only a fifo is taken for one");
        assert_eq!(clean(&dir, None).unwrap(), 0);
    }
}
