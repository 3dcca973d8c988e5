//! The host's end of the channel: one connection, one request at a time.
//!
//! ```text
//!          dialled                HELLO, WELCOME
//! Closed ───────────> Greeting ────────────────────> Open
//!    <─────────────────────┴────── lost ───────────────┘
//! ```
//!
//! The guest's kernel dials before there is any user space. Whoever dials later has to be the kernel that was here before:
//! it knows the epoch, a random number that only WELCOME tells. It has to come from a privileged port, too, and while the
//! channel is open nobody else is let in.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::abi::{MAX_LEN, PRIVILEGED, REPLY, kind};
use super::frame::{self, Ask, Frame, Hello, Violation};
use virtio::rate::GUEST_ERRORS;

/// How long a guest that dialled may take to say hello.
const GREETING: Duration = Duration::from_secs(5);

/// What the channel counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Times the channel was opened.
    pub opened: u64,
    /// Dials that were turned away.
    pub turned_away: u64,
    /// Times it was lost.
    pub lost: u64,
    /// Requests sent.
    pub requests: u64,
    /// Replies to nothing that is asked: late ones, repeated ones.
    pub stray_replies: u64,
    /// Times it was closed because the guest broke the protocol.
    pub violations: u64,
}

/// What happened.
#[derive(Debug, PartialEq, Eq)]
pub enum Happened {
    /// The guest has opened the channel.
    Opened(Hello),
    /// It answered the request `seq`.
    Replied {
        /// As [`Channel::send`] gave it.
        seq: u64,
        /// The request's type.
        kind: u16,
        /// 0, or a Linux errno.
        status: u32,
        /// What it says.
        body: Vec<u8>,
    },
    /// The channel is closed; what was asked has no answer.
    Lost(String),
}

#[derive(Debug)]
enum State {
    Closed,
    Greeting { wire: Wire, until: Instant },
    Open { wire: Wire, hello: Hello, asked: Option<(u64, u16)> },
}

#[derive(Debug)]
struct Wire {
    socket: UnixStream,
    bytes: Vec<u8>,
}

/// The channel.
#[derive(Debug)]
pub struct Channel {
    state: State,
    /// 0 until the first WELCOME.
    epoch: u64,
    seq: u64,
    counters: Counters,
    new_epoch: fn() -> u64,
}

impl Channel {
    /// A channel that nobody has dialled.
    pub fn new() -> Self {
        Self::with_epochs(random_epoch)
    }

    /// The same with epochs of one's own, none of them 0.
    pub fn with_epochs(new_epoch: fn() -> u64) -> Self {
        Channel { state: State::Closed, epoch: 0, seq: 0, counters: Counters::default(), new_epoch }
    }

    /// Takes a connection that the guest has made from its port `guest_port`; `socket` does not block. Gives the
    /// descriptor to wait on with [`Channel::on_ready`], if it is let in.
    pub fn accept(&mut self, socket: OwnedFd, guest_port: u32, now: Instant) -> Option<RawFd> {
        let mut socket = UnixStream::from(socket);
        let errno = match &self.state {
            _ if guest_port >= PRIVILEGED => libc::EACCES,
            State::Open { .. } => libc::EBUSY,
            // One that dials and then says nothing keeps nobody out.
            State::Closed | State::Greeting { .. } => {
                let fd = socket.as_raw_fd();
                let wire = Wire { socket, bytes: Vec::new() };
                self.state = State::Greeting { wire, until: now + GREETING };
                return Some(fd);
            }
        };
        self.counters.turned_away += 1;
        GUEST_ERRORS.warn(format_args!("upcall: the guest dialled from port {guest_port}: turned away"));
        // Best effort: it may have hung up.
        let _ = socket.write(&frame::refused(errno));
        None
    }

    /// Whether requests can be sent, and what the guest said of itself.
    pub fn hello(&self) -> Option<&Hello> {
        match &self.state {
            State::Open { hello, .. } => Some(hello),
            _ => None,
        }
    }

    /// Sends a request, which the guest shall answer within `within`. `None` if the channel is not open. An earlier request
    /// is forgotten: its answer is a stray.
    pub fn send(&mut self, ask: &Ask, within: Duration) -> Option<u64> {
        let State::Open { wire, asked, .. } = &mut self.state else { return None };
        self.seq += 1;
        let bytes = ask.encode(self.epoch, self.seq, within);
        // The socket holds far more than one request; a guest that reads none is one that does not answer.
        if wire.socket.write(&bytes).ok() != Some(bytes.len()) {
            self.close();
            return None;
        }
        *asked = Some((self.seq, ask.kind()));
        self.counters.requests += 1;
        Some(self.seq)
    }

