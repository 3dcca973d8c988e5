//! What is done to a container that runs: what the shim forwards, refuses, and tells containerd.

use crate::daemon::{
    Daemon, code, ctx, delete, exec_request, kill_request, made, shutdown, start_request, started, wait,
};
use crate::is_root;
use agent_api::metrics::Metrics;
use agent_api::task::{
    PauseRequest, ResumeRequest, StateRequest, StatsRequest, Status, TaskClient, UpdateTaskRequest,
};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::events::task::TaskOOM;
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};
use serde_json::json;
use ttrpc::Code;

async fn pause(task: &TaskClient) -> ttrpc::Result<()> {
    task.pause(ctx(), &PauseRequest { id: "web".into(), ..Default::default() }).await.map(drop)
}

async fn resume(task: &TaskClient) -> ttrpc::Result<()> {
    task.resume(ctx(), &ResumeRequest { id: "web".into(), ..Default::default() }).await.map(drop)
}

async fn status(task: &TaskClient) -> Status {
    let request = StateRequest { id: "web".into(), ..Default::default() };
    task.state(ctx(), &request).await.unwrap().status.unwrap()
}

#[tokio::test]
async fn a_container_stands_still_and_goes_on() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = made(&daemon, &["sleep"]).await;
    let (early, text) = code(pause(&task).await.unwrap_err());
    assert_eq!((early, text.contains("created")), (Code::FAILED_PRECONDITION, true), "{text}");
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    let (running, text) = code(resume(&task).await.unwrap_err());
    assert_eq!((running, text.contains("running")), (Code::FAILED_PRECONDITION, true), "{text}");

    pause(&task).await.unwrap();
    assert_eq!(status(&task).await, Status::PAUSED);
    let (again, text) = code(pause(&task).await.unwrap_err());
    assert_eq!((again, text.contains("paused")), (Code::FAILED_PRECONDITION, true), "{text}");
    let (refused, text) =
        code(task.exec(ctx(), &exec_request("e", &["exit", "0"], String::new())).await.unwrap_err());
    assert_eq!((refused, text.contains("paused")), (Code::FAILED_PRECONDITION, true), "{text}");
    resume(&task).await.unwrap();
    assert_eq!(status(&task).await, Status::RUNNING);

    pause(&task).await.unwrap();
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(status(&task).await, Status::STOPPED);
    assert_eq!(code(resume(&task).await.unwrap_err()).0, Code::FAILED_PRECONDITION);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    let topics = daemon.topics_when(7).await;
    let middle = ["/tasks/paused", "/tasks/resumed", "/tasks/paused", "/tasks/exit", "/tasks/delete"];
    assert_eq!(topics[2..], middle);
}

#[tokio::test]
async fn a_container_whose_vm_is_gone_cannot_be_paused() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["sleep"]).await;
    let vmm = daemon.state("web").unwrap()["vmm"]["pid"].as_i64().unwrap();
    let vmm = rustix::process::Pid::from_raw(i32::try_from(vmm).unwrap()).unwrap();
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).unwrap();
    wait(&task, "web", "").await;
    assert_eq!(code(pause(&task).await.unwrap_err()).0, Code::FAILED_PRECONDITION);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn counters_come_from_the_guest() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["exit", "0"]).await;
    wait(&task, "web", "").await;
    let request = StatsRequest { id: "web".into(), ..Default::default() };
    let stats = task.stats(ctx(), &request).await.unwrap().stats.unwrap();
    // In the shape of the host that this runs on.
    if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(Metrics::parse_from_bytes(&stats.value).unwrap().cpu.usage_usec, 1_500_000);
    } else {
        assert_eq!(stats.type_url, "io.containerd.cgroups.v1.Metrics");
        assert_eq!(v1::Metrics::parse_from_bytes(&stats.value).unwrap().cpu.usage.total, 1_500_000_000);
    }
    delete(&task, "web", "").await.unwrap();
    assert_eq!(code(task.stats(ctx(), &request).await.unwrap_err()).0, Code::NOT_FOUND);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn limits_are_changed_by_the_guest() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["sleep"]).await;
    let update = |kind: &str, limit: i64| {
        let mut resources = Any::new();
        resources.type_url = format!("types.containerd.io/opencontainers/runtime-spec/1/{kind}");
        resources.value = json!({ "pids": { "limit": limit } }).to_string().into_bytes();
        let resources = MessageField::some(resources);
        let annotations = [("a".to_owned(), "b".to_owned())].into();
        UpdateTaskRequest { id: "web".into(), resources, annotations, ..Default::default() }
    };
    task.update(ctx(), &update("LinuxResources", 10)).await.unwrap();
    let (refused, text) = code(task.update(ctx(), &update("LinuxResources", 100)).await.unwrap_err());
    assert_eq!((refused, text.contains("must be below 100")), (Code::INVALID_ARGUMENT, true), "{text}");
    let (other, text) = code(task.update(ctx(), &update("WindowsResources", 10)).await.unwrap_err());
    assert_eq!((other, text.contains("LinuxResources")), (Code::INVALID_ARGUMENT, true), "{text}");
    let empty = UpdateTaskRequest { id: "web".into(), ..Default::default() };
    assert_eq!(code(task.update(ctx(), &empty).await.unwrap_err()).0, Code::INVALID_ARGUMENT);

    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(&task, "web", "").await;
    let late = task.update(ctx(), &update("LinuxResources", 10)).await.unwrap_err();
    assert_eq!(code(late).0, Code::FAILED_PRECONDITION);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_before_the_exit() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["oom", "137"]).await;
    assert_eq!(wait(&task, "web", "").await, 137);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    let expected = ["create", "start", "oom", "exit", "delete"].map(|topic| format!("/tasks/{topic}"));
    assert_eq!(daemon.topics_when(5).await, expected);
    let (_, oom) = daemon.events.lock().unwrap()[2].clone();
    assert_eq!(oom.type_url, "containerd.events.TaskOOM");
    assert_eq!(TaskOOM::parse_from_bytes(&oom.value).unwrap().container_id, "web");
}

#[tokio::test]
async fn kills_in_a_container_that_lives_are_told_as_they_come() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["oom"]).await;
    assert_eq!(daemon.topics_when(3).await[2], "/tasks/oom");
    task.exec(ctx(), &exec_request("e", &["oom", "137"], String::new())).await.unwrap();
    task.start(ctx(), &start_request("web", "e")).await.unwrap();
    assert_eq!(wait(&task, "web", "e").await, 137);
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    let expected = ["exec-added", "exec-started", "oom", "exit", "exit", "delete"];
    assert_eq!(daemon.topics_when(9).await[3..], expected.map(|topic| format!("/tasks/{topic}")));
}
