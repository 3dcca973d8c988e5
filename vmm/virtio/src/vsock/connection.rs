//! One connection: what each side has said, and what it is still owed. It knows nothing of queues.
//!
//! ```text
//!  dialled ─> Dialling ── RESPONSE ──┐
//!                 │                  v   both directions over,       RST, or SHUTDOWN of both
//!  REQUEST ───────┼─────────────> Open ── guest told of it ─> Closing ──────────────> gone
//!                 │                  │
//!                 │ RST, cancelled   │ RST, or SHUTDOWN of both        host took the rest,
//!                 v                  v    (answered with RST)          or went away
//!                gone             Draining ──────────────────────────> gone
//! ```
//!
//! Each direction ends by itself (virtio 1.2, 5.10.6.5):
//!
//! | who | does | the other sees |
//! | --- | --- | --- |
//! | guest | `SHUTDOWN(send)` | host reads end of file, once it has read what was sent before |
//! | guest | `SHUTDOWN(receive)` | host's writes fail with `EPIPE`; what it wrote before and was not delivered is lost |
//! | guest | `SHUTDOWN(both)`, close | both of the above; RST tells the guest that its ports are free, and the host may take its time to read (`Draining`) |
//! | host | `shutdown(SHUT_WR)` | guest gets `SHUTDOWN(send)` after the last byte |
//! | host | `shutdown(SHUT_RD)` | guest gets `SHUTDOWN(receive)` when it next sends; what it sends is thrown away |
//! | host | close | `SHUTDOWN(receive)` at once, `SHUTDOWN(both)` after the last byte; the guest answers RST |
//!
//! When both directions have ended in whatever way, the guest is told `SHUTDOWN(both)`, so that it lets go too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::backlog::Backlog;
use super::credit::{Credit, Overrun, Window};
use super::metrics::Metrics;
use super::packet::{Header, Key, NO_RECEIVE, NO_SEND, Op, Packet};
use super::socket::{self, Poll};
use super::table::Token;
use crate::queue::{Reader, Writer};

const BOTH: u32 = NO_RECEIVE | NO_SEND;
/// Most buffers that one read fills. Linux's are a bit less than 4 KiB.
const MAX_APPETITE: usize = 32;

/// Where a connection stands.
#[derive(Debug)]
pub enum Phase {
    /// The host dialled, the guest has not answered.
    Dialling {
        /// Who asked for it.
        request: u64,
        /// The end to hand out when the guest answers.
        far: OwnedFd,
    },
    /// Bytes flow.
    Open,
    /// All is over and the guest was told; it has yet to say RST. No socket any more.
    Closing,
    /// The guest is gone; the host has yet to take what the guest sent. Not to be found by its key any more.
    Draining,
}

/// Bytes on their way to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToHost {
    /// The guest may send.
    Open,
    /// The guest has sent all, some of it waits in the backlog.
    Ending,
    /// The host has, or can read, all there will ever be.
    Ended,
    /// The host reads no more.
    Refused,
}

/// What the guest is to be sent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A packet without payload, and its flags.
    Control(Op, u32),
    /// Bytes of the host, if it has some, at most this many.
    Data(u32),
}

/// What a packet of the guest led to.
#[derive(Debug)]
pub enum Step {
    /// The connection goes on.
    Live,
    /// The guest accepted.
    Opened {
        /// Who asked for it.
        request: u64,
        /// Its end of the connection.
        far: OwnedFd,
    },
    /// The guest reset the connection.
    Reset,
    /// The guest has said its last word on a connection that was over.
    Over,
    /// The guest is done with it and waits for our RST.
    Closed,
    /// The guest has forgotten the connection and asks for a new one.
    Replaced,
}

/// The guest broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A packet's payload is not all there.
    #[error("payload of {len} bytes in a packet with {left} bytes behind its header")]
    Truncated {
        /// As the header says.
        len: u32,
        /// As the chain has it.
        left: usize,
    },
    /// The guest cannot know of the connection yet, or may not use it yet.
    #[error("{op:?} before the connection is open")]
    TooEarly {
        /// What came.
        op: Op,
    },
    /// The connection is open already.
    #[error("{op:?} on an open connection")]
    TooLate {
        /// What came.
        op: Op,
    },
    /// The guest said it would send no more.
    #[error("{len} bytes after SHUTDOWN(send)")]
    AfterEnd {
        /// Bytes sent.
        len: u32,
    },
    /// More than the guest had credit for.
    #[error(transparent)]
    Overrun(#[from] Overrun),
}

