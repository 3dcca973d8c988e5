//! Streams and round trips between the host and three small servers in a guest or a container, the same for all.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;

/// Sends back what it gets.
const ECHO: u16 = 7001;
/// Says one byte when it is there, and takes all it gets.
const SINK: u16 = 7002;
/// Sends [`STREAM`] bytes.
const SOURCE: u16 = 7003;

/// Bytes of one stream.
const STREAM: usize = 32 << 20;
/// Bytes of one read or write, on both sides.
const CHUNK: usize = 64 << 10;
/// Round trips in one connection.
const ROUND_TRIPS: usize = 200;
/// No answer within this time is a failure.
const LIMIT: Duration = Duration::from_secs(300);

/// A shell script that runs the servers, with busybox alone, for ever.
pub fn servers() -> String {
    let count = STREAM / CHUNK;
    format!(
        "nc -ll -p {ECHO} -e cat 2>/dev/null &\n\
         nc -ll -p {SINK} -e sh -c 'echo; exec dd of=/dev/null bs={CHUNK}' 2>/dev/null &\n\
         nc -ll -p {SOURCE} -e dd if=/dev/zero bs={CHUNK} count={count} 2>/dev/null &\n\
         wait\n"
    )
}

/// The servers of one guest, as the host sees them.
#[derive(Debug)]
pub struct Servers {
    address: IpAddr,
}

impl Servers {
    /// Waits until all of them answer.
    pub fn at(address: IpAddr) -> Result<Servers> {
        let servers = Servers { address };
        for port in [ECHO, SINK, SOURCE] {
            wait_until(&format!("{address}:{port} answers"), || Ok(servers.connect(port).is_ok()))?;
        }
        Ok(servers)
    }

    fn connect(&self, port: u16) -> Result<TcpStream> {
        // A second: as long as the first repetition of a lost request takes.
        let stream = TcpStream::connect_timeout(&SocketAddr::new(self.address, port), Duration::from_secs(1))
            .with_context(|| format!("connect to {}:{port}", self.address))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }

    /// One stream from the host, until the other side has taken all of it; MB/s.
    pub fn send(&self) -> Result<f64> {
        let mut stream = self.connect(SINK)?;
        stream.read_exact(&mut [0]).context("the sink's sign")?;
        let chunk = vec![0; CHUNK];
        let begin = Instant::now();
        for _ in 0..STREAM / CHUNK {
            stream.write_all(&chunk).context("send")?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let more = stream.read(&mut [0]).context("wait for the sink's end")?;
        ensure!(more == 0, "the sink says more than it should");
        Ok(rate(STREAM, begin))
    }

    /// One stream to the host, from its first bytes; MB/s.
    pub fn receive(&self) -> Result<f64> {
        let mut stream = self.connect(SOURCE)?;
        let mut chunk = vec![0; CHUNK];
        let first = stream.read(&mut chunk).context("receive")?;
        let begin = Instant::now();
        let mut total = first;
        loop {
            match stream.read(&mut chunk).context("receive")? {
                0 => break,
                n => total += n,
            }
        }
        ensure!(total == STREAM, "{total} bytes came, of {STREAM}");
        Ok(rate(total - first, begin))
    }

    /// Times from one byte to its echo, µs.
    pub fn round_trips(&self) -> Result<Vec<f64>> {
        const WARM_UP: usize = 5;
        let mut stream = self.connect(ECHO)?;
        stream.set_nodelay(true)?;
        let mut times = Vec::with_capacity(ROUND_TRIPS);
        for number in 0..ROUND_TRIPS + WARM_UP {
            let begin = Instant::now();
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0]).context("wait for the echo")?;
            if number >= WARM_UP {
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
        }
        Ok(times)
    }
}

/// MB/s since `begin`.
fn rate(bytes: usize, begin: Instant) -> f64 {
    bytes as f64 / begin.elapsed().as_secs_f64() / 1e6
}
