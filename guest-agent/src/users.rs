//! The sandbox's own users: a user namespace with the network, the IPC and the host name that belong to it.
//!
//! A namespace gives power over what was made in it, so all of them are made together, before the network is. The agent
//! itself enters all but the users: what it does to the pod's network and name, it does there, with the rights of the
//! guest's root; containers inherit them, and enter the users.
//!
//! ```text
//! agent ──fork──> helper: unshare users ──> maps written ──> root of them, unshare net, ipc, uts ──> ends
//!   │ <────────────── each bound to a file below /run/ctvm/ns, which keeps it ────────────────────────┘
//!   └─ moves the VM's devices there, and follows them
//! ```

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use agent_api::NAMESPACES_PATH;
use agent_api::sandbox::UserNamespace;
use agent_api::users::{IdMapError, IdMaps};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Pid, Uid, setgid, setuid};

use crate::mounts;
use crate::network::{self, NetworkError};
use crate::sys::{self, Fork};

/// How long the helper may take for a step; a kernel that has memory takes less than a millisecond.
const PATIENCE: Duration = Duration::from_secs(5);

/// A user namespace that cannot be made, or in which somebody is nobody.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The kernel would not take it.
    #[error("user namespace")]
    Map(#[from] IdMapError),
    /// The sandbox has one already.
    #[error("user namespace: the sandbox has another one already")]
    Other,
    /// The sandbox has none.
    #[error("user namespace: the sandbox has none that its containers could enter")]
    None,
    /// A user or group that has no place in it.
    #[error("{kind} {id} of the container has no place in the sandbox's user namespace")]
    Nobody {
        /// `user` or `group`.
        kind: &'static str,
        /// Its number.
        id: u32,
    },
    /// The kernel refused.
    #[error("user namespace: cannot {what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A device cannot be moved.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// The sandbox's users, once it has some.
#[derive(Debug, Default)]
pub struct Users(OnceLock<IdMaps>);

/// The file that stands for the sandbox's namespace of a kind, by its name in `/proc/PID/ns`.
pub fn namespace(kind: &str) -> PathBuf {
    Path::new(NAMESPACES_PATH).join(kind)
}

impl Users {
    /// Makes them, or does nothing where they are there.
    ///
    /// # Errors
    /// See [`UsersError`].
    pub fn set_up(&self, wanted: &UserNamespace) -> Result<(), UsersError> {
        let maps = IdMaps::try_from(wanted)?;
        match self.0.get() {
            Some(there) if *there == maps => return Ok(()),
            Some(_) => return Err(UsersError::Other),
            None => {}
        }
        make(&maps).map_err(failed("make it and what belongs to it"))?;
        network::move_devices(open("net")?.as_fd())?;
        for (kind, flag) in [
            ("net", CloneFlags::CLONE_NEWNET),
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("uts", CloneFlags::CLONE_NEWUTS),
        ] {
            setns(open(kind)?, flag).map_err(|errno| failed("enter what belongs to it")(errno.into()))?;
        }
        sys::loopback_up().map_err(failed("bring its loopback up"))?;
        // One thread, so nobody was quicker.
        let _ = self.0.set(maps);
        Ok(())
    }

    /// Whether the sandbox has some.
    pub fn exist(&self) -> bool {
        self.0.get().is_some()
    }

    /// What a user and a group of the containers are in the guest.
    ///
    /// # Errors
    /// [`UsersError::Nobody`] and [`UsersError::None`].
    pub fn outside(&self, uid: u32, gid: u32) -> Result<(u32, u32), UsersError> {
        let maps = self.0.get().ok_or(UsersError::None)?;
        let nobody = |kind, id| UsersError::Nobody { kind, id };
        Ok((
            maps.uids.outside(uid).ok_or_else(|| nobody("user", uid))?,
            maps.gids.outside(gid).ok_or_else(|| nobody("group", gid))?,
        ))
    }

    /// Does `job` as their root, in a process of its own.
    ///
    /// # Errors
    /// The job's, and the kernel's.
    pub fn as_root(&self, job: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let users = self.open().map_err(io::Error::other)?;
        let mut helper = Helper::start(|agent| {
            setns(users, CloneFlags::CLONE_NEWUSER)?;
            become_root()?;
            job()?;
            say(agent, 0)
        })?;
        helper.answer().map(drop)
    }

    /// The namespace, to be entered.
    ///
    /// # Errors
    /// [`UsersError::None`].
    pub fn open(&self) -> Result<File, UsersError> {
        if self.exist() { open("user") } else { Err(UsersError::None) }
    }
}

fn open(kind: &str) -> Result<File, UsersError> {
    File::open(namespace(kind)).map_err(failed("open one of its files"))
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> UsersError {
    move |cause| UsersError::Os { what, cause }
}

/// Becomes root of the user namespace that this process is in.
fn become_root() -> io::Result<()> {
    setgid(Gid::from_raw(0))?;
    setuid(Uid::from_raw(0))?;
    Ok(())
}

fn make(maps: &IdMaps) -> io::Result<()> {
    let mut helper = Helper::start(|agent| {
        unshare(CloneFlags::CLONE_NEWUSER)?;
        say(agent, 0)?;
        agent.read_exact(&mut [0])?;
        become_root()?;
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
        say(agent, 0)?;
        agent.read_exact(&mut [0])
    })?;
    helper.answer()?;
    let proc = PathBuf::from(format!("/proc/{}", helper.pid));
    fs::write(proc.join("uid_map"), maps.uids.to_file())?;
    fs::write(proc.join("gid_map"), maps.gids.to_file())?;
    helper.go_on()?;
    helper.answer()?;
    for kind in ["user", "net", "ipc", "uts"] {
        pin(helper.pid, kind)?;
    }
    helper.go_on()
}

/// Starts a process in the users and in process numbers of its own that belong to them, which then does `forever`; the
/// file that stands for these numbers.
///
/// # Errors
/// The kernel's.
pub fn start_in_own_pids(users: &File, forever: impl FnOnce()) -> io::Result<PathBuf> {
    let mut helper = Helper::start(|agent| {
        setns(users, CloneFlags::CLONE_NEWUSER)?;
        become_root()?;
        unshare(CloneFlags::CLONE_NEWPID)?;
        match sys::fork()? {
            Fork::Child => {
                forever();
                sys::exit_now(1)
            }
            Fork::Parent(pid) => say(agent, pid.as_raw()),
        }
    })?;
    let pid = Pid::from_raw(helper.answer()?);
    pin(pid, "pid")?;
    Ok(namespace("pid"))
}

/// Binds a process's namespace to its file, in place of one that was there.
fn pin(pid: Pid, kind: &str) -> io::Result<()> {
    let file = namespace(kind);
    fs::create_dir_all(NAMESPACES_PATH)?;
    if mounts::is_mount_point(&file) {
        umount2(&file, MntFlags::MNT_DETACH)?;
    }
    File::create(&file)?;
    let source = format!("/proc/{pid}/ns/{kind}");
    Ok(mount(Some(source.as_str()), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// A fork that does a few steps where this process must not go. It ends by itself; the reaper collects it.
struct Helper {
    pid: Pid,
    socket: UnixStream,
}

impl Helper {
    fn start(job: impl FnOnce(&mut UnixStream) -> io::Result<()>) -> io::Result<Self> {
        let (ours, mut theirs) = UnixStream::pair()?;
        match sys::fork()? {
            Fork::Child => {
                drop(ours);
                if let Err(error) = job(&mut theirs) {
                    let errno = error.raw_os_error().unwrap_or(libc::EIO);
                    // A parent that does not listen is gone, and so will this process be.
                    let _ = say(&mut theirs, -errno);
                }
                sys::exit_now(0)
            }
            Fork::Parent(pid) => {
                ours.set_read_timeout(Some(PATIENCE))?;
                Ok(Helper { pid, socket: ours })
            }
        }
    }

    /// What it says, unless that is an error.
    fn answer(&mut self) -> io::Result<i32> {
        let mut said = [0; 4];
        self.socket.read_exact(&mut said)?;
        match i32::from_le_bytes(said) {
            errno @ ..0 => Err(Errno::from_raw(errno.wrapping_neg()).into()),
            value => Ok(value),
        }
    }

    fn go_on(&mut self) -> io::Result<()> {
        self.socket.write_all(&[0])
    }
}

fn say(agent: &mut UnixStream, value: i32) -> io::Result<()> {
    agent.write_all(&value.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(outside: u32, count: u32) -> agent_api::sandbox::IdRange {
        agent_api::sandbox::IdRange { inside: 0, outside, count, ..Default::default() }
    }

    #[test]
    fn without_a_namespace_nobody_can_be_in_it() {
        let users = Users::default();
        assert!(!users.exist());
        assert!(matches!(users.open(), Err(UsersError::None)));
        assert!(matches!(users.outside(0, 0), Err(UsersError::None)));
        let empty = UserNamespace::new();
        assert!(matches!(users.set_up(&empty), Err(UsersError::Map(IdMapError::Ranges(0)))));
    }

    #[test]
    fn ids_outside_are_named() {
        let (uids, gids) = (vec![range(100_000, 1000)], vec![range(300_000, 10)]);
        let wanted = UserNamespace { uids, gids, ..Default::default() };
        let users = Users::default();
        users.0.set(IdMaps::try_from(&wanted).unwrap()).unwrap();
        assert_eq!(users.outside(7, 9).unwrap(), (100_007, 300_009));
        let error = users.outside(7, 10).unwrap_err().to_string();
        assert_eq!(error, "group 10 of the container has no place in the sandbox's user namespace");
        users.set_up(&wanted).unwrap();
        let other = UserNamespace { uids: vec![range(5, 5)], gids: vec![range(5, 5)], ..Default::default() };
        assert!(matches!(users.set_up(&other), Err(UsersError::Other)));
    }

    #[test]
    fn a_helper_says_what_failed() {
        let mut helper = Helper::start(|_| Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap();
        assert_eq!(helper.answer().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        let mut helper = Helper::start(|agent| say(agent, 77)).unwrap();
        assert_eq!(helper.answer().unwrap(), 77);
        assert!(helper.answer().is_err(), "it has ended");
    }
}