    /// Takes what the guest has sent.
    pub fn on_ready(&mut self) -> Vec<Happened> {
        let mut happened = Vec::new();
        let ended = match &mut self.state {
            State::Closed => return happened,
            State::Greeting { wire, .. } | State::Open { wire, .. } => wire.fill(),
        };
        // What was read is bounded, and so are the frames in it.
        loop {
            let taken = match &mut self.state {
                State::Closed => break,
                State::Greeting { wire, .. } | State::Open { wire, .. } => frame::take(&mut wire.bytes),
            };
            let step = match taken {
                Ok(None) => break,
                Ok(Some(frame)) => self.step(frame),
                Err(violation) => Err(violation),
            };
            match step {
                Ok(event) => happened.extend(event),
                Err(violation) => {
                    self.counters.violations += 1;
                    GUEST_ERRORS.warn(format_args!("upcall: closed: {violation}"));
                    happened.extend(self.lose(format!("the guest broke the protocol: {violation}")));
                }
            }
        }
        if ended {
            happened.extend(self.lose("the guest hung up".to_owned()));
        }
        happened
    }

    fn step(&mut self, frame: Frame) -> Result<Option<Happened>, Violation> {
        match &mut self.state {
            State::Closed => Ok(None),
            State::Greeting { .. } => self.greet(&frame),
            State::Open { asked, .. } => {
                if frame.epoch != self.epoch {
                    return Err(Violation::Epoch);
                }
                let due = asked.filter(|(seq, _)| *seq == frame.seq);
                match due {
                    Some((seq, kind)) if frame.kind == kind | REPLY => {
                        *asked = None;
                        let Frame { status, body, .. } = frame;
                        Ok(Some(Happened::Replied { seq, kind, status, body }))
                    }
                    Some(_) => Err(Violation::Kind { got: frame.kind, wanted: "the reply to the request" }),
                    None if frame.kind & REPLY != 0 && frame.seq <= self.seq => {
                        self.counters.stray_replies += 1;
                        Ok(None)
                    }
                    None => Err(Violation::Kind { got: frame.kind, wanted: "nothing" }),
                }
            }
        }
    }

    fn greet(&mut self, frame: &Frame) -> Result<Option<Happened>, Violation> {
        if frame.kind != kind::HELLO {
            return Err(Violation::Kind { got: frame.kind, wanted: "hello" });
        }
        let hello = frame::hello(&frame.body)?;
        let State::Greeting { mut wire, .. } = std::mem::replace(&mut self.state, State::Closed) else {
            unreachable!("the caller looked")
        };
        if frame.epoch != self.epoch {
            self.counters.turned_away += 1;
            GUEST_ERRORS.warn(format_args!("upcall: a hello with another epoch: turned away"));
            let _ = wire.socket.write(&frame::refused(libc::ESTALE));
            return Ok(None);
        }
        if self.epoch == 0 {
            self.epoch = (self.new_epoch)();
        }
        let welcome = frame::welcome(self.epoch);
        if wire.socket.write(&welcome).ok() != Some(welcome.len()) {
            return Ok(None);
        }
        self.counters.opened += 1;
        self.state = State::Open { wire, hello: hello.clone(), asked: None };
        Ok(Some(Happened::Opened(hello)))
    }

    /// Closes the channel; the guest may dial again.
    pub fn close(&mut self) {
        if let State::Open { .. } = self.state {
            self.counters.lost += 1;
        }
        self.state = State::Closed;
    }

    fn lose(&mut self, why: String) -> Option<Happened> {
        let was_open = matches!(self.state, State::Open { .. });
        self.close();
        was_open.then_some(Happened::Lost(why))
    }

    /// How long until [`Channel::expire`] has something to do.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        match &self.state {
            State::Greeting { until, .. } => Some(until.saturating_duration_since(now)),
            _ => None,
        }
    }

    /// Hangs up on a guest that dialled and has not said hello in time.
    pub fn expire(&mut self, now: Instant) {
        if self.next_timeout(now) == Some(Duration::ZERO) {
            self.counters.turned_away += 1;
            self.state = State::Closed;
        }
    }

    /// Counters, for stats.
    pub fn counters(&self) -> Counters {
        self.counters
    }
}

impl Default for Channel {
    fn default() -> Self {
        Self::new()
    }
}

impl Wire {
    /// Reads what there is, a bounded amount of it. True if nothing more will come.
    fn fill(&mut self) -> bool {
        let mut piece = [0; 2048];
        while self.bytes.len() < 2 * MAX_LEN {
            match self.socket.read(&mut piece) {
                Ok(0) => return true,
                Ok(n) => self.bytes.extend(&piece[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return true,
            }
        }
        false
    }
}

/// Not to be guessed by anyone in the guest.
fn random_epoch() -> u64 {
    let mut bytes = [0; 8];
    loop {
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        let epoch = u64::from_ne_bytes(bytes);
        if got.is_ok() && epoch != 0 {
            return epoch;
        }
    }
}
