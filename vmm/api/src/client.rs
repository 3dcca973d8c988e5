//! The owner's end of the control socket, blocking. The shim wraps [`crate::frame`] in its own event loop instead.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::frame::{self, FrameError, Packet};
use crate::{ApiError, Event, Message, Op, Outcome, Reply, Request};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM refused or failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// The socket failed or the VMM is gone.
    #[error("talking to the VMM")]
    Frame(#[from] FrameError),
    /// The VMM sent something that is not a message.
    #[error("the VMM sent a message that cannot be read")]
    Malformed(#[source] serde_json::Error),
    /// No answer in time.
    #[error("no answer from the VMM within {0:?}")]
    Deadline(Duration),
}

/// An owner that waits for each answer. Events that arrive meanwhile are kept for [`Client::next_event`].
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    next_id: u64,
    events: VecDeque<(Event, Vec<OwnedFd>)>,
}

impl Client {
    /// Takes the owner's end of a control socket.
    pub fn new(socket: OwnedFd) -> Self {
        Client { socket, next_id: 1, events: VecDeque::new() }
    }

    /// Sends `op` with its descriptors and waits up to `timeout` for the reply and the descriptors in it.
    pub fn call(
        &mut self,
        op: Op,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = serde_json::to_vec(&Request { id, op }).expect("our own types serialise");
        frame::send(&self.socket, &bytes, fds)?;
        let deadline = Instant::now() + timeout;
        loop {
            let Some(packet) = self.receive(deadline)? else { return Err(ClientError::Deadline(timeout)) };
            match decode(&packet)? {
                Message::Event(event) => self.events.push_back((event, packet.fds)),
                Message::Reply { id: of, outcome } if of == id || of == 0 => match outcome {
                    Outcome::Ok(reply) => return Ok((reply, packet.fds)),
                    Outcome::Err(error) => return Err(error.into()),
                },
                // The answer to a call that we gave up on.
                Message::Reply { .. } => {}
            }
        }
    }

    /// The next event and its descriptors; `None` when `timeout` passes first.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<(Event, Vec<OwnedFd>)>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + timeout;
        while let Some(packet) = self.receive(deadline)? {
            if let Message::Event(event) = decode(&packet)? {
                return Ok(Some((event, packet.fds)));
            }
        }
        Ok(None)
    }

    fn receive(&self, deadline: Instant) -> Result<Option<Packet>, ClientError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = rustix::time::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut ready, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(frame::recv(&self.socket)?)),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(FrameError::from(e).into()),
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn decode(packet: &Packet) -> Result<Message, ClientError> {
    serde_json::from_slice(&packet.bytes).map_err(ClientError::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorCode, ExitReason};

    fn reply(socket: &OwnedFd, message: &Message) {
        frame::send(socket, &serde_json::to_vec(message).unwrap(), &[]).unwrap();
    }

    #[test]
    fn a_reply_finds_its_call_and_events_wait() {
        let (ours, theirs) = frame::pair().unwrap();
        let vmm = std::thread::spawn(move || {
            let packet = frame::recv(&theirs).unwrap();
            let request: Request = serde_json::from_slice(&packet.bytes).unwrap();
            assert_eq!(request.op, Op::Pause);
            reply(&theirs, &Message::Event(Event::Exiting { reason: ExitReason::GuestReset }));
            reply(&theirs, &Message::Reply { id: request.id + 99, outcome: Outcome::Ok(Reply::Done) });
            let refused = ApiError::msg(ErrorCode::FailedPrecondition, "not running");
            reply(&theirs, &Message::Reply { id: request.id, outcome: Outcome::Err(refused) });
        });
        let mut client = Client::new(ours);
        let error = client.call(Op::Pause, &[], Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.to_string(), "not running");
        let (event, _) = client.next_event(Duration::from_secs(5)).unwrap().unwrap();
        assert_eq!(event, Event::Exiting { reason: ExitReason::GuestReset });
        vmm.join().unwrap();
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (ours, _theirs) = frame::pair().unwrap();
        let error = Client::new(ours).call(Op::Stats, &[], Duration::from_millis(20)).unwrap_err();
        assert!(matches!(error, ClientError::Deadline(_)));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let packet = br#"{"id":1,"op":{"fs_unmount":{"at":"x","force":true}}}"#;
        let error = serde_json::from_slice::<Request>(packet).unwrap_err();
        assert!(error.to_string().contains("force"), "{error}");
    }
}
