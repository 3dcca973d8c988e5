//! The VM follows the pod: what it is told, in which order with the containers' limits, and what a caller hears of a
//! guest that does not follow.

use std::fs;

use agent_api::RESOURCES_TYPE_URL;
use agent_api::task::{TaskClient, UpdateTaskRequest};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::daemon::{
    Daemon, code, create_request, ctx, delete, eventually, exec_request, fifo, kill_request, reader,
    shutdown, start_request, wait,
};
use crate::is_root;
use crate::operator::{ctvm, refused, run, told, value};

/// A VM of 1 vCPU and 256 MiB that can have four times as much.
const CONFIG: &str = "max_vcpus = 4\nmax_memory_mib = 1024";

const MIB: i64 = 1 << 20;

/// A bundle whose container sleeps within limits.
fn bundle(daemon: &Daemon, id: &str, pod: Option<&str>, resources: &Value) {
    daemon.make_bundle(id, &["sleep"], pod);
    let path = daemon.bundle(id).join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["linux"]["resources"] = resources.clone();
    fs::write(path, config.to_string()).unwrap();
}

/// A container `web` that has a limit of one CPU and 192 MiB, which is all that its VM has.
async fn web(config: &str) -> (Daemon, TaskClient) {
    let daemon = Daemon::new(&format!("{CONFIG}\n{config}")).await;
    let limits = json!({"cpu": {"quota": 100_000, "period": 100_000}, "memory": {"limit": 192 * MIB}});
    bundle(&daemon, "web", None, &limits);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    (daemon, task)
}

async fn end(daemon: &Daemon, task: &TaskClient) {
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(task, "web", "").await;
    delete(task, "web", "").await.unwrap();
    shutdown(task, "web").await;
    daemon.nothing_left().await;
}

fn limits(cpus: f64, mib: i64) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "few CPUs")]
    let quota = (cpus * 100_000.0) as i64;
    json!({"cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": mib * MIB}})
}

async fn update(task: &TaskClient, id: &str, resources: Value) -> ttrpc::Result<()> {
    let resources = Any {
        type_url: RESOURCES_TYPE_URL.to_owned(),
        value: resources.to_string().into_bytes(),
        ..Any::default()
    };
    let resources = MessageField::some(resources);
    let request = UpdateTaskRequest { id: id.into(), resources, ..Default::default() };
    task.update(ctx(), &request).await.map(drop)
}

/// What the guest was told since `web` runs.
async fn journal(daemon: &Daemon, task: &TaskClient) -> Vec<String> {
    let path = daemon.path("journal");
    let _ = fs::remove_file(&path);
    let path = fifo(&path);
    let text = reader(&path);
    task.exec(ctx(), &exec_request("journal", &["journal"], path)).await.unwrap();
    task.start(ctx(), &start_request("web", "journal")).await.unwrap();
    wait(task, "web", "journal").await;
    delete(task, "web", "journal").await.unwrap();
    let text = String::from_utf8(text.await.unwrap()).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    assert_eq!(lines[0], "boot 1 256");
    assert_eq!(lines[1], "create web");
    lines[2..].to_vec()
}

/// vCPUs and memory, each what there is and what was asked for, as `ctvm ps` has it.
async fn sizes(daemon: &Daemon) -> String {
    let list: Value = serde_json::from_str(&told(daemon, &["ps", "--json"]).await).unwrap();
    let row = &list[0];
    let [vcpus, memory] = ["vcpus", "memory"].map(|what| {
        let unit = if what == "memory" { "_mib" } else { "" };
        let (there, asked) = (&row[format!("{what}{unit}")], &row[format!("{what}_asked{unit}")]);
        format!("{there}/{asked}")
    });
    format!("{vcpus} {memory}")
}

#[tokio::test]
async fn the_vm_grows_before_the_limits_and_shrinks_after_them() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    assert_eq!(sizes(&daemon).await, "1/1 256/256");
    update(&task, "web", limits(2.5, 300)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "3/3 364/364");
    update(&task, "web", limits(2.5, 299)).await.unwrap();
    update(&task, "web", limits(1.5, 700)).await.unwrap();
    update(&task, "web", json!({"pids": {"limit": 10}})).await.unwrap();
    update(&task, "web", limits(0.5, 64)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "1/1 256/256", "memory does not go below that of the boot");
    let expected = [
        "resize 3 364",
        "limits of web",
        // 299 and 64, rounded up to 2.
        "limits of web",
        "resize - 764",
        "limits of web",
        "resize 2 -",
        "limits of web",
        "limits of web",
        "resize 1 256",
    ];
    assert_eq!(journal(&daemon, &task).await, expected);
    end(&daemon, &task).await;
}

