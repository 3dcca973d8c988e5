//! Bytes between a client and the guest's stream, both ways.
//!
//! What the other side has no room for is all that is held of a direction, 64 KiB at most, and nothing is read before
//! it is gone: whoever reads slowly slows the sender down. A direction without traffic holds no memory.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

use crate::watched::watch;

/// Most bytes of one read.
const CHUNK: usize = 64 * 1024;

thread_local! {
    /// One for all connections: what does not fit the other side at once is copied out of it.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Copies both ways until both have ended, each end passed on as one.
///
/// # Errors
/// When either side breaks; both are closed then, the client with a reset if it was prepared for that.
pub async fn relay(client: TcpStream, stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let client = watch(client.into_std()?.into())?;
    let stream = watch(stream.into())?;
    tokio::try_join!(one_way(&client, &stream), one_way(&stream, &client))?;
    // Everything was passed on, so what the kernel still holds for the client is not to be thrown away.
    set_socket_linger(client.get_ref(), None)?;
    Ok(())
}

async fn one_way(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        match step(from, to)? {
            Step::Moved(rest) => {
                write_all(to, &rest).await?;
                // A sender that never stops must not keep the others from running.
                tokio::task::coop::consume_budget().await;
            }
            Step::End => return Ok(shutdown(to.get_ref(), Shutdown::Write)?),
            Step::Empty => tokio::select! {
                ready = from.readable() => drop(ready?),
                error = gone(to) => return Err(error),
            },
        }
    }
}

/// What came of a read and a write that did not wait.
enum Step {
    /// Bytes were read; these are what the other side had no room for.
    Moved(Vec<u8>),
    /// Nothing to read now.
    Empty,
    /// Nothing to read ever again.
    End,
}

fn step(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<Step> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.resize(CHUNK, 0);
        let read = attempt(from, Interest::READABLE, |fd| rustix::io::read(fd, &mut scratch[..]))?;
        let Some(n) = read else { return Ok(Step::Empty) };
        if n == 0 {
            return Ok(Step::End);
        }
        let written = write(to, &scratch[..n])?;
        Ok(Step::Moved(scratch[written..n].to_vec()))
    })
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(to, bytes)? {
            0 => drop(to.writable().await?),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}

/// Writes what fits: 0 bytes when nothing does.
fn write(to: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(attempt(to, Interest::WRITABLE, |fd| send(fd, bytes, flags))?.unwrap_or(0))
}

/// Asks the kernel first, since [`gone`] makes the event loop forget what it knew; then through the event loop, so that
/// the next wait waits. Nothing when the descriptor is not ready.
fn attempt(
    fd: &AsyncFd<OwnedFd>,
    interest: Interest,
    mut call: impl FnMut(&OwnedFd) -> rustix::io::Result<usize>,
) -> io::Result<Option<usize>> {
    let mut done = retry(|| call(fd.get_ref()));
    if would_block(&done) {
        done = fd.try_io(interest, |fd| retry(|| call(fd)));
    }
    if would_block(&done) { Ok(None) } else { done.map(Some) }
}

fn would_block(done: &io::Result<usize>) -> bool {
    done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}

/// Waits until `to` takes nothing any more, and says why. Only for the task that writes to it, while it does not: the
/// event loop is made to forget that there is room.
async fn gone(to: &AsyncFd<OwnedFd>) -> io::Error {
    loop {
        let mut guard = match to.writable().await {
            Ok(guard) => guard,
            Err(error) => return error,
        };
        // No bytes: the kernel says what it would say to some.
        if let Err(error) = send(to.get_ref(), &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            return error.into();
        }
        if guard.ready().is_write_closed() {
            return io::ErrorKind::BrokenPipe.into();
        }
        guard.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::Ipv4Addr;
    use std::time::{Duration, Instant};

    use super::*;

    /// A client and a guest with a relay between them.
    async fn pair() -> (std::net::TcpStream, UnixStream, tokio::task::JoinHandle<io::Result<()>>) {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        set_socket_linger(&accepted, Some(Duration::ZERO)).unwrap();
        let (guest, stream) = UnixStream::pair().unwrap();
        (client, guest, tokio::spawn(relay(accepted, stream)))
    }

    fn data(first: u8) -> Vec<u8> {
        (0..251_u8).cycle().skip(first.into()).take(5_000_000).collect()
    }

    /// Sends, ends its direction, and reads to the end.
    macro_rules! exchange {
        ($socket:ident, $first:expr) => {
            tokio::task::spawn_blocking(move || {
                let mut writer = $socket.try_clone().unwrap();
                let sender = std::thread::spawn(move || {
                    writer.write_all(&data($first)).unwrap();
                    writer.shutdown(std::net::Shutdown::Write).unwrap();
                });
                let mut got = Vec::new();
                let mut reader = $socket;
                reader.read_to_end(&mut got).unwrap();
                sender.join().unwrap();
                got
            })
        };
    }

    #[tokio::test]
    async fn both_directions_at_once_byte_for_byte_to_their_ends() {
        let (client, guest, relay) = pair().await;
        let at_client = exchange!(client, 1);
        let at_guest = exchange!(guest, 2);
        assert!(at_guest.await.unwrap() == data(1));
        assert!(at_client.await.unwrap() == data(2));
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_ended_direction_leaves_the_other_open() {
        let (mut client, mut guest, relay) = pair().await;
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let answered = tokio::task::spawn_blocking(move || {
            assert_eq!(guest.read(&mut [0]).unwrap(), 0);
            guest.write_all(b"answer").unwrap();
            drop(guest);
            let mut text = String::new();
            client.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(answered.await.unwrap(), "answer");
        relay.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_goes_resets_a_client_that_is_silent() {
        let (client, guest, relay) = pair().await;
        drop(guest);
        assert_eq!(relay.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let since = Instant::now();
        while client.take_error().unwrap().is_none() {
            assert!(since.elapsed() < Duration::from_secs(20), "no reset");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_client_that_is_reset_ends_a_guest_that_is_silent() {
        let (client, mut guest, relay) = pair().await;
        // Nothing has ended before: both directions wait for bytes.
        tokio::time::sleep(Duration::from_millis(20)).await;
        set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(relay.await.unwrap().is_err());
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    #[tokio::test]
    async fn a_reader_that_is_slow_stops_the_sender() {
        let (client, guest, relay) = pair().await;
        client.set_nonblocking(true).unwrap();
        let mut sent = 0_usize;
        let mut quiet = 0;
        // Kernel buffers and one chunk, then no more.
        while quiet < 20 {
            match (&client).write(&[7; 64 * 1024]) {
                Ok(n) => (sent, quiet) = (sent + n, 0),
                Err(_) => {
                    quiet += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            assert!(sent < 64 << 20, "it takes without end");
        }
        drop(client);
        let got = tokio::task::spawn_blocking(move || {
            let mut guest = guest;
            std::io::copy(&mut guest, &mut std::io::sink()).unwrap()
        });
        assert_eq!(got.await.unwrap(), sent as u64);
        drop(relay);
    }
}
