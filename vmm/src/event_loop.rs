//! What the main thread waits for, by name: one epoll instance, one blocking wait.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Something that can become ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Token {
    /// The control socket.
    Control,
    /// The guest ended.
    GuestEnd,
    /// A driver changed the status of a device that somebody waits for.
    DeviceStatus,
    /// The guest notified a queue.
    Queue {
        /// Slot of the device.
        slot: u16,
        /// Queue of the device.
        queue: u16,
    },
    /// The upcall channel.
    Upcall,
    /// A device's backend.
    Backend {
        /// Slot of the device.
        slot: u16,
    },
}

impl Token {
    fn encode(self) -> u64 {
        match self {
            Token::Control => 0,
            Token::GuestEnd => 1,
            Token::DeviceStatus => 2,
            Token::Queue { slot, queue } => 3 | u64::from(slot) << 32 | u64::from(queue) << 48,
            Token::Backend { slot } => 4 | u64::from(slot) << 32,
            Token::Upcall => 5,
        }
    }

    fn decode(bits: u64) -> Self {
        let part = |at: u32| u16::try_from(bits >> at & 0xffff).expect("16 bits");
        let (slot, queue) = (part(32), part(48));
        match part(0) {
            0 => Token::Control,
            1 => Token::GuestEnd,
            2 => Token::DeviceStatus,
            3 => Token::Queue { slot, queue },
            4 => Token::Backend { slot },
            5 => Token::Upcall,
            _ => unreachable!("only `encode` makes these"),
        }
    }
}

/// What to wait for on the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Something to read.
    Read,
    /// Room to write.
    Write,
}

/// The epoll instance.
#[derive(Debug)]
pub struct EventLoop {
    epoll: Epoll,
}

impl EventLoop {
    /// Most events taken at once; the rest comes at the next wait.
    const BATCH: usize = 16;

    /// An instance that waits for nothing.
    pub fn new() -> io::Result<Self> {
        Ok(EventLoop { epoll: Epoll::new()? })
    }

    /// Waits for `fd` to become readable, from now on.
    pub fn add(&self, fd: &impl AsRawFd, token: Token) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, Interest::Read, token)
    }

    /// Waits for something else on `fd`.
    pub fn change(&self, fd: &impl AsRawFd, token: Token, interest: Interest) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, interest, token)
    }

    /// Does not wait for `fd` any more.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }

    fn control(
        &self,
        op: ControlOperation,
        fd: &impl AsRawFd,
        interest: Interest,
        token: Token,
    ) -> io::Result<()> {
        let events = match interest {
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
        };
        self.epoll.ctl(op, fd.as_raw_fd(), EpollEvent::new(events, token.encode()))
    }

    /// Waits until something is ready or `timeout` has passed, and says what.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = Token> + use<>> {
        // Rounded up: a timer that is due is due when this returns.
        let timeout =
            timeout.map_or(-1, |t| i32::try_from(t.as_millis().saturating_add(1)).unwrap_or(i32::MAX));
        let mut events = [EpollEvent::default(); Self::BATCH];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        Ok(events.into_iter().take(count).map(|event| Token::decode(event.data())))
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::Control,
            Token::GuestEnd,
            Token::DeviceStatus,
            Token::Queue { slot: 18, queue: 7 },
            Token::Queue { slot: u16::MAX, queue: u16::MAX },
            Token::Backend { slot: 3 },
            Token::Upcall,
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }

    #[test]
    fn what_is_ready_is_named_until_it_is_removed() {
        let events = EventLoop::new().unwrap();
        let wait = |timeout| events.wait(timeout).unwrap().collect::<Vec<_>>();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        events.add(&kick, Token::Backend { slot: 2 }).unwrap();
        assert_eq!(wait(Some(Duration::ZERO)), []);
        kick.write(1).unwrap();
        assert_eq!(wait(None), [Token::Backend { slot: 2 }]);
        events.remove(&kick).unwrap();
        assert_eq!(wait(Some(Duration::ZERO)), []);
    }
}
