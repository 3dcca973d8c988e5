//! Standard streams: from the process through a pipe or pseudo-terminal to the host, and back.
//!
//! ```text
//! process 1 ──pipe──> pump ──vsock, port 1025──> shim        stdout; stderr the same
//! process 0 <──pipe── pump <──vsock, port 1025── shim        stdin
//! process tty <─pty─> two pumps <── one vsock ──> shim       terminal
//! ```
//!
//! The process does not get the vsock socket itself, which would save the copy: `open("/dev/stdout")`, that is
//! `/proc/self/fd/1`, fails with ENXIO on a socket, and images rely on it (logs linked to `/dev/stdout`,
//! `> /dev/stderr` in scripts). Pipes belong to the process's user, so that this works without being root too.
//!
//! Back-pressure goes straight through: a pump holds at most [`CHUNK`] bytes of a stream and reads again only when
//! the host has taken them; a full pipe then stops the process. An idle pump holds no buffer.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use agent_api::stream::{BadStreamName, StreamId};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use tokio::sync::{Notify, oneshot};

use crate::fd::Fd;
use crate::host::Host;
use crate::reaper::{self, Watch};

/// Most bytes that a pump holds: a pipe's capacity and a vsock packet's.
const CHUNK: usize = 64 * 1024;

/// How long an exit waits for output that the host does not take. Output is normally passed on in less; a process
/// whose reader stalls must not seem to live on.
const DRAIN: Duration = Duration::from_secs(1);

/// How long a finished output stream is kept for the host to read to its end and hang up.
const LINGER: Duration = Duration::from_secs(10);

