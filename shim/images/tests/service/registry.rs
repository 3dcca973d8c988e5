//! A small registry, as good or as bad as a test wants it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine;
use sha2::{Digest, Sha256};

use crate::bucket::Objects;

/// What it wants of those who ask.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Wants {
    #[default]
    Nothing,
    /// "user" with "password".
    Basic,
    /// A token of its own token service, which wants the same name and password.
    Bearer,
    /// Nobody is let in.
    Nobody,
}

/// What it has and how it behaves.
#[derive(Debug, Default)]
pub struct State {
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// By "repository:reference".
    pub manifests: BTreeMap<String, (String, Vec<u8>)>,
    pub wants: Wants,
    /// It is an object store in place of a registry.
    pub objects: Option<Objects>,
    /// Connections end without an answer.
    pub down: bool,
    /// Every answer's status is this.
    pub status: Option<u16>,
    /// Blobs are given with every byte of this range wrong.
    pub tampered: bool,
    /// So are the next so many.
    pub tampered_once: u32,
    /// Blobs end there.
    pub cut: Option<usize>,
    pub latency: Duration,
    /// Requests that were answered, as "GET path range".
    pub log: Vec<String>,
    /// Tokens that are good.
    pub tokens: u32,
    /// Bytes of blobs sent.
    pub sent: usize,
    uploads: BTreeMap<String, Vec<u8>>,
}

/// A registry that listens.
pub struct Registry {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
    stopped: Arc<std::sync::atomic::AtomicBool>,
}

/// What wraps a connection.
pub type Wrap = Arc<dyn Fn(TcpStream) -> Option<Box<dyn Stream>> + Send + Sync>;

pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Registry {
    pub fn new() -> Registry {
        Registry::wrapped(Arc::new(|stream| Some(Box::new(stream))))
    }

    pub fn wrapped(wrap: Wrap) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(State::default()));
        let stopped = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (shared, ended) = (Arc::clone(&state), Arc::clone(&stopped));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if ended.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                let (state, wrap) = (Arc::clone(&shared), Arc::clone(&wrap));
                std::thread::spawn(move || {
                    let closer = stream.try_clone();
                    if let Some(stream) = wrap(stream) {
                        serve(&state, address, stream);
                    }
                    let _ = closer.map(|closer| closer.shutdown(Shutdown::Both)); // gone already
                });
            }
        });
        Registry { address, state, thread: Some(thread), stopped }
    }

    /// With the blobs of a folder.
    pub fn with_blobs(folder: &std::path::Path) -> Registry {
        let registry = Registry::new();
        registry.add(folder);
        registry
    }

    pub fn add(&self, folder: &std::path::Path) {
        for file in std::fs::read_dir(folder).expect("a folder").flatten() {
            let bytes = std::fs::read(file.path()).expect("a blob");
            self.state().blobs.insert(file.file_name().to_string_lossy().into_owned(), bytes);
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("whole")
    }

    /// The daemon's configuration for it.
    pub fn config(&self, more: &str) -> String {
        let host = self.address;
        format!(
            r#"{{"device": {{"backend": {{"type": "registry", "config": {{"scheme": "http", "host": "{host}",
                "repo": "a/b"{more}}}}}}}, "mode": "direct"}}"#
        )
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stopped.store(true, std::sync::atomic::Ordering::SeqCst);
        let _ = TcpStream::connect(self.address); // wakes it
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

pub struct Request {
    method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The body is not sent, its length is.
    head: bool,
}

impl Answer {
    fn new(status: u16) -> Answer {
        Answer { status, headers: Vec::new(), body: Vec::new(), head: false }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Answer {
        self.headers.push((name, value.into()));
        self
    }
}

fn serve(state: &Mutex<State>, address: SocketAddr, stream: Box<dyn Stream>) {
    let mut stream = BufReader::new(stream);
    while let Some(request) = read(&mut stream) {
        let latency = state.lock().expect("whole").latency;
        std::thread::sleep(latency);
        let answer = {
            let mut state = state.lock().expect("whole");
            if state.down {
                return;
            }
            let range = request.headers.get("range").cloned().unwrap_or_default();
            let answer = state.answer(address, &request);
            state.log.push(format!("{} {} {range} -> {}", request.method, request.path, answer.status));
            answer
        };
        let mut head = format!("HTTP/1.1 {} X\r\ncontent-length: {}\r\n", answer.status, answer.body.len());
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if !answer.head {
            bytes.extend(&answer.body);
        }
        if stream.get_mut().write_all(&bytes).and_then(|()| stream.get_mut().flush()).is_err() {
            return;
        }
    }
}

fn read(stream: &mut BufReader<Box<dyn Stream>>) -> Option<Request> {
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    if let Some(len) = headers.get("content-length").and_then(|len| len.parse().ok()) {
        body.resize(len, 0);
        stream.read_exact(&mut body).ok()?;
    } else if headers.get("transfer-encoding").is_some_and(|how| how == "chunked") {
        loop {
            let mut size = String::new();
            stream.read_line(&mut size).ok()?;
            let size = usize::from_str_radix(size.trim(), 16).ok()?;
            let at = body.len();
            body.resize(at + size, 0);
            stream.read_exact(&mut body[at..]).ok()?;
            stream.read_line(&mut String::new()).ok()?;
            if size == 0 {
                break;
            }
        }
    }
    Some(Request { method, path, headers, body })
}

fn basic() -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("user:password"))
}

