//! The real shim binary between a fake containerd and a fake VMM with a fake agent: every step of a sandbox's life,
//! and every way out of it. Needs root, for mounts; says so when it was not run.

mod fake;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_api::task::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount, PauseRequest,
    PidsRequest, ShutdownRequest, StartRequest, StateRequest, Status, TaskClient, WaitRequest,
};
use async_trait::async_trait;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::events::task::{TaskExit, TaskStart};
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

/// Not a test: the process that the shim takes for its VMM.
#[test]
#[ignore = "started by the shim"]
fn fake_vmm() {
    fake::run();
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not run: needs root");
    }
    root
}

/// A containerd, as far as the shim can tell: a folder with bundles, an address for events, and what came there.
struct Daemon {
    dir: tempfile::TempDir,
    events: Arc<Mutex<Vec<(String, Any)>>>,
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
    async fn new(config: &str) -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.path("bundles").join(id)
    }

    /// A bundle whose container runs `args`.
    fn make_bundle(&self, id: &str, args: &[&str], pod: Option<&str>) {
        let bundle = self.bundle(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), format!("in {id}")).unwrap();
        let annotations = pod.map_or(json!({}), |pod| json!({ "io.kubernetes.cri.sandbox-id": pod }));
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": { "args": args, "cwd": "/" },
            "root": { "path": "rootfs" },
            "annotations": annotations,
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o700);
        rustix::fs::mknodat(rustix::fs::CWD, bundle.join("log"), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
    }

    /// Runs the shim binary as containerd does.
    fn shim(&self, id: &str, action: &[&str], stdin: &[u8]) -> Output {
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
    fn start_output(&self, id: &str) -> Output {
        let mut params = BootstrapParams::new();
        params.instance_id = id.into();
        params.namespace = "test".into();
        params.socket_dir = Some(self.path("s").to_str().unwrap().into());
        self.shim(id, &["start"], &params.write_to_bytes().unwrap())
    }

    fn start(&self, id: &str) -> String {
        let output = self.start_output(id);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "containerd reads it with the answer");
        let result = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
        assert_eq!(fs::read_to_string(self.bundle(id).join("address")).unwrap(), result.address);
        result.address
    }

    async fn connect(&self, id: &str) -> TaskClient {
        let client = Client::connect(&self.start(id)).await.unwrap();
        TaskClient::new(client)
    }

    fn delete(&self, id: &str) -> DeleteResponse {
        let bundle = self.bundle(id);
        let output = self.shim(id, &["-bundle", bundle.to_str().unwrap(), "delete"], b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    fn state(&self, id: &str) -> Option<serde_json::Value> {
        let bytes = fs::read(self.path("run").join("test").join(id).join("state.json")).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    fn topics(&self) -> Vec<String> {
        self.events.lock().unwrap().iter().map(|(topic, _)| topic.clone()).collect()
    }

    /// Waits for that many events, and gives their topics.
    async fn topics_when(&self, count: usize) -> Vec<String> {
        eventually("events", || self.topics().len() >= count).await;
        self.topics()
    }

    /// Everything that a sandbox could leave: processes that name this folder, files, mounts.
    fn leftovers(&self) -> Vec<String> {
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

    async fn nothing_left(&self) {
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

async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn ctx() -> Context {
    ttrpc::context::with_duration(Duration::from_secs(60))
}

fn code(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

fn create_request(daemon: &Daemon, id: &str) -> CreateTaskRequest {
    let mut request = CreateTaskRequest::new();
    request.id = id.into();
    request.bundle = daemon.bundle(id).to_str().unwrap().into();
    request
}

fn start_request(id: &str, exec_id: &str) -> StartRequest {
    StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

async fn wait(task: &TaskClient, id: &str, exec_id: &str) -> u32 {
    let request = WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.wait(ctx(), &request).await.unwrap().exit_status
}

async fn delete(task: &TaskClient, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
    let request = DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    task.delete(ctx(), &request).await.map(|r| r.exit_status)
}

async fn shutdown(task: &TaskClient, id: &str) {
    let request = ShutdownRequest { id: id.into(), ..Default::default() };
    task.shutdown(ctx(), &request).await.unwrap();
}

fn kill_request(id: &str, signal: u32) -> KillRequest {
    KillRequest { id: id.into(), signal, ..Default::default() }
}

fn fifo(path: &Path) -> String {
    let mode = rustix::fs::Mode::from_raw_mode(0o700);
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Reads a fifo to its end on a thread of its own. Like a client, it has the fifo open before the shim does.
fn reader(path: &str) -> tokio::task::JoinHandle<Vec<u8>> {
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

#[tokio::test]
async fn a_whole_life() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["say", "to stdout", "to stderr", "7"], None);
    let task = daemon.connect("web").await;
    let mut request = create_request(&daemon, "web");
    (request.stdout, request.stderr) = (fifo(&daemon.path("out")), fifo(&daemon.path("err")));
    let (out, err) = (reader(&request.stdout), reader(&request.stderr));
    let pid = task.create(ctx(), &request).await.unwrap().pid;
    let vmm = daemon.state("web").unwrap()["vmm"]["pid"].as_u64().unwrap();
    assert_eq!(u64::from(pid), vmm, "the task's process is one of this host");
    // containerd repeats a create that it does not know the outcome of.
    assert_eq!(task.create(ctx(), &request).await.unwrap().pid, pid);

    let state = task.state(ctx(), &StateRequest { id: "web".into(), ..Default::default() }).await.unwrap();
    assert_eq!((state.status.unwrap(), state.stdout.as_str()), (Status::CREATED, request.stdout.as_str()));
    assert_eq!(task.start(ctx(), &start_request("web", "")).await.unwrap().pid, pid);
    assert_eq!(wait(&task, "web", "").await, 7);
    assert_eq!(code(task.kill(ctx(), &kill_request("web", 9)).await.unwrap_err()).0, Code::NOT_FOUND);
    // Nothing is left to do for a shim with a container.
    shutdown(&task, "web").await;
    assert_eq!(delete(&task, "web", "").await.unwrap(), 7);
    assert_eq!(code(delete(&task, "web", "").await.unwrap_err()).0, Code::NOT_FOUND);
    assert_eq!(out.await.unwrap(), b"to stdout");
    assert_eq!(err.await.unwrap(), b"to stderr");
    shutdown(&task, "web").await;
    assert!(daemon.state("web").is_none(), "the state is gone before the answer");
    drop(task);
    daemon.nothing_left().await;
    assert_eq!(
        daemon.topics_when(4).await,
        ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    );
    let (_, exit) = daemon.events.lock().unwrap()[2].clone();
    assert_eq!(exit.type_url, "containerd.events.TaskExit");
    let exit = TaskExit::parse_from_bytes(&exit.value).unwrap();
    assert_eq!(
        (exit.container_id.as_str(), exit.id.as_str(), exit.pid, exit.exit_status),
        ("web", "web", pid, 7)
    );
    // containerd calls `delete` after a regular end as well.
    assert_eq!(daemon.delete("web").exit_status, 137);
    let timeline = fs::read_to_string(daemon.path("timelines/test-web.json")).unwrap();
    let stages: Vec<(String, u64)> = serde_json::from_str(&timeline).unwrap();
    let names: Vec<&str> = stages.iter().map(|(name, _)| name.as_str()).collect();
    for stage in ["shim start", "vmm exec", "kvm set-up", "agent ready", "container running", "exited"] {
        assert!(names.contains(&stage), "{stage} in {names:?}");
    }
    assert!(stages.is_sorted_by_key(|(_, at)| *at));
}

#[tokio::test]
async fn execs_have_their_own_streams_events_and_ends() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["sleep"], None);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    let exec = |exec_id: &str, args: &[&str], stdout: String| {
        let mut spec = Any::new();
        spec.value = json!({ "args": args, "cwd": "/" }).to_string().into_bytes();
        ExecProcessRequest {
            id: "web".into(),
            exec_id: exec_id.into(),
            stdout,
            spec: MessageField::some(spec),
            ..Default::default()
        }
    };
    let early = task.exec(ctx(), &exec("early", &["exit", "0"], String::new())).await.unwrap_err();
    assert_eq!(code(early).0, Code::FAILED_PRECONDITION);
    task.start(ctx(), &start_request("web", "")).await.unwrap();

    let path = fifo(&daemon.path("e1"));
    let out = reader(&path);
    task.exec(ctx(), &exec("e1", &["say", "hello", "", "3"], path)).await.unwrap();
    let again = task.exec(ctx(), &exec("e1", &["exit", "0"], String::new())).await.unwrap_err();
    assert_eq!(code(again).0, Code::ALREADY_EXISTS);
    task.start(ctx(), &start_request("web", "e1")).await.unwrap();
    assert_eq!(wait(&task, "web", "e1").await, 3);
    assert_eq!(delete(&task, "web", "e1").await.unwrap(), 3);
    assert_eq!(out.await.unwrap(), b"hello");
    assert_eq!(daemon.topics_when(5).await[2..], ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);

    // One that cannot be started says why, has no exit event, and can be deleted.
    task.exec(ctx(), &exec("e2", &["missing"], String::new())).await.unwrap();
    let (missing, text) = code(task.start(ctx(), &start_request("web", "e2")).await.unwrap_err());
    assert_eq!((missing, text.contains("\"missing\"")), (Code::INVALID_ARGUMENT, true));
    delete(&task, "web", "e2").await.unwrap();
    let pids = task.pids(ctx(), &PidsRequest { id: "web".into(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes[0].pid, 42);

    let running = delete(&task, "web", "").await.unwrap_err();
    assert_eq!(code(running).0, Code::FAILED_PRECONDITION);
    task.kill(ctx(), &kill_request("web", 15)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 143);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    let topics = daemon.topics_when(8).await;
    assert_eq!(topics[5..], ["/tasks/exec-added", "/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn input_reaches_the_process_and_ends() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("cat", &["cat"], None);
    let task = daemon.connect("cat").await;
    let mut request = create_request(&daemon, "cat");
    (request.stdin, request.stdout) = (fifo(&daemon.path("in")), fifo(&daemon.path("out")));
    let out = reader(&request.stdout);
    task.create(ctx(), &request).await.unwrap();
    task.start(ctx(), &start_request("cat", "")).await.unwrap();
    let payload: Vec<u8> = (0..(8 << 20)).map(|i: u32| (i % 253) as u8).collect();
    let (bytes, path) = (payload.clone(), request.stdin.clone());
    let writer = tokio::task::spawn_blocking(move || {
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all(&bytes).unwrap();
    });
    writer.await.unwrap();
    let close = CloseIORequest { id: "cat".into(), stdin: true, ..Default::default() };
    task.close_io(ctx(), &close).await.unwrap();
    assert_eq!(wait(&task, "cat", "").await, 0);
    delete(&task, "cat", "").await.unwrap();
    let got = out.await.unwrap();
    assert!(got == payload, "{} bytes of {}", got.len(), payload.len());
    shutdown(&task, "cat").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn the_root_file_system_is_shown_and_leaves_no_mount() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("plain", &["read", "file"], None);
    daemon.make_bundle("layers", &["read", "file"], Some("plain"));
    let task = daemon.connect("plain").await;
    for (id, expected) in [("plain", "in plain"), ("layers", "upper layer")] {
        let mut request = create_request(&daemon, id);
        request.stdout = fifo(&daemon.path(&format!("out-{id}")));
        if id == "layers" {
            let dir = |name: &str| {
                fs::create_dir(daemon.path(name)).unwrap();
                daemon.path(name).display().to_string()
            };
            let (low, up, upper, work) = (dir("low"), dir("up"), dir("upper"), dir("work"));
            fs::write(format!("{low}/file"), "lower layer").unwrap();
            fs::write(format!("{up}/file"), "upper layer").unwrap();
            let mut mount = Mount::new();
            mount.type_ = "overlay".into();
            mount.source = "overlay".into();
            mount.options =
                vec![format!("workdir={work}"), format!("upperdir={upper}"), format!("lowerdir={up}:{low}")];
            request.rootfs = vec![mount];
        }
        let out = reader(&request.stdout);
        task.create(ctx(), &request).await.unwrap();
        assert!(!daemon.leftovers().iter().any(|l| l.contains(" overlay ")), "no mount while it runs");
        task.start(ctx(), &start_request(id, "")).await.unwrap();
        assert_eq!(wait(&task, id, "").await, 0);
        delete(&task, id, "").await.unwrap();
        assert_eq!(String::from_utf8(out.await.unwrap()).unwrap(), expected);
    }
    shutdown(&task, "plain").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn containers_of_a_pod_share_its_shim() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("pod", &["sleep"], Some("pod"));
    daemon.make_bundle("app", &["exit", "0"], Some("pod"));
    let alone = daemon.start_output("app");
    assert!(!alone.status.success());
    let text = String::from_utf8(alone.stderr).unwrap();
    assert!(text.contains("sandbox pod of container app does not run"), "{text}");
    let task = daemon.connect("pod").await;
    task.create(ctx(), &create_request(&daemon, "pod")).await.unwrap();
    let shim = daemon.state("pod").unwrap()["shim"]["pid"].clone();
    task.start(ctx(), &start_request("pod", "")).await.unwrap();
    let app = daemon.connect("app").await;
    app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    app.start(ctx(), &start_request("app", "")).await.unwrap();
    assert_eq!(wait(&app, "app", "").await, 0);
    delete(&app, "app", "").await.unwrap();
    // The pod is not empty: its shim stays, whoever asks, and `delete` for the app leaves it alone.
    shutdown(&app, "app").await;
    daemon.delete("app");
    assert_eq!(daemon.state("pod").unwrap()["shim"]["pid"], shim);
    task.kill(ctx(), &kill_request("pod", 9)).await.unwrap();
    assert_eq!(wait(&task, "pod", "").await, 137);
    delete(&task, "pod", "").await.unwrap();
    shutdown(&task, "pod").await;
    daemon.nothing_left().await;
}

fn kill_9(pid: &serde_json::Value) {
    let pid = i32::try_from(pid.as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

async fn sleeping(daemon: &Daemon) -> TaskClient {
    daemon.make_bundle("web", &["sleep"], None);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(daemon, "web")).await.unwrap();
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    task
}

#[tokio::test]
async fn a_killed_shim_is_cleaned_up_by_delete() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    kill_9(&daemon.state("web").unwrap()["shim"]["pid"]);
    let request = WaitRequest { id: "web".into(), ..Default::default() };
    assert!(task.wait(ctx(), &request).await.is_err());
    let response = daemon.delete("web");
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.is_some());
    daemon.nothing_left().await;
    // And its name is free again.
    let task = daemon.connect("web").await;
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn delete_ends_a_shim_that_containerd_gave_up_on() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let _task = sleeping(&daemon).await;
    daemon.delete("web");
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_killed_vmm_ends_its_tasks() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    kill_9(&daemon.state("web").unwrap()["vmm"]["pid"]);
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(daemon.topics_when(3).await[2], "/tasks/exit");
    assert_eq!(code(task.kill(ctx(), &kill_request("web", 9)).await.unwrap_err()).0, Code::NOT_FOUND);
    let pids = task.pids(ctx(), &PidsRequest { id: "web".into(), ..Default::default() }).await.unwrap();
    assert!(pids.processes.is_empty());
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_container_that_never_ran_is_killed_and_deleted() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["sleep"], None);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

/// The error of a create whose VM does not come up.
async fn boot_error(config: &str) -> (Code, String) {
    let daemon = Daemon::new(config).await;
    daemon.make_bundle("web", &["sleep"], None);
    let task = daemon.connect("web").await;
    let error = code(task.create(ctx(), &create_request(&daemon, "web")).await.unwrap_err());
    // What containerd does then.
    assert_eq!(code(delete(&task, "web", "").await.unwrap_err()).0, Code::NOT_FOUND);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    assert!(daemon.topics().is_empty(), "{:?}", daemon.topics());
    error
}

#[tokio::test]
async fn a_boot_that_fails_says_at_which_stage_and_why() {
    if !is_root() {
        return;
    }
    let (status, text) = boot_error("cmdline = \"fake=refuse\"").await;
    assert_eq!(status, Code::FAILED_PRECONDITION);
    assert!(text.contains("while configuring the VM") && text.contains("no /dev/kvm on this host"), "{text}");
    let (status, text) = boot_error("cmdline = \"fake=mute\"\n[timeouts]\nboot_ms = 300").await;
    assert_eq!(status, Code::DEADLINE_EXCEEDED);
    assert!(
        text.contains("waiting for the guest's agent (guest's console: \"random: crng init done\")"),
        "{text}"
    );
    assert!(text.contains("within 300ms"), "{text}");
    let (status, text) = boot_error("cmdline = \"fake=panic\"").await;
    assert_eq!(status, Code::UNAVAILABLE);
    assert!(text.contains("Kernel panic - not syncing: no init"), "{text}");
    let (_, text) = boot_error("cmdline = \"fake=crash\"").await;
    assert!(text.contains("ended without a word (signal: 6"), "{text}");
}

#[tokio::test]
async fn a_guest_file_that_is_missing_is_named() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["sleep"], None);
    fs::remove_file(daemon.path("kernel")).unwrap();
    let task = daemon.connect("web").await;
    let (status, text) = code(task.create(ctx(), &create_request(&daemon, "web")).await.unwrap_err());
    assert_eq!(status, Code::FAILED_PRECONDITION);
    assert!(text.contains("opening the guest's files: kernel /"), "{text}");
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_wrong_configuration_is_the_answer_to_start() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("vcpu = 2").await;
    daemon.make_bundle("web", &["sleep"], None);
    let output = daemon.start_output("web");
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("config.toml, line 7: unknown field `vcpu`"), "{text}");
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_create_that_fails_leaves_room_for_the_next() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["exit", "0"], None);
    let task = daemon.connect("web").await;
    let mut wrong = create_request(&daemon, "web");
    wrong.stdout = "binary:///usr/bin/logger".into();
    let (status, text) = code(task.create(ctx(), &wrong).await.unwrap_err());
    assert_eq!(status, Code::UNIMPLEMENTED);
    assert!(text.contains("only a fifo's path"), "{text}");
    let mut wrong = create_request(&daemon, "web");
    let mut mount = Mount::new();
    mount.type_ = "erofs".into();
    wrong.rootfs = vec![mount];
    let (status, text) = code(task.create(ctx(), &wrong).await.unwrap_err());
    assert_eq!((status, text.contains("\"erofs\"")), (Code::INVALID_ARGUMENT, true));
    let mut wrong = create_request(&daemon, "web");
    wrong.id = "../web".into();
    assert_eq!(code(task.create(ctx(), &wrong).await.unwrap_err()).0, Code::INVALID_ARGUMENT);

    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    let paused =
        task.pause(ctx(), &PauseRequest { id: "web".into(), ..Default::default() }).await.unwrap_err();
    assert_eq!(code(paused).0, Code::UNIMPLEMENTED);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_containerd_that_is_restarted_finds_its_task_again() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["sleep"], None);
    let address = daemon.start("web");
    // Gone in the middle of a create, which is carried out all the same.
    let task = TaskClient::new(Client::connect(&address).await.unwrap());
    let request = create_request(&daemon, "web");
    let call = task.create(ctx(), &request);
    assert!(tokio::time::timeout(Duration::from_millis(5), call).await.is_err());
    drop(task);
    let task = TaskClient::new(Client::connect(&address).await.unwrap());
    let pid = task.create(ctx(), &create_request(&daemon, "web")).await.unwrap().pid;
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    let connect = agent_api::task::ConnectRequest { id: "web".into(), ..Default::default() };
    assert_eq!(task.connect(ctx(), &connect).await.unwrap().task_pid, pid);
    assert_eq!(daemon.topics_when(2).await, ["/tasks/create", "/tasks/start"]);
    let start = TaskStart::parse_from_bytes(&daemon.events.lock().unwrap()[1].1.value).unwrap();
    assert_eq!((start.container_id.as_str(), start.pid), ("web", pid));
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(&task, "web", "").await;
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn both_names_of_the_task_service_are_served() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["sleep"], None);
    let client = Client::connect(&daemon.start("web")).await.unwrap();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut request = ttrpc::Request::new();
        request.service = service.into();
        request.method = "Connect".into();
        request.timeout_nano = 60_000_000_000;
        let response = client.request(request).await.unwrap();
        let response = agent_api::task::ConnectResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(
            u64::from(response.shim_pid),
            daemon.state("web").unwrap()["shim"]["pid"].as_u64().unwrap()
        );
    }
    shutdown(&TaskClient::new(client), "web").await;
    daemon.nothing_left().await;
}
