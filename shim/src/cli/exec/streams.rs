//! The standard streams of an exec: fifos in the sandbox's state directory, copied to and from this process's own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use tokio::sync::mpsc;

use crate::dirs;

/// Fifos of one exec; removed when dropped.
#[derive(Debug)]
pub struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        // The sandbox may have taken it along.
        let _ = std::fs::remove_dir_all(&self.0);
        dirs::leave_parent(&self.0);
    }
}

/// Our ends of the streams.
#[derive(Debug)]
pub struct Streams {
    dir: Dir,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

impl Streams {
    /// Makes the fifos in `state_dir`, and opens the ends of the outputs.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn make(state_dir: &Path, exec_id: &str, tty: bool) -> io::Result<Self> {
        let dir = Dir(state_dir.join("execs").join(exec_id));
        dirs::make(&dir.0)?;
        let names: &[&str] = if tty { &["stdin", "stdout"] } else { &["stdin", "stdout", "stderr"] };
        for name in names {
            mknodat(CWD, dir.0.join(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        }
        // Before the shim opens them, so that none of the output can be lost.
        let open = |name: &str| {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            rustix::fs::open(dir.0.join(name), flags, Mode::empty())
        };
        let stdout = open("stdout")?;
        let stderr = if tty { None } else { Some(open("stderr")?) };
        Ok(Streams { dir, stdout, stderr })
    }

    /// What the shim is told that a stream is.
    pub fn name(&self, stream: &str) -> String {
        self.dir.0.join(stream).display().to_string()
    }

    /// Copies, each stream on a thread of its own, now that the shim has the other ends. The first channel ends with the
    /// outputs; the second says that the input has ended.
    ///
    /// # Errors
    /// When the shim has not opened them.
    pub fn run(self) -> io::Result<(mpsc::Receiver<()>, mpsc::Receiver<()>, Dir)> {
        let (outputs_tx, outputs) = mpsc::channel(1);
        let (input_tx, input_ended) = mpsc::channel(1);
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let stdin = rustix::fs::open(self.dir.0.join("stdin"), flags, Mode::empty())?;
        for fd in [Some(&stdin), Some(&self.stdout), self.stderr.as_ref()].into_iter().flatten() {
            rustix::fs::fcntl_setfl(fd.as_fd(), OFlags::empty())?;
        }
        std::thread::spawn(move || {
            // A command that reads no more breaks the pipe.
            let _ = copy(io::stdin(), File::from(stdin));
            let _ = input_tx.blocking_send(());
        });
        let tx = outputs_tx.clone();
        std::thread::spawn(move || {
            // Nothing can be done for a reader of ours that is gone.
            let _ = copy(File::from(self.stdout), io::stdout());
            drop(tx);
        });
        if let Some(stderr) = self.stderr {
            std::thread::spawn(move || {
                let _ = copy(File::from(stderr), io::stderr());
                drop(outputs_tx);
            });
        }
        Ok((outputs, input_ended, self.dir))
    }
}

/// Copies to the end, each part at once.
fn copy(mut from: impl io::Read, mut to: impl io::Write) -> io::Result<()> {
    let mut part = [0; 16 * 1024];
    loop {
        match from.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&part[..n])?;
                to.flush()?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifos_go_with_the_process() {
        let state = tempfile::tempdir().unwrap();
        let streams = Streams::make(state.path(), "ctvm-1", false).unwrap();
        let name = streams.name("stderr");
        assert!(Path::new(&name).exists());
        drop(streams);
        assert!(state.path().read_dir().unwrap().next().is_none());
    }
}