#[tokio::test]
async fn limits_that_the_guest_refuses_give_back_what_the_vm_was_grown_by() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    let mut wanted = limits(2.0, 400);
    wanted["pids"]["limit"] = 100.into();
    let (refused, text) = code(update(&task, "web", wanted).await.unwrap_err());
    assert_eq!((refused, text.as_str()), (Code::INVALID_ARGUMENT, "pids.limit must be below 100"));
    assert_eq!(sizes(&daemon).await, "1/1 256/256");
    // The old limits are those that count.
    update(&task, "web", json!({"cpu": {"quota": 150_000}})).await.unwrap();
    let expected = ["resize 2 464", "limits of web refused", "resize 1 256", "resize 2 -", "limits of web"];
    assert_eq!(journal(&daemon, &task).await, expected);
    end(&daemon, &task).await;
}

/// An update that the guest does not follow, and then the same once more.
async fn failing(fault: &str, expected: Code, words: &str, known: &str, told: &[&str]) {
    let (daemon, task) = web(&format!("cmdline = \"resize={fault}\"")).await;
    let (failed, text) = code(update(&task, "web", limits(3.0, 400)).await.unwrap_err());
    assert_eq!(failed, expected, "{text}");
    assert!(text.contains(words) && text.ends_with("; the container's limits are as they were"), "{text}");
    assert_eq!(sizes(&daemon).await, known, "{fault}");
    update(&task, "web", limits(3.0, 400)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "3/3 464/464");
    assert_eq!(journal(&daemon, &task).await, told, "{fault}");
    end(&daemon, &task).await;
}

#[tokio::test]
async fn a_guest_that_does_not_grow_leaves_the_limits_as_they_were() {
    if !is_root() {
        return;
    }
    let twice = ["resize 3 464", "resize 3 464", "limits of web"];
    let words = "not resized, vCPUs 1 of 3, memory 256 of 464 MiB: refused";
    failing("refused", Code::FAILED_PRECONDITION, words, "1/3 256/464", &twice).await;
    let words = "did not answer in time, vCPUs unknown of 3, memory 256 of 464 MiB";
    failing("timed_out", Code::DEADLINE_EXCEEDED, words, "null/3 256/464", &twice).await;
    failing("reset", Code::UNAVAILABLE, "reset the upcall channel", "null/3 256/464", &twice).await;
}

#[tokio::test]
async fn what_came_of_a_part_is_told_and_given_back() {
    if !is_root() {
        return;
    }
    let words = "resized in part, vCPUs 2 of 3, memory 360 of 464 MiB";
    let told = ["resize 3 464", "resize 1 256", "resize 3 464", "limits of web"];
    failing("partial", Code::RESOURCE_EXHAUSTED, words, "1/1 256/256", &told).await;
}

#[tokio::test]
async fn a_guest_that_does_not_shrink_has_its_new_limits_and_is_asked_again() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("cmdline = \"resize=stuck\"").await;
    update(&task, "web", limits(4.0, 600)).await.unwrap();
    let (failed, text) = code(update(&task, "web", limits(1.0, 200)).await.unwrap_err());
    assert_eq!(failed, Code::RESOURCE_EXHAUSTED, "{text}");
    assert!(text.contains("resized in part, vCPUs 2 of 1, memory 464 of 264 MiB"), "{text}");
    assert!(text.contains("the container's limits are changed"), "{text}");
    assert_eq!(sizes(&daemon).await, "2/1 464/264");
    let table = crate::operator::told(&daemon, &["ps"]).await;
    assert!(table.contains("  2/1 ") && table.contains("  464/264 MiB "), "{table}");
    // What containerd does when it was told of a failure.
    update(&task, "web", limits(1.0, 200)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "1/1 264/264");
    let expected =
        ["resize 4 664", "limits of web", "limits of web", "resize 1 264", "limits of web", "resize 1 264"];
    assert_eq!(journal(&daemon, &task).await, expected);
    end(&daemon, &task).await;
}

