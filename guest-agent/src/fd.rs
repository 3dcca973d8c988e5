//! Descriptors the runtime waits on: pipes, pseudo-terminals, sockets. One type for all of them.
//!
//! tokio has a type for each kind; here they meet in one copy loop, and a vsock connection must also serve as the
//! transport of ttrpc.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, Shutdown, send};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A non-blocking descriptor registered with the runtime. Clones share the descriptor, which is closed with the
/// last of them.
#[derive(Debug, Clone)]
pub struct Fd(Arc<AsyncFd<OwnedFd>>);

impl Fd {
    /// Makes `fd` non-blocking and registers it.
    ///
    /// # Errors
    /// EPERM for what cannot be polled (a regular file).
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        Ok(Self(Arc::new(crate::sys::register(fd, Interest::READABLE | Interest::WRITABLE)?)))
    }

    /// Waits until there is something to read: data, end of file or an error.
    pub async fn wait_readable(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// Reads without waiting; `None` when there is nothing yet, after which [`Self::wait_readable`] waits.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.attempt(Interest::READABLE, |fd| nix::unistd::read(fd, buf))
    }

    /// Reads at least one byte, or 0 at the end.
    pub async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.wait_readable().await?;
            if let Some(n) = self.try_read(buf)? {
                return Ok(n);
            }
        }
    }

    /// Writes what fits without waiting: 0 when nothing does.
    pub fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        Ok(self.attempt(Interest::WRITABLE, |fd| nix::unistd::write(fd, buf))?.unwrap_or(0))
    }

    /// Asks the kernel first: the runtime knows of readiness only what its last poll brought, and "nothing to read"
    /// must be true when a process has just exited. Asks again through the runtime, so that its next wait waits.
    fn attempt(
        &self,
        interest: Interest,
        mut call: impl FnMut(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> io::Result<Option<usize>> {
        let mut done = retry(|| call(self.as_fd()));
        if would_block(&done) {
            done = self.0.try_io(interest, |_| retry(|| call(self.as_fd())));
        }
        if would_block(&done) { Ok(None) } else { done.map(Some) }
    }

    /// Writes all of `buf`, waiting for room as needed.
    pub async fn write_all(&self, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.try_write(buf)? {
                0 => self.wait_writable().await?,
                n => buf = &buf[n..],
            }
        }
        Ok(())
    }

    /// Waits until there is room to write, or an error to learn of.
    pub async fn wait_writable(&self) -> io::Result<()> {
        self.0.writable().await.map(drop)
    }

    /// Waits until the peer of a socket takes nothing any more, and says why. Forgets that there is room to write, so
    /// whoever writes meanwhile must be this waiter's own task.
    pub async fn wait_gone(&self) -> io::Error {
        loop {
            let mut guard = match self.0.writable().await {
                Ok(guard) => guard,
                Err(error) => return error,
            };
            // No bytes: the kernel says what it would say to some.
            if let Err(errno) = send(self.0.as_raw_fd(), &[], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)
            {
                return errno.into();
            }
            if guard.ready().is_write_closed() {
                return io::ErrorKind::BrokenPipe.into();
            }
            guard.clear_ready();
        }
    }

    /// Ends this side's direction of a socket; the peer reads to the end and may go on sending.
    pub fn finish_writing(&self) -> io::Result<()> {
        Ok(nix::sys::socket::shutdown(self.0.as_raw_fd(), Shutdown::Write)?)
    }
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for Fd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let free = buf.initialize_unfilled();
            if let Ok(done) = guard.try_io(|fd| retry(|| nix::unistd::read(fd.get_ref(), free))) {
                let n = done?;
                buf.advance(n);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Fd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|fd| retry(|| nix::unistd::write(fd.get_ref(), buf))) {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish_writing())
    }
}

fn would_block(done: &io::Result<usize>) -> bool {
    done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

fn retry(mut call: impl FnMut() -> nix::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(nix::errno::Errno::EINTR) => {}
            done => return Ok(done?),
        }
    }
}

/// Sets `O_NONBLOCK`. It belongs to the open file, so everyone who shares it sees it.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
