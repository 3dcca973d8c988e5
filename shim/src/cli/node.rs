//! The sandboxes of this node, found by their state directories, and what each of them answers.

use std::io::{self, Read};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::paths;
use crate::sandbox::operator::SOCKET;
use crate::sandbox::operator::status::Status;
use crate::sandbox::state_file::State;

/// How long a sandbox has to answer. It gives its VM a second.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// Most bytes of one answer.
const MAX_ANSWER: u64 = 8 << 20;
/// Sandboxes asked at once.
const AT_ONCE: usize = 16;

/// A sandbox of which there is something on this node.
#[derive(Debug, Clone)]
pub struct Found {
    /// containerd's namespace.
    pub namespace: String,
    /// The sandbox's id.
    pub id: String,
    /// Its state directory.
    pub dir: PathBuf,
    /// What belongs to it.
    pub state: State,
}

/// Why there is no answer to the operator's question.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The state directories cannot be read.
    #[error("reading {path}")]
    Read {
        /// The directory or file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is none at all.
    #[error("no sandbox runs on this node (nothing in {})", .0.display())]
    None(PathBuf),
    /// None of that name.
    #[error("no {what} {name:?}; there are: {candidates}")]
    NoSuch {
        /// A sandbox or a container.
        what: &'static str,
        /// As it was named.
        name: String,
        /// What could have been meant.
        candidates: String,
    },
    /// Several of that name.
    #[error("{name:?} can be several {what}: {candidates}; say more of the name")]
    Several {
        /// Sandboxes or containers.
        what: &'static str,
        /// As it was named.
        name: String,
        /// Which.
        candidates: String,
    },
    /// Its shim has ended.
    #[error("sandbox {id} is dead: its shim has ended. {remedy}")]
    Dead {
        /// Which.
        id: String,
        /// What to do.
        remedy: String,
    },
    /// Its shim runs and does not answer.
    #[error("sandbox {id} does not answer (its shim is process {pid})")]
    Silent {
        /// Which.
        id: String,
        /// Process number of its shim.
        pid: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It answered with an error or nonsense.
    #[error("sandbox {id} answered: {text}")]
    Answer {
        /// Which.
        id: String,
        /// Its words.
        text: String,
    },
}

impl NodeError {
    /// The exit status for it.
    pub fn exit_status(&self) -> u8 {
        match self {
            NodeError::Read { .. } => 3,
            NodeError::None(_) | NodeError::NoSuch { .. } | NodeError::Several { .. } => 9,
            NodeError::Dead { .. } | NodeError::Silent { .. } | NodeError::Answer { .. } => 10,
        }
    }
}

impl Found {
    /// Its namespace and id, as they are told.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// Whether its shim runs. One that is just being started has not told its number yet.
    pub fn shim_runs(&self) -> bool {
        self.state.shim.is_none_or(|shim| shim.is_alive())
    }

    /// Number of the VMM's process, if it runs.
    pub fn vmm(&self) -> Option<u32> {
        self.state.vmm.filter(|vmm| vmm.is_alive()).map(|vmm| vmm.pid)
    }

    /// What to do about a sandbox whose shim is dead.
    pub fn remedy(&self) -> String {
        format!(
            "containerd removes what is left when it sees that, at its next start at the latest; by hand: \
             containerd-shim-ctvm-v2 -namespace {} -id {} delete >/dev/null",
            self.namespace, self.id
        )
    }

    fn dead(&self) -> NodeError {
        NodeError::Dead { id: self.full_name(), remedy: self.remedy() }
    }

    fn silent(&self, source: io::Error) -> NodeError {
        if !self.shim_runs() {
            return self.dead();
        }
        let pid = self.state.shim.map_or(0, |shim| shim.pid);
        NodeError::Silent { id: self.full_name(), pid, source }
    }

    /// Asks for a path and gives the whole answer.
    ///
    /// # Errors
    /// [`NodeError::Dead`], [`NodeError::Silent`], [`NodeError::Answer`].
    pub fn get(&self, target: &str) -> Result<String, NodeError> {
        let mut body = String::new();
        let mut reader = self.open(target)?.take(MAX_ANSWER);
        reader.read_to_string(&mut body).map_err(|e| self.silent(e))?;
        Ok(body)
    }

    /// Asks for a path; what is left to read is the answer. Each part of it has [`PATIENCE`] to come.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn open(&self, target: &str) -> Result<UnixStream, NodeError> {
        if !self.shim_runs() {
            return Err(self.dead());
        }
        let stream = request(&self.dir, "GET", target, PATIENCE).map_err(|e| self.silent(e))?;
        let head = read_head(&stream).map_err(|e| self.silent(e))?;
        if head.split(' ').nth(1) == Some("200") {
            return Ok(stream);
        }
        let mut text = String::new();
        // What there is of it.
        let _ = (&stream).take(4096).read_to_string(&mut text);
        let line = head.lines().next().unwrap_or_default();
        Err(NodeError::Answer { id: self.full_name(), text: format!("{line}: {}", text.trim()) })
    }

    /// Has something done, which may take so long, and gives what it answers.
    ///
    /// # Errors
    /// [`NodeError::Dead`], [`NodeError::Silent`].
    pub fn post(&self, target: &str, patience: Duration) -> Result<Answer, NodeError> {
        if !self.shim_runs() {
            return Err(self.dead());
        }
        let exchange = || {
            let stream = request(&self.dir, "POST", target, patience)?;
            let head = read_head(&stream)?;
            let mut body = String::new();
            stream.take(MAX_ANSWER).read_to_string(&mut body)?;
            Ok(Answer { is_ok: head.split(' ').nth(1) == Some("200"), body })
        };
        exchange().map_err(|e| self.silent(e))
    }

    /// Asks how it is.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn status(&self) -> Result<Status, NodeError> {
        let text = self.get("/status")?;
        serde_json::from_str(&text)
            .map_err(|e| NodeError::Answer { id: self.full_name(), text: format!("{text:?}: {e}") })
    }
}

