//! All that stands between the guest's queues and the host's sockets: the connections, and what must go out.
//!
//! [`Exchange::take`] handles one packet of the guest, [`Exchange::look`] what the sockets are ready for; both only
//! change connections and note who needs a turn. `to_guest` gives the turns, when there are buffers.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::connection::{Connection, Step, Violation};
use super::metrics::Metrics;
use super::packet::{Header, Key, Op, Packet, Reset};
use super::socket::{self, Poll};
use super::table::{Full, Table, Token};
use crate::queue::Reader;
use crate::rate::GUEST_ERRORS;

/// Resets that may wait for buffers before no more packets of the guest are taken (virtio 1.2, 5.10.6.1.2: additional
/// resources may be exhausted).
const MAX_RESETS: usize = 256;
/// Events that may wait to be collected before no more packets of the guest are taken: each holds a descriptor.
const MAX_EVENTS: usize = 64;

/// What the owner of the device has to know. Collected by [`super::Vsock::take_events`].
#[derive(Debug)]
pub enum VsockEvent {
    /// The guest dialled one of the ports it may dial.
    Accepted {
        /// Port on the host's side.
        port: u32,
        /// Port on the guest's side.
        guest_port: u32,
        /// The host's end: a non-blocking stream socket.
        socket: OwnedFd,
    },
    /// The guest accepted a dial.
    Connected {
        /// As given to [`super::Vsock::connect`].
        request: u64,
        /// The host's end: a non-blocking stream socket.
        socket: OwnedFd,
    },
    /// A dial came to nothing.
    Refused {
        /// As given to [`super::Vsock::connect`].
        request: u64,
        /// Why.
        reason: Refusal,
    },
}

/// Why a dial came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody listens at that port of the guest, or it takes no more.
    #[error("the guest refused the connection")]
    ByGuest,
    /// The guest answered with something else than yes or no.
    #[error("the guest broke the protocol")]
    Protocol,
    /// The driver reset the device.
    #[error("the guest's driver reset the device")]
    DeviceReset,
}