thread_local! {
    /// One for all pumps: what does not fit the destination at once is copied out of it.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What can go wrong with standard streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A name in a request is none of ours.
    #[error(transparent)]
    Name(#[from] BadStreamName),
    /// The host did not take a connection.
    #[error("cannot open {0} on the host")]
    Dial(StreamId, #[source] io::Error),
    /// The guest is out of something.
    #[error("cannot make the ends of the standard streams")]
    Ends(#[source] io::Error),
}

/// The streams of one process as its request names them.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// Request field, verbatim, as `State` gives it back; so the next two.
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    /// One pseudo-terminal in place of three pipes.
    pub terminal: bool,
}

/// The streams of a process that does not exist yet, connected to the host.
#[derive(Debug)]
pub struct Wiring {
    stdin: Option<Fd>,
    stdout: Option<Fd>,
    stderr: Option<Fd>,
}

/// The process's ends of its pipes, to be its descriptors 0, 1 and 2.
#[derive(Debug)]
pub struct ChildEnds {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// The streams of a process, in flow.
#[derive(Debug)]
pub struct Flow {
    close_stdin: Arc<Notify>,
    terminal: Option<Fd>,
    drained: Vec<oneshot::Receiver<()>>,
}

/// Pipes whose process is about to be made.
#[derive(Debug)]
pub struct Pipes {
    wiring: Wiring,
    stdin: Option<Fd>,
    stdout: Option<Fd>,
    stderr: Option<Fd>,
}

impl Wiring {
    /// Connects every stream that has a name. With a terminal, stderr has no meaning, and stdin comes by stdout's
    /// connection unless it has a name of its own.
    pub async fn dial(host: &Host, names: &Names) -> Result<Self, StdioError> {
        let mut stdin = StreamId::from_name(&names.stdin)?;
        let stdout = StreamId::from_name(&names.stdout)?;
        let mut stderr = StreamId::from_name(&names.stderr)?;
        if names.terminal {
            stderr = None;
            stdin = stdin.filter(|&id| Some(id) != stdout);
        }
        let mut wiring = Self {
            stdin: connect(host, stdin).await?,
            stdout: connect(host, stdout).await?,
            stderr: connect(host, stderr).await?,
        };
        if names.terminal && wiring.stdin.is_none() {
            wiring.stdin.clone_from(&wiring.stdout);
        }
        Ok(wiring)
    }

    /// Makes the pipes; the process's ends belong to `uid` and `gid`.
    pub fn pipes(self, uid: u32, gid: u32) -> Result<(ChildEnds, Pipes), StdioError> {
        let owner = (Uid::from_raw(uid), Gid::from_raw(gid));
        let (stdin, to_stdin) =
            self.stdin.as_ref().map_or_else(null, |_| input(owner)).map_err(StdioError::Ends)?;
        let (stdout, from_stdout) =
            self.stdout.as_ref().map_or_else(null, |_| output(owner)).map_err(StdioError::Ends)?;
        let (stderr, from_stderr) =
            self.stderr.as_ref().map_or_else(null, |_| output(owner)).map_err(StdioError::Ends)?;
        let pipes = Pipes { wiring: self, stdin: to_stdin, stdout: from_stdout, stderr: from_stderr };
        Ok((ChildEnds { stdin, stdout, stderr }, pipes))
    }

    /// Connects the master of a process's pseudo-terminal, and gives the terminal to `uid`, as login(1) would.
    pub fn terminal(self, master: OwnedFd, uid: u32, process: &Watch) -> Result<Flow, StdioError> {
        let peer = crate::sys::pty_peer(master.as_fd()).map_err(StdioError::Ends)?;
        fchown(&peer, Some(Uid::from_raw(uid)), None).map_err(|errno| StdioError::Ends(errno.into()))?;
        drop(peer);
        let master = Fd::new(master).map_err(StdioError::Ends)?;
        let mut flow = Flow::new(Some(master.clone()));
        if let Some(host) = self.stdin {
            tokio::spawn(pump_in(host, master.clone(), process.clone(), flow.close_stdin.clone()));
        }
        if let Some(host) = self.stdout {
            flow.output(master, host, process);
        }
        Ok(flow)
    }
}

impl Pipes {
    /// Lets the bytes flow for `process`.
    pub fn run(self, process: &Watch) -> Flow {
        let mut flow = Flow::new(None);
        if let (Some(host), Some(pipe)) = (self.wiring.stdin, self.stdin) {
            tokio::spawn(pump_in(host, pipe, process.clone(), flow.close_stdin.clone()));
        }
        let outputs = [(self.stdout, self.wiring.stdout), (self.stderr, self.wiring.stderr)];
        for (pipe, host) in outputs.into_iter().filter_map(|(pipe, host)| pipe.zip(host)) {
            flow.output(pipe, host, process);
        }
        flow
    }
}

impl Flow {
    fn new(terminal: Option<Fd>) -> Self {
        Self { close_stdin: Arc::new(Notify::new()), terminal, drained: Vec::new() }
    }

    fn output(&mut self, from: Fd, host: Fd, process: &Watch) {
        let (sender, receiver) = oneshot::channel();
        self.drained.push(receiver);
        tokio::spawn(pump_out(from, host, process.clone(), sender));
    }

    /// Takes what tells when everything that the process wrote before its exit is on its way to the host, or that
    /// the host does not take it ([`DRAIN`]).
    pub fn drain(&mut self) -> impl Future<Output = ()> + use<> {
        let outputs = std::mem::take(&mut self.drained);
        async move {
            let all = async {
                for output in outputs {
                    // An error means that the pump is gone: all is passed on, or the host hung up.
                    let _ = output.await;
                }
            };
            if tokio::time::timeout(DRAIN, all).await.is_err() {
                log::warn!("output left behind: the host has not taken it for {} ms", DRAIN.as_millis());
            }
        }
    }

    /// Closes the process's stdin once the bytes that have arrived by now are passed on. A shim that half-closes
    /// the stream instead need not care about the order.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Sets the terminal's size in characters.
    ///
    /// # Errors
    /// ENOTTY when the process has no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let terminal = self.terminal.as_ref().ok_or(Errno::ENOTTY)?;
        crate::sys::set_window_size(terminal.as_fd(), columns, rows)
    }
}

async fn connect(host: &Host, id: Option<StreamId>) -> Result<Option<Fd>, StdioError> {
    let Some(id) = id else { return Ok(None) };
    host.dial_stream(id).await.map(Some).map_err(|error| StdioError::Dial(id, error))
}

fn null() -> io::Result<(OwnedFd, Option<Fd>)> {
    Ok((open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?, None))
}

fn input((uid, gid): (Uid, Gid)) -> io::Result<(OwnedFd, Option<Fd>)> {
    let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
    fchown(&theirs, Some(uid), Some(gid))?;
    Ok((theirs, Some(Fd::new(ours)?)))
}

fn output((uid, gid): (Uid, Gid)) -> io::Result<(OwnedFd, Option<Fd>)> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    fchown(&theirs, Some(uid), Some(gid))?;
    Ok((theirs, Some(Fd::new(ours)?)))
}

/// One step of a pump that did not have to wait.
pub enum Step {
    /// Bytes were read; these are what the destination had no room for.
    Moved(Vec<u8>),
    /// Nothing to read now.
    Empty,
    /// Nothing to read ever again.
    End,
}

/// Reads once and writes once.
pub fn step(from: &Fd, to: &Fd) -> io::Result<Step> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(CHUNK, 0);
        let n = match from.try_read(scratch) {
            Ok(Some(0)) => return Ok(Step::End),
            // A terminal whose last user is gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Step::End),
            Ok(Some(n)) => n,
            Ok(None) => return Ok(Step::Empty),
            Err(error) => return Err(error),
        };
        let written = to.try_write(&scratch[..n])?;
        Ok(Step::Moved(scratch[written..n].to_vec()))
    })
}

