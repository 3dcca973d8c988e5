//! A process's standard streams: copied between containerd's fifos and the guest's vsock streams.
//!
//! ```text
//! client ─ fifo ──> splice ─> stream ─> guest's stdin        each arrow ends the next one
//! client <─ fifo ── splice <─ stream <─ guest's stdout/stderr
//! logger <─ pipe ── splice <─┤  binary://…, binary-v2://…
//!   file <───────── write  <─┘  file://…
//! ```
//! In place of a fifo there may be a pipe of our own, whose other end is a stream of containerd's ([`streaming`](crate::streaming)).
//!
//! Bytes move inside the kernel (`splice`): this process holds none of them, and a slow reader slows the guest down,
//! through the pipe and the stream's credit, instead of filling memory. A file is the exception: it cannot be spliced to
//! where it is appended to, and 16 KiB of its stream pass through here at a time.
//!
//! Both ends of an output fifo are held open, so that a client may come and go without the writer failing or the
//! reader seeing the end. That comes when the process has ended and somebody has read what is in the pipe, or the process
//! is deleted: a containerd that was away meanwhile opens the fifo anew, which waits for a writer, and finds the rest. Of an input fifo the writing end is held until `CloseIO`: a client that reconnects does not
//! end the input.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::Shutdown;
use rustix::pipe::{SpliceFlags, splice};
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::container::logger::{self, Logger, LoggerError, Owner, is_logger};
use crate::streaming::Desk;
use crate::streaming::pump::{self, Pump};
use crate::watched::watch as watch_fd;

/// Where a process's streams go, in containerd's words. Empty is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Fifo to read from, or the URI of a stream of the sandbox's own socket (`ttrpc+unix://`).
    pub stdin: String,
    /// Fifo to write to, or the URI of a stream, a file (`file://`) or a logger (`binary://`, `binary-v2://`).
    pub stdout: String,
    /// The same; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal: one stream both ways.
    pub terminal: bool,
}

impl Stdio {
    /// Paths of the fifos that are opened.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let streams = [self.stdin.as_str(), &self.stdout, self.used_stderr()];
        streams.into_iter().filter(|p| p.starts_with('/')).map(PathBuf::from)
    }

    fn used_stderr(&self) -> &str {
        if self.terminal { "" } else { &self.stderr }
    }
}

/// A stream that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// Not a path, and of no known kind.
    #[error(
        "{stream} {uri:?}: supported are a fifo's path, a stream of this sandbox's socket (ttrpc+unix://) and, for output, file://, binary:// and binary-v2://"
    )]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// As containerd named it.
        uri: String,
    },
    /// A program for each output.
    #[error("stdout {stdout:?} and stderr {stderr:?}: one logger takes both")]
    Loggers {
        /// As containerd named it.
        stdout: String,
        /// As containerd named it.
        stderr: String,
    },
    /// A logger that does not take the output.
    #[error("logger {uri:?}")]
    Logger {
        /// As containerd named it.
        uri: String,
        /// Why not.
        #[source]
        source: LoggerError,
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
    stdout: Option<Output>,
    stderr: Option<Output>,
    logger: Option<Logger>,
    pumps: Vec<Pump>,
}

/// Where an output goes.
#[derive(Debug)]
enum Output {
    /// A client's fifo, or a logger's pipe.
    Pipe(OwnedFd),
    /// A file, to its end.
    File(File),
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
    /// Opens what `stdio` names, and starts its logger. Streams are those of `desk`.
    ///
    /// # Errors
    /// See [`IoError`].
    pub async fn open(stdio: &Stdio, owner: Owner<'_>, desk: &Arc<Desk>) -> Result<Self, IoError> {
        let mut pumps = Vec::new();
        let stdin = match (stdio.stdin.as_str(), desk.id_in(&stdio.stdin)) {
            ("", _) => None,
            (uri, Some(id)) => {
                let made = pump::input(desk, &id);
                let (reader, writer, pump) = made.map_err(|source| failed("stdin", uri, source))?;
                pumps.push(pump);
                Some((reader, writer))
            }
            (path, None) => {
                let read = open_fifo("stdin", path, true, false)?;
                Some((read, open_fifo("stdin", path, false, true)?))
            }
        };
        let (stdout, stderr) = (stdio.stdout.as_str(), stdio.used_stderr());
        if is_logger(stdout) && is_logger(stderr) && stdout != stderr {
            return Err(IoError::Loggers { stdout: stdout.to_owned(), stderr: stderr.to_owned() });
        }
        let mut to = |stream, uri: &str| match desk.id_in(uri) {
            Some(id) => {
                let (pipe, pump) = pump::output(desk, &id).map_err(|source| failed(stream, uri, source))?;
                pumps.push(pump);
                Ok(Some(Output::Pipe(pipe)))
            }
            None => output(stream, uri),
        };
        let (to_stdout, to_stderr) = (to("stdout", stdout)?, to("stderr", stderr)?);
        let mut fifos = Fifos { stdin, stdout: to_stdout, stderr: to_stderr, logger: None, pumps };
        if let Some(uri) = [stdout, stderr].into_iter().find(|uri| is_logger(uri)) {
            let started = Logger::start(uri, owner).await;
            let (logger, inputs) =
                started.map_err(|source| IoError::Logger { uri: uri.to_owned(), source })?;
            fifos.logger = Some(logger);
            if is_logger(stdout) {
                fifos.stdout = Some(Output::Pipe(inputs.stdout));
            }
            if is_logger(stderr) {
                fifos.stderr = Some(Output::Pipe(inputs.stderr));
            }
        }
        Ok(fifos)
    }
}

