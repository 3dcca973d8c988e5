//! What an operator sees: the sandbox's socket, and `ctvm` that asks it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::daemon::{
    Daemon, create_request, ctx, delete, eventually, kill_request, shutdown, start_request, wait,
};
use crate::{is_root, kill_9, sleeping};
use agent_api::task::TaskClient;
use serde_json::Value;

/// `ctvm` with its arguments.
pub fn ctvm(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ctvm"));
    command.args(arguments).env("CTVM_RUN_DIR", daemon.path("run")).stdin(Stdio::null());
    command
}

pub async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// What it prints when it succeeds.
pub async fn told(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = run(ctvm(daemon, arguments)).await;
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Its status and its one line of complaint.
pub async fn refused(daemon: &Daemon, arguments: &[&str]) -> (i32, String) {
    let output = run(ctvm(daemon, arguments)).await;
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    (output.status.code().unwrap(), text)
}

fn connect(daemon: &Daemon, id: &str) -> UnixStream {
    let stream = UnixStream::connect(daemon.path("run/test").join(id).join("metrics.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// One request in bytes, and the whole answer.
async fn ask(daemon: &Daemon, request: &[u8]) -> String {
    let (mut stream, request) = (connect(daemon, "web"), request.to_vec());
    let exchange = move || {
        // One that is too long is answered and closed before all of it is written.
        let _ = stream.write_all(&request);
        let mut answer = String::new();
        // A reset follows an answer to a request that was not read to its end.
        let _ = stream.read_to_string(&mut answer);
        answer
    };
    tokio::task::spawn_blocking(exchange).await.unwrap()
}

/// The value of the sample that begins with `name{namespace="test",sandbox="web"` and has `labels` after that.
pub fn value(text: &str, name: &str, labels: &str) -> Option<f64> {
    let begin = match labels {
        "" => format!("{name}{{namespace=\"test\",sandbox=\"web\"}} "),
        labels => format!("{name}{{namespace=\"test\",sandbox=\"web\",{labels}}} "),
    };
    text.lines().find_map(|line| line.strip_prefix(&begin)).map(|v| v.parse().unwrap())
}

async fn end(daemon: &Daemon, task: &TaskClient) {
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(task, "web", "").await;
    delete(task, "web", "").await.unwrap();
    shutdown(task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn metrics_tell_all_that_is_known() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("vcpus = 2\nmemory_mib = 128").await;
    let task = sleeping(&daemon).await;
    let socket = daemon.path("run/test/web/metrics.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    daemon.make_bundle("app", &["exit", "3"], Some("web"));
    let app = daemon.connect("app").await;
    for _ in 0..2 {
        app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
        app.start(ctx(), &start_request("app", "")).await.unwrap();
        assert_eq!(wait(&app, "app", "").await, 3);
        delete(&app, "app", "").await.unwrap();
    }

    let answer = ask(&daemon, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", text.len())), "{head}");
    for (name, labels, expected) in [
        ("ctvm_sandbox_up", "", 1.0),
        ("ctvm_vmm_up", "", 1.0),
        ("ctvm_agent_up", "", 1.0),
        ("ctvm_vcpus", "", 2.0),
        ("ctvm_guest_memory_configured_bytes", "", 134_217_728.0),
        ("ctvm_containers", "state=\"running\"", 1.0),
        ("ctvm_process_exits_total", "process=\"container\",kind=\"error\"", 2.0),
        ("ctvm_process_exits_total", "process=\"container\",kind=\"signal\"", 0.0),
        ("ctvm_container_restarts_total", "name=\"app\"", 1.0),
        ("ctvm_container_restarts_total", "name=\"web\"", 0.0),
        ("ctvm_vcpu_exits_total", "kind=\"mmio_write\"", 7.0),
        ("ctvm_device_counter_total", "device=\"blk0\",counter=\"reads\"", 3.0),
        ("ctvm_agent_memory_total_bytes", "", 1_024_000.0),
        ("ctvm_container_cpu_seconds_total", "container=\"web\"", 1.5),
        ("ctvm_container_memory_usage_bytes", "container=\"web\"", 4096.0),
        ("ctvm_container_pids", "container=\"web\"", 2.0),
        ("ctvm_container_oom_kills_total", "container=\"web\"", 0.0),
    ] {
        assert_eq!(value(text, name, labels), Some(expected), "{name} {labels} in {text}");
    }
    assert!(!text.contains("ctvm_container_memory_limit_bytes"), "it has none");
    for name in ["ctvm_vmm_memory_private_bytes", "ctvm_shim_memory_pss_bytes", "ctvm_sandbox_uptime_seconds"]
    {
        assert!(value(text, name, "").unwrap() > 0.0, "{name} in {text}");
    }
    let stage = |stage: &str| value(text, "ctvm_start_stage_seconds", &format!("stage=\"{stage}\""));
    // The fake VMM's stages are from before it.
    assert_eq!((stage("shim start"), stage("vmm main")), (Some(0.0), Some(0.0)));
    let ready = stage("agent ready").unwrap();
    let created = value(text, "ctvm_start_stage_seconds", "stage=\"container created\",container=\"app\"");
    assert!(created.unwrap() > ready, "{text}");
    heads_are_right(text);
    end(&daemon, &task).await;
}

/// Every family has its head, once, before its samples.
fn heads_are_right(text: &str) {
    let mut seen = std::collections::HashSet::new();
    let mut current = "";
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            current = rest.split(' ').next().unwrap();
            assert!(seen.insert(current.to_owned()), "{current} twice");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current);
            let expected = match name {
                _ if name.ends_with("_total") => "counter",
                "ctvm_resize_duration_seconds" => "histogram",
                _ => "gauge",
            };
            assert_eq!(kind, expected);
        } else {
            let name = line.split(['{', ' ']).next().unwrap();
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            assert!(name == current || histogram == Some(current), "{line}");
        }
    }
    assert!(seen.len() > 3, "{text}");
}

#[tokio::test]
async fn a_sandbox_that_hangs_tells_what_is_known_in_time() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("cmdline = \"fake=deaf\"").await;
    let task = sleeping(&daemon).await;
    for _ in 0..2 {
        let begun = Instant::now();
        let text = told(&daemon, &["metrics"]).await;
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        for name in ["ctvm_sandbox_up", "ctvm_vmm_up", "ctvm_agent_up"] {
            assert_eq!(value(&text, name, ""), Some(0.0), "{text}");
        }
        assert!(value(&text, "ctvm_vmm_memory_private_bytes", "").unwrap() > 0.0, "{text}");
        assert!(!text.contains("ctvm_vcpu_exits_total") && !text.contains("ctvm_agent_cpus"), "{text}");
    }
    end(&daemon, &task).await;
}

#[tokio::test]
async fn wrong_requests_are_answered_and_harm_nothing() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    for (request, status) in [
        (&b"\x16\x03\x01garbage\xff\n"[..], "400"),
        (b"GET /nothing HTTP/1.1\r\n\r\n", "404"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"GET /resize?vcpus=1 HTTP/1.1\r\n\r\n", "405"),
        (b"POST /resize HTTP/1.1\r\n\r\n", "400"),
        (b"POST /resize?vcpus=0 HTTP/1.1\r\n\r\n", "400"),
        (b"GET /metrics HTTP/3.0\r\n\r\n", "505"),
        (&[b'x'; 20_000], "431"),
    ] {
        let answer = ask(&daemon, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer:?}");
    }
    // Clients that say nothing have their places, and no more; then they are free again.
    let silent: Vec<UnixStream> = (0..8).map(|_| connect(&daemon, "web")).collect();
    let ninth = ask(&daemon, b"GET /status HTTP/1.1\r\n\r\n").await;
    assert!(ninth.starts_with("HTTP/1.1 503 "), "{ninth}");
    drop(silent);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(ask(&daemon, b"GET /status HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    end(&daemon, &task).await;
}

#[tokio::test]
async fn ps_lists_what_lives_and_what_is_dead() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    assert_eq!(told(&daemon, &["ps", "--json"]).await.trim(), "[]");
    let (status, text) = refused(&daemon, &["logs", "web"]).await;
    assert_eq!((status, text.contains("no sandbox runs on this node")), (9, true), "{text}");
    let task = sleeping(&daemon).await;
    let list: Value = serde_json::from_str(&told(&daemon, &["ps", "--json"]).await).unwrap();
    let [row] = list.as_array().unwrap().as_slice() else { panic!("{list}") };
    assert_eq!(
        (&row["namespace"], &row["sandbox"], &row["state"]),
        (&"test".into(), &"web".into(), &"running".into())
    );
    assert_eq!((&row["vcpus"], &row["memory_mib"]), (&1.into(), &256.into()));
    assert_eq!(row["containers"][0]["state"], "running");
    let state = daemon.state("web").unwrap();
    assert_eq!((&row["shim_pid"], &row["vmm_pid"]), (&state["shim"]["pid"], &state["vmm"]["pid"]));
    let top = told(&daemon, &["top", "--once"]).await;
    let cells: Vec<&str> = top.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((cells[1], cells.last()), ("web", Some(&"1")), "{top}");
    assert!(cells[4].parse::<f64>().unwrap() > 0.0, "the VMM's private memory: {top}");
    let stages = told(&daemon, &["timeline", "w"]).await;
    assert!(stages.contains("agent ready") && stages.contains("container running"), "{stages}");

    let (status, text) = refused(&daemon, &["console", "other/web"]).await;
    assert_eq!((status, text.contains("no sandbox \"web\"; there are: none")), (9, true), "{text}");
    kill_9(&state["shim"]["pid"]);
    eventually("its end is seen", || !fs::exists(format!("/proc/{}", state["shim"]["pid"])).unwrap()).await;
    let table = told(&daemon, &["ps"]).await;
    assert!(table.contains(" dead ") && table.contains("-namespace test -id web delete"), "{table}");
    let (status, text) = refused(&daemon, &["console", "web"]).await;
    assert_eq!((status, text.contains("its shim has ended")), (10, true), "{text}");
    let metrics = told(&daemon, &["metrics"]).await;
    assert_eq!(value(&metrics, "ctvm_sandbox_up", ""), Some(0.0));
    assert!(metrics.contains("ctvm_node_sandboxes{state=\"dead\"} 1\n"), "{metrics}");
    heads_are_right(&(metrics + "# HELP a b\n# TYPE a gauge\na 1\n# HELP b b\n# TYPE b gauge\nb 1\n"));
    drop(task);
    daemon.delete("web");
    daemon.nothing_left().await;
}

#[tokio::test]
async fn metrics_of_the_node_are_served() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    let socket = daemon.path("node.sock");
    let address = format!("unix:{}", socket.display());
    let mut server = ctvm(&daemon, &["metrics", "--listen", &address]).stderr(Stdio::null()).spawn().unwrap();
    eventually("it listens", || UnixStream::connect(&socket).is_ok()).await;
    let exchange = move || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = tokio::task::spawn_blocking(exchange).await.unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("200 OK"), "{head}");
    assert_eq!(value(text, "ctvm_sandbox_up", ""), Some(1.0));
    assert!(text.contains("ctvm_node_sandboxes{state=\"answering\"} 1\n"), "{text}");
    heads_are_right(text);
    end(&daemon, &task).await;
}

#[tokio::test]
async fn logs_have_the_lines_of_all_and_follow() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    let identity = |component: &str| format!(" component={component} ");
    let mut follower = ctvm(&daemon, &["logs", "-f", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    let log = told(&daemon, &["logs", "web"]).await;
    for line in log.lines() {
        assert!(line.starts_with("time=\"") && line.contains(" sandbox=web"), "{line}");
        assert!(
            line.contains(" namespace=test ") && line.contains(" runtime=io.containerd.ctvm.v2 "),
            "{line}"
        );
    }
    let find = |words: &[&str]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(find(&["level=warning", "fake: a word of the monitor", &identity("vmm")]), "{log}");
    let guest = ["level=info", r"fake \x1b agent up", " component=guest container=web ", " source=agent"];
    assert!(find(&guest), "{log}");
    assert!(
        find(&["msg=create", &identity("shim"), " container=web "])
            || find(&["msg=\"create\"", " container=web "]),
        "{log}"
    );
    assert_eq!(
        told(&daemon, &["console", "web"]).await,
        "CTVM-INIT\n[2J\n",
        "cleaned of what a terminal would do"
    );

    end(&daemon, &task).await;
    // What came after it had begun, and then the end.
    let mut followed = String::new();
    follower.stdout.take().unwrap().read_to_string(&mut followed).unwrap();
    assert!(follower.wait().unwrap().success());
    assert!(followed.starts_with(&log[..200]), "{followed}");
    assert!(followed.contains("VM stopped"), "{followed}");
}

#[tokio::test]
async fn exec_runs_a_command_with_its_streams_and_status() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = sleeping(&daemon).await;
    let output = run(ctvm(&daemon, &["exec", "web", "--", "say", "to stdout", "to stderr", "42"])).await;
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert_eq!((&*output.stdout, &*output.stderr), (&b"to stdout"[..], &b"to stderr"[..]));

    let payload = vec![b'p'; 3 << 20];
    let mut cat = ctvm(&daemon, &["exec", "we", "--container", "web", "--", "cat"]);
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut stdin, bytes) = (cat.stdin.take().unwrap(), payload.clone());
    let writer = tokio::task::spawn_blocking(move || stdin.write_all(&bytes).unwrap());
    let output = tokio::task::spawn_blocking(move || cat.wait_with_output().unwrap()).await.unwrap();
    writer.await.unwrap();
    assert!(output.status.success() && output.stdout == payload, "{} bytes", output.stdout.len());

    // A signal is the command's.
    let mut sleep = ctvm(&daemon, &["exec", "web", "--", "sleep"]).spawn().unwrap();
    eventually("it runs", || daemon.topics().iter().filter(|t| *t == "/tasks/exec-started").count() == 3)
        .await;
    let pid = rustix::process::Pid::from_child(&sleep);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = tokio::task::spawn_blocking(move || sleep.wait().unwrap()).await.unwrap();
    assert_eq!(status.code(), Some(128 + 15));

    let (status, text) = refused(&daemon, &["exec", "web", "--", "missing"]).await;
    assert_eq!((status, text.contains("exec \"missing\": no such file")), (125, true), "{text}");
    let (status, text) = refused(&daemon, &["exec", "web", "--container", "x", "--", "true"]).await;
    assert_eq!(
        (status, text.contains("no container \"x\"; there are: web (running)")),
        (125, true),
        "{text}"
    );
    let (status, text) = refused(&daemon, &["exec", "-t", "web", "--", "true"]).await;
    assert_eq!((status, text.contains("no terminal")), (125, true), "{text}");
    assert!(!daemon.path("run/test/web/execs").exists(), "its fifos are gone");
    let metrics = told(&daemon, &["metrics"]).await;
    for (kind, count) in [("success", 1.0), ("error", 1.0), ("signal", 1.0)] {
        let labels = format!("process=\"exec\",kind=\"{kind}\"");
        assert_eq!(value(&metrics, "ctvm_process_exits_total", &labels), Some(count), "{kind} in {metrics}");
    }
    end(&daemon, &task).await;
}

#[tokio::test]
async fn ends_by_want_of_memory_and_with_the_vm_are_told_apart() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("web", &["oom", "137"], None);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    let exits = |text: &str, kind: &str| {
        value(text, "ctvm_process_exits_total", &format!("process=\"container\",kind=\"{kind}\"")).unwrap()
    };
    let text = told(&daemon, &["metrics"]).await;
    assert_eq!((exits(&text, "oom"), exits(&text, "signal")), (1.0, 0.0), "{text}");
    delete(&task, "web", "").await.unwrap();
    fs::remove_dir_all(daemon.bundle("web")).unwrap();
    let task = sleeping(&daemon).await;
    kill_9(&daemon.state("web").unwrap()["vmm"]["pid"]);
    assert_eq!(wait(&task, "web", "").await, 137);
    let text = told(&daemon, &["metrics"]).await;
    assert_eq!((exits(&text, "vm_lost"), value(&text, "ctvm_sandbox_up", "")), (1.0, Some(0.0)), "{text}");
    assert!(text.contains("state=\"ended\""), "{text}");
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}