#[tokio::test]
async fn more_than_the_vm_can_have_is_refused_with_the_numbers() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    for wanted in [limits(4.5, 64), limits(1.0, 1000)] {
        let (refused, text) = code(update(&task, "web", wanted).await.unwrap_err());
        assert_eq!(refused, Code::OUT_OF_RANGE, "{text}");
        assert!(text.contains("and its VM can have 4 vCPUs and 1024 MiB at most"), "{text}");
    }
    assert_eq!(journal(&daemon, &task).await, [""; 0]);
    end(&daemon, &task).await;
}

#[tokio::test]
async fn two_callers_at_once_have_one_turn_each() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    bundle(&daemon, "app", Some("web"), &limits(0.5, 10));
    let app = daemon.connect("app").await;
    app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    let first = update(&task, "web", limits(2.0, 192));
    let second = update(&app, "app", limits(1.5, 110));
    let (first, second) = tokio::join!(first, second);
    first.unwrap();
    second.unwrap();
    assert_eq!(sizes(&daemon).await, "4/4 366/366");
    let journal = journal(&daemon, &task).await;
    assert!(!journal.iter().any(|line| line.contains("in the middle")), "{journal:?}");
    assert_eq!(journal.iter().filter(|line| line.starts_with("limits")).count(), 2, "{journal:?}");
    task.kill(ctx(), &kill_request("app", 9)).await.unwrap();
    wait(&app, "app", "").await;
    delete(&app, "app", "").await.unwrap();
    end(&daemon, &task).await;
}

#[tokio::test]
async fn a_further_container_has_room_before_it_is_made_and_its_room_goes_with_it() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    bundle(&daemon, "app", Some("web"), &limits(1.5, 500));
    let app = daemon.connect("app").await;
    app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    assert_eq!(sizes(&daemon).await, "3/3 756/756");
    app.kill(ctx(), &kill_request("app", 9)).await.unwrap();
    wait(&app, "app", "").await;
    delete(&app, "app", "").await.unwrap();
    // Nobody waits for that.
    for _ in 0..100 {
        if sizes(&daemon).await == "1/1 256/256" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(journal(&daemon, &task).await, ["resize 3 756", "create app", "resize 1 256"]);
    // A limit above all that the VM can have is bounded, not refused.
    let mut config: Value =
        serde_json::from_slice(&fs::read(daemon.bundle("app").join("config.json")).unwrap()).unwrap();
    config["linux"]["resources"] = limits(64.0, 100_000);
    fs::write(daemon.bundle("app").join("config.json"), config.to_string()).unwrap();
    app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    assert_eq!(sizes(&daemon).await, "4/4 1024/1024");
    // And such limits may be changed, as long as they do not grow.
    update(&app, "app", limits(63.0, 90_000)).await.unwrap();
    delete(&app, "app", "").await.unwrap();
    end(&daemon, &task).await;
}

#[tokio::test]
async fn a_container_that_the_guest_has_no_room_for_is_not_made() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("cmdline = \"resize=refused\"").await;
    bundle(&daemon, "app", Some("web"), &limits(1.5, 500));
    let app = daemon.connect("app").await;
    let (failed, text) = code(app.create(ctx(), &create_request(&daemon, "app")).await.unwrap_err());
    assert_eq!(failed, Code::FAILED_PRECONDITION, "{text}");
    assert!(text.contains("vCPUs 1 of 3") && text.ends_with("; the container was not made"), "{text}");
    assert_eq!(code(delete(&app, "app", "").await.unwrap_err()).0, Code::NOT_FOUND);
    app.create(ctx(), &create_request(&daemon, "app")).await.unwrap();
    let journal = journal(&daemon, &task).await;
    assert_eq!(journal, ["resize 3 756", "resize 3 756", "create app"]);
    delete(&app, "app", "").await.unwrap();
    end(&daemon, &task).await;
}

#[tokio::test]
async fn cpus_that_a_container_may_use_stay() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("").await;
    let mut wanted = limits(3.0, 192);
    wanted["cpu"]["cpus"] = "1-2".into();
    update(&task, "web", wanted).await.unwrap();
    update(&task, "web", limits(1.0, 192)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "3/3 256/256");
    let (status, text) = refused(&daemon, &["resize", "--cpus", "2", "web"]).await;
    assert_eq!(status, 1);
    assert!(
        text.contains("container \"web\" may use CPU 2, so the VM keeps 3 vCPUs; asked for were 2"),
        "{text}"
    );
    update(&task, "web", json!({"cpu": {"cpus": "0"}})).await.unwrap();
    assert_eq!(sizes(&daemon).await, "1/1 256/256");
    end(&daemon, &task).await;
}

