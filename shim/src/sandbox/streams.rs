//! Matches the stream connections that the guest dials with the processes that wait for them.
//!
//! A stream's id is invented here and named to the agent in `Create` or `Exec`; the agent dials back and says the id
//! first. Connections come in any order, and from a guest that is not trusted: an id that nobody waits for is closed,
//! a connection that says nothing is closed after a while, and only so many may be in that state at once.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::stream::{HELLO_LEN, StreamId};
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;

use crate::sandbox::complaints::Complaints;

/// Connections that have not said their id yet.
const MAX_UNNAMED: usize = 64;
/// How long they have for it.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The streams of one sandbox.
#[derive(Debug)]
pub struct Streams {
    next: AtomicU64,
    unnamed: AtomicUsize,
    expected: Mutex<HashMap<StreamId, oneshot::Sender<UnixStream>>>,
    complaints: Mutex<Complaints>,
}

/// A stream that was named to the agent; not waited for any more once dropped.
#[derive(Debug)]
pub struct Expected {
    /// Its id.
    pub id: StreamId,
    connection: oneshot::Receiver<UnixStream>,
    streams: Arc<Streams>,
}

impl Streams {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Streams {
            next: AtomicU64::new(1),
            unnamed: AtomicUsize::new(0),
            expected: Mutex::default(),
            complaints: Mutex::new(Complaints::about("a stream connection of the guest was closed")),
        })
    }

    /// Invents a stream.
    pub fn expect(self: &Arc<Self>) -> Expected {
        let id = StreamId(self.next.fetch_add(1, Ordering::Relaxed));
        let (sender, connection) = oneshot::channel();
        self.expected.lock().expect("no code panics while it holds this lock").insert(id, sender);
        Expected { id, connection, streams: self.clone() }
    }

    /// Takes a connection that the guest dialled.
    pub fn accept(self: &Arc<Self>, connection: OwnedFd) {
        if self.unnamed.fetch_add(1, Ordering::Relaxed) >= MAX_UNNAMED {
            self.unnamed.fetch_sub(1, Ordering::Relaxed);
            self.complain(format_args!("{MAX_UNNAMED} have said no id yet"));
            return;
        }
        let streams = self.clone();
        tokio::spawn(async move {
            let named = tokio::time::timeout(HELLO_TIMEOUT, read_hello(connection)).await;
            streams.unnamed.fetch_sub(1, Ordering::Relaxed);
            match named {
                Ok(Ok((id, connection))) => {
                    let waiting =
                        streams.expected.lock().expect("no code panics while it holds this lock").remove(&id);
                    match waiting {
                        // Whoever gave up meanwhile leaves the connection to be closed.
                        Some(waiting) => drop(waiting.send(connection)),
                        None => streams.complain(format_args!("nobody expects stream {}", id.0)),
                    }
                }
                Ok(Err(e)) => streams.complain(format_args!("{e}")),
                Err(_) => streams.complain(format_args!("it said no id in {HELLO_TIMEOUT:?}")),
            }
        });
    }

    fn complain(&self, why: std::fmt::Arguments<'_>) {
        self.complaints.lock().expect("no code panics while it holds this lock").note(why);
    }
}

async fn read_hello(connection: OwnedFd) -> std::io::Result<(StreamId, UnixStream)> {
    let connection = UnixStream::from(connection);
    connection.set_nonblocking(true)?;
    let mut connection = tokio::net::UnixStream::from_std(connection)?;
    let mut hello = [0; HELLO_LEN];
    connection.read_exact(&mut hello).await?;
    Ok((StreamId::from_hello(hello), connection.into_std()?))
}

impl Expected {
    /// Waits for the agent to dial it; `None` when it does not within `timeout`.
    pub async fn connection(mut self, timeout: Duration) -> Option<UnixStream> {
        tokio::time::timeout(timeout, &mut self.connection).await.ok()?.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.streams.expected.lock().expect("no code panics while it holds this lock").remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    fn dial(streams: &Arc<Streams>, hello: &[u8]) -> UnixStream {
        let (guest, host) = UnixStream::pair().unwrap();
        (&guest).write_all(hello).unwrap();
        streams.accept(host.into());
        guest
    }

    #[tokio::test]
    async fn connections_find_their_processes_in_any_order() {
        let streams = Streams::new();
        let (first, second) = (streams.expect(), streams.expect());
        assert_ne!(first.id, second.id);
        let mut hello = second.id.hello().to_vec();
        hello.extend(b"data follows at once");
        let _second = dial(&streams, &hello);
        let _first = dial(&streams, &first.id.hello());
        let wait = Duration::from_secs(5);
        assert!(first.connection(wait).await.is_some());
        let mut connection = second.connection(wait).await.unwrap();
        connection.set_nonblocking(false).unwrap();
        let mut data = [0; 20];
        connection.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"data follows at once");
    }

    #[tokio::test]
    async fn an_id_that_nobody_expects_is_closed() {
        let streams = Streams::new();
        let mut guest = dial(&streams, &StreamId(99).hello());
        let end = tokio::task::spawn_blocking(move || guest.read(&mut [0]).unwrap()).await.unwrap();
        assert_eq!(end, 0);
        // One that was given up is not expected any more.
        let given_up = streams.expect();
        let hello = given_up.id.hello();
        drop(given_up);
        let mut guest = dial(&streams, &hello);
        let end = tokio::task::spawn_blocking(move || guest.read(&mut [0]).unwrap()).await.unwrap();
        assert_eq!(end, 0);
    }

    #[tokio::test]
    async fn silent_connections_are_bounded() {
        let streams = Streams::new();
        let held: Vec<_> = (0..MAX_UNNAMED).map(|_| dial(&streams, b"half")).collect();
        let mut refused = dial(&streams, b"half");
        let end = tokio::task::spawn_blocking(move || refused.read(&mut [0])).await.unwrap();
        // Closed with what it said unread.
        assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        drop(held);
    }
}