fn failed(stream: &'static str, uri: &str, source: std::io::Error) -> IoError {
    IoError::Open { stream, path: uri.to_owned(), source }
}

/// Opens a fifo or a file.
fn output(stream: &'static str, uri: &str) -> Result<Option<Output>, IoError> {
    if uri.is_empty() || is_logger(uri) {
        return Ok(None);
    }
    let Some(path) = uri.strip_prefix("file://") else {
        return open_fifo(stream, uri, true, true).map(|fifo| Some(Output::Pipe(fifo)));
    };
    let path = logger::decode(path).ok().filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| IoError::Scheme { stream, uri: uri.to_owned() })?;
    let opened = Path::new(&path)
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| OpenOptions::new().append(true).create(true).mode(0o644).open(&path));
    let file = opened.map_err(|source| IoError::Open { stream, path, source })?;
    Ok(Some(Output::File(file)))
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
    logger: Option<Logger>,
    pumps: Vec<Pump>,
    /// What waits for a reader ends with it.
    kept: Option<watch::Sender<()>>,
    moved: Arc<AtomicU64>,
}

impl Copying {
    /// Starts to copy.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub fn start(fifos: Fifos, streams: Streams, terminal: bool) -> std::io::Result<Self> {
        let mut copying = Copying::default();
        copying.logger = fifos.logger;
        copying.pumps = fifos.pumps;
        let (kept, until_stopped) = watch::channel(());
        copying.kept = Some(kept);
        let stdout = streams.stdout.map(stream_fd).transpose()?.map(Arc::new);
        let input =
            if terminal { stdout.clone() } else { streams.stdin.map(stream_fd).transpose()?.map(Arc::new) };
        if let (Some((reader, writer)), Some(stream)) = (fifos.stdin, input) {
            let reader = watch_fd(reader)?;
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
        for (name, stream, output) in [("stdout", stdout, fifos.stdout), ("stderr", stderr, fifos.stderr)] {
            let (Some(stream), Some(output)) = (stream, output) else { continue };
            let moved = copying.moved.clone();
            copying.outputs.push(match output {
                Output::Pipe(fifo) => {
                    let fifo = watch_fd(fifo)?;
                    let until_stopped = until_stopped.clone();
                    tokio::spawn(async move {
                        if let Err(e) = copy(&stream, &fifo, &moved).await {
                            log::debug!("{name}: {e}");
                        }
                        tokio::spawn(until_read(fifo, until_stopped));
                    })
                }
                Output::File(file) => tokio::spawn(async move {
                    if let Err(e) = append(&stream, &file, &moved).await {
                        log::warn!("{name} to its file: {e}");
                    }
                }),
            });
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
            // It ends with its input, and then all it was given is where it belongs.
            if let Some(logger) = &mut self.logger {
                logger.ended().await;
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
        self.logger = None;
        self.kept = None;
        self.pumps.clear();
    }
}

/// How often an ended process's pipe is looked at when nobody reads it.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Keeps a pipe open until it is empty, or nobody wants it any more.
async fn until_read(pipe: AsyncFd<OwnedFd>, mut until_stopped: watch::Receiver<()>) {
    // There is no event for it. A reader that is there is through in no time.
    let mut pause = Duration::from_millis(1);
    while ioctl_fionread(pipe.get_ref()).is_ok_and(|unread| unread > 0) {
        tokio::select! {
            _ = until_stopped.changed() => break,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
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
    watch_fd(stream.into())
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

/// Bytes of a stream on their way to a file.
const BUFFER: usize = 16 * 1024;

/// Writes what comes from `from` to a file until it ends. A file is written to without waiting for it: there is no
/// telling when one is ready.
async fn append(from: &AsyncFd<OwnedFd>, mut to: &File, moved: &AtomicU64) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut readable = from.readable().await?;
        match rustix::io::read(from.get_ref(), &mut *buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&buffer[..n])?;
                moved.fetch_add(n as u64, Ordering::Relaxed);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => readable.clear_ready(),
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
    use std::io::Read as _;

    const OWNER: Owner<'_> = Owner { namespace: "test", id: "web" };

    fn desk() -> Arc<Desk> {
        Desk::new("/run/containerd/s/test".as_ref())
    }

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
        let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
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
        let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
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
        let mut copying =
            Copying::start(Fifos::open(&stdio, OWNER, &desk()).await.unwrap(), streams, false).unwrap();
        // Opened while we hold the other end, as clients do.
        let mut client = std::fs::File::open(&output).unwrap();
        guest.write_all(b"before").unwrap();
        assert!(!copying.drain(Duration::from_secs(60), Duration::from_millis(50)).await);
        // And it goes on copying.
        guest.write_all(b" after").unwrap();
        drop(guest);
        assert!(copying.drain(Duration::from_secs(60), Duration::from_secs(60)).await);
        let read = move || {
            let mut got = String::new();
            client.read_to_string(&mut got).unwrap();
            got
        };
        // The end comes when all is read.
        assert_eq!(tokio::task::spawn_blocking(read).await.unwrap(), "before after");
    }

    /// What `Streams` and a guest that says `out` and `err` make of `stdio`.
    async fn said(stdio: &Stdio, out: &[u8], err: &[u8]) {
        let (mut guest_out, shim_out) = UnixStream::pair().unwrap();
        let (mut guest_err, shim_err) = UnixStream::pair().unwrap();
        let fifos = Fifos::open(stdio, OWNER, &desk()).await.unwrap();
        let streams = Streams { stdin: None, stdout: Some(shim_out), stderr: Some(shim_err) };
        let mut copying = Copying::start(fifos, streams, false).unwrap();
        guest_out.write_all(out).unwrap();
        guest_err.write_all(err).unwrap();
        drop((guest_out, guest_err));
        assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
    }

    #[tokio::test]
    async fn a_file_is_made_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new dir/log");
        let uri = format!("file://{}", text(&path).replace(' ', "%20"));
        let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
        assert_eq!(stdio.paths().count(), 0, "what a client cleans up");
        said(&stdio, b"first\n", b"").await;
        said(&stdio, b"", b"second\n").await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
    }

    #[tokio::test]
    async fn a_logger_is_given_both_outputs_and_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let script = "echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $* $HOME\" > \"$1/args\"; exec 5>&-; \
                      cat <&4 > \"$1/err\" & cat <&3 4<&- > \"$1/out\"; wait";
        let script: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let uri = format!("binary:///bin/sh?-c={script}&to={}&flag", text(dir.path()));
        let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
        let out = "x".repeat(1 << 20);
        // More than the streams hold: it is copied while it comes.
        let (mut guest_out, shim_out) = UnixStream::pair().unwrap();
        let (mut guest_err, shim_err) = UnixStream::pair().unwrap();
        let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
        let streams = Streams { stdin: None, stdout: Some(shim_out), stderr: Some(shim_err) };
        let mut copying = Copying::start(fifos, streams, false).unwrap();
        let bytes = out.clone();
        let guest = std::thread::spawn(move || {
            guest_err.write_all(b"err").unwrap();
            guest_out.write_all(bytes.as_bytes()).unwrap();
        });
        assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
        guest.join().unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(read("out") == out && read("err") == "err", "the program has ended, with all of it");
        assert_eq!(read("args").trim_end(), format!("test/web {} flag", text(dir.path())));
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_refused_by_name() {
        let open = async |stdout: &str, stderr: &str| {
            let stdio = Stdio { stdout: stdout.into(), stderr: stderr.into(), ..Stdio::default() };
            crate::error::chain(&Fifos::open(&stdio, OWNER, &desk()).await.unwrap_err())
        };
        for other in ["ttrpc+unix:///run/x?streaming_id=a", "grpc+unix:///run/x", "binary-v3:///a"] {
            assert!(open(other, "").await.contains("supported are a fifo's path"), "{other}");
        }
        assert!(open("/dev/null", "").await.contains("stdout \"/dev/null\" is not a fifo"));
        assert!(open("/nonexistent/fifo", "").await.starts_with("opening stdout"));
        assert!(open("file://relative", "").await.contains("supported are"));
        assert!(open("file:///proc/no/such", "").await.starts_with("opening stdout \"/proc/no/such\""));
        assert!(open("binary:///a", "binary:///b").await.contains("one logger takes both"));
        let text = open("binary:///no/such?a=b", "").await;
        assert!(text.contains("starting \"/no/such\": No such file"), "{text}");
        let stdin = Stdio { stdin: "file:///etc/passwd".into(), ..Stdio::default() };
        assert!(matches!(
            Fifos::open(&stdin, OWNER, &desk()).await,
            Err(IoError::Scheme { stream: "stdin", .. })
        ));
    }

    #[tokio::test]
    async fn output_waits_for_a_reader_that_comes_after_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "out");
        let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
        let fifos = Fifos::open(&stdio, Owner { namespace: "n", id: "c" }, &desk()).await.unwrap();
        let (ours, mut guests) = UnixStream::pair().unwrap();
        let streams = Streams { stdout: Some(ours), ..Streams::default() };
        let mut copying = Copying::start(fifos, streams, false).unwrap();
        guests.write_all(b"last words").unwrap();
        drop(guests);
        assert!(copying.drain(Duration::from_secs(10), Duration::from_secs(10)).await);
        // Opening waits for a writer, which is still there, and reading ends, so it is gone then.
        let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(&path).unwrap());
        let text = tokio::time::timeout(Duration::from_secs(10), text).await.unwrap().unwrap();
        assert_eq!(text, "last words");
        copying.stop();
    }
}
