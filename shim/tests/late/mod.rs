//! A pod whose network is made between its task's creation and its start, and every way out before that.

use std::fs;
use std::process::Command;

use agent_api::task::{StateRequest, Status, TaskClient};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::daemon::{Daemon, code, create_request, ctx, delete, kill_request, shutdown, start_request, wait};
use crate::{is_root, kill_9};

/// A pod `web` that is made and not started, and its task's process number.
async fn made(daemon: &Daemon) -> (TaskClient, u32) {
    daemon.make_bundle("web", &["sleep"], None);
    let path = daemon.bundle("web").join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    (config["linux"]["uidMappings"], config["linux"]["gidMappings"]) = (map.clone(), map);
    fs::write(path, config.to_string()).unwrap();
    let task = daemon.connect("web").await;
    let pid = task.create(ctx(), &create_request(daemon, "web")).await.unwrap().pid;
    (task, pid)
}

async fn status(task: &TaskClient) -> Status {
    let request = StateRequest { id: "web".into(), ..Default::default() };
    task.state(ctx(), &request).await.unwrap().status.unwrap()
}

fn stages(daemon: &Daemon) -> Vec<String> {
    let text = fs::read_to_string(daemon.path("timelines/test-web.json")).unwrap();
    let stages: Vec<(String, u64)> = serde_json::from_str(&text).unwrap();
    stages.into_iter().map(|(name, _)| name).collect()
}

#[tokio::test]
async fn the_vm_boots_with_what_was_made_in_the_tasks_namespace() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (task, pid) = made(&daemon).await;
    let namespace = format!("/proc/{pid}/ns/net");
    assert_ne!(fs::read_link(&namespace).unwrap(), fs::read_link("/proc/self/ns/net").unwrap());
    assert_eq!(status(&task).await, Status::CREATED);
    // What a CNI plugin does: here, a device that a VM cannot have.
    let add = ["link", "add", "bridge7", "type", "bridge"];
    let up = ["link", "set", "bridge7", "up"];
    for args in [&add[..], &up[..]] {
        let net = format!("--net={namespace}");
        let done = Command::new("nsenter").arg(net).arg("ip").args(args).status().unwrap();
        assert!(done.success(), "{args:?}");
    }
    let (code, text) = code(task.start(ctx(), &start_request("web", "")).await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("interface bridge7 is of kind"), "{text}");
    // It never ran, and containerd hears so.
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(daemon.topics_when(1).await, ["/tasks/exit"]);
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_whole_life_with_a_late_network() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (task, pid) = made(&daemon).await;
    // containerd repeats a create that it does not know the outcome of.
    assert_eq!(task.create(ctx(), &create_request(&daemon, "web")).await.unwrap().pid, pid);
    let ended = {
        let task = task.clone();
        tokio::spawn(async move { wait(&task, "web", "").await })
    };
    assert_eq!(task.start(ctx(), &start_request("web", "")).await.unwrap().pid, pid);
    assert_eq!(status(&task).await, Status::RUNNING);
    assert!(stages(&daemon).iter().any(|stage| stage == "container running"), "{:?}", stages(&daemon));
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    // Who waited before there was a VM is told of the end, too.
    assert_eq!(ended.await.unwrap(), 137);
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    let topics = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    assert_eq!(daemon.topics_when(4).await, topics);
}

#[tokio::test]
async fn a_pod_that_gets_no_network_is_killed_and_deleted() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (task, _) = made(&daemon).await;
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(
        code(task.start(ctx(), &start_request("web", "")).await.unwrap_err()).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
    // Deleted at once, without a kill.
    let daemon = Daemon::new("").await;
    let (task, _) = made(&daemon).await;
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_vmm_that_is_killed_before_there_is_a_network_is_the_reason() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let (task, _) = made(&daemon).await;
    kill_9(&daemon.state("web").unwrap()["vmm"]["pid"]);
    let (_, text) = code(task.start(ctx(), &start_request("web", "")).await.unwrap_err());
    // It has gone when its namespace is opened for the network, or, as the kill takes its time, when it is asked first.
    assert!(text.contains("connecting the pod's network") || text.contains("the VMM is gone"), "{text}");
    assert_eq!(delete(&task, "web", "").await.unwrap(), 137);
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}
