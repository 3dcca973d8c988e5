//! The control socket: packets in, requests out; replies and events in, packets out.
//!
//! The socket never blocks this process. What the owner does not take at once waits in the outbox; while anything
//! waits there, no further request is read, so an owner that does not read cannot make it grow.
//!
//! Not here: what an operation does (`monitor`).

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_api::frame::{self, FrameError};
use vmm_api::{ApiError, ErrorCode, Event, Message, Outcome, Packet, Reply, Request};

/// What came in.
#[derive(Debug)]
pub enum Incoming {
    /// A request and its descriptors.
    Request(Box<Request>, Vec<OwnedFd>),
    /// A packet that is no request. It has been answered.
    Refused,
    /// Nothing yet.
    Nothing,
    /// The owner is gone: the lease has ended.
    Closed,
}

/// The VMM's end of the control socket.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    outbox: VecDeque<Packet>,
    closed: bool,
}

impl Control {
    /// Takes the socket and makes it non-blocking.
    pub fn new(socket: OwnedFd) -> std::io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Control { socket, outbox: VecDeque::new(), closed: false })
    }

    /// Takes one request.
    pub fn receive(&mut self) -> Incoming {
        let packet = match frame::recv(&self.socket) {
            Ok(packet) => packet,
            Err(e) if e.would_block() => return Incoming::Nothing,
            Err(e @ (FrameError::TooLong | FrameError::TooManyFds)) => return self.refuse(0, e.to_string()),
            Err(e) => {
                log::debug!("the lease ended: {e}");
                return Incoming::Closed;
            }
        };
        match serde_json::from_slice(&packet.bytes) {
            Ok(request) => Incoming::Request(Box::new(request), packet.fds),
            Err(e) => self.refuse(id_of(&packet.bytes), format!("not a request: {e}")),
        }
    }

    fn refuse(&mut self, id: u64, why: String) -> Incoming {
        self.reply(id, Err(ApiError::msg(ErrorCode::InvalidArgument, why)));
        Incoming::Refused
    }

    /// Answers request `id`; `fds` are those that the reply names.
    pub fn reply(&mut self, id: u64, result: Result<(Reply, Vec<OwnedFd>), ApiError>) {
        let (outcome, fds) = match result {
            Ok((reply, fds)) => (Outcome::Ok(reply), fds),
            Err(error) => {
                log::info!("refused: {error}");
                (Outcome::Err(error), vec![])
            }
        };
        self.send(&Message::Reply { id, outcome }, fds);
    }

    /// Tells the owner something.
    pub fn event(&mut self, event: Event, fds: Vec<OwnedFd>) {
        self.send(&Message::Event(event), fds);
    }

    fn send(&mut self, message: &Message, fds: Vec<OwnedFd>) {
        let bytes = serde_json::to_vec(message).expect("our own types serialise");
        self.outbox.push_back(Packet { bytes, fds });
        self.flush();
    }

    /// Sends what waits, as far as the owner takes it.
    pub fn flush(&mut self) {
        while let Some(packet) = self.outbox.front() {
            let fds: Vec<_> = packet.fds.iter().map(AsFd::as_fd).collect();
            match frame::send(&self.socket, &packet.bytes, &fds) {
                Err(e) if e.would_block() => return,
                Err(FrameError::Closed) => {
                    self.closed = true;
                    self.outbox.clear();
                    return;
                }
                // The owner ran into a limit of the host's (descriptors in flight): this packet cannot be sent.
                Err(e) => log::error!("a packet to the owner is lost: {e}"),
                Ok(()) => {}
            }
            self.outbox.pop_front();
        }
    }

    /// Sends what waits, and waits for the owner to take it, but not for ever.
    pub fn flush_all(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.is_clogged() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("the owner did not take the last {} packets", self.outbox.len());
                return;
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            // Whatever it says, the next send finds out.
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout));
            self.flush();
        }
    }

    /// Whether something waits for the owner to read.
    pub fn is_clogged(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether a send found the owner gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }
}

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The request's id, if only that can be read; else 0.
fn id_of(bytes: &[u8]) -> u64 {
    let value: Option<serde_json::Value> = serde_json::from_slice(bytes).ok();
    value.and_then(|v| v.get("id")?.as_u64()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use vmm_api::Op;

    use super::*;

    fn pair() -> (OwnedFd, Control) {
        let (ours, theirs) = frame::pair().unwrap();
        (ours, Control::new(theirs).unwrap())
    }

    fn answer(owner: &OwnedFd) -> Message {
        serde_json::from_slice(&frame::recv(owner).unwrap().bytes).unwrap()
    }

    fn refusal(owner: &OwnedFd) -> (u64, String) {
        match answer(owner) {
            Message::Reply { id, outcome: Outcome::Err(error) } => {
                assert_eq!(error.code, ErrorCode::InvalidArgument);
                (id, error.message)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_comes_with_its_descriptors() {
        let (owner, mut control) = pair();
        assert!(matches!(control.receive(), Incoming::Nothing));
        let fd = std::fs::File::open("/dev/null").unwrap();
        frame::send(&owner, br#"{"id":7,"op":"stats"}"#, &[fd.as_fd()]).unwrap();
        let Incoming::Request(request, fds) = control.receive() else { panic!() };
        assert_eq!((*request, fds.len()), (Request { id: 7, op: Op::Stats }, 1));
        drop(owner);
        assert!(matches!(control.receive(), Incoming::Closed));
    }

    #[test]
    fn what_is_no_request_is_refused_by_its_id_where_it_has_one() {
        let (owner, mut control) = pair();
        for (packet, id, word) in [
            (&b"hello"[..], 0, "not a request"),
            (br#"{"id":4,"op":"explode"}"#, 4, "explode"),
            (br#"{"id":5,"op":"stats","more":1}"#, 5, "more"),
            (br#"{"id":-1,"op":"stats"}"#, 0, "not a request"),
            (b"\xff\xfe", 0, "not a request"),
        ] {
            frame::send(&owner, packet, &[]).unwrap();
            assert!(matches!(control.receive(), Incoming::Refused));
            let (got, text) = refusal(&owner);
            assert_eq!(got, id);
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn an_owner_that_does_not_read_finds_all_in_order_later() {
        let (owner, mut control) = pair();
        let mut sent = 0;
        while !control.is_clogged() {
            control.reply(sent, Ok((Reply::Done, vec![])));
            sent += 1;
        }
        control.reply(sent, Ok((Reply::Done, vec![])));
        for id in 0..=sent {
            control.flush();
            assert!(matches!(answer(&owner), Message::Reply { id: got, .. } if got == id));
        }
        assert!(!control.is_clogged());
    }

    #[test]
    fn an_owner_that_is_gone_is_noticed_on_sending() {
        let (owner, mut control) = pair();
        drop(owner);
        control.reply(1, Ok((Reply::Done, vec![])));
        assert!(control.is_closed() && !control.is_clogged());
    }
}
