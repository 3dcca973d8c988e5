//! A VMM without a VM, and an agent without a guest, in one process: what is on the other side of the shim.
//!
//! The shim starts it like `ctvm-vmm`, with the control socket on descriptor 3. What it should do is in the first
//! word of the container's command:
//!
//! | command | does |
//! | --- | --- |
//! | `exit N` | ends with that code |
//! | `say OUT ERR N` | writes to both outputs, ends |
//! | `cat` | copies stdin to stdout until it ends |
//! | `read FILE` | writes the content of a file below the container's root |
//! | `sleep` | runs until it is killed |
//! | `oom N` | counts as one more process of its container that was killed for want of memory, and ends with that code |
//! | `oom` | the same, and runs until it is killed |
//! | `missing` | cannot be started |
//! | `journal` | writes to stdout what VM and containers were told about sizes, a line each |
//!
//! and how its boot should fail in words of the kernel's command line: `fake=refuse|mute|panic|crash`; with `fake=slow`
//! it takes its time to show a directory, and with `fake=deaf` neither monitor nor agent answers when asked how it is. The
//! first resize ends as `resize=…` says; see [`vm`].

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::metrics::Metrics;
use agent_api::sandbox::{
    ForwardRequest, ForwardResponse, InfoRequest, InfoResponse, OomKillsRequest, OomKillsResponse, Sandbox,
    SetupRequest, SetupResponse, create_sandbox,
};
use agent_api::stream::StreamId;
use agent_api::task::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
    KillRequest, PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResumeRequest, StartRequest,
    StartResponse, StatsRequest, StatsResponse, Task, UpdateTaskRequest, WaitRequest, WaitResponse,
    create_task,
};
use agent_api::{AGENT_PORT, LOG_PORT, METRICS_TYPE_URL, RESOURCES_TYPE_URL, STREAM_PORT};
use async_trait::async_trait;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::asynchronous::transport::{Listener, Socket};
use vm::{FakeVm, Journal};
use vmm_api::frame::{self, FrameError};
use vmm_api::{
    ApiError, CONTROL_FD, ErrorCode, Event, ExitReason, FdIndex, Message, Op, Outcome, Reply, Request, Stats,
    Timeline,
};

mod vm;

/// What `fake=slow` waits: any test's patience with a create is far below it.
const SLOW: Duration = Duration::from_millis(500);

/// The port on which the guest has no server. On every other one, a server says the port and whether it was asked for
/// by IPv6, and then what it was told.
pub const REFUSED_PORT: u32 = 9;

/// Directories that the shim shows to the guest, by name.
type Shares = Arc<Mutex<HashMap<String, OwnedFd>>>;

