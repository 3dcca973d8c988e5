//! A process's standard streams: copied between containerd's fifos and the guest's vsock streams.
//!
//! ```text
//! client ─ fifo ─> splice ─> stream ─> guest's stdin         each arrow ends the next one
//! client <─ fifo ─ splice <─ stream <─ guest's stdout/stderr
//! ```
//!
//! Bytes move inside the kernel (`splice`): this process holds none of them, and a slow reader slows the guest down,
//! through the pipe and the stream's credit, instead of filling memory.
//!
//! Both ends of an output fifo are held open, so that a client may come and go without the writer failing or the
//! reader seeing the end. Of an input fifo the writing end is held until `CloseIO`: a client that reconnects does not
//! end the input.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::{SpliceFlags, splice};
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::watched::watch;

/// Where a process's streams go, in containerd's words. Empty is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Fifo to read from.
    pub stdin: String,
    /// Fifo to write to.
    pub stdout: String,
    /// Fifo to write to; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal: one stream both ways.
    pub terminal: bool,
}

impl Stdio {
    /// Paths of what is opened.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let stderr = if self.terminal { "" } else { &self.stderr };
        [self.stdin.as_str(), &self.stdout, stderr].into_iter().filter(|p| !p.is_empty()).map(PathBuf::from)
    }
}

/// A stream that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// Not a fifo's path.
    #[error("{stream} {uri:?}: only a fifo's path is supported, not a URI with a scheme")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// As containerd named it.
        uri: String,
    },
    /// Another kind of file.
    #[error("{stream} {path:?} is not a fifo")]
    NotFifo {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: String,
    },
    /// It cannot be opened.
    #[error("opening {stream} {path:?}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The host's ends of a process's streams, opened before anything is asked of the guest.
#[derive(Debug, Default)]
pub struct Fifos {
    stdin: Option<(OwnedFd, OwnedFd)>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The guest's ends.
#[derive(Debug, Default)]
pub struct Streams {
    /// Its stdin; with a terminal absent.
    pub stdin: Option<UnixStream>,
    /// Its stdout; with a terminal both ways.
    pub stdout: Option<UnixStream>,
    /// Its stderr.
    pub stderr: Option<UnixStream>,
}

impl Fifos {
    /// Opens what `stdio` names.
    ///
    /// # Errors
    /// See [`IoError`].
    pub fn open(stdio: &Stdio) -> Result<Self, IoError> {
        let stdin = match stdio.stdin.as_str() {
            "" => None,
            path => {
                let read = open_fifo("stdin", path, true, false)?;
                Some((read, open_fifo("stdin", path, false, true)?))
            }
        };
        let output = |stream, path: &str| match path {
            "" => Ok(None),
            path => open_fifo(stream, path, true, true).map(Some),
        };
        let stderr = if stdio.terminal { None } else { output("stderr", &stdio.stderr)? };
        Ok(Fifos { stdin, stdout: output("stdout", &stdio.stdout)?, stderr })
    }
}

/// Opens a fifo without waiting for a peer.
fn open_fifo(stream: &'static str, path: &str, read: bool, write: bool) -> Result<OwnedFd, IoError> {
    if !path.starts_with('/') {
        return Err(IoError::Scheme { stream, uri: path.to_owned() });
    }
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("open flags fit an int");
    let file = OpenOptions::new()
        .read(read)
        .write(write)
        .custom_flags(flags)
        .open(path)
        .map_err(|source| IoError::Open { stream, path: path.to_owned(), source })?;
    let is_fifo = file.metadata().is_ok_and(|m| m.file_type().is_fifo());
    if is_fifo { Ok(file.into()) } else { Err(IoError::NotFifo { stream, path: path.to_owned() }) }
}

/// The copying of one process.
#[derive(Debug, Default)]
pub struct Copying {
    /// Held until `CloseIO`.
    stdin_writer: Option<OwnedFd>,
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    moved: Arc<AtomicU64>,
}

impl Copying {
    /// Starts to copy.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub fn start(fifos: Fifos, streams: Streams, terminal: bool) -> std::io::Result<Self> {
        let mut copying = Copying::default();
        let stdout = streams.stdout.map(stream_fd).transpose()?.map(Arc::new);
        let input =
            if terminal { stdout.clone() } else { streams.stdin.map(stream_fd).transpose()?.map(Arc::new) };
        if let (Some((reader, writer)), Some(stream)) = (fifos.stdin, input) {
            let reader = watch(reader)?;
            copying.stdin_writer = Some(writer);
            copying.input = Some(tokio::spawn(async move {
                if let Err(e) = copy(&reader, &stream, &AtomicU64::new(0)).await {
                    log::debug!("stdin: {e}");
                }
                // The guest sees the end of its input; with a terminal it also keeps its output.
                let _ = rustix::net::shutdown(stream.get_ref(), Shutdown::Write);
            }));
        }
        let stderr = streams.stderr.map(stream_fd).transpose()?.map(Arc::new);
        for (name, stream, fifo) in [("stdout", stdout, fifos.stdout), ("stderr", stderr, fifos.stderr)] {
            let (Some(stream), Some(fifo)) = (stream, fifo) else { continue };
            let fifo = watch(fifo)?;
            let moved = copying.moved.clone();
            copying.outputs.push(tokio::spawn(async move {
                if let Err(e) = copy(&stream, &fifo, &moved).await {
                    log::debug!("{name}: {e}");
                }
            }));
        }
        Ok(copying)
    }

