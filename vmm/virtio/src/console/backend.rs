//! The descriptors behind the console.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// Makes the open file non-blocking, for all who share it.
fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// Where the guest's output goes.
#[derive(Debug)]
pub struct Output(OwnedFd);

impl Output {
    /// Takes a file, pipe, socket or terminal, and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Output(fd))
    }

    /// Writes as much of `bytes` as the descriptor takes now, and tells how much it was.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::write(&self.0, &bytes[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                // Full, or nobody reads any more: both end in a counter.
                Err(_) => break,
            }
        }
        done
    }
}

/// What the guest reads, with an epoll instance that is readable only while input is [wanted](Input::want).
#[derive(Debug)]
pub struct Input {
    fd: OwnedFd,
    epoll: OwnedFd,
    watched: bool,
    ended: bool,
}

impl Input {
    /// Takes a file, pipe, socket or terminal, and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Input { fd, epoll, watched: false, ended: false })
    }

    /// Readable when there is input that is wanted.
    pub fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The input itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Its end was reached.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// The end is reached: it is never wanted again.
    pub fn end(&mut self) {
        self.ended = true;
        self.want(false);
    }

    /// Watches the input, or does not. Tells whether it must be read without waiting: a regular file cannot be
    /// watched, and always has something to say.
    pub fn want(&mut self, wanted: bool) -> bool {
        let wanted = wanted && !self.ended;
        if wanted == self.watched {
            return false;
        }
        let result = if wanted {
            epoll::add(&self.epoll, &self.fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
        } else {
            epoll::delete(&self.epoll, &self.fd)
        };
        match result {
            Ok(()) => self.watched = wanted,
            Err(Errno::PERM) => return wanted,
            Err(e) => log::warn!("console input cannot be watched: {e}"),
        }
        false
    }
}