/// Runs until the lease ends.
pub fn run() -> ! {
    // SAFETY: the shim starts this process with the control socket on that descriptor and nothing else in it owns it.
    let control = Arc::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let shares = Shares::default();
    let mut fault = String::new();
    let mut console = None;
    let journal = Journal::default();
    let mut vm = None;
    loop {
        let packet = match frame::recv(&*control) {
            Ok(packet) => packet,
            Err(FrameError::Closed) => std::process::exit(10),
            Err(e) => panic!("{e}"),
        };
        let Request { id, op } = serde_json::from_slice(&packet.bytes).expect("a request");
        let mut fds = packet.fds;
        let outcome = match op {
            Op::Configure(config) => {
                assert_eq!(fds.len(), 3, "kernel, image, console");
                console = fds.pop();
                let word = config.kernel.cmdline.split(' ').find_map(|w| w.strip_prefix("fake="));
                word.unwrap_or_default().clone_into(&mut fault);
                vm = Some(Arc::new(FakeVm::new(&config, journal.clone())));
                if fault == "refuse" {
                    Outcome::Err(ApiError::msg(ErrorCode::FailedPrecondition, "no /dev/kvm on this host"))
                } else {
                    Outcome::Ok(Reply::Done)
                }
            }
            Op::Boot => {
                let timeline =
                    Timeline { main_us: 1, configure_us: 2, kvm_ready_us: 3, ..Timeline::default() };
                Outcome::Ok(Reply::Booted { timeline })
            }
            Op::FsMount { at, .. } => {
                if fault == "slow" {
                    std::thread::sleep(SLOW);
                }
                shares.lock().unwrap().insert(at, fds.remove(0));
                Outcome::Ok(Reply::Done)
            }
            Op::FsUnmount { at, .. } => match shares.lock().unwrap().remove(&at) {
                Some(_) => Outcome::Ok(Reply::Done),
                None => Outcome::Err(ApiError::msg(ErrorCode::NotFound, at)),
            },
            Op::Resize { vcpus, memory_mib, timeout_ms } => {
                let (vm, control) = (vm.clone().expect("configured"), control.clone());
                // Others are answered meanwhile.
                std::thread::spawn(move || {
                    let outcome = vm.resize(vcpus, memory_mib, timeout_ms);
                    tell(&control, &Message::Reply { id, outcome });
                });
                continue;
            }
            // Silent, as a monitor that hangs is.
            Op::Stats if fault == "deaf" => continue,
            Op::Stats => {
                let mut stats = Stats { state: "running".into(), ..Stats::default() };
                vm.as_ref().expect("configured").count(&mut stats);
                stats.exits.insert("mmio_write".into(), 7);
                stats.devices.insert("blk0".into(), [("reads".to_owned(), 3)].into());
                Outcome::Ok(Reply::Stats(Box::new(stats)))
            }
            Op::Shutdown => Outcome::Ok(Reply::Done),
            other => Outcome::Err(ApiError::msg(ErrorCode::Internal, format!("{other:?}"))),
        };
        let booted = matches!(outcome, Outcome::Ok(Reply::Booted { .. }));
        let stops = serde_json::from_slice::<Request>(&packet.bytes).is_ok_and(|r| r.op == Op::Shutdown);
        tell(&control, &Message::Reply { id, outcome });
        if stops {
            tell(&control, &Message::Event(Event::Exiting { reason: ExitReason::Shutdown }));
            std::process::exit(0);
        }
        if booted {
            match fault.as_str() {
                "mute" => {
                    let console = console.as_ref().expect("configured");
                    rustix::io::write(console, b"\rrandom: crng init done\r\n").unwrap();
                }
                "panic" => {
                    let last_words = "[    0.1] Kernel panic - not syncing: no init".to_owned();
                    tell(
                        &control,
                        &Message::Event(Event::Exiting { reason: ExitReason::GuestPanic { last_words } }),
                    );
                    std::process::exit(11);
                }
                "crash" => std::process::abort(),
                _ => {
                    eprintln!("ctvm-vmm: warn: fake: a word of the monitor");
                    let console = console.as_ref().expect("configured");
                    rustix::io::write(console, b"CTVM-INIT\r\n\x1b[2J").unwrap();
                    let (control, shares, is_deaf) = (control.clone(), shares.clone(), fault == "deaf");
                    let journal = journal.clone();
                    std::thread::spawn(move || agent(control, shares, is_deaf, journal));
                }
            }
        }
    }
}

fn tell(control: &OwnedFd, message: &Message) {
    // A shim that is gone is seen at the next receive.
    let _ = frame::send(control, &serde_json::to_vec(message).unwrap(), &[]);
}

/// Dials a host port: our end of the connection.
fn dial(control: &OwnedFd, port: u32) -> UnixStream {
    let (guest, host) = UnixStream::pair().unwrap();
    let event = Message::Event(Event::VsockAccepted { port, guest_port: 1, socket: FdIndex(0) });
    let _ = frame::send(control, &serde_json::to_vec(&event).unwrap(), &[host.as_fd()]);
    guest
}

fn agent(control: Arc<OwnedFd>, shares: Shares, is_deaf: bool, journal: Journal) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async move {
        let mut log = dial(&control, LOG_PORT);
        log.write_all(b"{\"level\":\"info\",\"source\":\"agent\",\"container\":\"web\",\"msg\":\"fake \\u001b agent up\"}\n").unwrap();
        let socket = Socket::try_from(dial(&control, AGENT_PORT)).unwrap();
        let connections = async_stream(socket);
        let fake = Arc::new(Fake { control, shares, processes: Mutex::default(), is_deaf, journal });
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_task(fake.clone()))
            .register_service(create_sandbox(fake));
        server.start().await.unwrap();
        std::future::pending::<()>().await;
        drop(log);
    });
}

/// One connection, and no end.
fn async_stream(socket: Socket) -> impl futures::Stream<Item = std::io::Result<Socket>> + Send + 'static {
    use futures::StreamExt as _;
    futures::stream::iter([Ok(socket)]).chain(futures::stream::pending())
}

struct Fake {
    control: Arc<OwnedFd>,
    shares: Shares,
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
    is_deaf: bool,
    journal: Journal,
}

