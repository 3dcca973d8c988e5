//! A process that does nothing, in a pid namespace of its own: what a pod's containers share where no pause container
//! holds their process numbers.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

use crate::sys::{self, Fork};
use crate::users::{self, Users};

/// The sandbox's pause process, made when somebody first asks for it.
#[derive(Debug, Default)]
pub struct Pause(Mutex<Option<PathBuf>>);

impl Pause {
    /// The file that stands for its process numbers, which belong to the sandbox's users.
    ///
    /// # Errors
    /// When there is none and none can be made.
    pub fn pids(&self, users: &Users) -> io::Result<PathBuf> {
        let mut pids = self.0.lock().expect("no code panics while it holds this lock");
        if let Some(pids) = pids.as_ref().filter(|file| file.exists()) {
            return Ok(pids.clone());
        }
        let started = if users.exist() {
            users::start_in_own_pids(&users.open().map_err(io::Error::other)?, || hold())?
        } else {
            PathBuf::from(format!("/proc/{}/ns/pid", start()?))
        };
        *pids = Some(started.clone());
        Ok(started)
    }
}

fn start() -> io::Result<u32> {
    let own = File::open("/proc/self/ns/pid")?;
    // The next child is the new namespace's first process, and later ones are to be ours again.
    unshare(CloneFlags::CLONE_NEWPID)?;
    let forked = sys::fork();
    if matches!(forked, Ok(Fork::Child)) {
        hold();
    }
    setns(own, CloneFlags::CLONE_NEWPID)?;
    match forked? {
        Fork::Child => hold(),
        Fork::Parent(pid) => Ok(pid.as_raw().cast_unsigned()),
    }
}

/// The child: holds no descriptor of the agent's, has the kernel collect orphans, and waits for the end of the machine.
fn hold() -> ! {
    if sys::close_all_but(&[]).is_err() || sys::ignore_signal(Signal::SIGCHLD).is_err() {
        sys::exit_now(1);
    }
    let _ = nix::sys::prctl::set_name(c"pause");
    loop {
        nix::unistd::pause();
    }
}
