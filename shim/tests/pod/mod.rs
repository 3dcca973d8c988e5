//! A pod by the Sandbox API: from `CreateSandbox` to `ShutdownSandbox`, and every way out of it.

use agent_api::metrics::Metrics;
use agent_api::task::TaskClient;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use protobuf::Message as _;
use serde_json::Value;
use ttrpc::Code;

use crate::daemon::{
    Daemon, Netns, code, create_request, ctx, delete, kill_request, shutdown, start_request, wait,
};
use crate::operator::told;
use crate::{is_root, kill_9};

/// A pod that is not yet made, and its services.
struct Pod {
    sandbox: SandboxClient,
    task: TaskClient,
    namespace: Netns,
}

/// A request about the pod.
macro_rules! about_pod {
    ($request:ident) => {
        &$request { sandbox_id: "pod".into(), ..Default::default() }
    };
}

impl Pod {
    async fn new(daemon: &Daemon) -> Pod {
        daemon.make_pod_bundle("pod");
        let client = daemon.client("pod").await;
        let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        Pod { sandbox, task, namespace: Netns::make() }
    }

    fn create_request(&self) -> CreateSandboxRequest {
        let annotation = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        CreateSandboxRequest {
            sandbox_id: "pod".into(),
            netns_path: self.namespace.path(),
            annotations: [annotation("io.ctvm.vcpus", "2"), annotation("io.ctvm.memory_mib", "192")].into(),
            ..Default::default()
        }
    }

    /// Makes and starts it; its process number.
    async fn start(&self) -> u32 {
        self.sandbox.create_sandbox(ctx(), &self.create_request()).await.unwrap();
        self.sandbox.start_sandbox(ctx(), about_pod!(StartSandboxRequest)).await.unwrap().pid
    }

    async fn state(&self) -> String {
        self.sandbox.sandbox_status(ctx(), about_pod!(SandboxStatusRequest)).await.unwrap().state
    }

    /// A container that sleeps.
    async fn sleeper(&self, daemon: &Daemon, id: &str) {
        daemon.make_bundle(id, &["sleep"], Some("pod"));
        self.task.create(ctx(), &create_request(daemon, id)).await.unwrap();
        self.task.start(ctx(), &start_request(id, "")).await.unwrap();
    }

    async fn end(self, daemon: &Daemon) {
        self.sandbox.shutdown_sandbox(ctx(), about_pod!(ShutdownSandboxRequest)).await.unwrap();
        let Pod { sandbox, task, namespace } = self;
        drop((sandbox, task, namespace));
        daemon.nothing_left().await;
    }
}

#[tokio::test]
async fn a_pods_whole_life() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let pod = Pod::new(&daemon).await;
    assert_eq!(pod.state().await, "SANDBOX_NOTREADY", "nobody has made it yet");
    let ping = async || pod.sandbox.ping_sandbox(ctx(), about_pod!(PingRequest)).await;
    assert_eq!(code(ping().await.unwrap_err()).0, Code::NOT_FOUND);

    let pid = pod.start().await;
    assert_eq!(u64::from(pid), daemon.state("pod").unwrap()["vmm"]["pid"].as_u64().unwrap());
    let again = pod.sandbox.create_sandbox(ctx(), &pod.create_request()).await.unwrap_err();
    assert_eq!(code(again).0, Code::ALREADY_EXISTS);
    ping().await.unwrap();
    let status = pod.sandbox.sandbox_status(ctx(), about_pod!(SandboxStatusRequest)).await.unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", pid));
    assert!(status.created_at.is_some() && status.exited_at.is_none());
    let platform = pod.sandbox.platform(ctx(), about_pod!(PlatformRequest)).await.unwrap();
    assert_eq!((platform.platform.os.as_str(), platform.platform.architecture.as_str()), ("linux", "amd64"));

    pod.sleeper(&daemon, "app").await;
    let metrics = pod.sandbox.sandbox_metrics(ctx(), about_pod!(SandboxMetricsRequest)).await.unwrap();
    assert_eq!(metrics.metrics.id, "pod");
    if metrics.metrics.data.type_url == "io.containerd.cgroups.v2.Metrics" {
        let metrics = Metrics::parse_from_bytes(&metrics.metrics.data.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.pids.current), (1_500_000, 2), "of all containers");
    }
    // A container's end is not the pod's, nor is the end of the last one.
    pod.task.kill(ctx(), &kill_request("app", 9)).await.unwrap();
    assert_eq!(wait(&pod.task, "app", "").await, 137);
    delete(&pod.task, "app", "").await.unwrap();
    ping().await.unwrap();

    let waiting = tokio::spawn({
        let sandbox = pod.sandbox.clone();
        async move { sandbox.wait_sandbox(ctx(), about_pod!(WaitSandboxRequest)).await.unwrap() }
    });
    pod.sandbox.stop_sandbox(ctx(), about_pod!(StopSandboxRequest)).await.unwrap();
    let end = waiting.await.unwrap();
    assert!(end.exit_status == 0 && end.exited_at.is_some(), "{end:?}");
    assert_eq!(pod.state().await, "SANDBOX_NOTREADY");
    assert_eq!(code(ping().await.unwrap_err()).0, Code::NOT_FOUND);
    let late = pod.sandbox.sandbox_metrics(ctx(), about_pod!(SandboxMetricsRequest)).await.unwrap_err();
    assert_eq!(code(late).0, Code::NOT_FOUND);
    // Once more is no error.
    pod.sandbox.stop_sandbox(ctx(), about_pod!(StopSandboxRequest)).await.unwrap();
    pod.end(&daemon).await;
}