/// What a sandbox answers to what it was to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether it was tried.
    pub is_ok: bool,
    /// Its words.
    pub body: String,
}

/// Connects and asks. Neither waits longer than [`PATIENCE`], not even for a shim that takes no connections; the answer may
/// take `patience`.
fn request(dir: &Path, method: &str, target: &str, patience: Duration) -> io::Result<UnixStream> {
    // A state directory's path may be longer than a socket's address.
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(&short)?)?;
    let stream = UnixStream::from(socket);
    io::Write::write_all(
        &mut &stream,
        format!("{method} {target} HTTP/1.1\r\nHost: ctvm\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    Ok(stream)
}

/// Reads an answer up to its body, and not a byte of that.
fn read_head(mut stream: impl Read) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > 4096 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Every sandbox of the node, by namespace and id.
///
/// # Errors
/// [`NodeError::Read`].
pub fn sandboxes() -> Result<Vec<Found>, NodeError> {
    sandboxes_in(&paths::run_dir())
}

fn sandboxes_in(run_dir: &Path) -> Result<Vec<Found>, NodeError> {
    let mut found = Vec::new();
    for (namespace, dir) in directories(run_dir)? {
        for (id, dir) in directories(&dir)? {
            // One without a state file goes or comes just now.
            let state = State::read(&dir).map_err(|source| NodeError::Read { path: dir.clone(), source })?;
            if let Some(state) = state {
                found.push(Found { namespace: namespace.clone(), id, dir, state });
            }
        }
    }
    found.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(found)
}

fn directories(parent: &Path) -> Result<Vec<(String, PathBuf)>, NodeError> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(NodeError::Read { path: parent.to_owned(), source }),
    };
    let is_dir = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|t| t.is_dir());
    let named = |entry: std::fs::DirEntry| Some((entry.file_name().into_string().ok()?, entry.path()));
    Ok(entries.flatten().filter(is_dir).filter_map(named).collect())
}

/// The sandbox that an operator means: `[NAMESPACE/]ID`, of which the id may be cut short as long as it is the only one
/// that begins so.
///
/// # Errors
/// [`NodeError::None`], [`NodeError::NoSuch`] and [`NodeError::Several`], with what could have been meant.
pub fn find(name: &str) -> Result<Found, NodeError> {
    let all = sandboxes()?;
    if all.is_empty() {
        return Err(NodeError::None(paths::run_dir()));
    }
    let (namespace, id) = name.split_once('/').map_or((None, name), |(ns, id)| (Some(ns), id));
    let of_namespace: Vec<Found> =
        all.into_iter().filter(|f| namespace.is_none_or(|ns| ns == f.namespace)).collect();
    pick(("sandbox", "sandboxes"), id, of_namespace, |found| (&found.id, found.full_name()))
}

/// The one of `all` that is called `name` or is the only one that begins so. `names` gives what is compared and what is
/// told.
///
/// # Errors
/// [`NodeError::NoSuch`] and [`NodeError::Several`].
pub fn pick<T>(
    (what, plural): (&'static str, &'static str),
    name: &str,
    all: Vec<T>,
    names: impl Fn(&T) -> (&str, String),
) -> Result<T, NodeError> {
    /// Names in an error.
    const MAX: usize = 10;
    let list = |all: &[T]| {
        let more = all.len().saturating_sub(MAX);
        let mut text: Vec<String> = all.iter().take(MAX).map(|one| names(one).1).collect();
        if more > 0 {
            text.push(format!("{more} more"));
        }
        if text.is_empty() { "none".to_owned() } else { text.join(", ") }
    };
    let everything = list(&all);
    let (exact, rest): (Vec<T>, Vec<T>) = all.into_iter().partition(|one| names(one).0 == name);
    let mut meant = match exact.is_empty() {
        false => exact,
        true => rest.into_iter().filter(|one| !name.is_empty() && names(one).0.starts_with(name)).collect(),
    };
    match meant.len() {
        0 => Err(NodeError::NoSuch { what, name: name.to_owned(), candidates: everything }),
        1 => Ok(meant.remove(0)),
        _ => Err(NodeError::Several { what: plural, name: name.to_owned(), candidates: list(&meant) }),
    }
}

