//! What containerd is to the shim: bundles, `start` and `delete`, a socket for events; and the requests it sends.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_api::task::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest,
    TaskClient, WaitRequest,
};
use async_trait::async_trait;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Events, create_events};
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use ttrpc::Code;
use ttrpc::asynchronous::{Client, Server};
use ttrpc::context::Context;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-ctvm-v2");

/// A containerd, as far as the shim can tell: a folder with bundles, an address for events, and what came there.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub events: Arc<Mutex<Vec<(String, Any)>>>,
    _server: Server,
}

struct Collector(Arc<Mutex<Vec<(String, Any)>>>);

#[async_trait]
impl Events for Collector {
    async fn forward(
        &self,
        _: &ttrpc::r#async::TtrpcContext,
        request: ForwardRequest,
    ) -> ttrpc::Result<agent_api::task::Empty> {
        let envelope = request.envelope.unwrap();
        assert_eq!(envelope.namespace, "test");
        self.0.lock().unwrap().push((envelope.topic, envelope.event.unwrap()));
        Ok(agent_api::task::Empty::new())
    }
}

impl Daemon {
    pub async fn new(config: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("ctvm-shim").tempdir_in("/dev/shm").unwrap();
        let events = Arc::new(Mutex::new(Vec::new()));
        let collector = Arc::new(Collector(events.clone()));
        let mut server = Server::new()
            .bind(&format!("unix://{}/ttrpc", dir.path().display()))
            .unwrap()
            .register_service(create_events(collector));
        server.start().await.unwrap();
        let daemon = Daemon { dir, events, _server: server };
        let vmm = daemon.path("vmm");
        let me = std::env::current_exe().unwrap();
        fs::write(&vmm, format!("#!/bin/sh\nexec {} --ignored --exact fake_vmm --nocapture\n", me.display()))
            .unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(daemon.path("kernel"), "kernel").unwrap();
        let kernel = daemon.path("kernel");
        let text = format!(
            "kernel = {kernel:?}\nimage = {kernel:?}\nvmm = {vmm:?}\nhost_cgroup = false\nlog_level = \"debug\"\n\
             timeline_dir = {:?}\n{config}\n",
            daemon.path("timelines")
        );
        fs::write(daemon.path("config.toml"), text).unwrap();
        daemon
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path("bundles").join(id)
    }