#[tokio::test]
async fn an_operator_has_the_vm_grow_and_shrink() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("cmdline = \"resize=partial\"").await;
    let output = run(ctvm(&daemon, &["resize", "--cpus", "3", "--memory", "768M", "web"])).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let rows = "        ASKED    REACHED\nvCPUs   3        2\nmemory  768 MiB  512 MiB\npartial after ";
    assert!(text.starts_with(rows) && text.ends_with(" ms: partial\n"), "{text}");
    let text = told(&daemon, &["resize", "--cpus", "3", "--memory", "768", "--timeout", "5", "we"]).await;
    assert!(text.contains("memory  768 MiB  768 MiB\ndone after "), "{text}");
    assert_eq!(sizes(&daemon).await, "3/3 768/768");
    let metrics = told(&daemon, &["metrics"]).await;
    for (name, labels, expected) in [
        ("ctvm_vcpus", "", 3.0),
        ("ctvm_vcpus_requested", "", 3.0),
        ("ctvm_vcpus_max", "", 4.0),
        ("ctvm_guest_memory_configured_bytes", "", 805_306_368.0),
        ("ctvm_guest_memory_requested_bytes", "", 805_306_368.0),
        ("ctvm_guest_memory_max_bytes", "", 1_073_741_824.0),
        ("ctvm_upcall_up", "", 1.0),
        ("ctvm_resize_requests_total", "by=\"operator\"", 2.0),
        ("ctvm_resize_requests_total", "by=\"update\"", 0.0),
        ("ctvm_resizes_total", "result=\"done\"", 1.0),
        ("ctvm_resizes_total", "result=\"partial\"", 1.0),
        ("ctvm_resizes_total", "result=\"timed_out\"", 0.0),
        ("ctvm_resize_duration_seconds_bucket", "le=\"0.1\"", 2.0),
        ("ctvm_resize_duration_seconds_sum", "", 0.1),
        ("ctvm_resize_duration_seconds_count", "", 2.0),
        ("ctvm_guest_memory_given_back_bytes_total", "", 0.0),
    ] {
        assert_eq!(value(&metrics, name, labels), Some(expected), "{name} {labels} in {metrics}");
    }
    let (status, text) = refused(&daemon, &["resize", "--cpus", "5", "web"]).await;
    assert_eq!((status, text.contains("the VMM refused resize")), (1, true), "{text}");
    let (status, _) = refused(&daemon, &["resize", "--cpus", "2", "other"]).await;
    assert_eq!(status, 9);
    // The pod's own next change counts.
    update(&task, "web", limits(2.0, 192)).await.unwrap();
    assert_eq!(sizes(&daemon).await, "2/2 256/256");
    end(&daemon, &task).await;
}

#[tokio::test]
async fn a_monitor_that_dies_in_a_resize_is_told_as_such() {
    if !is_root() {
        return;
    }
    let (daemon, task) = web("cmdline = \"resize=fatal\"").await;
    let (failed, text) = code(update(&task, "web", limits(2.0, 192)).await.unwrap_err());
    assert_eq!((failed, text.contains("the VMM is gone")), (Code::UNAVAILABLE, true), "{text}");
    wait(&task, "web", "").await;
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_vm_that_boots_small_has_its_size_before_its_container() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("vcpus = 2\nmemory_mib = 512\n[resize]\nboot_small = \"all\"").await;
    daemon.make_bundle("web", &["journal"], None);
    let task = daemon.connect("web").await;
    let mut request = create_request(&daemon, "web");
    request.stdout = fifo(&daemon.path("out"));
    let out = reader(&request.stdout);
    task.create(ctx(), &request).await.unwrap();
    assert_eq!(sizes(&daemon).await, "2/2 512/512");
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    wait(&task, "web", "").await;
    let text = String::from_utf8(out.await.unwrap()).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), ["boot 1 128", "resize 2 512", "create web"]);
    let stages = told(&daemon, &["timeline", "web"]).await;
    assert!(stages.contains("vm grown"), "{stages}");
    eventually("it has ended", || daemon.topics().len() == 3).await;
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}
