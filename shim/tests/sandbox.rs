//! The real shim binary between a fake containerd and a fake VMM with a fake agent: every step of a sandbox's life,
//! and every way out of it. Needs root, for mounts; says so when it was not run.

mod daemon;
mod fake;
mod forward;
mod hooks;
mod late;
mod operator;
mod pod;
mod resize;
mod streaming;
mod verbs;

use std::fs;
use std::io::Write as _;
use std::time::Duration;

use agent_api::task::{
    CheckpointTaskRequest, CloseIORequest, Mount, PidsRequest, StateRequest, Status, TaskClient, WaitRequest,
};
use containerd_shim_protos::events::task::{TaskExit, TaskStart};
use daemon::{
    Daemon, code, create_request, ctx, delete, exec_request, fifo, kill_request, made, reader, shutdown,
    start_request, started, wait,
};
use protobuf::Message as _;
use ttrpc::Code;
use ttrpc::asynchronous::Client;

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
    let task = made(&daemon, &["sleep"]).await;
    let early = task.exec(ctx(), &exec_request("early", &["exit", "0"], String::new())).await.unwrap_err();
    assert_eq!(code(early).0, Code::FAILED_PRECONDITION);
    task.start(ctx(), &start_request("web", "")).await.unwrap();

    let path = fifo(&daemon.path("e1"));
    let out = reader(&path);
    task.exec(ctx(), &exec_request("e1", &["say", "hello", "", "3"], path)).await.unwrap();
    let again = task.exec(ctx(), &exec_request("e1", &["exit", "0"], String::new())).await.unwrap_err();
    assert_eq!(code(again).0, Code::ALREADY_EXISTS);
    task.start(ctx(), &start_request("web", "e1")).await.unwrap();
    assert_eq!(wait(&task, "web", "e1").await, 3);
    assert_eq!(delete(&task, "web", "e1").await.unwrap(), 3);
    assert_eq!(out.await.unwrap(), b"hello");
    assert_eq!(daemon.topics_when(5).await[2..], ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);

    // One that cannot be started says why, has no exit event, and can be deleted.
    task.exec(ctx(), &exec_request("e2", &["missing"], String::new())).await.unwrap();
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
    started(daemon, &["sleep"]).await
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
    assert_eq!(pids.processes.len(), 1, "what has ended keeps its number until it is deleted");
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn the_last_container_ends_a_sandbox_that_nobody_will_ask_to() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    daemon.make_bundle("app", &["sleep"], Some("web"));
    task.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    task.start(ctx(), &start_request("app", "")).await.unwrap();
    kill_9(&daemon.state("web").unwrap()["vmm"]["pid"]);
    // containerd hears of both ends at once, and may be done with the first container first.
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(wait(&task, "app", "").await, 137);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    assert_eq!(delete(&task, "app", "").await.unwrap(), 137);
    drop(task);
    daemon.nothing_left().await;
    assert_eq!(daemon.topics_when(8).await[6..], ["/tasks/delete", "/tasks/delete"]);
}

#[tokio::test]
async fn a_container_that_never_ran_is_killed_and_deleted() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = made(&daemon, &["sleep"]).await;
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
async fn a_network_that_a_vm_cannot_have_is_refused_with_the_reason() {
    if !is_root() {
        return;
    }
    for (id, from, to, word) in [
        ("host", r#",{"type":"network"}"#, "", "the host's network is asked for"),
        (
            "gone",
            r#"{"type":"network"}"#,
            r#"{"type":"network","path":"/nonexistent/netns"}"#,
            "network namespace /nonexistent/netns: No such file",
        ),
    ] {
        let daemon = Daemon::new("").await;
        daemon.make_bundle(id, &["sleep"], None);
        let config = daemon.bundle(id).join("config.json");
        let text = fs::read_to_string(&config).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&config, text.replace(from, to)).unwrap();
        let task = daemon.connect(id).await;
        let (status, text) = code(task.create(ctx(), &create_request(&daemon, id)).await.unwrap_err());
        assert_eq!(status, Code::FAILED_PRECONDITION);
        assert!(text.contains("connecting the pod's network") && text.contains(word), "{text}");
    }
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
    wrong.stdout = "ttrpc+unix:///run/sock?streaming_id=web-stdout".into();
    let (status, text) = code(task.create(ctx(), &wrong).await.unwrap_err());
    assert_eq!(status, Code::UNIMPLEMENTED);
    assert!(text.contains("supported are a fifo's path"), "{text}");
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
    let checkpoint = CheckpointTaskRequest { id: "web".into(), ..Default::default() };
    assert_eq!(code(task.checkpoint(ctx(), &checkpoint).await.unwrap_err()).0, Code::UNIMPLEMENTED);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_containerd_that_is_restarted_finds_its_task_again() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("cmdline = \"fake=slow\"").await;
    daemon.make_bundle("web", &["sleep"], None);
    let address = daemon.start("web");
    // Gone in the middle of a create, which is carried out all the same.
    let task = TaskClient::new(Client::connect(&address).await.unwrap());
    let request = create_request(&daemon, "web");
    let call = task.create(ctx(), &request);
    assert!(tokio::time::timeout(Duration::from_millis(50), call).await.is_err());
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