#[tokio::test]
async fn ps_shows_a_pod_with_its_size() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let pod = Pod::new(&daemon).await;
    pod.start().await;
    pod.sleeper(&daemon, "app").await;
    let list: Value = serde_json::from_str(&told(&daemon, &["ps", "--json"]).await).unwrap();
    let [row] = list.as_array().unwrap().as_slice() else { panic!("{list}") };
    assert_eq!((&row["sandbox"], &row["state"]), (&"pod".into(), &"running".into()));
    assert_eq!((&row["vcpus"], &row["memory_mib"]), (&2.into(), &192.into()), "{row}");
    assert_eq!(row["containers"].as_array().unwrap().len(), 1, "{row}");
    assert_eq!(row["containers"][0]["state"], "running");
    pod.task.kill(ctx(), &kill_request("app", 9)).await.unwrap();
    wait(&pod.task, "app", "").await;
    delete(&pod.task, "app", "").await.unwrap();
    pod.end(&daemon).await;
}

#[tokio::test]
async fn a_pod_whose_vm_is_killed_ends_with_its_containers() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let pod = Pod::new(&daemon).await;
    pod.start().await;
    pod.sleeper(&daemon, "app").await;
    kill_9(&daemon.state("pod").unwrap()["vmm"]["pid"]);
    let end = pod.sandbox.wait_sandbox(ctx(), about_pod!(WaitSandboxRequest)).await.unwrap();
    assert_eq!(end.exit_status, 255, "nobody asked for it");
    assert_eq!(wait(&pod.task, "app", "").await, 137);
    assert_eq!(pod.state().await, "SANDBOX_NOTREADY");
    assert_eq!(delete(&pod.task, "app", "").await.unwrap(), 137);
    pod.end(&daemon).await;
}

#[tokio::test]
async fn a_pod_that_does_not_boot_says_so_at_its_start() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("cmdline = \"fake=refuse\"").await;
    let pod = Pod::new(&daemon).await;
    pod.sandbox.create_sandbox(ctx(), &pod.create_request()).await.unwrap();
    let refused = pod.sandbox.start_sandbox(ctx(), about_pod!(StartSandboxRequest)).await.unwrap_err();
    let (refused, text) = code(refused);
    assert_eq!(
        (refused, text.contains("no /dev/kvm on this host")),
        (Code::FAILED_PRECONDITION, true),
        "{text}"
    );
    pod.end(&daemon).await;
}

#[tokio::test]
async fn what_cannot_be_a_pod_is_refused() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let pod = Pod::new(&daemon).await;
    let other = CreateSandboxRequest { sandbox_id: "other".into(), ..pod.create_request() };
    assert_eq!(code(pod.sandbox.create_sandbox(ctx(), &other).await.unwrap_err()).0, Code::NOT_FOUND);
    let huge = [("io.ctvm.vcpus".to_owned(), "1000".to_owned())].into();
    let huge = CreateSandboxRequest { annotations: huge, ..pod.create_request() };
    let (refused, text) = code(pod.sandbox.create_sandbox(ctx(), &huge).await.unwrap_err());
    assert_eq!((refused, text.contains("vcpus")), (Code::INVALID_ARGUMENT, true), "{text}");
    // It can still be made, and then ends without having been stopped.
    pod.start().await;
    // `Shutdown` of the Task API is asked after each container, and leaves the pod alone.
    shutdown(&pod.task, "pod").await;
    pod.end(&daemon).await;
}
