//! A process's stream between a pipe, as `container/io` has it, and the clients that containerd has for it, one at a time:
//! a newer one takes the place of an older.
//!
//! What was handed to a client that then broke off may be lost with it: nobody says what it has read. Everything else
//! waits for the next client, at most what the pipe and one message hold.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::{Client, Clients, Desk, Said};
use crate::watched::watch;

/// Bytes of a message. containerd's reader counts its window wrong for messages of more than 32 KiB.
const MESSAGE: usize = 16 * 1024;
/// Bytes that a client may send ahead.
const WINDOW: usize = 64 * 1024;
/// How long a client has to read the rest of what a process wrote that is deleted.
const LAST_READ: Duration = Duration::from_secs(5);

/// The bytes of one stream on their way.
#[derive(Debug)]
pub struct Pump {
    desk: Arc<Desk>,
    id: String,
    task: Option<JoinHandle<()>>,
}

impl Drop for Pump {
    fn drop(&mut self) {
        // Nobody comes any more, and who is there has a moment.
        self.desk.give_up(&self.id);
        let Some(task) = self.task.take() else { return };
        tokio::spawn(async move {
            let stop = task.abort_handle();
            if tokio::time::timeout(LAST_READ, task).await.is_err() {
                stop.abort();
            }
        });
    }
}

/// A pipe whose content goes to the clients of stream `id`: the end to write to.
///
/// # Errors
/// When there is no pipe to be had.
pub fn output(desk: &Arc<Desk>, id: &str) -> std::io::Result<(OwnedFd, Pump)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let reader = watch(reader)?;
    let clients = desk.claim(id);
    let task = tokio::spawn(async move { pump_out(clients, &reader).await });
    Ok((writer, Pump { desk: desk.clone(), id: id.to_owned(), task: Some(task) }))
}

/// A pipe with what the clients of stream `id` send: the end to read from. It ends when a client says that it has no more.
///
/// # Errors
/// When there is no pipe to be had.
pub fn input(desk: &Arc<Desk>, id: &str) -> std::io::Result<(OwnedFd, OwnedFd, Pump)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Held by `io` until containerd closes the input, as for a fifo.
    let second = rustix::io::fcntl_dupfd_cloexec(&writer, 0)?;
    let writer = watch(writer)?;
    let clients = desk.claim(id);
    let task = tokio::spawn(async move { pump_in(clients, &writer).await });
    Ok((reader, second, Pump { desk: desk.clone(), id: id.to_owned(), task: Some(task) }))
}

async fn pump_out(mut clients: Clients, pipe: &AsyncFd<OwnedFd>) {
    let mut unsent: Vec<u8> = Vec::new();
    let mut next = clients.recv().await;
    while let Some(client) = next {
        next = match serve(client, &mut clients, pipe, &mut unsent).await {
            Served::Whole => return,
            Served::Replaced(newer) => Some(newer),
            Served::Lost => clients.recv().await,
        };
    }
}

/// How it ended with a client.
enum Served {
    /// It has all there was.
    Whole,
    /// A newer one is here.
    Replaced(Client),
    /// It is gone.
    Lost,
}

async fn serve(
    mut client: Client,
    clients: &mut Clients,
    pipe: &AsyncFd<OwnedFd>,
    unsent: &mut Vec<u8>,
) -> Served {
    let (mut room, mut more_come) = (0usize, true);
    loop {
        if !unsent.is_empty() && room > 0 {
            let part = unsent.len().min(room);
            if !client.send_data(&unsent[..part]).await {
                return Served::Lost;
            }
            unsent.drain(..part);
            room -= part;
            continue;
        }
        tokio::select! {
            newer = clients.recv(), if more_come => match newer {
                Some(newer) => return Served::Replaced(newer),
                None => more_come = false,
            },
            said = client.says() => match said {
                Said::Room(more) => room = room.saturating_add(more as usize),
                Said::Data(_) | Said::End | Said::Lost => return Served::Lost,
            },
            read = read(pipe), if unsent.is_empty() => match read {
                Ok(bytes) if bytes.is_empty() => return Served::Whole,
                Ok(bytes) => *unsent = bytes,
                Err(e) => {
                    log::debug!("a stream's pipe: {e}");
                    return Served::Whole;
                }
            },
        }
    }
}

async fn pump_in(mut clients: Clients, pipe: &AsyncFd<OwnedFd>) {
    let mut next = clients.recv().await;
    while let Some(mut client) = next.take() {
        let mut more_come = true;
        let mut is_there = client.send_room(WINDOW).await;
        while is_there && next.is_none() {
            tokio::select! {
                newer = clients.recv(), if more_come => match newer {
                    Some(newer) => next = Some(newer),
                    None => more_come = false,
                },
                said = client.says() => match said {
                    Said::Data(bytes) => {
                        // The process has closed its input: what comes goes nowhere, and is not waited for.
                        let _ = write(pipe, &bytes).await;
                        is_there = client.send_room(bytes.len().min(WINDOW)).await;
                    }
                    Said::End => return,
                    Said::Room(_) | Said::Lost => is_there = false,
                },
            }
        }
        if next.is_none() {
            next = clients.recv().await;
        }
    }
}

/// Waits for bytes in the pipe; none at its end. Nothing is lost when this is dropped.
async fn read(pipe: &AsyncFd<OwnedFd>) -> std::io::Result<Vec<u8>> {
    loop {
        let mut ready = pipe.readable().await?;
        let mut bytes = vec![0; MESSAGE];
        match rustix::io::read(pipe.get_ref(), &mut *bytes) {
            Ok(count) => {
                bytes.truncate(count);
                return Ok(bytes);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
}

async fn write(pipe: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = pipe.writable().await?;
        match rustix::io::write(pipe.get_ref(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
