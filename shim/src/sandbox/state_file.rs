//! What `delete` needs to clean up after a shim that was killed: written before each thing it names is made, so that
//! nothing can be left behind that is not in it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};

use super::net::Joined;
use crate::dirs;

/// Name of the file in a sandbox's state directory.
pub const STATE_FILE: &str = "state.json";

/// A process that may have ended, and whose number may have been given to another since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// Its start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
}

/// Everything on the host that belongs to a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The serving shim; none until it has begun.
    #[serde(default)]
    pub shim: Option<ProcessId>,
    /// Its VMM.
    #[serde(default)]
    pub vmm: Option<ProcessId>,
    /// The shim's socket.
    pub socket: PathBuf,
    /// Control groups made for VMM and shim.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
    /// Interfaces whose traffic goes to the VM.
    #[serde(default)]
    pub network: Option<Joined>,
    /// Fifos of its processes. Their clients made them and remove them with the task; when the shim was killed,
    /// containerd forgets the task by itself and no client comes.
    #[serde(default)]
    pub fifos: Vec<PathBuf>,
}

impl ProcessId {
    /// Names the process that has this number now; `None` when there is none.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(ProcessId { pid, start_ticks: start_ticks(&stat)? })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Waits up to `grace` for the process to end by itself, then kills it and waits for that. Says whether it is
    /// gone.
    ///
    /// # Errors
    /// When the process exists and may not be signalled.
    pub fn end(&self, grace: Duration) -> io::Result<bool> {
        let raw = i32::try_from(self.pid).unwrap_or(0);
        let Some(pid) = Pid::from_raw(raw) else { return Ok(true) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(true) };
        // Asked after the open: from here on the descriptor names the process that the start time is of.
        if !self.is_alive() || wait(&pidfd, grace)? {
            return Ok(true);
        }
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(e.into()),
        }
        wait(&pidfd, Duration::from_secs(2))
    }
}

/// Waits for a pidfd to say that its process ended.
fn wait(pidfd: impl std::os::fd::AsFd, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut ready = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut ready, Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Field 22 of `/proc/PID/stat`. The name, field 2, may hold anything, so counting begins after its last `)`.
/// A zombie has ended: only its parent has not looked yet.
fn start_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl State {
    /// Reads the state of a sandbox; `None` when it has none.
    ///
    /// # Errors
    /// When there is a file and it cannot be read.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(dir.join(STATE_FILE)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::from),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Replaces the state of a sandbox, whole or not at all.
    ///
    /// # Errors
    /// When the directory or the file cannot be written.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let next = dir.join(".state.json");
        std::fs::write(&next, serde_json::to_vec(self).expect("our own types serialise"))?;
        std::fs::rename(&next, dir.join(STATE_FILE))
    }
}

/// Removes a sandbox's state directory, and the namespace's when it was the last in it.
///
/// # Errors
/// When the directory is there and cannot be removed.
pub fn remove_dir(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    dirs::leave_parent(dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_survives_a_hostile_name() {
        let stat =
            "42 (a) R (b) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1000 2 18446744073709551615";
        assert_eq!(start_ticks(stat), Some(98765));
        assert_eq!(start_ticks(&stat.replace(") S", ") Z")), None);
        assert_eq!(start_ticks("nonsense"), None);
    }

    #[test]
    fn a_number_used_again_is_another_process() {
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        let other = ProcessId { start_ticks: me.start_ticks + 1, ..me };
        assert!(!other.is_alive());
        // And it is not killed: this test is still here to say so.
        assert!(other.end(Duration::ZERO).unwrap());
    }

    #[test]
    fn a_process_is_ended_by_force_when_it_will_not_go() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        assert!(id.end(Duration::from_millis(1)).unwrap());
        assert!(!id.is_alive());
        child.wait().unwrap();
        assert!(id.end(Duration::ZERO).unwrap());
    }

    #[test]
    fn the_file_is_replaced_whole_and_removed_with_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("web");
        assert_eq!(State::read(&dir).unwrap(), None);
        let state = State {
            shim: Some(ProcessId { pid: 1, start_ticks: 2 }),
            vmm: None,
            socket: "/run/s".into(),
            cgroups: vec![],
            network: None,
            fifos: vec![],
        };
        assert_eq!(
            state.write(&dir).unwrap_err().kind(),
            io::ErrorKind::NotFound,
            "a removed one stays away"
        );
        std::fs::create_dir_all(&dir).unwrap();
        state.write(&dir).unwrap();
        let with_vmm = State { vmm: Some(ProcessId { pid: 3, start_ticks: 4 }), ..state };
        with_vmm.write(&dir).unwrap();
        assert_eq!(State::read(&dir).unwrap(), Some(with_vmm));
        remove_dir(&dir).unwrap();
        assert!(!root.path().join("ns").exists());
        remove_dir(&dir).unwrap();
    }
}
