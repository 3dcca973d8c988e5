//! A stand-in for the shim: takes the agent's connections and drives one container after another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::protobuf::well_known_types::any::Any;
use agent_api::sandbox::SandboxClient;
use agent_api::stream::{HELLO_LEN, StreamId};
use agent_api::task::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount, StartRequest, TaskClient,
    WaitRequest,
};
use agent_api::ttrpc::r#async::{Client, transport::Socket};
use agent_api::ttrpc::context::{self, Context as RpcContext};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;

/// A connection from the agent, whatever carries it.
pub trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Connection for T {}
pub type BoxConnection = Box<dyn Connection>;

/// Takes connections on one port.
pub enum Listener {
    Unix(tokio::net::UnixListener),
    Vsock(tokio_vsock::VsockListener),
}

impl Listener {
    pub fn bind(at: &str, port: u32) -> Result<Self> {
        if let Some(dir) = at.strip_prefix("unix:") {
            let path = format!("{dir}/{port}");
            let _ = std::fs::remove_file(&path);
            return Ok(Self::Unix(tokio::net::UnixListener::bind(path)?));
        }
        ensure!(at == "vsock", "listen at vsock or unix:DIRECTORY, not {at:?}");
        let any = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, port);
        Ok(Self::Vsock(tokio_vsock::VsockListener::bind(any)?))
    }

    pub async fn accept(&mut self) -> Result<BoxConnection> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Vsock(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

type Waiting = Arc<Mutex<HashMap<StreamId, oneshot::Sender<BoxConnection>>>>;

/// The sandbox as its shim sees it.
pub struct Shim {
    pub tasks: TaskClient,
    pub sandbox: SandboxClient,
    /// Mounts that make a container's root file system.
    pub rootfs: Vec<Mount>,
    waiting: Waiting,
    next: Mutex<u64>,
}

/// The host's ends of a process's standard streams.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<BoxConnection>,
    pub stdout: Option<BoxConnection>,
    pub stderr: Option<BoxConnection>,
}

/// What a process said and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

pub fn rpc() -> RpcContext {
    context::with_timeout(60_000_000_000)
}

impl Shim {
    /// Waits for an agent at `at`.
    pub async fn meet(at: &str, rootfs: Vec<Mount>) -> Result<Self> {
        let mut agent = Listener::bind(at, agent_api::AGENT_PORT)?;
        let mut streams = Listener::bind(at, agent_api::STREAM_PORT)?;
        let mut log = Listener::bind(at, agent_api::LOG_PORT)?;
        println!("listening at {at}");
        let connection =
            tokio::time::timeout(Duration::from_secs(3600), agent.accept()).await.context("no agent")??;
        let client = Client::new(Socket::new(connection));
        let waiting = Waiting::default();
        let table = waiting.clone();
        tokio::spawn(async move {
            while let Ok(mut connection) = streams.accept().await {
                let table = table.clone();
                tokio::spawn(async move {
                    let mut hello = [0; HELLO_LEN];
                    if connection.read_exact(&mut hello).await.is_ok() {
                        let receiver = table.lock().unwrap().remove(&StreamId::from_hello(hello));
                        let _ = receiver.expect("a stream that was asked for").send(connection);
                    }
                });
            }
        });
        tokio::spawn(async move {
            let mut connection = log.accept().await.unwrap();
            let mut text = String::new();
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = connection.read(&mut buf).await {
                text.push_str(&String::from_utf8_lossy(&buf[..n]));
                while let Some((line, rest)) = text.split_once('\n') {
                    let line: Value = serde_json::from_str(line).expect("log lines are JSON");
                    println!("    [{} {}] {}", line["source"], line["level"], line["msg"]);
                    text = rest.to_owned();
                }
            }
        });
        Ok(Self {
            tasks: TaskClient::new(client.clone()),
            sandbox: SandboxClient::new(client),
            rootfs,
            waiting,
            next: Mutex::new(1),
        })
    }

