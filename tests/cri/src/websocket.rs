//! The streaming side of CRI: `v4.channel.k8s.io` over WebSocket, where the first byte of a message names the stream.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

/// Most that any message may let wait for itself.
const LIMIT: Duration = Duration::from_secs(120);

const PROTOCOL: &str = "v4.channel.k8s.io";

/// A stream's number in exec and attach.
pub const STDIN: u8 = 0;
/// See [`STDIN`].
pub const STDOUT: u8 = 1;
/// See [`STDIN`].
pub const STDERR: u8 = 2;
/// Where the server says how it ended, as a Kubernetes `Status`.
pub const STATUS: u8 = 3;
/// Where the client says how large its terminal is.
pub const RESIZE: u8 = 4;

/// An open connection.
#[derive(Debug)]
pub struct Channels {
    socket: WebSocket<TcpStream>,
    /// What came on a stream while another was waited for, or behind what was waited for.
    unread: BTreeMap<u8, Vec<u8>>,
}

impl Channels {
    /// Opens what a CRI server gave the address of.
    pub fn open(url: &str) -> Result<Channels> {
        let mut request = url.replacen("http", "ws", 1).into_client_request()?;
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let uri = request.uri();
        let host = uri.host().context("an address without a host")?;
        let port = uri.port_u16().context("an address without a port")?;
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let (socket, _) = tungstenite::client(request, stream).map_err(|e| anyhow::anyhow!("{url}: {e}"))?;
        Ok(Channels { socket, unread: BTreeMap::new() })
    }

    /// Sends bytes on a stream.
    pub fn send(&mut self, stream: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[stream], bytes].concat();
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// The next message of any stream, beside what [`Channels::read_until`] left unread; none at the end.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            match self.socket.read() {
                Ok(Message::Binary(bytes)) => match bytes.split_first() {
                    Some((stream, rest)) => return Ok(Some((*stream, rest.to_vec()))),
                    None => bail!("a message without a stream"),
                },
                Ok(Message::Close(_)) => return Ok(None),
                Ok(_) => {}
                Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                    return Ok(None);
                }
                // containerd's server hangs up without a word.
                Err(tungstenite::Error::Protocol(
                    tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
                )) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Reads a stream up to and with `wanted`.
    pub fn read_until(&mut self, stream: u8, wanted: &str) -> Result<String> {
        loop {
            let unread = self.unread.entry(stream).or_default();
            if let Some(at) = unread.windows(wanted.len()).position(|bytes| bytes == wanted.as_bytes()) {
                let read: Vec<u8> = unread.drain(..at + wanted.len()).collect();
                return Ok(String::from_utf8_lossy(&read).into_owned());
            }
            let so_far = String::from_utf8_lossy(unread).into_owned();
            match self.receive()? {
                Some((from, bytes)) => self.unread.entry(from).or_default().extend(bytes),
                None => bail!("the stream ended without {wanted:?}: {so_far:?}"),
            }
        }
    }

    /// Reads to the end: the rest of standard output, standard error and the status.
    pub fn read_all(&mut self) -> Result<[String; 3]> {
        while let Some((stream, bytes)) = self.receive()? {
            self.unread.entry(stream).or_default().extend(bytes);
        }
        Ok([STDOUT, STDERR, STATUS].map(|stream| {
            String::from_utf8_lossy(&self.unread.remove(&stream).unwrap_or_default()).into_owned()
        }))
    }

    /// Hangs up.
    pub fn close(mut self) -> Result<()> {
        self.socket.close(None)?;
        // To the answer: what is read here is of no use any more.
        while self.receive()?.is_some() {}
        Ok(())
    }
}
