//! `ctvm metrics`: the metrics of every sandbox of this node, printed or served to Prometheus.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Args;

use crate::cli::Failure;
use crate::cli::merge::Merged;
use crate::cli::node::{self, NodeError};
use crate::sandbox::operator::exposition::{Exposition, Kind};
use crate::sandbox::operator::http::{self, HEAD_TIMEOUT, Method, RequestError};

/// Clients at once.
const MAX_CLIENTS: usize = 16;
/// How long one may take to read its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to.
#[derive(Debug, Clone, Args)]
pub struct Metrics {
    /// Serve them at /metrics until killed: HOST:PORT, or unix:PATH (mode 0600)
    #[arg(long, value_name = "ADDRESS", value_parser = listen)]
    pub listen: Option<Listen>,
}

/// Where to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// Address and port.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

fn listen(text: &str) -> Result<Listen, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        return match path.starts_with('/') {
            true => Ok(Listen::Unix(path.into())),
            false => Err(format!("{text:?}: unix: wants an absolute path")),
        };
    }
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
            Ok(Listen::Tcp(text.to_owned()))
        }
        _ => Err(format!("{text:?} is neither HOST:PORT, such as 127.0.0.1:9477, nor unix:PATH")),
    }
}

/// Prints or serves.
///
/// # Errors
/// See [`Failure`]. A sandbox that does not answer is none: it is told in the metrics.
pub fn run(options: &Metrics) -> Result<(), Failure> {
    match &options.listen {
        None => {
            let text = collect()?;
            std::io::stdout()
                .write_all(text.as_bytes())
                .map_err(|source| Failure::Local { what: "standard output", source })
        }
        Some(Listen::Tcp(address)) => {
            let listener = TcpListener::bind(address).map_err(|e| cannot_listen(address, &e))?;
            eprintln!("ctvm: metrics at http://{address}/metrics");
            serve(|| listener.accept().map(|(stream, _)| stream))
        }
        Some(Listen::Unix(path)) => {
            let listener = bind(path).map_err(|e| cannot_listen(&path.display().to_string(), &e))?;
            eprintln!("ctvm: metrics at unix:{}, path /metrics", path.display());
            serve(|| listener.accept().map(|(stream, _)| stream))
        }
    }
}

fn cannot_listen(address: &str, error: &io::Error) -> Failure {
    let source = io::Error::new(error.kind(), format!("{address}: {error}"));
    Failure::Local { what: "listening", source }
}

/// A socket that the last run left is replaced; one that answers, or another kind of file, is not.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let is_socket = path.symlink_metadata().is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The metrics of all sandboxes, and how many there are.
///
/// # Errors
/// [`NodeError::Read`].
pub fn collect() -> Result<String, NodeError> {
    let all = node::sandboxes()?;
    let answers = node::each(&all, |found| found.get("/metrics"));
    let mut merged = Merged::default();
    let mut counts = [("answering", 0_u64), ("silent", 0), ("dead", 0)];
    for (found, answer) in all.iter().zip(answers) {
        let state = match &answer {
            Ok(_) => 0,
            Err(NodeError::Dead { .. }) => 2,
            Err(_) => 1,
        };
        counts[state].1 += 1;
        match answer {
            Ok(text) => merged.add(&text),
            Err(_) => {
                let mut down = Exposition::new(&[("namespace", &found.namespace), ("sandbox", &found.id)]);
                let help = "1 if the VM runs and its monitor and agent answered within a second.";
                down.gauge("ctvm_sandbox_up", help, false);
                merged.add(&down.finish());
            }
        }
    }
    let mut node = Exposition::new(&[]);
    let help = "Sandboxes of this node: answering, silent (the shim runs), dead (it does not).";
    let mut family = node.family("ctvm_node_sandboxes", Kind::Gauge, help);
    for (state, count) in counts {
        family.sample(&[("state", state)], count);
    }
    merged.add(&node.finish());
    Ok(merged.text())
}

/// A connection with time limits.
trait Stream: Read + Write + Send + 'static {
    fn limit(&self, read: Duration, write: Duration) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn limit(&self, read: Duration, write: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(read))?;
        self.set_write_timeout(Some(write))
    }
}

impl Stream for std::net::TcpStream {
    fn limit(&self, read: Duration, write: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(read))?;
        self.set_write_timeout(Some(write))
    }
}

fn serve<S: Stream>(mut accept: impl FnMut() -> io::Result<S>) -> Result<(), Failure> {
    static CLIENTS: AtomicUsize = AtomicUsize::new(0);
    loop {
        let stream = match accept() {
            Ok(stream) => stream,
            Err(e) => {
                eprintln!("ctvm: accepting: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if CLIENTS.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            CLIENTS.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        std::thread::spawn(move || {
            if let Err(e) = attend(stream) {
                eprintln!("ctvm: a client: {e}");
            }
            CLIENTS.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn attend(mut stream: impl Stream) -> io::Result<()> {
    stream.limit(HEAD_TIMEOUT, WRITE_TIMEOUT)?;
    let (status, content_type, body) = match read_request(&mut stream) {
        Ok(request) if request.method != Method::Get => {
            ("405 Method Not Allowed", http::TEXT_TYPE, "the only method is GET\n".to_owned())
        }
        Ok(request) if request.path == "/metrics" => match collect() {
            Ok(text) => ("200 OK", http::METRICS_TYPE, text),
            Err(e) => ("500 Internal Server Error", http::TEXT_TYPE, format!("{e}\n")),
        },
        Ok(_) => ("404 Not Found", http::TEXT_TYPE, "there is /metrics\n".to_owned()),
        Err(e) => match e.status() {
            Some(status) => (status, http::TEXT_TYPE, format!("{e}\n")),
            None => return Ok(()),
        },
    };
    let head = http::head(status, content_type, Some(body.len()));
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

fn read_request(stream: &mut impl Read) -> Result<http::Request, RequestError> {
    let begun = std::time::Instant::now();
    let mut head = Vec::new();
    let mut part = [0; 512];
    loop {
        if let Some(request) = http::parse(&head)? {
            return Ok(request);
        }
        if begun.elapsed() > HEAD_TIMEOUT {
            return Err(RequestError::Late);
        }
        match stream.read(&mut part) {
            Ok(0) => return Err(RequestError::Gone),
            Ok(n) => head.extend_from_slice(&part[..n]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(RequestError::Late);
            }
            Err(_) => return Err(RequestError::Gone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert_eq!(listen("127.0.0.1:9477"), Ok(Listen::Tcp("127.0.0.1:9477".into())));
        assert_eq!(listen("[::1]:9477"), Ok(Listen::Tcp("[::1]:9477".into())));
        assert_eq!(listen("unix:/run/m"), Ok(Listen::Unix("/run/m".into())));
        assert_eq!(listen("unix:///run/m"), Ok(Listen::Unix("/run/m".into())));
        for wrong in ["", "9477", ":9477", "host", "host:99999", "unix:m", "/run/m"] {
            assert!(listen(wrong).unwrap_err().contains(&format!("{wrong:?}")));
        }
    }

    #[test]
    fn a_left_socket_is_replaced_and_a_served_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m");
        let first = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        bind(&path).unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        bind(&file).unwrap_err();
        assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    }

    #[test]
    fn wrong_requests_are_answered() {
        for (request, status) in [
            ("GET /x HTTP/1.1\r\n\r\n", "404"),
            ("PUT /metrics HTTP/1.1\r\n\r\n", "405"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\u{1}\n", "400"),
        ] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(request.as_bytes()).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            attend(server).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        }
    }
}