/// What reading from the host gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing any more.
    End,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Its name.
    pub key: Key,
    phase: Phase,
    /// Our end of the pair. None only in `Closing`.
    socket: Option<OwnedFd>,
    /// REQUEST or RESPONSE, until it is sent.
    opening: Option<Op>,

    to_host: ToHost,
    window: Window,
    backlog: Backlog,
    watching_room: bool,
    /// What the guest said in SHUTDOWN.
    heard: u32,

    /// The host sends no more, or the guest takes no more.
    to_guest_ended: bool,
    credit: Credit,
    /// The host's socket was ready for reading and has not said "would block" since.
    readable: bool,
    /// What the guest was told in SHUTDOWN.
    told: u32,
    /// The guest asked for our credit.
    update_asked: bool,
    /// We asked for the guest's credit and have got none since.
    credit_asked: bool,
    /// How many of the guest's buffers to offer to the next read.
    appetite: usize,
}

impl Connection {
    /// A connection that the guest has asked for.
    pub fn accepted(packet: &Packet, socket: OwnedFd, window: u32) -> Self {
        let mut connection = Connection::new(packet.key, Phase::Open, Op::Response, socket, window);
        connection.credit.learn(packet.buf_alloc, packet.fwd_cnt);
        connection
    }

    /// A connection that the host asks for.
    pub fn dialled(key: Key, request: u64, socket: OwnedFd, far: OwnedFd, window: u32) -> Self {
        Connection::new(key, Phase::Dialling { request, far }, Op::Request, socket, window)
    }

    fn new(key: Key, phase: Phase, opening: Op, socket: OwnedFd, window: u32) -> Self {
        Connection {
            key,
            phase,
            socket: Some(socket),
            opening: Some(opening),
            to_host: ToHost::Open,
            window: Window::new(window),
            backlog: Backlog::default(),
            watching_room: false,
            heard: 0,
            to_guest_ended: false,
            credit: Credit::default(),
            readable: false,
            told: 0,
            update_asked: false,
            credit_asked: false,
            appetite: 1,
        }
    }

    /// Where it stands.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The dial that it is, as long as the guest has not answered.
    pub fn request(&self) -> Option<u64> {
        match self.phase {
            Phase::Dialling { request, .. } => Some(request),
            _ => None,
        }
    }

    /// Our end of the pair.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Size of the window that was promised to the guest.
    pub fn window_size(&self) -> u32 {
        self.window.size()
    }

    /// Takes a packet. An error means that the connection must be reset.
    pub fn receive(
        &mut self,
        packet: &Packet,
        payload: &mut Reader<'_>,
        metrics: &mut Metrics,
    ) -> Result<Step, Violation> {
        if matches!(self.phase, Phase::Closing) {
            return Ok(match packet.op {
                Op::Reset => Step::Over,
                Op::Request => Step::Replaced,
                Op::Shutdown if packet.flags & BOTH == BOTH => Step::Closed,
                // The guest sent it before it knew.
                _ => Step::Live,
            });
        }
        if packet.op == Op::Reset {
            return Ok(Step::Reset);
        }
        if self.opening.is_some() {
            return Err(Violation::TooEarly { op: packet.op });
        }
        self.learn_credit(packet);
        match std::mem::replace(&mut self.phase, Phase::Open) {
            Phase::Dialling { request, far } if packet.op == Op::Response => {
                Ok(Step::Opened { request, far })
            }
            phase @ Phase::Dialling { .. } => {
                self.phase = phase;
                Err(Violation::TooEarly { op: packet.op })
            }
            phase => {
                self.phase = phase;
                self.receive_open(packet, payload, metrics)
            }
        }
    }

    fn learn_credit(&mut self, packet: &Packet) {
        self.credit.learn(packet.buf_alloc, packet.fwd_cnt);
        if self.credit.left() > 0 {
            self.credit_asked = false;
        }
    }

