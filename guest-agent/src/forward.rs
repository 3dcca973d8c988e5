//! Connections to servers on the guest's loopback, which the host asks for: what a port-forward comes to.
//!
//! ```text
//! shim <── one vsock stream, port 1025 ──> relay <── TCP, 127.0.0.1 or ::1 ──> server in a container
//! ```
//!
//! The stream is dialled only when the server has answered, so that the host learns of a port without one by the
//! call's own answer.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use agent_api::sandbox::ForwardRequest;
use agent_api::stream::StreamId;
use agent_api::ttrpc::Code;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::TcpStream;

use crate::fd::Fd;
use crate::host::Host;
use crate::stdio::{Step, step};

/// How long both addresses together have to answer. On a loopback that is at once, unless a server's queue is full.
const ANSWER: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No port has this number.
    #[error("port {0} is not within 1 to 65535")]
    Port(u32),
    /// Nobody there.
    #[error("no server on port {port} of the loopback")]
    Refused {
        /// The port.
        port: u16,
        /// What the address that was tried last said.
        #[source]
        source: io::Error,
    },
    /// A server that does not take connections.
    #[error("the server on port {port} has not answered for {} s", ANSWER.as_secs())]
    Late {
        /// The port.
        port: u16,
    },
    /// The host did not take its stream.
    #[error("cannot open {0} on the host")]
    Dial(StreamId, #[source] io::Error),
    /// A descriptor cannot be used.
    #[error("cannot prepare the connection")]
    Prepare(#[source] io::Error),
}

impl ForwardError {
    /// What the host is told.
    pub fn code(&self) -> Code {
        match self {
            Self::Port(_) => Code::INVALID_ARGUMENT,
            Self::Refused { .. } => Code::FAILED_PRECONDITION,
            Self::Late { .. } => Code::DEADLINE_EXCEEDED,
            Self::Dial(..) | Self::Prepare(_) => Code::INTERNAL,
        }
    }
}

/// Connects the server with the stream that the request names, and leaves them to each other.
pub async fn open(host: &Host, request: &ForwardRequest) -> Result<(), ForwardError> {
    let port = u16::try_from(request.port).ok().filter(|port| *port > 0);
    let port = port.ok_or(ForwardError::Port(request.port))?;
    let connected = tokio::time::timeout(ANSWER, connect(port, request.ipv6)).await;
    let server = connected.map_err(|_| ForwardError::Late { port })??;
    let stream = StreamId(request.stream);
    let host = host.dial_stream(stream).await.map_err(|error| ForwardError::Dial(stream, error))?;
    tokio::spawn(async move {
        if let Err(error) = relay(&host, &server).await {
            log::debug!("forwarded connection to port {port}: {error}");
            // Whoever is cut off must not take that for the regular end.
            let abort = libc::linger { l_onoff: 1, l_linger: 0 };
            let _ = setsockopt(&server, sockopt::Linger, &abort); // it fails on a connection that is gone
        }
    });
    Ok(())
}

async fn connect(port: u16, ipv6_first: bool) -> Result<Fd, ForwardError> {
    let mut addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    if ipv6_first {
        addresses.reverse();
    }
    let server = match TcpStream::connect((addresses[0], port)).await {
        Ok(server) => server,
        Err(_) => TcpStream::connect((addresses[1], port))
            .await
            .map_err(|source| ForwardError::Refused { port, source })?,
    };
    // Whoever sent the bytes has gathered them already.
    server.set_nodelay(true).map_err(ForwardError::Prepare)?;
    server.into_std().and_then(|server| Fd::new(server.into())).map_err(ForwardError::Prepare)
}

/// Copies both ways until both have ended, each end passed on as one, or until either side breaks.
async fn relay(host: &Fd, server: &Fd) -> io::Result<()> {
    tokio::try_join!(one_way(host, server), one_way(server, host)).map(drop)
}

async fn one_way(from: &Fd, to: &Fd) -> io::Result<()> {
    loop {
        match step(from, to)? {
            Step::Moved(rest) => {
                to.write_all(&rest).await?;
                tokio::task::coop::consume_budget().await;
            }
            Step::End => return to.finish_writing(),
            Step::Empty => tokio::select! {
                ready = from.wait_readable() => ready?,
                error = to.wait_gone() => return Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::*;

    /// A host that takes one stream, and says what it was given on it.
    struct Shim {
        folder: std::path::PathBuf,
        listener: UnixListener,
    }

    impl Shim {
        fn new(name: &str) -> Shim {
            let folder = std::env::temp_dir().join(format!("ctvm-forward-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            let listener = UnixListener::bind(folder.join(agent_api::STREAM_PORT.to_string())).unwrap();
            Shim { folder, listener }
        }

        fn host(&self) -> Host {
            Host::Unix(self.folder.clone())
        }

        /// The stream, once its id was read.
        fn accept(&self) -> std::os::unix::net::UnixStream {
            let (mut stream, _) = self.listener.accept().unwrap();
            let mut hello = [0; 8];
            stream.read_exact(&mut hello).unwrap();
            assert_eq!(StreamId::from_hello(hello), StreamId(7));
            stream
        }
    }

    impl Drop for Shim {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    fn request(port: u16, ipv6: bool) -> ForwardRequest {
        ForwardRequest { port: port.into(), ipv6, stream: 7, ..Default::default() }
    }

    fn read_to_end(mut from: impl std::io::Read + Send + 'static) -> JoinHandle<io::Result<Vec<u8>>> {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).map(|_| bytes)
        })
    }

    #[tokio::test]
    async fn bytes_and_half_closes_pass_both_ways() {
        let shim = Shim::new("both");
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // ::1 is tried first, and nobody is there.
        open(&shim.host(), &request(server.local_addr().unwrap().port(), true)).await.unwrap();
        let (stream, (server, _)) = (shim.accept(), server.accept().unwrap());
        let data: Vec<u8> = (0..251).cycle().take(3_000_000).collect();
        let (up, down) = (data.clone(), data.iter().rev().copied().collect::<Vec<u8>>());
        let (at_server, sent_down) = (read_to_end(server.try_clone().unwrap()), down.clone());
        let (mut client, expected_up) = (stream.try_clone().unwrap(), up.clone());
        let sender = std::thread::spawn(move || {
            client.write_all(&up).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
        });
        let done = tokio::task::spawn_blocking(move || {
            sender.join().unwrap();
            assert!(at_server.join().unwrap().unwrap() == expected_up);
            // One direction is over; the other is not.
            let at_client = read_to_end(stream);
            let mut server = server;
            server.write_all(&sent_down).unwrap();
            drop(server);
            assert!(at_client.join().unwrap().unwrap() == down);
        });
        done.await.unwrap();
    }

    #[tokio::test]
    async fn a_side_that_goes_takes_the_other_along() {
        let shim = Shim::new("gone");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        open(&shim.host(), &request(listener.local_addr().unwrap().port(), false)).await.unwrap();
        let (stream, (server, _)) = (shim.accept(), listener.accept().unwrap());
        // The host hangs up on a server that says nothing and takes no notice of an end.
        drop(stream);
        let since = std::time::Instant::now();
        let told = loop {
            if let Some(error) = server.take_error().unwrap() {
                break error;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "the server's connection lives on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        // What a reset is to a socket whose input has ended.
        assert_eq!(told.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_port_without_a_server_is_told_and_no_stream_is_dialled() {
        let shim = Shim::new("refused");
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let error = open(&shim.host(), &request(free, false)).await.unwrap_err();
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        assert_eq!(error.to_string(), format!("no server on port {free} of the loopback"));
        for port in [0, 65_536, u32::MAX] {
            let request = ForwardRequest { port, ..Default::default() };
            let error = open(&shim.host(), &request).await.unwrap_err();
            assert_eq!(
                (error.code(), error.to_string().contains(&port.to_string())),
                (Code::INVALID_ARGUMENT, true)
            );
        }
        shim.listener.set_nonblocking(true).unwrap();
        assert_eq!(shim.listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
