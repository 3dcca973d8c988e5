//! A handle on one VMM process: starts it, sends requests, tells its events and its end apart.
//!
//! ```text
//! Vmm::call ──┐                         ┌─> the call it answers
//!             ├─ SOCK_SEQPACKET (fd 3) ─┤
//! reader task ┘        ctvm-vmm         └─> Events (connections of the guest)
//! ```
//!
//! The socket is the lease on the VM: when this process ends, however it ends, the VMM powers off. Nothing else here
//! knows what a VM is made of; see `sandbox::boot`.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch as state;
use tokio::sync::{mpsc, oneshot};
use vmm_api::frame::{self, FrameError};
use vmm_api::{ApiError, CONTROL_FD, Event, ExitReason, Message, Op, Outcome, Reply, Request};

use crate::sandbox::complaints::Complaints;
use crate::watched::watch;

/// Why the VMM did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Its binary is nowhere.
    #[error("no VMM binary: {0} does not exist, and PATH has no ctvm-vmm")]
    NotFound(PathBuf),
    /// It cannot be run.
    #[error("starting {path}")]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Descriptor 3, where the VMM looks for its socket, belongs to someone else in this process.
    #[error("file descriptor {CONTROL_FD} is taken by the parent process (a job server, perhaps): close it")]
    SlotTaken,
    /// A descriptor could not be set up.
    #[error("setting up the control socket")]
    Socket(#[source] std::io::Error),
    /// It refused or failed.
    #[error("the VMM refused {op}")]
    Refused {
        /// Name of the operation.
        op: &'static str,
        /// What it said.
        #[source]
        source: ApiError,
    },
    /// It ended.
    #[error("the VMM is gone: {0}")]
    Gone(String),
    /// It did not answer.
    #[error("the VMM did not answer {op} within {after:?}")]
    Deadline {
        /// Name of the operation.
        op: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// It sent a packet that cannot be sent or read.
    #[error("packet to or from the VMM")]
    Packet(#[source] FrameError),
    /// It answered something else than what was asked.
    #[error("the VMM answered {op} with something else")]
    Answer {
        /// Name of the operation.
        op: &'static str,
    },
}

/// How a VMM process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmExit {
    /// What its last packet said; none from one that crashed or was killed.
    pub reason: Option<ExitReason>,
    /// What the kernel said.
    pub status: Option<ExitStatus>,
}

impl VmmExit {
    /// Whether it was killed by SIGKILL: by an operator, or by the host when memory ran out.
    pub fn was_killed(&self) -> bool {
        self.reason.is_none() && self.status.is_some_and(|s| s.signal() == Some(Signal::KILL.as_raw()))
    }
}

impl std::fmt::Display for VmmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.reason, &self.status) {
            (Some(reason), _) => write!(f, "{reason}"),
            (None, Some(status)) => write!(f, "ended without a word ({status})"),
            (None, None) => f.write_str("ended without a word"),
        }
    }
}

/// File descriptor 3 of this process, held free for the control socket of the next VMM.
///
/// A child gets exactly the descriptors that are not close-on-exec, under the numbers they have here; so the
/// socket must have number 3 at the moment of the spawn. Reserve it first thing in `main`.
#[derive(Debug)]
pub struct ControlSlot(OwnedFd);

impl ControlSlot {
    /// Reserves it.
    ///
    /// # Errors
    /// [`VmmError::SlotTaken`] when the process was started with that descriptor open.
    pub fn reserve() -> Result<Self, VmmError> {
        // The kernel gives the lowest free number: open until it is ours or passed.
        let mut below = Vec::new();
        loop {
            let fd = dev_null().map_err(|e| VmmError::Socket(e.into()))?;
            match fd.as_raw_fd() {
                CONTROL_FD => return Ok(ControlSlot(fd)),
                n if n < CONTROL_FD => below.push(fd),
                _ => return Err(VmmError::SlotTaken),
            }
        }
    }

    /// Runs `spawn` with `socket` as descriptor 3 of the child.
    fn with<T>(&mut self, socket: &OwnedFd, spawn: impl FnOnce() -> T) -> rustix::io::Result<T> {
        rustix::io::dup2(socket, &mut self.0)?;
        rustix::io::fcntl_setfd(&self.0, FdFlags::empty())?;
        let result = spawn();
        // A second holder of that end would keep the VMM's end of file from us: put the placeholder back.
        rustix::io::dup2(dev_null()?, &mut self.0)?;
        rustix::io::fcntl_setfd(&self.0, FdFlags::CLOEXEC)?;
        Ok(result)
    }
}