    /// Lets the input end once the client has closed its end too.
    pub fn close_stdin(&mut self) {
        self.stdin_writer = None;
    }

    /// Waits for the output to end: at most `longest`, and not for a stream that stays open with nothing coming for
    /// `quiet`, which is how a daemon that outlives its parent holds it. Says whether it ended.
    pub async fn drain(&mut self, longest: Duration, quiet: Duration) -> bool {
        let moved = self.moved.clone();
        let ended = async {
            for output in &mut self.outputs {
                // A copier that panicked or was stopped has ended as well.
                let _ = output.await;
            }
        };
        let gave_up = async {
            let mut before = moved.load(Ordering::Relaxed);
            loop {
                tokio::time::sleep(quiet).await;
                let now = moved.load(Ordering::Relaxed);
                if now == before {
                    break;
                }
                before = now;
            }
        };
        let ended = tokio::select! {
            biased;
            () = ended => true,
            () = gave_up => false,
            () = tokio::time::sleep(longest) => false,
        };
        if ended {
            self.outputs.clear();
        }
        ended
    }

    /// Stops copying and closes everything.
    pub fn stop(&mut self) {
        self.stdin_writer = None;
        for task in self.outputs.drain(..).chain(self.input.take()) {
            task.abort();
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stream_fd(stream: UnixStream) -> std::io::Result<AsyncFd<OwnedFd>> {
    stream.set_nonblocking(true)?;
    watch(stream.into())
}

/// Most bytes moved by one system call: what a pipe holds.
const CHUNK: usize = 64 * 1024;

/// Moves bytes from `from` to `to` until the first ends; one of them is a pipe. Counts them in `moved`.
async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>, moved: &AtomicU64) -> std::io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(from.get_ref(), None, to.get_ref(), None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                moved.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(Errno::INTR) => {}
            // One of the two was not ready, and the error does not say which.
            Err(Errno::AGAIN) => {
                let in_ready = is_ready(from, PollFlags::IN | PollFlags::HUP);
                let out_ready = is_ready(to, PollFlags::OUT | PollFlags::ERR);
                if !in_ready {
                    readable.clear_ready();
                }
                if !out_ready {
                    writable.clear_ready();
                }
                if in_ready && out_ready {
                    // Became ready in between; the next round will tell.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn is_ready(fd: &AsyncFd<OwnedFd>, wanted: PollFlags) -> bool {
    let mut ready = [PollFd::from_borrowed_fd(fd.as_fd(), wanted)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut ready, Some(&now)).is_ok_and(|n| n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
        let path = dir.path().join(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        path
    }

    fn text(path: &std::path::Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    /// Both directions, with a client that comes late, leaves in between, and reads slowly.
    #[tokio::test]
    async fn bytes_arrive_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (fifo(&dir, "in"), fifo(&dir, "out"));
        let stdio = Stdio { stdin: text(&input), stdout: text(&output), ..Stdio::default() };
        let fifos = Fifos::open(&stdio).unwrap();
        let (guest_in, shim_in) = UnixStream::pair().unwrap();
        let (guest_out, shim_out) = UnixStream::pair().unwrap();
        let streams = Streams { stdin: Some(shim_in), stdout: Some(shim_out), stderr: None };
        let mut copying = Copying::start(fifos, streams, false).unwrap();

        let payload: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        // The guest echoes its input until it ends.
        let guest = std::thread::spawn(move || {
            let (mut from, mut to) = (guest_in, guest_out);
            std::io::copy(&mut from, &mut to).unwrap()
        });
        let to_send = payload.clone();
        let client = std::thread::spawn(move || {
            for part in to_send.chunks(to_send.len() / 2) {
                // A client that reconnects between two halves does not end the input.
                std::fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(part).unwrap();
            }
        });
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            std::fs::File::open(&output).unwrap().read_to_end(&mut got).unwrap();
            got
        });
        tokio::task::spawn_blocking(move || client.join().unwrap()).await.unwrap();
        copying.close_stdin();
        assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
        copying.stop();
        let got = tokio::task::spawn_blocking(move || reader.join().unwrap()).await.unwrap();
        assert_eq!(guest.join().unwrap(), payload.len() as u64);
        assert!(got == payload, "{} bytes of {}", got.len(), payload.len());
    }

    #[tokio::test]
    async fn a_terminal_has_one_stream_both_ways() {
        let dir = tempfile::tempdir().unwrap();
        let (input, output) = (fifo(&dir, "in"), fifo(&dir, "out"));
        let stdio = Stdio {
            stdin: text(&input),
            stdout: text(&output),
            stderr: "/nonexistent, and not opened with a terminal".into(),
            terminal: true,
        };
        let fifos = Fifos::open(&stdio).unwrap();
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let streams = Streams { stdout: Some(shim), ..Streams::default() };
        let _copying = Copying::start(fifos, streams, true).unwrap();
        let done = tokio::task::spawn_blocking(move || {
            std::fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(b"hello").unwrap();
            let mut got = [0; 5];
            guest.read_exact(&mut got).unwrap();
            guest.write_all(b"HELLO").unwrap();
            let mut back = [0; 5];
            std::fs::File::open(&output).unwrap().read_exact(&mut back).unwrap();
            (got, back)
        });
        let (got, back) = done.await.unwrap();
        assert_eq!((&got, &back), (b"hello", b"HELLO"));
    }

    #[tokio::test]
    async fn a_stream_held_open_does_not_hold_up_the_exit() {
        let dir = tempfile::tempdir().unwrap();
        let output = fifo(&dir, "out");
        let stdio = Stdio { stdout: text(&output), ..Stdio::default() };
        let (mut guest, shim) = UnixStream::pair().unwrap();
        let streams = Streams { stdout: Some(shim), ..Streams::default() };
        let mut copying = Copying::start(Fifos::open(&stdio).unwrap(), streams, false).unwrap();
        // Opened while we hold the other end, as clients do.
        let mut client = std::fs::File::open(&output).unwrap();
        guest.write_all(b"before").unwrap();
        assert!(!copying.drain(Duration::from_secs(60), Duration::from_millis(50)).await);
        // And it goes on copying.
        guest.write_all(b" after").unwrap();
        drop(guest);
        assert!(copying.drain(Duration::from_secs(60), Duration::from_secs(60)).await);
        let mut got = String::new();
        client.read_to_string(&mut got).unwrap();
        assert_eq!(got, "before after");
    }

    #[test]
    fn what_is_not_a_fifo_is_refused_by_name() {
        let open = |stdout: &str| {
            let stdio = Stdio { stdout: stdout.into(), ..Stdio::default() };
            Fifos::open(&stdio).unwrap_err().to_string()
        };
        assert!(open("binary:///usr/bin/logger?x=y").contains("only a fifo's path is supported"));
        assert!(open("/dev/null").contains("stdout \"/dev/null\" is not a fifo"));
        assert!(open("/nonexistent/fifo").starts_with("opening stdout"));
    }
}
