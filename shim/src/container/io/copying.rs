//! The copying, from its start to its end.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::io::ioctl_fionread;
use rustix::net::Shutdown;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fifos::{Fifos, Output};
use super::{Streams, bytes};
use crate::container::logger::Logger;
use crate::streaming::pump::Pump;
use crate::watched::watch as watch_fd;

/// The copying of one process.
#[derive(Debug, Default)]
pub struct Copying {
    /// Held until `CloseIO`.
    stdin_writer: Option<OwnedFd>,
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    logger: Option<Logger>,
    pumps: Vec<Pump>,
    /// What waits for a reader ends with it.
    kept: Option<watch::Sender<()>>,
    moved: Arc<AtomicU64>,
}

impl Copying {
    /// Starts to copy.
    ///
    /// # Errors
    /// When a descriptor cannot be watched.
    pub fn start(fifos: Fifos, streams: Streams, terminal: bool) -> std::io::Result<Self> {
        let mut copying = Copying::default();
        copying.logger = fifos.logger;
        copying.pumps = fifos.pumps;
        let (kept, until_stopped) = watch::channel(());
        copying.kept = Some(kept);
        let stdout = streams.stdout.map(stream_fd).transpose()?.map(Arc::new);
        let input =
            if terminal { stdout.clone() } else { streams.stdin.map(stream_fd).transpose()?.map(Arc::new) };
        if let (Some((reader, writer)), Some(stream)) = (fifos.stdin, input) {
            let reader = watch_fd(reader)?;
            copying.stdin_writer = Some(writer);
            copying.input = Some(tokio::spawn(async move {
                if let Err(e) = bytes::copy(&reader, &stream, &AtomicU64::new(0)).await {
                    log::debug!("stdin: {e}");
                }
                // The guest sees the end of its input; with a terminal it also keeps its output.
                let _ = rustix::net::shutdown(stream.get_ref(), Shutdown::Write);
            }));
        }
        let stderr = streams.stderr.map(stream_fd).transpose()?.map(Arc::new);
        for (name, stream, output) in [("stdout", stdout, fifos.stdout), ("stderr", stderr, fifos.stderr)] {
            let (Some(stream), Some(output)) = (stream, output) else { continue };
            let moved = copying.moved.clone();
            copying.outputs.push(match output {
                Output::Pipe(fifo) => {
                    let fifo = watch_fd(fifo)?;
                    let until_stopped = until_stopped.clone();
                    tokio::spawn(async move {
                        if let Err(e) = bytes::copy(&stream, &fifo, &moved).await {
                            log::debug!("{name}: {e}");
                        }
                        tokio::spawn(until_read(fifo, until_stopped));
                    })
                }
                Output::File(file) => tokio::spawn(async move {
                    if let Err(e) = bytes::append(&stream, &file, &moved).await {
                        log::warn!("{name} to its file: {e}");
                    }
                }),
            });
        }
        Ok(copying)
    }

    /// Lets the input end once the client has closed its end too.
    pub fn close_stdin(&mut self) {
        self.stdin_writer = None;
    }

    /// Waits for the output to end: at most `longest`, and not for a stream that stays open with nothing coming for
    /// `quiet`, which is how a daemon that outlives its parent holds it. Says whether it ended.
    pub async fn drain(&mut self, longest: Duration, quiet: Duration) -> bool {
        let moved = self.moved.clone();
        let ended = async {
            for output in &mut self.outputs {
                // A copier that panicked or was stopped has ended as well.
                let _ = output.await;
            }
            // It ends with its input, and then all it was given is where it belongs.
            if let Some(logger) = &mut self.logger {
                logger.ended().await;
            }
        };
        let gave_up = async {
            let mut before = moved.load(Ordering::Relaxed);
            loop {
                tokio::time::sleep(quiet).await;
                let now = moved.load(Ordering::Relaxed);
                if now == before {
                    break;
                }
                before = now;
            }
        };
        let ended = tokio::select! {
            biased;
            () = ended => true,
            () = gave_up => false,
            () = tokio::time::sleep(longest) => false,
        };
        if ended {
            self.outputs.clear();
        }
        ended
    }

    /// Stops copying and closes everything.
    pub fn stop(&mut self) {
        self.stdin_writer = None;
        for task in self.outputs.drain(..).chain(self.input.take()) {
            task.abort();
        }
        self.logger = None;
        self.kept = None;
        self.pumps.clear();
    }
}

/// How often an ended process's pipe is looked at when nobody reads it.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Keeps a pipe open until it is empty, or nobody wants it any more.
async fn until_read(pipe: AsyncFd<OwnedFd>, mut until_stopped: watch::Receiver<()>) {
    // There is no event for it. A reader that is there is through in no time.
    let mut pause = Duration::from_millis(1);
    while ioctl_fionread(pipe.get_ref()).is_ok_and(|unread| unread > 0) {
        tokio::select! {
            _ = until_stopped.changed() => break,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stream_fd(stream: UnixStream) -> std::io::Result<AsyncFd<OwnedFd>> {
    stream.set_nonblocking(true)?;
    watch_fd(stream.into())
}