impl State {
    fn answer(&mut self, address: SocketAddr, request: &Request) -> Answer {
        if let Some(status) = self.status {
            return Answer::new(status);
        }
        if let Some(object) = &self.objects {
            return match object.strip(request) {
                Ok(digest) => self.blob(&digest, request),
                Err(status) => Answer::new(status),
            };
        }
        let credentials = request.headers.get("authorization").cloned().unwrap_or_default();
        if request.path.starts_with("/token") {
            if credentials != basic() {
                return Answer::new(401);
            }
            self.tokens += 1;
            let mut answer = Answer::new(200);
            answer.body = format!(r#"{{"token": "t{}", "expires_in": 300}}"#, self.tokens).into_bytes();
            return answer;
        }
        match self.wants {
            Wants::Nothing => {}
            Wants::Basic if credentials == basic() => {}
            Wants::Basic => return Answer::new(401).with("www-authenticate", "Basic realm=\"x\""),
            Wants::Bearer if self.tokens > 0 && credentials == format!("Bearer t{}", self.tokens) => {}
            Wants::Bearer => {
                let challenge =
                    format!("Bearer realm=\"http://{address}/token\",service=\"s\",scope=\"x:y:pull\"");
                return Answer::new(401).with("www-authenticate", challenge);
            }
            Wants::Nobody => return Answer::new(403),
        }
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let Some(path) = path.strip_prefix("/v2/") else { return Answer::new(404) };
        if let Some((_, upload)) = path.split_once("/blobs/uploads/") {
            return self.upload(path, upload, query, request);
        }
        if let Some((_, digest)) = path.split_once("/blobs/sha256:") {
            return self.blob(digest, request);
        }
        match path.split_once("/manifests/") {
            Some((repository, reference)) => self.manifest(repository, reference, request),
            None => Answer::new(if path.is_empty() { 200 } else { 404 }),
        }
    }

    fn blob(&mut self, digest: &str, request: &Request) -> Answer {
        let Some(mut bytes) = self.blobs.get(digest).cloned() else { return Answer::new(404) };
        let once = self.tampered_once > 0;
        self.tampered_once -= u32::from(once);
        if self.tampered || once {
            bytes.iter_mut().for_each(|byte| *byte ^= 0x40);
        }
        bytes.truncate(self.cut.unwrap_or(usize::MAX));
        let range = request.headers.get("range").and_then(|range| {
            let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?))
        });
        let mut answer = Answer::new(200);
        answer.head = request.method == "HEAD";
        answer.body = match range {
            None => bytes,
            Some((from, _)) if from >= bytes.len() => return Answer::new(416),
            Some((from, to)) => {
                answer.status = 206;
                bytes[from..(to + 1).min(bytes.len())].to_vec()
            }
        };
        if !answer.head {
            self.sent += answer.body.len();
        }
        answer
    }

    fn upload(&mut self, path: &str, upload: &str, query: &str, request: &Request) -> Answer {
        match request.method.as_str() {
            "POST" => {
                let name = format!("u{}", self.uploads.len());
                self.uploads.insert(name.clone(), Vec::new());
                Answer::new(202).with("location", format!("/v2/{path}{name}?state=1"))
            }
            "PUT" => {
                let digest = query.split('&').find_map(|part| part.strip_prefix("digest="));
                let digest = digest.unwrap_or_default().replace("%3A", ":");
                let got = format!("sha256:{:x}", Sha256::digest(&request.body));
                if got != digest || self.uploads.remove(upload).is_none() {
                    return Answer::new(400);
                }
                self.blobs.insert(digest["sha256:".len()..].to_owned(), request.body.clone());
                Answer::new(201)
            }
            _ => Answer::new(405),
        }
    }

    fn manifest(&mut self, repository: &str, reference: &str, request: &Request) -> Answer {
        if request.method == "PUT" {
            let kind = request.headers.get("content-type").cloned().unwrap_or_default();
            let digest = format!("sha256:{:x}", Sha256::digest(&request.body));
            for reference in [reference, &digest] {
                let manifest = (kind.clone(), request.body.clone());
                self.manifests.insert(format!("{repository}:{reference}"), manifest);
            }
            return Answer::new(201);
        }
        let Some((kind, body)) = self.manifests.get(&format!("{repository}:{reference}")) else {
            return Answer::new(404);
        };
        let mut answer = Answer::new(200).with("content-type", kind.clone());
        answer.body.clone_from(body);
        answer.head = request.method == "HEAD";
        answer
    }
}
