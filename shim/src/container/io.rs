//! A process's standard streams: copied between containerd's fifos and the guest's vsock streams.
//!
//! ```text
//! client ─ fifo ──> splice ─> stream ─> guest's stdin        each arrow ends the next one
//! client <─ fifo ── splice <─ stream <─ guest's stdout/stderr
//! logger <─ pipe ── splice <─┤  binary://…, binary-v2://…
//!   file <───────── write  <─┘  file://…
//! ```
//! In place of a fifo there may be a pipe of our own, whose other end is a stream of containerd's ([`streaming`](crate::streaming)).
//!
//! Bytes move inside the kernel (`splice`): this process holds none of them, and a slow reader slows the guest down,
//! through the pipe and the stream's credit, instead of filling memory. A file is the exception: it cannot be spliced to
//! where it is appended to, and 16 KiB of its stream pass through here at a time.
//!
//! Both ends of an output fifo are held open, so that a client may come and go without the writer failing or the
//! reader seeing the end. That comes when the process has ended and somebody has read what is in the pipe, or the process
//! is deleted: a containerd that was away meanwhile opens the fifo anew, which waits for a writer, and finds the rest. Of
//! an input fifo the writing end is held until `CloseIO`: a client that reconnects does not end the input.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::container::logger::LoggerError;

mod bytes;
mod copying;
mod fifos;
#[cfg(test)]
mod tests;

pub use copying::Copying;
pub use fifos::Fifos;

/// Where a process's streams go, in containerd's words. Empty is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Fifo to read from, or the URI of a stream of the sandbox's own socket (`ttrpc+unix://`).
    pub stdin: String,
    /// Fifo to write to, or the URI of a stream, a file (`file://`) or a logger (`binary://`, `binary-v2://`).
    pub stdout: String,
    /// The same; unused with a terminal.
    pub stderr: String,
    /// The process has a terminal: one stream both ways.
    pub terminal: bool,
}

impl Stdio {
    /// Paths of the fifos that are opened.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let streams = [self.stdin.as_str(), &self.stdout, self.used_stderr()];
        streams.into_iter().filter(|p| p.starts_with('/')).map(PathBuf::from)
    }

    fn used_stderr(&self) -> &str {
        if self.terminal { "" } else { &self.stderr }
    }
}

/// A stream that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// Not a path, and of no known kind.
    #[error(
        "{stream} {uri:?}: supported are a fifo's path, a stream of this sandbox's socket (ttrpc+unix://) and, for output, file://, binary:// and binary-v2://"
    )]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// As containerd named it.
        uri: String,
    },
    /// A program for each output.
    #[error("stdout {stdout:?} and stderr {stderr:?}: one logger takes both")]
    Loggers {
        /// As containerd named it.
        stdout: String,
        /// As containerd named it.
        stderr: String,
    },
    /// A logger that does not take the output.
    #[error("logger {uri:?}")]
    Logger {
        /// As containerd named it.
        uri: String,
        /// Why not.
        #[source]
        source: LoggerError,
    },
    /// Another kind of file.
    #[error("{stream} {path:?} is not a fifo")]
    NotFifo {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: String,
    },
    /// It cannot be opened.
    #[error("opening {stream} {path:?}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The guest's ends.
#[derive(Debug, Default)]
pub struct Streams {
    /// Its stdin; with a terminal absent.
    pub stdin: Option<UnixStream>,
    /// Its stdout; with a terminal both ways.
    pub stdout: Option<UnixStream>,
    /// Its stderr.
    pub stderr: Option<UnixStream>,
}