/// Passes `from` on to the host until its end. An error ends it too: the process then writes to a pipe without a
/// reader, as it would on the host.
async fn pump_out(from: Fd, host: Fd, process: Watch, drained: oneshot::Sender<()>) {
    if let Err(error) = pass_output(&from, &host, process, drained).await {
        log::debug!("output stream ended early: {error}");
        return;
    }
    drop(from);
    if host.finish_writing().is_ok() {
        // Closing now could overtake the last bytes in a VMM that takes a reset as one.
        let _ = tokio::time::timeout(LINGER, host.read(&mut [0])).await;
    }
}

async fn pass_output(
    from: &Fd,
    host: &Fd,
    mut process: Watch,
    drained: oneshot::Sender<()>,
) -> io::Result<()> {
    let mut drained = Some(drained);
    loop {
        // Asked before the pipe is: what a process wrote, it wrote before it ended.
        let over = process.borrow().is_some();
        match step(from, host)? {
            Step::Moved(rest) => {
                host.write_all(&rest).await?;
                // A process that never stops writing must not keep the others from running.
                tokio::task::coop::consume_budget().await;
            }
            Step::End => return Ok(()),
            Step::Empty => {
                if over && let Some(drained) = drained.take() {
                    // Nobody waits any more if the receiver is gone.
                    let _ = drained.send(());
                }
                tokio::select! {
                    ready = from.wait_readable() => ready?,
                    _ = reaper::ended(&mut process), if drained.is_some() => {}
                }
            }
        }
    }
}

/// Passes what the host sends on to `to` until the host's end, the process's, or `close`.
async fn pump_in(host: Fd, to: Fd, process: Watch, close: Arc<Notify>) {
    if let Err(error) = pass_input(&host, &to, process, &close).await
        && error.raw_os_error() != Some(libc::EPIPE)
    {
        log::debug!("input stream ended early: {error}");
    }
}