struct Process {
    container: String,
    args: Vec<String>,
    streams: Mutex<[Option<UnixStream>; 3]>,
    exit: watch::Sender<Option<u32>>,
    paused: AtomicBool,
    /// Its container's kills for want of memory.
    oom_kills: Arc<watch::Sender<u64>>,
}

impl Fake {
    fn add(&self, id: &str, exec_id: &str, args: Vec<String>, names: [&str; 3]) {
        let streams = names.map(|name| {
            let id = StreamId::from_name(name).expect("a stream name")?;
            let mut stream = dial(&self.control, STREAM_PORT);
            stream.write_all(&id.hello()).unwrap();
            Some(stream)
        });
        let mut processes = self.processes.lock().unwrap();
        let init = processes.get(&(id.to_owned(), String::new()));
        let oom_kills = init.map_or_else(|| Arc::new(watch::Sender::new(0)), |init| init.oom_kills.clone());
        let process = Process {
            container: id.to_owned(),
            args,
            streams: Mutex::new(streams),
            exit: watch::Sender::new(None),
            paused: AtomicBool::new(false),
            oom_kills,
        };
        processes.insert((id.to_owned(), exec_id.to_owned()), Arc::new(process));
    }

    fn find(&self, id: &str, exec_id: &str) -> ttrpc::Result<Arc<Process>> {
        let found = self.processes.lock().unwrap().get(&(id.to_owned(), exec_id.to_owned())).cloned();
        found.ok_or_else(|| refused(ttrpc::Code::NOT_FOUND, "no such process in the guest"))
    }
}

fn refused(code: ttrpc::Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

fn args_of(process: &serde_json::Value) -> Vec<String> {
    serde_json::from_value(process["args"].clone()).expect("process.args")
}

impl Process {
    fn end(&self, status: u32) {
        *self.streams.lock().unwrap() = [None, None, None];
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert(status);
            first
        });
    }

    fn run(&self, shares: &Shares, journal: &Journal) {
        let [stdin, stdout, stderr] =
            self.streams.lock().unwrap().each_ref().map(|s| s.as_ref().map(|s| s.try_clone().unwrap()));
        let write = |stream: Option<UnixStream>, text: &[u8]| {
            if let Some(mut stream) = stream {
                stream.write_all(text).unwrap();
            }
        };
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let status = match args.as_slice() {
            ["exit", code] => code.parse().unwrap(),
            ["say", out, err, code] => {
                write(stdout, out.as_bytes());
                write(stderr, err.as_bytes());
                code.parse().unwrap()
            }
            ["cat"] => {
                std::io::copy(&mut stdin.unwrap(), &mut stdout.unwrap()).unwrap();
                0
            }
            ["read", file] => {
                let shares = shares.lock().unwrap();
                let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
                let file =
                    rustix::fs::openat(&shares[&self.container], *file, flags, rustix::fs::Mode::empty());
                let mut text = String::new();
                std::fs::File::from(file.unwrap()).read_to_string(&mut text).unwrap();
                write(stdout, text.as_bytes());
                0
            }
            ["journal"] => {
                write(stdout, journal.text().as_bytes());
                0
            }
            ["oom", code] => {
                self.oom_kills.send_modify(|kills| *kills += 1);
                code.parse().unwrap()
            }
            ["oom"] => {
                self.oom_kills.send_modify(|kills| *kills += 1);
                return;
            }
            _ => return,
        };
        self.end(status);
    }
}

#[async_trait]
impl Sandbox for Fake {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        assert_eq!((request.share_tag.as_str(), request.entropy.len()), ("ctvm", 64));
        assert!(request.realtime_ns > 0 && !request.hostname.is_empty());
        let mut response = SetupResponse::new();
        response.kernel_release = "0.0-fake".into();
        Ok(response)
    }

    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        if self.is_deaf {
            std::future::pending::<()>().await;
        }
        let mut info = InfoResponse::new();
        info.kernel_release = "0.0-fake".into();
        info.memory_total_kib = 1000;
        info.cpus = 1;
        Ok(info)
    }

    async fn oom_kills(&self, _: &TtrpcContext, request: OomKillsRequest) -> ttrpc::Result<OomKillsResponse> {
        let init = self.find(&request.id, "")?;
        let (mut kills, mut exit) = (init.oom_kills.subscribe(), init.exit.subscribe());
        if let Some(beyond) = request.beyond {
            tokio::select! {
                _ = kills.wait_for(|kills| *kills > beyond) => {}
                _ = exit.wait_for(Option::is_some) => {}
            }
        }
        let (kills, ended) = (*kills.borrow(), exit.borrow().is_some());
        Ok(OomKillsResponse { kills, ended, ..Default::default() })
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<ForwardResponse> {
        if request.port == REFUSED_PORT {
            return Err(refused(ttrpc::Code::FAILED_PRECONDITION, "no server on that port"));
        }
        let mut stream = dial(&self.control, STREAM_PORT);
        stream.write_all(&StreamId(request.stream).hello()).unwrap();
        // A client that goes breaks it off.
        std::thread::spawn(move || drop(serve(stream, &request)));
        Ok(ForwardResponse::new())
    }
}