fn dev_null() -> rustix::io::Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Finds the VMM: where the configuration says, else beside this binary, else in `PATH`.
///
/// # Errors
/// [`VmmError::NotFound`].
pub fn find_binary(configured: Option<&Path>) -> Result<PathBuf, VmmError> {
    const NAME: &str = "ctvm-vmm";
    if let Some(path) = configured {
        return if path.exists() { Ok(path.to_owned()) } else { Err(VmmError::NotFound(path.to_owned())) };
    }
    let beside = std::env::current_exe().unwrap_or_default().with_file_name(NAME);
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(std::env::split_paths(&in_path).map(|dir| dir.join(NAME)))
        .find(|path| path.is_file())
        .ok_or(VmmError::NotFound(beside))
}

/// Starts a VMM that logs to `log`, and returns its process and our end of its control socket.
///
/// # Errors
/// [`VmmError::Spawn`] and [`VmmError::Socket`].
pub fn spawn(binary: &Path, slot: &mut ControlSlot, log: Stdio) -> Result<(Child, OwnedFd), VmmError> {
    let (ours, theirs) = frame::pair().map_err(VmmError::Socket)?;
    let mut command = Command::new(binary);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
    let child = slot
        .with(&theirs, || command.spawn())
        .map_err(|e| VmmError::Socket(e.into()))?
        .map_err(|source| VmmError::Spawn { path: binary.to_owned(), source })?;
    Ok((child, ours))
}

type Answer = (Outcome, Vec<OwnedFd>);

/// Calls under way, by request id; `None` when the VMM is gone and no answer will come.
#[derive(Debug)]
struct Calls {
    next_id: u64,
    open: Option<HashMap<u64, oneshot::Sender<Answer>>>,
}

/// A running VMM.
#[derive(Debug)]
pub struct Vmm {
    socket: Arc<AsyncFd<OwnedFd>>,
    calls: Arc<Mutex<Calls>>,
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: state::Receiver<Option<VmmExit>>,
}

/// Events of a VMM with their descriptors. Its end is in [`Vmm::exited`].
pub type Events = mpsc::Receiver<(Event, Vec<OwnedFd>)>;

/// Events that wait for us. The guest causes them by dialling, and each holds a descriptor.
const EVENT_BACKLOG: usize = 64;

impl Vmm {
    /// Takes a VMM that [`spawn`] started into the event loop.
    ///
    /// # Errors
    /// [`VmmError::Socket`].
    pub fn adopt(child: Child, socket: OwnedFd) -> Result<(Self, Events), VmmError> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| VmmError::Socket(e.into()))?;
        let pid = child.id();
        let raw = i32::try_from(pid).expect("a process number is a positive int");
        let pidfd = Pid::from_raw(raw).expect("a child's process number is not zero");
        let pidfd = pidfd_open(pidfd, PidfdFlags::NONBLOCK).map_err(|e| VmmError::Socket(e.into()))?;
        let pidfd = Arc::new(watch(pidfd).map_err(VmmError::Socket)?);
        let socket = Arc::new(watch(socket).map_err(VmmError::Socket)?);
        let calls = Arc::new(Mutex::new(Calls { next_id: 1, open: Some(HashMap::new()) }));
        let (event_tx, events) = mpsc::channel(EVENT_BACKLOG);
        let (exit_tx, exit) = state::channel(None);
        tokio::spawn(read(socket.clone(), calls.clone(), event_tx, child, pidfd.clone(), exit_tx));
        Ok((Vmm { socket, calls, pid, pidfd, exit }, events))
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends `op` with its descriptors and waits up to `timeout` for the answer.
    ///
    /// # Errors
    /// [`VmmError::Refused`], [`VmmError::Gone`], [`VmmError::Deadline`], [`VmmError::Packet`].
    pub async fn call(
        &self,
        op: Op,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), VmmError> {
        let name = name_of(&op);
        let (answer_tx, answer) = oneshot::channel();
        let Some(id) = self.open(answer_tx) else { return Err(self.gone().await) };
        let bytes = serde_json::to_vec(&Request { id, op }).expect("our own types serialise");
        let exchange = async {
            self.send(&bytes, fds).await?;
            answer.await.map_err(|_| FrameError::Closed)
        };
        let answered = tokio::time::timeout(timeout, exchange).await;
        if !matches!(answered, Ok(Ok(_))) {
            self.forget(id);
        }
        match answered {
            Ok(Ok((Outcome::Ok(reply), fds))) => Ok((reply, fds)),
            Ok(Ok((Outcome::Err(source), _))) => Err(VmmError::Refused { op: name, source }),
            Ok(Err(FrameError::Closed)) => Err(self.gone().await),
            Ok(Err(e)) => Err(VmmError::Packet(e)),
            Err(_) => Err(VmmError::Deadline { op: name, after: timeout }),
        }
    }

    /// Notes a call; its id, or none when the VMM is gone.
    fn open(&self, answer: oneshot::Sender<Answer>) -> Option<u64> {
        let mut calls = self.calls.lock().expect("no code panics while it holds this lock");
        let id = calls.next_id;
        calls.next_id += 1;
        calls.open.as_mut()?.insert(id, answer);
        Some(id)
    }

    /// Gives a call up.
    fn forget(&self, id: u64) {
        let mut calls = self.calls.lock().expect("no code panics while it holds this lock");
        if let Some(open) = &mut calls.open {
            open.remove(&id);
        }
    }

    async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
        loop {
            let mut ready = self.socket.writable().await.map_err(FrameError::Socket)?;
            match frame::send(self.socket.as_fd(), bytes, fds) {
                Err(e) if e.would_block() => ready.clear_ready(),
                sent => return sent,
            }
        }
    }

    /// Waits for the process to end, and says how.
    pub async fn exited(&self) -> VmmExit {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await;
        let ended = ended.ok().and_then(|e| e.clone());
        ended.unwrap_or(VmmExit { reason: None, status: None })
    }

    /// How the process ended, if it has.
    pub fn exit(&self) -> Option<VmmExit> {
        self.exit.borrow().clone()
    }

    async fn gone(&self) -> VmmError {
        // The socket closes a moment before the process is reaped; the reason is worth that moment.
        match tokio::time::timeout(Duration::from_secs(1), self.exited()).await {
            Ok(exit) => VmmError::Gone(exit.to_string()),
            Err(_) => VmmError::Gone("it closed its control socket".into()),
        }
    }

    /// Asks the VMM to power off; kills it when it has not ended within `grace`.
    pub async fn stop(&self, grace: Duration) -> VmmExit {
        // A VMM that is gone or hangs is dealt with below.
        let _ = self.call(Op::Shutdown, &[], grace).await;
        if let Ok(exit) = tokio::time::timeout(grace, self.exited()).await {
            return exit;
        }
        log::warn!("the VMM (process {}) did not end within {grace:?}: killing it", self.pid);
        self.kill();
        self.exited().await
    }

    /// Kills the VMM.
    pub fn kill(&self) {
        // Fails when it has ended.
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }
}

