//! Turns at the guest's receive buffers: resets first, then one connection after the other.

use super::connection::{Connection, Fill, Next};
use super::exchange::Exchange;
use super::metrics::Metrics;
use super::packet::{HEADER_LEN, Header, Op};
use crate::GuestMemory;
use crate::queue::{Queue, Writer};
use crate::rate::GUEST_ERRORS;

/// Most bytes that a connection sends in one turn.
const TURN_BYTES: u32 = 128 << 10;
/// Most turns in one go.
const TURNS_AT_ONCE: usize = 32;
#[expect(clippy::cast_possible_truncation, reason = "it is 44")]
const HEADER_BYTES: u32 = HEADER_LEN as u32;

/// How [`Exchange::serve`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing is left to do.
    All,
    /// The guest has to give buffers first.
    NoBuffers,
    /// There is more to do; let others work first.
    More,
}

/// A receive buffer of the guest.
struct Buffer<'m> {
    head: u16,
    header: Writer<'m>,
    payload: Writer<'m>,
}

/// The guest's receive buffers.
struct Buffers<'a, 'm> {
    queue: &'a mut Queue,
    memory: &'m GuestMemory,
    cid: u32,
    metrics: &'a mut Metrics,
}

impl<'m> Buffers<'_, 'm> {
    /// The next buffer with room for a header and `least` bytes of payload; or the head of one that is too small.
    fn pop(&mut self, least: usize) -> Option<Result<Buffer<'m>, u16>> {
        let chain = self.queue.pop(self.memory)?;
        let head = chain.head();
        let (_, mut header) = chain.split();
        Some(match header.split_off(HEADER_LEN) {
            Ok(payload) if payload.left() >= least => Ok(Buffer { head, header, payload }),
            Ok(_) | Err(_) => Err(head),
        })
    }

    /// As `pop`, but gives those that are too small back empty, at most a queue full of them at a time.
    fn next(&mut self, least: usize) -> Option<Buffer<'m>> {
        for _ in 0..self.queue.size() {
            match self.pop(least)? {
                Ok(buffer) => return Some(buffer),
                Err(head) => {
                    self.metrics.malformed += 1;
                    GUEST_ERRORS.warn(format_args!("vsock: receive buffer {head} has no room for a packet"));
                    self.queue.push_used(self.memory, head, 0);
                }
            }
        }
        None
    }

    /// Sends a packet whose payload, if any, is in its place already.
    fn send(&mut self, head: u16, mut place: Writer<'m>, header: &Header) {
        place.write_obj(header).expect("`pop` leaves room for the header");
        let len = header.len.get();
        self.queue.push_used(self.memory, head, HEADER_BYTES + len);
        self.metrics.packets_to_guest += 1;
        self.metrics.bytes_to_guest += u64::from(len);
    }

    /// Sends the packet that `header` makes. False if there is no buffer.
    fn send_control(&mut self, header: impl FnOnce() -> Header) -> bool {
        let Some(buffer) = self.next(0) else { return false };
        self.send(buffer.head, buffer.header, &header());
        true
    }

    /// Reads from the host straight into as many buffers as the connection has an appetite for. False if there is no
    /// buffer.
    fn send_data(&mut self, connection: &mut Connection, credit: u32) -> bool {
        let limit = credit.min(TURN_BYTES) as usize;
        let Some(first) = self.next(1) else { return false };
        let mut offered = Vec::with_capacity(connection.appetite());
        offered.push((first.head, first.header, first.payload.left()));
        let mut room = first.payload;
        while offered.len() < connection.appetite() && room.left() < limit {
            match self.pop(1) {
                Some(Ok(buffer)) => {
                    offered.push((buffer.head, buffer.header, buffer.payload.left()));
                    room.append(buffer.payload);
                }
                // One to be given back empty. Leave it, so that only buffers in a row are put back below.
                Some(Err(_)) => {
                    self.queue.undo_pop();
                    break;
                }
                None => break,
            }
        }

        let offers = offered.len();
        let mut rest = match connection.fill(&mut room, limit) {
            Fill::Bytes(count) => count,
            Fill::Nothing | Fill::End => 0,
        };
        let mut used = 0;
        for (head, place, capacity) in offered {
            let count = rest.min(capacity);
            if count == 0 {
                self.queue.undo_pop();
                continue;
            }
            let len = u32::try_from(count).expect("at most TURN_BYTES were read");
            let header = connection.header(self.cid, Op::Data, 0, len);
            self.send(head, place, &header);
            rest -= count;
            used += 1;
        }
        connection.ate(used, offers);
        true
    }

    /// Gives a connection its turn. False if it cannot go on for lack of buffers.
    fn turn(&mut self, connection: &mut Connection) -> bool {
        // Each control packet changes what comes next, and there are few kinds; data ends the turn.
        while let Some(next) = connection.next() {
            match next {
                Next::Data(credit) => return self.send_data(connection, credit),
                Next::Control(op, flags) => {
                    let cid = self.cid;
                    if !self.send_control(|| connection.header(cid, op, flags, 0)) {
                        return false;
                    }
                    connection.sent(op, flags, self.metrics);
                }
            }
        }
        true
    }
}

impl Exchange {
    /// Gives the guest what it is owed, as far as it has buffers, and a bounded amount at a time.
    pub fn serve(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Served {
        let served = self.serve_turns(queue, memory);
        if served == Served::NoBuffers {
            self.metrics.buffer_stalls += 1;
        }
        queue.notify(memory);
        served
    }

    fn serve_turns(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Served {
        let cid = self.cid;
        let mut buffers = Buffers { queue, memory, cid, metrics: &mut self.metrics };
        while let Some(reset) = self.resets.front() {
            if !buffers.send_control(|| reset.header(cid)) {
                return Served::NoBuffers;
            }
            self.resets.pop_front();
        }
        for _ in 0..TURNS_AT_ONCE {
            let Some(token) = self.table.next_turn() else { return Served::All };
            let Some(connection) = self.table.get_mut(token) else { continue };
            let mut buffers = Buffers { queue, memory, cid, metrics: &mut self.metrics };
            if !buffers.turn(connection) {
                self.table.keep_turn(token);
                return Served::NoBuffers;
            }
            if connection.next().is_some() {
                self.table.schedule(token);
            }
        }
        Served::More
    }
}