/// A dial could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The guest's driver has not set the device up (yet, or after a reset).
    #[error("the guest has no socket driver running")]
    NotActive,
    /// Too many connections.
    #[error(transparent)]
    Full(#[from] Full),
    /// The host has no descriptors or memory left.
    #[error("cannot make a socket pair")]
    Socket(#[source] io::Error),
}

/// The connections of one guest.
#[derive(Debug)]
pub struct Exchange {
    /// The guest's context id.
    pub cid: u32,
    /// Ports the guest may dial.
    pub ports: Vec<u32>,
    /// Counters.
    pub metrics: Metrics,
    /// What the owner has yet to collect.
    pub events: Vec<VsockEvent>,
    pub(super) table: Table,
    pub(super) resets: VecDeque<Reset>,
    poll: Poll,
}

impl Exchange {
    /// No connections.
    pub fn new(cid: u32, ports: Vec<u32>) -> io::Result<Self> {
        Ok(Exchange {
            cid,
            ports,
            metrics: Metrics::default(),
            events: Vec::new(),
            table: Table::default(),
            resets: VecDeque::new(),
            poll: Poll::new()?,
        })
    }

    /// Readable when [`Exchange::look`] has something to do.
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }

    /// Whether packets of the guest must wait until it has given buffers for our resets.
    pub fn owes_too_many_resets(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether packets of the guest must wait until the owner has collected events.
    pub fn owes_too_many_events(&self) -> bool {
        self.events.len() >= MAX_EVENTS
    }

    /// Dials a port of the guest.
    pub fn connect(&mut self, guest_port: u32, request: u64) -> Result<(), ConnectError> {
        let (near, far) = socket::pair().map_err(ConnectError::Socket)?;
        self.make_room();
        let key = self.table.dial_key(guest_port);
        let connection = Connection::dialled(key, request, near, far, self.table.window());
        let token = self.table.insert(connection)?;
        self.watch(token).map_err(ConnectError::Socket)?;
        self.table.schedule(token);
        Ok(())
    }

    /// Gives up a dial. False if it has ended already, in whatever way.
    pub fn cancel(&mut self, request: u64) -> bool {
        let dial = self.table.iter().find(|(_, c)| c.request() == Some(request)).map(|(token, _)| token);
        let Some(connection) = dial.and_then(|token| self.table.remove(token)) else { return false };
        self.metrics.unanswered += 1;
        if connection.is_known_to_guest() {
            self.resets.push_back(Reset::of(connection.key));
        }
        true
    }

    /// Ends all connections at once, without a word to the guest.
    pub fn drop_all(&mut self) {
        self.resets.clear();
        for connection in self.table.clear() {
            self.refuse_dial(&connection, Refusal::DeviceReset);
        }
    }

    /// Takes one packet of the guest.
    pub fn take(&mut self, packet: &mut Reader<'_>) {
        self.metrics.packets_from_guest += 1;
        let header: Header = match packet.read_obj() {
            Ok(header) => header,
            Err(e) => {
                self.metrics.malformed += 1;
                return GUEST_ERRORS.warn(format_args!("vsock: packet header: {e}"));
            }
        };
        match header.check(self.cid) {
            Ok(checked) => self.dispatch(&checked, packet),
            Err(reject) => {
                self.metrics.malformed += 1;
                GUEST_ERRORS.warn(format_args!("vsock: packet dropped: {reject}"));
                self.resets.extend(header.answer(self.cid));
            }
        }
    }

    fn dispatch(&mut self, packet: &Packet, payload: &mut Reader<'_>) {
        let Some((token, connection)) =
            self.table.find(packet.key).and_then(|t| Some((t, self.table.get_mut(t)?)))
        else {
            return match packet.op {
                Op::Request => self.accept(packet),
                Op::Reset => {}
                _ => self.stray(packet.key),
            };
        };
        match connection.receive(packet, payload, &mut self.metrics) {
            Ok(Step::Live) => self.settle(token),
            Ok(Step::Opened { request, far }) => {
                self.metrics.connected += 1;
                self.events.push(VsockEvent::Connected { request, socket: far });
                self.settle(token);
            }
            Ok(Step::Reset) => {
                self.metrics.reset_by_guest += 1;
                self.guest_is_gone(token);
            }
            Ok(Step::Over) => drop(self.table.remove(token)),
            Ok(Step::Closed) => {
                self.resets.push_back(Reset::of(packet.key));
                self.guest_is_gone(token);
            }
            Ok(Step::Replaced) => {
                self.table.remove(token);
                self.accept(packet);
            }
            Err(violation) => self.violated(token, violation),
        }
    }

    fn stray(&mut self, key: Key) {
        self.metrics.strays += 1;
        self.resets.push_back(Reset::of(key));
    }

    fn violated(&mut self, token: Token, violation: Violation) {
        let Some(connection) = self.table.remove(token) else { return };
        let Key { host_port, guest_port } = connection.key;
        GUEST_ERRORS.warn(format_args!("vsock: guest port {guest_port}, host port {host_port}: {violation}"));
        self.metrics.violations += 1;
        self.resets.push_back(Reset::of(connection.key));
        self.refuse_dial(&connection, Refusal::Protocol);
    }

    fn guest_is_gone(&mut self, token: Token) {
        self.table.forget_key(token);
        let Some(connection) = self.table.get_mut(token) else { return };
        if connection.request().is_none() && connection.drain() {
            self.settle(token);
        } else if let Some(connection) = self.table.remove(token) {
            self.refuse_dial(&connection, Refusal::ByGuest);
        }
    }

    fn refuse_dial(&mut self, connection: &Connection, reason: Refusal) {
        if let Some(request) = connection.request() {
            self.metrics.unanswered += 1;
            self.events.push(VsockEvent::Refused { request, reason });
        }
    }

    /// The guest asks for a connection that there is not.
    fn accept(&mut self, packet: &Packet) {
        let accepted = self.try_accept(packet).unwrap_or_else(|e| {
            let port = packet.key.host_port;
            GUEST_ERRORS.warn(format_args!("vsock: guest's connection to port {port} refused: {e}"));
            false
        });
        if accepted {
            self.metrics.accepted += 1;
        } else {
            self.metrics.refused += 1;
            self.resets.push_back(Reset::of(packet.key));
        }
    }

    fn try_accept(&mut self, packet: &Packet) -> io::Result<bool> {
        let Key { host_port: port, guest_port } = packet.key;
        if !self.ports.contains(&port) {
            return Ok(false);
        }
        self.make_room();
        if !self.table.has_room() {
            GUEST_ERRORS.warn(format_args!("vsock: guest's connection to port {port} refused: {Full}"));
            return Ok(false);
        }
        let (near, far) = socket::pair()?;
        let connection = Connection::accepted(packet, near, self.table.window());
        let token = self.table.insert(connection).map_err(io::Error::other)?;
        self.watch(token)?;
        self.table.schedule(token);
        self.events.push(VsockEvent::Accepted { port, guest_port, socket: far });
        Ok(true)
    }

    /// Where all places are taken, frees one of those that only wait for the guest's last word.
    fn make_room(&mut self) {
        if self.table.has_room() {
            return;
        }
        if let Some(connection) = self.table.some_closing().and_then(|token| self.table.remove(token)) {
            self.resets.push_back(Reset::of(connection.key));
        }
    }

    fn watch(&mut self, token: Token) -> io::Result<()> {
        let socket = self.table.get(token).and_then(Connection::socket);
        let watched = self.poll.add(socket.expect("a new connection has its socket"), token);
        watched.inspect_err(|_| drop(self.table.remove(token)))
    }

    /// Looks at sockets that became ready, a bounded number of them at a time.
    pub fn look(&mut self) {
        for ready in self.poll.ready() {
            let Some(connection) = self.table.get_mut(ready.token) else { continue };
            if ready.hung_up {
                connection.hung_up(&mut self.metrics);
            }
            if ready.write {
                connection.flush(&mut self.metrics);
            }
            if ready.read {
                connection.readable();
            }
            self.settle(ready.token);
        }
    }

    /// After a connection changed: sees to its next turn, or to its end.
    pub(super) fn settle(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else { return };
        if connection.is_drained() {
            self.table.remove(token);
            return;
        }
        connection.watch_room_if_needed(&self.poll, token);
        if connection.next().is_some() {
            self.table.schedule(token);
        }
    }
}