    fn receive_open(
        &mut self,
        packet: &Packet,
        payload: &mut Reader<'_>,
        metrics: &mut Metrics,
    ) -> Result<Step, Violation> {
        match packet.op {
            Op::Request | Op::Response => return Err(Violation::TooLate { op: packet.op }),
            Op::Data => self.deliver(packet.len, payload, metrics)?,
            Op::CreditRequest => self.update_asked = true,
            Op::CreditUpdate | Op::Reset => {}
            Op::Shutdown => {
                self.heard |= packet.flags & BOTH;
                if self.heard == BOTH {
                    return Ok(Step::Closed);
                }
                if self.heard & NO_RECEIVE != 0 {
                    self.end_to_guest();
                }
                if self.heard & NO_SEND != 0 && self.to_host == ToHost::Open {
                    self.to_host = ToHost::Ending;
                    self.end_to_host_if_drained();
                }
            }
        }
        Ok(Step::Live)
    }

    fn deliver(
        &mut self,
        len: u32,
        payload: &mut Reader<'_>,
        metrics: &mut Metrics,
    ) -> Result<(), Violation> {
        if self.heard & NO_SEND != 0 {
            return Err(Violation::AfterEnd { len });
        }
        if payload.left() < len as usize {
            return Err(Violation::Truncated { len, left: payload.left() });
        }
        self.window.receive(len)?;
        let mut rest = len;
        if self.to_host == ToHost::Open && self.backlog.is_empty() && len > 0 {
            let sent = self.socket().map(|s| socket::send_payload(s, payload, len as usize));
            rest -= self.account(sent, metrics);
        }
        if self.to_host == ToHost::Refused {
            self.window.forward(rest);
            metrics.bytes_discarded += u64::from(rest);
        } else if rest > 0 {
            if self.backlog.is_empty() {
                metrics.host_stalls += 1;
            }
            self.backlog
                .append(payload, rest as usize, self.window.size() as usize)
                .expect("the payload's length was checked above");
        }
        Ok(())
    }

    /// Takes account of what a send said; answers how many bytes went.
    fn account(&mut self, sent: Option<io::Result<usize>>, metrics: &mut Metrics) -> u32 {
        match sent {
            Some(Ok(count)) => {
                let count = u32::try_from(count).expect("no more is sent than the window holds");
                self.window.forward(count);
                metrics.bytes_to_host += u64::from(count);
                return count;
            }
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
            // Gone, or its reading side shut. Anything else, such as no memory, cannot be waited for.
            Some(Err(_)) | None => self.refuse(metrics),
        }
        0
    }

    /// The host takes no more.
    fn refuse(&mut self, metrics: &mut Metrics) {
        self.to_host = ToHost::Refused;
        let lost = u32::try_from(self.backlog.len()).expect("the window bounds the backlog");
        self.backlog.consume(self.backlog.len());
        self.window.forward(lost);
        metrics.bytes_discarded += u64::from(lost);
    }

    fn end_to_host_if_drained(&mut self) {
        if self.to_host == ToHost::Ending && self.backlog.is_empty() {
            self.to_host = ToHost::Ended;
            if let Some(socket) = self.socket() {
                socket::end_writing(socket);
            }
        }
    }

    fn end_to_guest(&mut self) {
        if let Some(socket) = self.socket() {
            socket::end_reading(socket);
        }
        self.to_guest_ended = true;
    }

    /// The socket has something to read.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// The host's end was closed.
    pub fn hung_up(&mut self, metrics: &mut Metrics) {
        if self.to_host != ToHost::Ended {
            self.refuse(metrics);
        }
    }

    /// Sends what waits for the host, as far as there is room.
    pub fn flush(&mut self, metrics: &mut Metrics) {
        if !self.backlog.is_empty() {
            let sent = self.socket().map(|s| socket::send_bytes(s, self.backlog.bytes()));
            let count = self.account(sent, metrics);
            self.backlog.consume(count as usize);
        }
        self.end_to_host_if_drained();
    }

    /// Watches for room just as long as something waits for it.
    pub fn watch_room_if_needed(&mut self, poll: &Poll, token: Token) {
        let needed = !self.backlog.is_empty();
        if let Some(socket) = self.socket.as_ref().filter(|_| needed != self.watching_room) {
            // Changing what is watched of a watched socket takes no memory, so it cannot fail.
            let changed = poll.watch_room(socket.as_fd(), token, needed);
            debug_assert!(changed.is_ok(), "{changed:?}");
            self.watching_room = needed;
        }
    }

