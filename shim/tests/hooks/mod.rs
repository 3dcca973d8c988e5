//! OCI hooks: run on the host at their moments, in the pod's network namespace, and what comes of one that fails.

use std::fs;

use serde_json::{Value, json};
use ttrpc::Code;

use crate::daemon::{
    Daemon, Netns, code, create_request, ctx, delete, kill_request, shutdown, start_request, wait,
};
use crate::is_root;

/// A bundle `web` that sleeps in `namespace`, with these hooks.
fn make_bundle(daemon: &Daemon, namespace: &str, hooks: &Value) {
    daemon.make_bundle("web", &["sleep"], None);
    let path = daemon.bundle("web").join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hooks"] = hooks.clone();
    config["linux"]["namespaces"][2]["path"] = namespace.into();
    fs::write(path, config.to_string()).unwrap();
}

/// Writes its moment, the container's status and whose network namespace it and the process it is told are in.
fn hook(daemon: &Daemon, moment: &str) -> Value {
    let script = format!(
        "s=$(cat); p=${{s#*\\\"pid\\\":}}; p=${{p%%[!0-9]*}}; t=${{s#*\\\"status\\\":\\\"}}; \
         echo {moment} ${{t%%\\\"*}} $(readlink /proc/self/ns/net) $(readlink /proc/$p/ns/net) >> {}",
        daemon.path("said").display()
    );
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

#[tokio::test]
async fn hooks_run_at_their_moments_in_the_pods_network() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let namespace = Netns::make();
    let hooks = json!({
        "prestart": [hook(&daemon, "prestart")],
        "createRuntime": [hook(&daemon, "createRuntime")],
        "poststart": [hook(&daemon, "poststart"), {"path": "/no/such/hook"}],
        "poststop": [hook(&daemon, "poststop")],
    });
    make_bundle(&daemon, &namespace.path(), &hooks);
    let task = daemon.connect("web").await;
    let said = || fs::read_to_string(daemon.path("said")).unwrap();
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    let own = fs::read_link(namespace.path()).unwrap().display().to_string();
    assert_eq!(said(), format!("prestart creating {own} {own}\ncreateRuntime creating {own} {own}\n"));
    // One that fails then is no reason to end what runs.
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    assert!(said().ends_with(&format!("poststart running {own} {own}\n")), "{}", said());
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    assert_eq!(wait(&task, "web", "").await, 137);
    assert_eq!(said().lines().count(), 3);
    delete(&task, "web", "").await.unwrap();
    assert!(said().lines().last().unwrap().starts_with("poststop stopped "), "{}", said());
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_hook_that_fails_undoes_the_container() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let namespace = Netns::make();
    let failing = json!({"path": "/bin/sh", "args": ["sh", "-c", "echo no such card >&2; exit 1"]});
    let hooks = json!({"createRuntime": [failing], "poststop": [hook(&daemon, "poststop")]});
    make_bundle(&daemon, &namespace.path(), &hooks);
    let task = daemon.connect("web").await;
    let refused = task.create(ctx(), &create_request(&daemon, "web")).await.unwrap_err();
    let (refused, text) = code(refused);
    assert_eq!((refused, text.contains("hook /bin/sh failed")), (Code::FAILED_PRECONDITION, true), "{text}");
    assert!(text.contains("no such card"), "{text}");
    assert!(fs::read_to_string(daemon.path("said")).unwrap().starts_with("poststop stopped "));
    assert_eq!(code(delete(&task, "web", "").await.unwrap_err()).0, Code::NOT_FOUND);
    // Without it, the same container can be made.
    make_bundle_again(&daemon, &namespace.path());
    task.create(ctx(), &create_request(&daemon, "web")).await.unwrap();
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

fn make_bundle_again(daemon: &Daemon, namespace: &str) {
    fs::remove_dir_all(daemon.bundle("web")).unwrap();
    make_bundle(daemon, namespace, &json!({}));
}

#[tokio::test]
async fn hooks_that_cannot_do_what_they_are_for_are_refused() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let made = hook(&daemon, "createRuntime");
    make_bundle(&daemon, "", &json!({"createRuntime": [made]}));
    let task = daemon.connect("web").await;
    let (refused, text) = code(task.create(ctx(), &create_request(&daemon, "web")).await.unwrap_err());
    assert_eq!(
        (refused, text.contains("has no name on this host")),
        (Code::INVALID_ARGUMENT, true),
        "{text}"
    );
    fs::remove_dir_all(daemon.bundle("web")).unwrap();
    make_bundle(&daemon, "", &json!({"createContainer": [{"path": "/usr/bin/cdi-hook"}]}));
    let (refused, text) = code(task.create(ctx(), &create_request(&daemon, "web")).await.unwrap_err());
    assert_eq!((refused, text.contains("/usr/bin/cdi-hook")), (Code::INVALID_ARGUMENT, true), "{text}");
    assert!(!daemon.path("said").exists());
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}
