//! The streaming side of CRI: `v4.channel.k8s.io` over WebSocket, where the first byte of a message names the stream.

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
pub struct Channels(WebSocket<TcpStream>);

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
        Ok(Channels(socket))
    }

    /// Sends bytes on a stream.
    pub fn send(&mut self, stream: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[stream], bytes].concat();
        Ok(self.0.send(Message::binary(message))?)
    }

    /// The next bytes of any stream; none at the end.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            match self.0.read() {
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

    /// Reads until a stream has brought `wanted`; all that came on it.
    pub fn read_until(&mut self, stream: u8, wanted: &str) -> Result<String> {
        let mut got = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&got).into_owned();
            if text.contains(wanted) {
                return Ok(text);
            }
            match self.receive()? {
                Some((from, bytes)) if from == stream => got.extend(bytes),
                Some(_) => {}
                None => bail!("the stream ended without {wanted:?}: {text:?}"),
            }
        }
    }

    /// Reads to the end: standard output, standard error and the status.
    pub fn read_all(&mut self) -> Result<[String; 3]> {
        let mut got = [const { Vec::new() }; 3];
        while let Some((stream, bytes)) = self.receive()? {
            if let Some(to) = got.get_mut(usize::from(stream).wrapping_sub(1)) {
                to.extend(bytes);
            }
        }
        Ok(got.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Hangs up.
    pub fn close(mut self) -> Result<()> {
        self.0.close(None)?;
        // To the answer: what is read here is of no use any more.
        while self.receive()?.is_some() {}
        Ok(())
    }
}
