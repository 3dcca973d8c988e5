//! What an operator asks a sandbox: HTTP on a Unix socket in its state directory, for root only. All is asked for with
//! `GET`, save the one thing that changes something.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | [`collect`]: Prometheus's text format |
//! | `/status` | [`status`]: JSON, from memory alone |
//! | `/logs`, `/logs?follow=1` | the last 64 KiB of the log, and then what comes |
//! | `/console` | the end of what the guest's console said |
//! | `/timeline` | stages of the start, JSON as in the timeline file |
//! | `POST /resize?…` | [`resize`]: JSON, when the VM has another size or has not got it |
//!
//! Whoever connects is trusted (the socket's mode is 0600) but not believed: heads, connections and the time they may
//! take are bounded, and what the guest said is cleaned of control characters before it gets here.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::logger;
use crate::sandbox::Sandbox;

pub mod collect;
pub mod counters;
pub mod exposition;
pub mod http;
pub mod images;
pub mod memory;
pub mod resize;
pub mod size;
pub mod status;

/// Name of the socket in a sandbox's state directory.
pub const SOCKET: &str = "metrics.sock";

/// Connections at once, those that follow the log included.
const MAX_CONNECTIONS: usize = 8;
/// Of them those that may follow the log.
const MAX_FOLLOWERS: usize = 4;
/// How long a client has to take an answer, or one part of the log.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;

/// What a sandbox keeps for its operator.
#[derive(Debug, Default)]
pub struct Operator {
    /// What happened.
    pub counters: counters::Counters,
    turns: collect::Turns,
}

/// Opens the socket in `state_dir`, which goes with that directory. Its path may be longer than a socket's address.
///
/// # Errors
/// When it cannot be made.
pub fn listen(state_dir: &Path) -> io::Result<UnixListener> {
    let dir = rustix::fs::open(state_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(&short)?)?;
    // Before anybody can connect.
    rustix::fs::chmodat(&dir, SOCKET, Mode::RUSR | Mode::WUSR, rustix::fs::AtFlags::empty())?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Answers until the process ends.
pub async fn serve(sandbox: Arc<Sandbox>, listener: UnixListener) {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(e) => return log::warn!("no metrics: {e}"),
    };
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let followers = Arc::new(Semaphore::new(MAX_FOLLOWERS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Descriptors may have run out; they come back.
                log::debug!("accepting on {SOCKET}: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            refuse_at_once(&stream);
            continue;
        };
        let (sandbox, followers) = (sandbox.clone(), followers.clone());
        let attending: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            // A client that went away misses nothing.
            let _ = attend(&sandbox, stream, &followers).await;
            drop(permit);
        });
        tokio::spawn(attending);
    }
}

/// Nobody waits for this client.
fn refuse_at_once(stream: &UnixStream) {
    let text = busy();
    let _ = stream.try_write(text.as_bytes());
}

fn busy() -> String {
    let body = format!("more than {MAX_CONNECTIONS} connections, or {MAX_FOLLOWERS} that follow the log\n");
    http::head("503 Service Unavailable", http::TEXT_TYPE, Some(body.len())) + &body
}

async fn attend(sandbox: &Arc<Sandbox>, mut stream: UnixStream, followers: &Semaphore) -> io::Result<()> {
    let request = match http::read(&mut stream).await {
        Ok(request) => request,
        Err(e) => {
            let Some(status) = e.status() else { return Ok(()) };
            return answer(&mut stream, status, http::TEXT_TYPE, &format!("{e}\n")).await;
        }
    };
    if (request.method, request.path.as_str()) == (http::Method::Post, "/resize") {
        let (status, content_type, body) = resize::answer(sandbox, &request.query).await;
        return answer(&mut stream, status, content_type, &body).await;
    }
    if request.method != http::Method::Get || request.path == "/resize" {
        let text = "GET is for all but /resize, and POST for that\n";
        return answer(&mut stream, "405 Method Not Allowed", http::TEXT_TYPE, text).await;
    }
    let (content_type, body) = match (request.path.as_str(), request.query.as_str()) {
        ("/metrics", _) => (http::METRICS_TYPE, collect::metrics(sandbox).await),
        ("/status", _) => {
            let status = status::Status::of(sandbox);
            (http::JSON_TYPE, serde_json::to_string(&status).expect("our own types serialise"))
        }
        ("/logs", "follow=1") => {
            let Ok(_permit) = followers.try_acquire() else {
                return stream.write_all(busy().as_bytes()).await;
            };
            return follow(&mut stream).await;
        }
        ("/logs", _) => (http::TEXT_TYPE, all_lines()),
        ("/console", _) => (http::TEXT_TYPE, sandbox.console_text()),
        ("/timeline", _) => (http::JSON_TYPE, sandbox.timeline.to_json()),
        _ => {
            let text =
                "there are /metrics, /status, /logs, /logs?follow=1, /console, /timeline and POST /resize\n";
            return answer(&mut stream, "404 Not Found", http::TEXT_TYPE, text).await;
        }
    };
    answer(&mut stream, "200 OK", content_type, &body).await
}

async fn answer(stream: &mut UnixStream, status: &str, content_type: &str, body: &str) -> io::Result<()> {
    let head = http::head(status, content_type, Some(body.len()));
    within(async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await
    })
    .await
}

async fn within(writing: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(WRITE_TIMEOUT, writing).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

fn all_lines() -> String {
    let mut lines = Vec::new();
    let mut position = 0;
    loop {
        let part = logger::ring().read(&mut position);
        if part.bytes.is_empty() {
            return String::from_utf8_lossy(&lines).into_owned();
        }
        lines.extend(part.bytes);
    }
}

/// The log from the oldest line on, until the client goes away.
async fn follow(stream: &mut UnixStream) -> io::Result<()> {
    let head = http::head("200 OK", http::TEXT_TYPE, None);
    within(stream.write_all(head.as_bytes())).await?;
    let mut position = 0;
    loop {
        // Before the look, so that no line falls between the two.
        let mut more = pin!(logger::ring().more());
        more.as_mut().enable();
        let part = logger::ring().read(&mut position);
        if part.missed > 0 {
            let text = format!("({} bytes of the log came too fast and are left out)\n", part.missed);
            within(stream.write_all(text.as_bytes())).await?;
        }
        if !part.bytes.is_empty() {
            within(stream.write_all(&part.bytes)).await?;
            continue;
        }
        tokio::select! {
            () = more => {}
            () = gone(stream) => return Ok(()),
        }
    }
}

/// Waits for the client to hang up.
async fn gone(stream: &UnixStream) {
    let mut ignored = [0; 64];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut ignored) {
            Ok(1..) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
        }
    }
}