    /// A bundle whose container runs `args`.
    pub fn make_bundle(&self, id: &str, args: &[&str], pod: Option<&str>) {
        let bundle = self.bundle(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), format!("in {id}")).unwrap();
        let annotations = pod.map_or(json!({}), |pod| json!({ "io.kubernetes.cri.sandbox-id": pod }));
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": { "args": args, "cwd": "/" },
            "root": { "path": "rootfs" },
            "annotations": annotations,
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "network" }] },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o700);
        rustix::fs::mknodat(rustix::fs::CWD, bundle.join("log"), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
    }

    /// A bundle for a pod of the Sandbox API, which has no configuration.
    pub fn make_pod_bundle(&self, id: &str) {
        self.make_bundle(id, &["none"], None);
        fs::remove_file(self.bundle(id).join("config.json")).unwrap();
    }

    /// Runs the shim binary as containerd does.
    pub fn shim(&self, id: &str, action: &[&str], stdin: &[u8]) -> Output {
        let mut shim = Command::new(SHIM)
            .args(["-namespace", "test", "-address", "/fake/containerd.sock", "-publish-binary", "/x"])
            .args(["-id", id])
            .args(action)
            .current_dir(self.bundle(id))
            .env("TTRPC_ADDRESS", self.path("ttrpc"))
            .env("CTVM_RUN_DIR", self.path("run"))
            .env("CTVM_CONFIG", self.path("config.toml"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        shim.stdin.take().unwrap().write_all(stdin).unwrap();
        shim.wait_with_output().unwrap()
    }

    /// `start` in the manner of 2.3, which can put the socket elsewhere.
    pub fn start_output(&self, id: &str) -> Output {
        let mut params = BootstrapParams::new();
        params.instance_id = id.into();
        params.namespace = "test".into();
        params.socket_dir = Some(self.path("s").to_str().unwrap().into());
        self.shim(id, &["start"], &params.write_to_bytes().unwrap())
    }

    pub fn start(&self, id: &str) -> String {
        let output = self.start_output(id);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "containerd reads it with the answer");
        let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        assert_eq!(fs::read_to_string(self.bundle(id).join("address")).unwrap(), result.address);
        result.address
    }

    pub async fn connect(&self, id: &str) -> TaskClient {
        TaskClient::new(self.client(id).await)
    }

    /// A connection on which any of the shim's services can be called.
    pub async fn client(&self, id: &str) -> Client {
        Client::connect(&self.start(id)).await.unwrap()
    }

    pub fn delete(&self, id: &str) -> DeleteResponse {
        let bundle = self.bundle(id);
        let output = self.shim(id, &["-bundle", bundle.to_str().unwrap(), "delete"], b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    pub fn state(&self, id: &str) -> Option<serde_json::Value> {
        let bytes = fs::read(self.path("run").join("test").join(id).join("state.json")).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    pub fn topics(&self) -> Vec<String> {
        self.events.lock().unwrap().iter().map(|(topic, _)| topic.clone()).collect()
    }

    /// Waits for that many events, and gives their topics.
    pub async fn topics_when(&self, count: usize) -> Vec<String> {
        eventually("events", || self.topics().len() >= count).await;
        self.topics()
    }

    /// Everything that a sandbox could leave: processes that name this folder, files, mounts.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(cmdline) = fs::read(entry.path().join("cmdline")) else { continue };
            let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
            let mine = self.dir.path().to_str().unwrap().as_bytes();
            if environ.windows(mine.len()).any(|w| w == mine) {
                found.push(String::from_utf8_lossy(&cmdline).replace('\0', " "));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = self.dir.path().to_str().unwrap();
        found.extend(mounts.lines().filter(|l| l.contains(here)).map(str::to_owned));
        for dir in ["s", "run"] {
            let entries = fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
            found.extend(entries.map(|e| e.path().display().to_string()));
        }
        found
    }

    pub async fn nothing_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.leftovers().is_empty() {
            assert!(Instant::now() < deadline, "left behind: {:#?}", self.leftovers());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // A test that failed leaves its sandbox: end it by the state file, as containerd would.
        for entry in fs::read_dir(self.path("run/test")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            self.shim(&id, &["delete"], b"");
        }
    }
}

/// A network namespace that a process of its own keeps. Its loopback is down.
pub struct Netns(Child);

impl Netns {
    pub fn make() -> Netns {
        let keeper = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn().unwrap();
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let namespace = Netns(keeper);
        while fs::read_link(namespace.path()).is_ok_and(|its| its == own) {
            std::thread::sleep(Duration::from_millis(1));
        }
        namespace
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn ctx() -> Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

pub fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

pub fn create_request(daemon: &Daemon, id: &str) -> CreateTaskRequest {
    let mut request = CreateTaskRequest::new();
    request.id = id.into();
    request.bundle = daemon.bundle(id).to_str().unwrap().into();
    request
}

/// A container `web` that was made of `args`, and not started.
pub async fn made(daemon: &Daemon, args: &[&str]) -> TaskClient {
    daemon.make_bundle("web", args, None);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(daemon, "web")).await.unwrap();
    task
}

/// A container `web` that runs `args`.
pub async fn started(daemon: &Daemon, args: &[&str]) -> TaskClient {
    let task = made(daemon, args).await;
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    task
}

/// An exec in `web`.
pub fn exec_request(exec_id: &str, args: &[&str], stdout: String) -> ExecProcessRequest {
    let mut spec = Any::new();
    spec.value = json!({ "args": args, "cwd": "/" }).to_string().into_bytes();
    let spec = MessageField::some(spec);
    ExecProcessRequest { id: "web".into(), exec_id: exec_id.into(), stdout, spec, ..Default::default() }
}

pub fn start_request(id: &str, exec_id: &str) -> StartRequest {
    StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

pub async fn wait(task: &TaskClient, id: &str, exec_id: &str) -> u32 {
    let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.wait(ctx(), &request).await.unwrap().exit_status
}

pub async fn delete(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
    let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.delete(ctx(), &request).await.map(|r| r.exit_status)
}

pub async fn shutdown(task: &TaskClient, id: &str) {
    let request = ShutdownRequest { id: id.into(), ..Default::default() };
    task.shutdown(ctx(), &request).await.unwrap();
}

pub fn kill_request(id: &str, signal: u32) -> KillRequest {
    KillRequest { id: id.into(), signal, ..Default::default() }
}

pub fn fifo(path: &Path) -> String {
    let mode = rustix::fs::Mode::from_raw_mode(0o700);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Reads a fifo to its end on a thread of its own. Like a client, it has the fifo open before the shim does.
pub fn reader(path: &str) -> tokio::task::JoinHandle<Vec<u8>> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let fifo = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
    tokio::task::spawn_blocking(move || {
        let mut fifo = fs::File::from(fifo);
        let mut bytes = Vec::new();
        loop {
            // Nothing to report before the first writer has come.
            let mut ready = [PollFd::new(&fifo, PollFlags::IN)];
            poll(&mut ready, None).unwrap();
            match fifo.read_to_end(&mut bytes) {
                Ok(_) => return bytes,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => panic!("{e}"),
            }
        }
    })
}
