//! What came of the last step of a container's first process, the call of its program.
//!
//! ```text
//! process ── pipe, which execve(2) closes ──> agent      nothing: the program runs. A text: why it does not
//!    └────── standard error, as runc has it
//! ```
//!
//! By then the container library has no channel to anybody; for an exec it has one. What comes through the pipe is a guest's, as
//! processes of the container may get at the process before its program is in it: it is cut, and no request waits for it for ever.

use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{pipe2, write};

use crate::fd::Fd;

/// Longest text, in bytes. Less than what a pipe takes at once.
const MAX: usize = 512;

/// How a process ends that touches a page of a file which cannot be read.
const BUS_ERROR: u32 = 128 + libc::SIGBUS.cast_unsigned();
/// What an operator should look at.
const CAUSE: &str = "bytes of the container's image cannot be had; the log of the node's image service says why (the registry is away \
     or refuses, bytes are wrong, a disk is full)";

/// The process's end.
#[derive(Debug, Clone)]
pub struct Teller(Arc<OwnedFd>);

/// The agent's.
#[derive(Debug)]
pub struct Verdict(Fd);

/// Both.
///
/// # Errors
/// No descriptors.
pub fn channel() -> io::Result<(Teller, Verdict)> {
    let (verdict, teller) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((Teller(Arc::new(teller)), Verdict(Fd::new(verdict)?)))
}

impl Teller {
    /// What has to stay open until then.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Says why the program does not run.
    pub fn tell(&self, why: &str) {
        // Whoever does not listen any more has no use for it.
        let _ = write(self.0.as_fd(), &why.as_bytes()[..why.floor_char_boundary(MAX)]);
        let _ = writeln!(io::stderr(), "{why}");
    }
}

impl Verdict {
    /// Waits until the program runs, the process has ended, or it has said why it does not.
    pub async fn wait(self) -> Option<String> {
        let mut text = [0; MAX];
        match self.0.read(&mut text).await {
            Ok(read @ 1..) => Some(printable(&text[..read])),
            // A pipe that cannot be read says nothing.
            Ok(0) | Err(_) => None,
        }
    }
}

/// What a process says of a program that execve(2) refused; `of_image` where its bytes are those of an image that comes as it is read.
pub fn refused(program: &str, errno: Errno, of_image: bool) -> String {
    let program = format!("{program:?}");
    // The rest is the part that matters.
    let said = format!("exec {}: {errno}", &program[..program.floor_char_boundary(MAX / 2)]);
    if of_image && errno == Errno::EIO { format!("{said}: {CAUSE}") } else { said }
}

/// What to say of the end of a program of such an image, if it may be the image's fault.
pub fn of_end(program: &str, status: u32) -> Option<String> {
    (status == BUS_ERROR).then(|| format!("{program:?} ended of SIGBUS: perhaps {CAUSE}"))
}

/// A text without what a log or a terminal would take for something else.
fn printable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(tell: impl FnOnce(&Teller)) -> Option<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (teller, verdict) = channel().unwrap();
            tell(&teller);
            drop(teller);
            verdict.wait().await
        })
    }

    #[test]
    fn an_io_error_of_an_image_has_a_likely_cause() {
        assert_eq!(refused("sh", Errno::EIO, true), format!("exec \"sh\": EIO: I/O error: {CAUSE}"));
        assert_eq!(refused("sh", Errno::EIO, false), "exec \"sh\": EIO: I/O error");
        assert_eq!(refused("sh", Errno::ENOENT, true), "exec \"sh\": ENOENT: No such file or directory");
        // However long the program's name is.
        let long = refused(&"\u{1b}".repeat(MAX), Errno::EIO, true);
        assert!(told(|teller| teller.tell(&long)).unwrap().ends_with(CAUSE));
        assert_eq!(of_end("sh", 135).unwrap(), format!("\"sh\" ended of SIGBUS: perhaps {CAUSE}"));
        assert_eq!(of_end("sh", 137), None);
    }

    #[test]
    fn a_program_that_runs_says_nothing_and_one_that_does_not_little() {
        assert_eq!(told(|_| ()), None);
        let odd = told(|teller| teller.tell("a\u{1b}[2J\nb")).unwrap();
        assert_eq!(odd, "a\u{fffd}[2J\u{fffd}b");
        let long = "ä".repeat(MAX);
        assert_eq!(told(|teller| teller.tell(&long)).unwrap().len(), MAX);
    }
}
