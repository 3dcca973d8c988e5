//! The owner's end of the control socket, blocking. The shim wraps [`crate::frame`] in its own event loop instead.

use std::collections::{BTreeMap, VecDeque};
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
    /// Calls begun and not finished, with their answers once they are here.
    begun: BTreeMap<u64, Option<(Outcome, Vec<OwnedFd>)>>,
}

/// A call that has been sent. Its answer is kept until [`Client::finish`], or for as long as the client lives.
#[derive(Debug)]
pub struct Begun(u64);

impl Client {
    /// Takes the owner's end of a control socket.
    pub fn new(socket: OwnedFd) -> Self {
        Client { socket, next_id: 1, events: VecDeque::new(), begun: BTreeMap::new() }
    }

    /// Sends `op` with its descriptors and waits up to `timeout` for the reply and the descriptors in it.
    pub fn call(
        &mut self,
        op: Op,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let begun = self.begin(op, fds)?;
        self.finish(begun, timeout)
    }

    /// Sends `op` with its descriptors.
    pub fn begin(&mut self, op: Op, fds: &[BorrowedFd<'_>]) -> Result<Begun, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = serde_json::to_vec(&Request { id, op }).expect("our own types serialise");
        frame::send(&self.socket, &bytes, fds)?;
        self.begun.insert(id, None);
        Ok(Begun(id))
    }

    /// Waits up to `timeout` for the reply to a call and the descriptors in it. One that is late is dropped.
    pub fn finish(
        &mut self,
        Begun(id): Begun,
        timeout: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let deadline = Instant::now() + timeout;
        while let Some(None) = self.begun.get(&id) {
            let Some(packet) = self.receive(deadline)? else {
                self.begun.remove(&id);
                return Err(ClientError::Deadline(timeout));
            };
            self.take(packet, id)?;
        }
        match self.begun.remove(&id).flatten() {
            Some((Outcome::Ok(reply), fds)) => Ok((reply, fds)),
            Some((Outcome::Err(error), _)) => Err(error.into()),
            None => unreachable!("a call is finished once, and was begun"),
        }
    }

    fn take(&mut self, packet: Packet, waiting_for: u64) -> Result<(), ClientError> {
        match decode(&packet)? {
            Message::Event(event) => self.events.push_back((event, packet.fds)),
            Message::Reply { id, outcome } => {
                // 0: the VMM could not read which request it was.
                let id = if id == 0 { waiting_for } else { id };
                // Else it is the answer to a call that was given up on.
                if let Some(answer) = self.begun.get_mut(&id) {
                    *answer = Some((outcome, packet.fds));
                }
            }
        }
        Ok(())
    }

    /// The next event and its descriptors; `None` when `timeout` passes first.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<(Event, Vec<OwnedFd>)>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + timeout;
        while let Some(packet) = self.receive(deadline)? {
            self.take(packet, 0)?;
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
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
