//! Standard streams: how a process's stdin, stdout and stderr are named and recognised.
//!
//! The shim invents an id, unique within the sandbox, and names it in `Create` or `Exec` as `stream:<decimal id>`.
//! The agent dials [`crate::STREAM_PORT`] once for each name and writes the id, 8 bytes, little-endian; then the
//! connection is the stream, raw. stdin flows to the guest, stdout and stderr to the host, a terminal both ways on
//! the connection named by `stdout`. A half-close ends a direction. The agent dials before it answers `Create` or
//! `Exec`, so the shim sees every connection of a process at the latest with that answer (they may come in any
//! order and from several processes at once).
//!
//! A forwarded connection (`Sandbox.Forward`) is such a stream as well, both ways.

use std::fmt;
use std::str::FromStr;

/// What a stream's name begins with.
pub const PREFIX: &str = "stream:";

/// Bytes of the hello at the head of a stream connection.
pub const HELLO_LEN: usize = 8;

/// One standard stream of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// A stream name that is neither empty nor `stream:<decimal id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadStreamName(String);

impl StreamId {
    /// Reads the name in a Task request: `None` for `""`, which asks for `/dev/null`.
    ///
    /// # Errors
    /// [`BadStreamName`] for anything but `""` and `stream:<decimal id>`.
    pub fn from_name(name: &str) -> Result<Option<Self>, BadStreamName> {
        if name.is_empty() { Ok(None) } else { name.parse().map(Some) }
    }

    /// The first bytes on this stream's connection.
    pub fn hello(self) -> [u8; HELLO_LEN] {
        self.0.to_le_bytes()
    }

    /// The id that a connection's first bytes announce.
    pub fn from_hello(hello: [u8; HELLO_LEN]) -> Self {
        Self(u64::from_le_bytes(hello))
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl FromStr for StreamId {
    type Err = BadStreamName;

    fn from_str(name: &str) -> Result<Self, BadStreamName> {
        let digits = name.strip_prefix(PREFIX).filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
        digits.and_then(|d| d.parse().ok()).map(Self).ok_or_else(|| BadStreamName(name.to_owned()))
    }
}

impl fmt::Display for BadStreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream name {:?} is neither empty nor \"{PREFIX}<decimal id>\"", self.0)
    }
}

impl std::error::Error for BadStreamName {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_hello_round_trip() {
        for id in [0, 7, u64::MAX] {
            let id = StreamId(id);
            assert_eq!(StreamId::from_name(&id.to_string()), Ok(Some(id)));
            assert_eq!(StreamId::from_hello(id.hello()), id);
        }
        assert_eq!(StreamId(0x0102).hello(), [2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn empty_name_is_no_stream() {
        assert_eq!(StreamId::from_name(""), Ok(None));
    }

    #[test]
    fn other_names_are_refused() {
        for name in
            ["stream:", "stream:-1", "stream:+1", "stream:1 ", "/run/fifo", "stream:18446744073709551616"]
        {
            let error = StreamId::from_name(name).expect_err(name);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