/// Does something for every sandbox, some at once; the results are in the order of the sandboxes.
pub fn each<T: Send>(all: &[Found], work: impl Fn(&Found) -> T + Sync) -> Vec<T> {
    let work = &work;
    let mut results = Vec::with_capacity(all.len());
    for some in all.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            let threads: Vec<_> = some.iter().map(|found| scope.spawn(move || work(found))).collect();
            results.extend(threads.into_iter().map(|thread| thread.join().expect("the work does not panic")));
        });
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::state_file::ProcessId;
    use std::os::unix::net::UnixListener;

    fn pick_of(name: &str, all: &[&str]) -> Result<String, String> {
        let all = all.iter().map(|s| (*s).to_owned()).collect();
        pick(("sandbox", "sandboxes"), name, all, |s: &String| (s, format!("ns/{s}")))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_name_may_be_cut_short_while_it_is_the_only_one() {
        let all = ["web", "web-2", "db1"];
        assert_eq!(pick_of("db", &all).unwrap(), "db1");
        assert_eq!(pick_of("web", &all).unwrap(), "web", "a whole name is no beginning");
        assert_eq!(pick_of("web-", &all).unwrap(), "web-2");
        let several = pick_of("we", &all).unwrap_err();
        assert_eq!(several, "\"we\" can be several sandboxes: ns/web, ns/web-2; say more of the name");
        let none = pick_of("x", &all).unwrap_err();
        assert_eq!(none, "no sandbox \"x\"; there are: ns/web, ns/web-2, ns/db1");
        assert!(pick_of("", &all).unwrap_err().starts_with("no sandbox \"\""));
        let many: Vec<String> = (0..15).map(|n| format!("s{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(pick_of("x", &many).unwrap_err().ends_with("ns/s9, 5 more"));
    }

    #[test]
    fn sandboxes_are_found_asked_and_known_to_be_dead() {
        let root = tempfile::tempdir().unwrap();
        // Longer than a socket's address may be.
        let long = "n".repeat(120);
        let me = ProcessId::of(std::process::id());
        let make = |namespace: &str, id: &str, shim| {
            let dir = root.path().join(namespace).join(id);
            std::fs::create_dir_all(&dir).unwrap();
            State { shim, socket: "/x".into(), ..State::default() }.write(&dir).unwrap();
        };
        make(&long, "alive", me);
        let dead = ProcessId { start_ticks: 1, ..me.unwrap() };
        make("default", "dead", Some(dead));
        std::fs::create_dir_all(root.path().join("default").join("going")).unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        let found = sandboxes_in(root.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|f| f.id.as_str()).collect();
        assert_eq!(names, ["dead", "alive"]);

        let error = found[0].get("/status").unwrap_err();
        assert_eq!(error.exit_status(), 10);
        assert!(error.to_string().contains("-namespace default -id dead delete"), "{error}");
        let error = found[1].get("/status").unwrap_err();
        assert!(matches!(error, NodeError::Silent { .. }), "{error}");

        let dir = rustix::fs::open(&found[1].dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())).unwrap();
        let server = std::thread::spawn(move || {
            for answer in ["200 OK\r\n\r\nbody", "404 Not Found\r\n\r\nno such thing", "gibberish"] {
                let (mut stream, _) = listener.accept().unwrap();
                let request = read_head(&stream).unwrap();
                assert!(request.starts_with("GET /x HTTP/1.1\r\n"), "{request}");
                io::Write::write_all(&mut stream, format!("HTTP/1.1 {answer}").as_bytes()).unwrap();
            }
        });
        assert_eq!(found[1].get("/x").unwrap(), "body");
        let error = found[1].get("/x").unwrap_err().to_string();
        assert!(error.ends_with("alive answered: HTTP/1.1 404 Not Found: no such thing"), "{error}");
        assert!(matches!(found[1].get("/x"), Err(NodeError::Silent { .. })));
        server.join().unwrap();
    }

    #[test]
    fn results_keep_the_order_of_their_sandboxes() {
        let found = |n: usize| Found {
            namespace: "ns".into(),
            id: n.to_string(),
            dir: PathBuf::new(),
            state: State::default(),
        };
        let all: Vec<Found> = (0..40).map(found).collect();
        let ids = each(&all, |found| found.id.clone());
        assert_eq!(ids, (0..40).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
