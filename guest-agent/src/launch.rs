//! Runs the container library in a forked process.
//!
//! `libcontainer` is made for a command that does one thing and exits: it blocks, changes the caller's directory,
//! `oom_score_adj` and dumpable flag, and waits for its own children. Forked off, it can do none of that to PID 1,
//! the agent goes on serving, and several containers start at once.
//!
//! ```text
//! agent ──fork──> launcher ──clone──> intermediate ──clone──> init or exec process
//!   │ <── pid or error ── │  (SOCK_SEQPACKET; also log lines)       │
//!   │ <── exit, reaped ── ✝                                         │
//!   └──── parent of <───────────────────────────────────────────────┘ once the launcher is gone
//! ```

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use agent_api::log_line::{Level, Source};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::unistd::Pid;

use crate::fd::Fd;
use crate::log_stream;
use crate::reaper::{self, Launching, Reaper};
use crate::sys::{self, Fork};

/// Longest message from a launcher; what is longer is cut.
const MAX_MESSAGE: usize = 8 * 1024;

/// Why there is no new process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No launcher.
    #[error("cannot start a launcher")]
    Fork(#[source] io::Error),
    /// The container library's own words.
    #[error("{0}")]
    Refused(String),
    /// The launcher crashed.
    #[error("launcher ended with status {0} and said nothing")]
    Silent(u32),
    /// The launcher's message is none.
    #[error("launcher said {0:?}")]
    Garbled(String),
}

/// A process that a launcher left behind, and the promise that its exit is not lost before someone watches it.
#[derive(Debug)]
pub struct Launched {
    /// The new process.
    pub pid: i32,
    /// To be dropped once the pid is watched.
    pub launching: Launching,
}

/// Forks, runs `job` there with no descriptors but 0, 1, 2 and `keep`, and returns the pid that it returns. What the
/// library complains of is logged as `container`'s.
pub async fn run(
    reaper: &Arc<Reaper>,
    container: &str,
    keep: &[RawFd],
    job: impl FnOnce() -> Result<i32, String>,
) -> Result<Launched, LaunchError> {
    let launching = reaper.launching();
    let (ours, launcher) = fork(keep, job).map_err(LaunchError::Fork)?;
    let ours = Fd::new(ours).map_err(LaunchError::Fork)?;
    let mut gone = reaper.watch(launcher.as_raw());
    let mut message = vec![0; MAX_MESSAGE + 1];
    // The library's errors say what was tried, its log says on what.
    let mut said = Vec::new();
    loop {
        let exit = tokio::select! {
            biased;
            ready = ours.wait_readable() => { ready.map_err(LaunchError::Fork)?; None }
            exit = reaper::ended(&mut gone) => Some(exit),
        };
        while let Some(n @ 1..) = ours.try_read(&mut message).map_err(LaunchError::Fork)? {
            let text = String::from_utf8_lossy(&message[1..n]).into_owned();
            match message[0] {
                b'P' => {
                    let pid = text.parse().map_err(|_| LaunchError::Garbled(text))?;
                    return Ok(Launched { pid, launching });
                }
                b'E' => return Err(LaunchError::Refused(explain(text, &said))),
                b'L' => {
                    log_stream::write(Level::Warn, Source::Container, container, &text);
                    said.push(text);
                }
                _ => return Err(LaunchError::Garbled(text)),
            }
        }
        if let Some(exit) = exit {
            return Err(LaunchError::Silent(exit.status));
        }
    }
}

/// The library's error with the first thing that it complained of, which is the deepest. What our executor said is in both.
fn explain(error: String, said: &[String]) -> String {
    match said.first() {
        Some(first) if !error.contains(first) && !first.starts_with("failed to execute payload") => {
            format!("{error}: {first}")
        }
        _ => error,
    }
}

fn fork(keep: &[RawFd], job: impl FnOnce() -> Result<i32, String>) -> io::Result<(OwnedFd, Pid)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    match sys::fork()? {
        Fork::Parent(pid) => Ok((ours, pid)),
        Fork::Child => child(&theirs, keep, job),
    }
}

/// The launcher's whole life. Whatever happens, it does not go back into the agent's code.
fn child(agent: &OwnedFd, keep: &[RawFd], job: impl FnOnce() -> Result<i32, String>) -> ! {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            sys::exit_now(1);
        }
    }
    let _leave = Leave;
    // The runtime's handler writes to a descriptor that is about to be closed and its number used again.
    let ready = sys::default_signal(Signal::SIGCHLD).and_then(|()| {
        let mut keep = keep.to_vec();
        keep.push(agent.as_raw_fd());
        sys::close_all_but(&keep)
    });
    log_stream::divert(agent.as_raw_fd());
    let (kind, text) = match ready.map_err(|error| error.to_string()).and_then(|()| job()) {
        Ok(pid) => ('P', pid.to_string()),
        Err(text) => ('E', text),
    };
    tell(agent, kind, &text);
    sys::exit_now(0)
}

/// Sends one message to the agent.
pub fn tell(agent: &impl AsFd, kind: char, text: &str) {
    let mut message = String::with_capacity(text.len() + 1);
    message.push(kind);
    message.push_str(text);
    let end = message.floor_char_boundary(MAX_MESSAGE);
    // Nobody is left to hear that the agent does not listen.
    let _ = send(agent.as_fd().as_raw_fd(), &message.as_bytes()[..end], MsgFlags::MSG_NOSIGNAL);
}

/// An error with its causes, on one line. Causes that the text above them already tells are left out, as are the NULs that the library
/// has behind what an exec's process said.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string().replace('\0', "");
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string().replace('\0', "");
        if !text.contains(&words) {
            write!(text, ": {words}").expect("writing to a String cannot fail");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open {path}: {source}")]
        struct Open {
            path: &'static str,
            source: io::Error,
        }
        #[derive(Debug, thiserror::Error)]
        #[error("no bundle")]
        struct Bundle(#[source] Open);
        let error = Bundle(Open { path: "/x", source: io::Error::other("disk on fire") });
        assert_eq!(chain(&error), "no bundle: cannot open /x: disk on fire");
        assert_eq!(chain(&io::Error::other("exec x: EIO\0\0")), "exec x: EIO");
    }

    #[test]
    fn an_error_says_on_what() {
        let said = |text: &str| explain("failed to prepare rootfs".to_owned(), &[text.to_owned()]);
        assert_eq!(said("no such file /x"), "failed to prepare rootfs: no such file /x");
        assert_eq!(said("rootfs"), "failed to prepare rootfs");
        assert_eq!(said("failed to execute payload err=Other(\"\")"), "failed to prepare rootfs");
    }
}