    /// The guest is gone. Tells whether the connection must stay until the host has taken what the guest sent.
    pub fn drain(&mut self) -> bool {
        self.end_to_guest();
        self.phase = Phase::Draining;
        !self.is_drained()
    }

    /// Whether the guest is gone and the host has taken all that it will take.
    pub fn is_drained(&self) -> bool {
        matches!(self.phase, Phase::Draining) && self.backlog.is_empty()
    }

    /// Whether the guest has been sent any packet about it.
    pub fn is_known_to_guest(&self) -> bool {
        self.opening.is_none()
    }

    /// What the guest is to be sent next, if it can be sent now.
    pub fn next(&self) -> Option<Next> {
        match self.phase {
            Phase::Closing | Phase::Draining => return None,
            Phase::Dialling { .. } | Phase::Open => {}
        }
        if let Some(op) = self.opening {
            return Some(Next::Control(op, 0));
        }
        if let Phase::Dialling { .. } = self.phase {
            return None;
        }
        let over = self.over();
        if over & !self.told != 0 {
            return Some(Next::Control(Op::Shutdown, over));
        }
        // Each packet tells our credit, so data does for an update.
        let waiting = self.readable && !self.to_guest_ended;
        let credit = self.credit.left();
        if waiting && credit > 0 {
            return Some(Next::Data(credit));
        }
        if self.update_asked || self.window.update_due() {
            return Some(Next::Control(Op::CreditUpdate, 0));
        }
        (waiting && !self.credit_asked).then_some(Next::Control(Op::CreditRequest, 0))
    }

    /// What the guest ought to know in SHUTDOWN's flags.
    fn over(&self) -> u32 {
        let no_send = if self.to_guest_ended { NO_SEND } else { 0 };
        let no_receive = match self.to_host {
            ToHost::Refused => NO_RECEIVE,
            ToHost::Ended if self.to_guest_ended => NO_RECEIVE,
            _ => 0,
        };
        no_send | no_receive
    }

    /// Header of a packet that is sent now, with `len` bytes of payload.
    pub fn header(&mut self, guest_cid: u32, op: Op, flags: u32, len: u32) -> Header {
        self.update_asked = false;
        let (buf_alloc, fwd_cnt) = self.window.tell();
        Header {
            len: len.into(),
            flags: flags.into(),
            buf_alloc: buf_alloc.into(),
            fwd_cnt: fwd_cnt.into(),
            ..Header::to_guest(guest_cid, self.key, op)
        }
    }

    /// A packet without payload was sent.
    pub fn sent(&mut self, op: Op, flags: u32, metrics: &mut Metrics) {
        match op {
            Op::Request | Op::Response => self.opening = None,
            Op::CreditRequest => {
                self.credit_asked = true;
                metrics.credit_stalls += 1;
            }
            Op::Shutdown => {
                self.told |= flags;
                if self.told == BOTH {
                    self.phase = Phase::Closing;
                    self.socket = None;
                }
            }
            Op::Reset | Op::Data | Op::CreditUpdate => {}
        }
    }

    /// How many of the guest's buffers to offer to the next read: few for messages, many for a flood.
    pub fn appetite(&self) -> usize {
        self.appetite
    }

    /// A read used so many of the buffers it was offered.
    pub fn ate(&mut self, used: usize, offered: usize) {
        if used == offered {
            self.appetite = (self.appetite * 2).min(MAX_APPETITE);
        } else if used <= offered / 2 {
            self.appetite = (self.appetite / 2).max(1);
        }
    }

    /// Reads at most `limit` bytes of the host, at least one, into `room`.
    pub fn fill(&mut self, room: &mut Writer<'_>, limit: usize) -> Fill {
        debug_assert!(limit > 0 && room.left() > 0, "else nothing and the end look the same");
        let read = self.socket.as_ref().map(|s| room.read_from(s.as_fd(), limit));
        match read {
            Some(Ok(count @ 1..)) => {
                self.credit.spend(u32::try_from(count).expect("no more is read than there is credit for"));
                Fill::Bytes(count)
            }
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Fill::Nothing
            }
            // The end; or the host closed its end without having read all (ECONNRESET), which is as much of an end.
            Some(Ok(_) | Err(_)) | None => {
                self.to_guest_ended = true;
                Fill::End
            }
        }
    }
}