/// The server behind a forwarded connection, until its client has no more to say.
fn serve(mut stream: UnixStream, request: &ForwardRequest) -> std::io::Result<()> {
    stream.write_all(format!("{} {}\n", request.port, request.ipv6).as_bytes())?;
    std::io::copy(&mut stream.try_clone()?, &mut stream)?;
    Ok(())
}

#[async_trait]
impl Task for Fake {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let spec: serde_json::Value =
            serde_json::from_slice(&request.options.value).expect("a configuration");
        assert_eq!(spec["root"]["path"], format!("/run/ctvm/share/{}", request.id));
        assert!(self.shares.lock().unwrap().contains_key(&request.id), "the root is shown first");
        self.journal.note(format!("create {}", request.id));
        let args = args_of(&spec["process"]);
        self.add(&request.id, "", args, [&request.stdin, &request.stdout, &request.stderr]);
        Ok(CreateTaskResponse::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if self.find(&request.id, "")?.paused.load(Ordering::Relaxed) {
            return Err(refused(ttrpc::Code::FAILED_PRECONDITION, "it is paused"));
        }
        let process: serde_json::Value = serde_json::from_slice(&request.spec.value).expect("a process");
        let names = [&*request.stdin, &*request.stdout, &*request.stderr];
        self.add(&request.id, &request.exec_id, args_of(&process), names);
        Ok(Empty::new())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let process = self.find(&request.id, &request.exec_id)?;
        if process.args[0] == "missing" {
            process.end(255);
            return Err(refused(ttrpc::Code::INVALID_ARGUMENT, "exec \"missing\": no such file"));
        }
        let (shares, journal) = (self.shares.clone(), self.journal.clone());
        std::thread::spawn(move || process.run(&shares, &journal));
        Ok(StartResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.find(&request.id, &request.exec_id)?;
        let mut exit = process.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().expect("waited for");
        Ok(WaitResponse { exit_status: status, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.find(&request.id, &request.exec_id)?.end(128 + request.signal);
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        match self.find(&request.id, "")?.paused.swap(true, Ordering::Relaxed) {
            false => Ok(Empty::new()),
            true => Err(refused(ttrpc::Code::FAILED_PRECONDITION, "it is paused")),
        }
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        match self.find(&request.id, "")?.paused.swap(false, Ordering::Relaxed) {
            true => Ok(Empty::new()),
            false => Err(refused(ttrpc::Code::FAILED_PRECONDITION, "it is running")),
        }
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        // Nobody's are all containers' together.
        if !request.id.is_empty() {
            self.find(&request.id, "")?;
        }
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 1_500_000;
        metrics.memory.mut_or_insert_default().usage = 4096;
        metrics.memory.mut_or_insert_default().usage_limit = u64::MAX;
        metrics.pids.mut_or_insert_default().current = 2;
        let value = metrics.write_to_bytes().unwrap();
        let stats = Any { type_url: METRICS_TYPE_URL.to_owned(), value, ..Any::default() };
        Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.find(&request.id, "")?;
        assert_eq!(request.resources.type_url, RESOURCES_TYPE_URL);
        let resources: serde_json::Value =
            serde_json::from_slice(&request.resources.value).expect("resources");
        if resources["pids"]["limit"].as_i64().is_some_and(|limit| limit >= 100) {
            self.journal.note(format!("limits of {} refused", request.id));
            return Err(refused(ttrpc::Code::INVALID_ARGUMENT, "pids.limit must be below 100"));
        }
        self.journal.note(format!("limits of {}", request.id));
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, _: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let process = ProcessInfo { pid: 42, ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        self.find(&request.id, &request.exec_id)?.end(128 + 9);
        self.processes.lock().unwrap().remove(&(request.id, request.exec_id));
        Ok(DeleteResponse::new())
    }
}