/// The reader task: answers to their calls, events to `events`, and at the end the exit.
async fn read(
    socket: Arc<AsyncFd<OwnedFd>>,
    calls: Arc<Mutex<Calls>>,
    events: mpsc::Sender<(Event, Vec<OwnedFd>)>,
    mut child: Child,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    exit: state::Sender<Option<VmmExit>>,
) {
    let mut reason = None;
    let mut complaints = Complaints::about("a connection of the guest was closed");
    loop {
        let packet = match receive(&socket).await {
            Ok(packet) => packet,
            Err(FrameError::Closed) => break,
            Err(e @ FrameError::Socket(_)) => {
                log::error!("reading from the VMM: {e}");
                break;
            }
            Err(e) => {
                log::error!("the VMM sent a {e}: dropped");
                continue;
            }
        };
        match serde_json::from_slice(&packet.bytes) {
            Ok(Message::Reply { id, outcome }) => {
                let mut calls = calls.lock().expect("no code panics while it holds this lock");
                if let Some(waiting) = calls.open.as_mut().and_then(|open| open.remove(&id)) {
                    // A caller that gave up has no use for it.
                    let _ = waiting.send((outcome, packet.fds));
                } else if let Outcome::Err(error) = outcome {
                    log::warn!("the VMM refused a request that nobody waits for: {error}");
                }
            }
            Ok(Message::Event(Event::Exiting { reason: why })) => reason = Some(why),
            Ok(Message::Event(event)) => {
                if events.try_send((event, packet.fds)).is_err() {
                    complaints.note(format_args!("{EVENT_BACKLOG} wait already"));
                }
            }
            Err(e) => log::error!("the VMM sent a message that cannot be read: {e}"),
        }
    }
    // Whoever waits for an answer learns now that none comes.
    calls.lock().expect("no code panics while it holds this lock").open = None;
    drop(events);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) => {
                let Ok(mut ready) = pidfd.readable().await else { break None };
                ready.clear_ready();
            }
            Err(e) => {
                log::error!("waiting for the VMM: {e}");
                break None;
            }
        }
    };
    exit.send_replace(Some(VmmExit { reason, status }));
}

async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<frame::Packet, FrameError> {
    loop {
        let mut ready = socket.readable().await.map_err(FrameError::Socket)?;
        match frame::recv(socket.as_fd()) {
            Err(e) if e.would_block() => ready.clear_ready(),
            received => return received,
        }
    }
}

/// The operation's name on the wire.
fn name_of(op: &Op) -> &'static str {
    match op {
        Op::Configure(_) => "configure",
        Op::Boot => "boot",
        Op::Pause => "pause",
        Op::Resume => "resume",
        Op::Attach { .. } => "attach",
        Op::Detach { .. } => "detach",
        Op::ImageChannel { .. } => "image_channel",
        Op::Balloon { .. } => "balloon",
        Op::FsMount { .. } => "fs_mount",
        Op::FsUnmount { .. } => "fs_unmount",
        Op::VsockConnect { .. } => "vsock_connect",
        Op::Resize { .. } => "resize",
        Op::Stats => "stats",
        Op::Shutdown => "shutdown",
    }
}