    fn expect(&self) -> (String, oneshot::Receiver<BoxConnection>) {
        let mut next = self.next.lock().unwrap();
        let id = StreamId(*next);
        *next += 1;
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, sender);
        (id.to_string(), receiver)
    }

    /// Creates a container with all its streams.
    pub async fn create(&self, id: &str, spec: &Value, terminal: bool) -> Result<Streams> {
        let (stdin, stdin_at) = self.expect();
        let (stdout, stdout_at) = self.expect();
        let (stderr, stderr_at) = self.expect();
        let request = CreateTaskRequest {
            id: id.to_owned(),
            rootfs: self.rootfs.clone(),
            terminal,
            stdin: if terminal { String::new() } else { stdin },
            stdout,
            stderr: if terminal { String::new() } else { stderr },
            options: Some(any(agent_api::SPEC_TYPE_URL, spec)).into(),
            ..Default::default()
        };
        self.tasks.create(rpc(), &request).await?;
        if terminal {
            return Ok(Streams { stdout: Some(stdout_at.await?), ..Streams::default() });
        }
        Ok(Streams {
            stdin: Some(stdin_at.await?),
            stdout: Some(stdout_at.await?),
            stderr: Some(stderr_at.await?),
        })
    }

    pub async fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        terminal: bool,
    ) -> Result<Streams> {
        let (stdin, stdin_at) = self.expect();
        let (stdout, stdout_at) = self.expect();
        let (stderr, stderr_at) = self.expect();
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal,
            stdin: if terminal { String::new() } else { stdin },
            stdout,
            stderr: if terminal { String::new() } else { stderr },
            spec: Some(any(agent_api::PROCESS_TYPE_URL, process)).into(),
            ..Default::default()
        };
        self.tasks.exec(rpc(), &request).await?;
        if terminal {
            return Ok(Streams { stdout: Some(stdout_at.await?), ..Streams::default() });
        }
        Ok(Streams {
            stdin: Some(stdin_at.await?),
            stdout: Some(stdout_at.await?),
            stderr: Some(stderr_at.await?),
        })
    }

    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.tasks.start(rpc(), &request).await?.pid)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.tasks.wait(rpc(), &request).await?.exit_status)
    }

    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let request =
            KillRequest { id: id.into(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.tasks.kill(rpc(), &request).await?;
        Ok(())
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        Ok(self.tasks.delete(rpc(), &request).await?.exit_status)
    }

    /// Runs a container to its end with `input` on stdin.
    pub async fn run(&self, id: &str, spec: &Value, input: &[u8]) -> Result<Outcome> {
        let streams = self.create(id, spec, false).await?;
        self.start(id, "").await?;
        let outcome = self.finish(id, "", streams, input).await?;
        ensure!(self.delete(id, "").await? == outcome.status, "delete tells another status");
        Ok(outcome)
    }

    /// Runs an exec to its end.
    pub async fn exec(&self, id: &str, exec_id: &str, process: &Value, input: &[u8]) -> Result<Outcome> {
        let streams = self.add_exec(id, exec_id, process, false).await?;
        self.start(id, exec_id).await?;
        let outcome = self.finish(id, exec_id, streams, input).await?;
        ensure!(self.delete(id, exec_id).await? == outcome.status, "delete tells another status");
        Ok(outcome)
    }

    pub async fn finish(&self, id: &str, exec_id: &str, streams: Streams, input: &[u8]) -> Result<Outcome> {
        let Streams { stdin: Some(mut stdin), stdout: Some(stdout), stderr: Some(stderr) } = streams else {
            bail!("three streams");
        };
        let feed = async {
            // A process may leave its input unread.
            let _ = stdin.write_all(input).await;
            let _ = stdin.shutdown().await;
        };
        let (status, (), out, err) =
            tokio::join!(self.wait(id, exec_id), feed, read_all(stdout), read_all(stderr));
        Ok(Outcome { status: status?, stdout: text(&out?), stderr: text(&err?) })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub async fn read_all(mut stream: BoxConnection) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    Ok(all)
}

fn any(type_url: &str, value: &Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes(), ..Any::default() }
}

/// containerd's default process, with this command.
pub fn process(args: &[&str]) -> Value {
    let caps: Vec<String> = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ]
    .map(|name| format!("CAP_{name}"))
    .to_vec();
    json!({
        "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true
    })
}

/// containerd's default configuration, as a shim would hand it on, with this process.
#[expect(clippy::needless_pass_by_value, reason = "reads better at every call")]
pub fn spec(id: &str, process: Value) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process,
        "root": {"path": format!("/run/ctvm/rootfs/{id}")},
        "hostname": id,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid","noexec","nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid","noexec","nodev","mode=1777","size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid","noexec","nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid","noexec","nodev","ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid","nodev","mode=1777"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid","strictatime","mode=755","size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro","nosuid","noexec","nodev"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": format!("/default/{id}"),
            "namespaces": [{"type": "pid"},{"type": "ipc"},{"type": "uts"},{"type": "mount"},{"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi","/proc/asound","/proc/kcore","/proc/keys","/proc/latency_stats","/proc/timer_list","/proc/timer_stats","/proc/sched_debug","/sys/firmware","/proc/scsi"],
            "readonlyPaths": ["/proc/bus","/proc/fs","/proc/irq","/proc/sys","/proc/sysrq-trigger"]
        }
    })
}

/// A shell's command in containerd's default configuration.
pub fn shell(id: &str, line: &str) -> Value {
    spec(id, process(&["/bin/sh", "-c", line]))
}

/// Waits for `wanted` in what a terminal says.
pub async fn read_until(stream: &mut BoxConnection, wanted: &str) -> Result<String> {
    let mut seen = String::new();
    let mut buf = [0; 1024];
    while !seen.contains(wanted) {
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut buf));
        match read.await.map_err(|_| anyhow!("no {wanted:?} in {seen:?}"))?? {
            0 => bail!("the end, and no {wanted:?} in {seen:?}"),
            n => seen.push_str(&String::from_utf8_lossy(&buf[..n])),
        }
    }
    Ok(seen)
}