async fn pass_input(host: &Fd, to: &Fd, mut process: Watch, close: &Notify) -> io::Result<()> {
    let mut closing = false;
    loop {
        match step(host, to)? {
            Step::Moved(rest) => {
                tokio::select! {
                    done = to.write_all(&rest) => done?,
                    _ = reaper::ended(&mut process) => return Ok(()),
                }
                tokio::task::coop::consume_budget().await;
            }
            Step::End => return Ok(()),
            Step::Empty if closing => return Ok(()),
            Step::Empty => tokio::select! {
                ready = host.wait_readable() => ready?,
                () = close.notified() => closing = true,
                _ = reaper::ended(&mut process) => return Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::sync::watch;

    use super::*;
    use crate::reaper::Exit;

    fn exit() -> Exit {
        Exit { status: 0, at: std::time::SystemTime::UNIX_EPOCH }
    }

    fn pair() -> (Fd, Fd) {
        let (a, b) = UnixStream::pair().unwrap();
        (Fd::new(a.into()).unwrap(), Fd::new(b.into()).unwrap())
    }

    async fn read_to_end(fd: &Fd) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buf = [0; 4096];
        loop {
            match fd.read(&mut buf).await.unwrap() {
                0 => return all,
                n => all.extend_from_slice(&buf[..n]),
            }
        }
    }

    fn own_ids() -> (u32, u32) {
        (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw())
    }

    #[tokio::test]
    async fn output_arrives_byte_for_byte_through_a_slow_reader() {
        let (host, far) = pair();
        let (_, process) = watch::channel(None);
        let (uid, gid) = own_ids();
        let wiring = Wiring { stdin: None, stdout: Some(host), stderr: None };
        let (child, pipes) = wiring.pipes(uid, gid).unwrap();
        let _flow = pipes.run(&process);
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let writer = {
            let (sent, stdout) = (sent.clone(), Fd::new(child.stdout).unwrap());
            tokio::spawn(async move { stdout.write_all(&sent).await.unwrap() })
        };
        assert!(read_to_end(&far).await == sent);
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn exit_waits_for_output_but_not_for_the_end_of_a_pipe_others_hold() {
        let (host, far) = pair();
        let (exited, process) = watch::channel(None);
        let (uid, gid) = own_ids();
        let wiring = Wiring { stdin: None, stdout: Some(host), stderr: None };
        let (child, pipes) = wiring.pipes(uid, gid).unwrap();
        let mut flow = pipes.run(&process);
        nix::unistd::write(&child.stdout, b"last words").unwrap();
        exited.send_replace(Some(exit()));
        flow.drain().await;
        let mut buf = [0; 64];
        assert_eq!(far.try_read(&mut buf).unwrap(), Some(10), "drained means on its way");
        drop(child);
    }

    #[tokio::test]
    async fn input_ends_with_the_hosts_half_close() {
        let (host, far) = pair();
        let (_, process) = watch::channel(None);
        let (uid, gid) = own_ids();
        let wiring = Wiring { stdin: Some(host), stdout: None, stderr: None };
        let (child, pipes) = wiring.pipes(uid, gid).unwrap();
        let _flow = pipes.run(&process);
        far.write_all(b"question").await.unwrap();
        far.finish_writing().unwrap();
        let stdin = Fd::new(child.stdin).unwrap();
        assert_eq!(read_to_end(&stdin).await, b"question");
    }

    #[tokio::test]
    async fn close_stdin_passes_on_what_has_arrived() {
        let (host, far) = pair();
        let (_, process) = watch::channel(None);
        let (uid, gid) = own_ids();
        let wiring = Wiring { stdin: Some(host), stdout: None, stderr: None };
        let (child, pipes) = wiring.pipes(uid, gid).unwrap();
        let flow = pipes.run(&process);
        far.write_all(b"question").await.unwrap();
        flow.close_stdin();
        let stdin = Fd::new(child.stdin).unwrap();
        assert_eq!(read_to_end(&stdin).await, b"question");
    }

    #[tokio::test]
    async fn process_that_does_not_read_does_not_keep_its_stdin_pump() {
        let (host, far) = pair();
        let (exited, process) = watch::channel(None);
        let (uid, gid) = own_ids();
        let wiring = Wiring { stdin: Some(host), stdout: None, stderr: None };
        let (_child, pipes) = wiring.pipes(uid, gid).unwrap();
        let _flow = pipes.run(&process);
        exited.send_replace(Some(exit()));
        assert!(read_to_end(&far).await.is_empty());
    }
}
