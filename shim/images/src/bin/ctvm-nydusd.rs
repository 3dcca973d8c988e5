//! `ctvm-nydusd … --apisock SOCKET …`: what nydus-snapshotter starts and asks in place of `nydusd`, on nodes where containers of Nydus images
//! are VMs'.
//!
//! The snapshotter hands an image to a runtime only when a daemon of its own says that it runs. `nydusd` would then mount the image on the
//! host a second time, and fetch it by itself. This one says yes to each mount and mounts nothing: the image service fetches, and the guest
//! mounts. So it has no state, and may be killed and started again at any time.

#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

/// Most bytes of a request's head, and of its body: a daemon's configuration with all its mirrors is far smaller.
const MAX: u64 = 1 << 20;

const HELP: &str = "ctvm-nydusd [fuse] --apisock SOCKET [--id ID] [nydusd's other options, which mean nothing here]

Answers nydus-snapshotter in place of nydusd and mounts nothing: for nodes where containers of Nydus images run in VMs.
Name it as `nydusd_path` in the snapshotter's configuration.";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.first().map(String::as_str) {
        Some("-V" | "--version") => println!("ctvm-nydusd {}", env!("CARGO_PKG_VERSION")),
        None | Some("-h" | "--help") => println!("{HELP}"),
        _ => {
            if let Err(error) = run(&words) {
                eprintln!("ctvm-nydusd: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(words: &[String]) -> Result<()> {
    let option = |name: &str| {
        let pairs = words.iter().zip(words.iter().skip(1));
        pairs.filter(|(word, _)| *word == name).map(|(_, value)| value.clone()).next_back()
    };
    let socket = option("--apisock").context("no --apisock: it is for nydus-snapshotter to start")?;
    let id = option("--id").unwrap_or_else(|| "ctvm".to_owned());
    let socket = Path::new(&socket);
    if socket.exists() {
        std::fs::remove_file(socket).with_context(|| format!("remove {}", socket.display()))?;
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("listen at {}", socket.display()))?;
    for connection in listener.incoming() {
        let (connection, id) = (connection.context("a connection")?, id.clone());
        // One that is never used is how the snapshotter notices this program's end.
        std::thread::spawn(move || match serve(&connection, &id) {
            Ok(()) => {}
            Err(error) => eprintln!("ctvm-nydusd: {error:#}"),
        });
    }
    Ok(())
}

/// Answers the requests of a connection (HTTP/1.1) until its end.
fn serve(connection: &UnixStream, id: &str) -> Result<()> {
    let mut reader = BufReader::new(connection);
    while let Some((method, path)) = request(&mut reader)? {
        let (status, body) = answer(&method, &path, id);
        let mut writer = connection;
        write!(
            writer,
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        writer.flush()?;
        if path == "/api/v1/daemon/exit" {
            std::process::exit(0);
        }
    }
    Ok(())
}

/// Method and path of the next request, without a query; its body is read and of no interest.
fn request(reader: &mut impl BufRead) -> Result<Option<(String, String)>> {
    let mut head = reader.by_ref().take(MAX);
    let mut line = String::new();
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next().context("no method")?, words.next().context("no path")?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        ensure!(head.read_line(&mut line)? > 0, "a request without an end");
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().context("a body's length")?;
        }
    }
    ensure!(length <= MAX, "a body of {length} bytes, must have at most {MAX}");
    ensure!(
        std::io::copy(&mut reader.take(length), &mut std::io::sink())? == length,
        "a body without an end"
    );
    let path = target.split('?').next().unwrap_or_default().to_owned();
    Ok(Some((method, path)))
}

/// Status and body for a request (nydus' `api/openapi/nydus-api-v1.yaml`).
fn answer(method: &str, path: &str, id: &str) -> (&'static str, String) {
    match (method, path) {
        ("GET", "/api/v1/daemon") => {
            let version = json!({
                "package_ver": env!("CARGO_PKG_VERSION"), "git_commit": "", "build_time": "", "profile": "ctvm", "rustc": "",
            });
            ("200 OK", json!({"id": id, "version": version, "state": "RUNNING"}).to_string())
        }
        ("POST" | "PUT" | "DELETE", "/api/v1/mount")
        | ("PUT", "/api/v1/daemon/start" | "/api/v1/daemon/exit") => ("204 No Content", String::new()),
        _ => {
            let message = format!("{method} {path}: nothing is mounted here; ask `ctvm image stat`");
            ("404 Not Found", json!({"code": "NotFound", "message": message}).to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_the_snapshotter_are_answered() {
        let (here, there) = UnixStream::pair().expect("sockets");
        let serving = std::thread::spawn(move || serve(&there, "x"));
        let mut reader = BufReader::new(here.try_clone().expect("a copy"));
        let mut ask = |text: &str| {
            (&here).write_all(text.as_bytes()).expect("sent");
            let (mut head, mut length) = (String::new(), 0);
            while !head.ends_with("\r\n\r\n") {
                assert!(reader.read_line(&mut head).expect("an answer") > 0, "{head}");
            }
            if let Some(value) = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")) {
                length = value.parse().expect("a length");
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            (head.lines().next().unwrap_or_default().to_owned(), String::from_utf8_lossy(&body).into_owned())
        };
        let (status, body) = ask("GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\n\r\n");
        assert!(
            status.contains("200") && body.contains("\"state\":\"RUNNING\"") && body.contains("\"id\":\"x\"")
        );
        let mount = "POST /api/v1/mount?mountpoint=%2Fm HTTP/1.1\r\ncontent-length: 7\r\n\r\n{\"a\":1}";
        assert!(ask(mount).0.contains("204"));
        let (status, body) = ask("GET /api/v1/metrics HTTP/1.1\r\n\r\n");
        assert!(status.contains("404") && body.contains("nothing is mounted here"), "{body}");
        here.shutdown(std::net::Shutdown::Both).expect("ended");
        serving.join().expect("no panic").expect("served");
    }

    #[test]
    fn what_is_no_request_ends_the_connection() {
        for text in [
            "\r\n",
            "GET\r\n\r\n",
            "GET /x HTTP/1.1\r\n",
            "PUT /x HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n",
            "PUT /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nab",
        ] {
            assert!(request(&mut text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(request(&mut &b""[..]).expect("an end").is_none());
    }
}
