//! A blocking client of CRI v1, one method a call.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    AttachRequest, ContainerConfig, ContainerFilter, ContainerStats, ContainerStatsFilter,
    ContainerStatsRequest, ContainerStatus, ContainerStatusRequest, CreateContainerRequest, ExecRequest,
    ExecSyncRequest, ImageSpec, ImageStatusRequest, LinuxContainerResources, ListContainerStatsRequest,
    ListContainersRequest, ListPodSandboxRequest, PodSandboxConfig, PodSandboxStats, PodSandboxStatsRequest,
    PodSandboxStatus, PodSandboxStatusRequest, PortForwardRequest, PullImageRequest, RemoveContainerRequest,
    RemoveImageRequest, RemovePodSandboxRequest, ReopenContainerLogRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// The longest that any one call may take: the lab machine is emulated.
const LIMIT: Duration = Duration::from_secs(300);

/// A connection to a CRI socket. A clone shares it.
#[derive(Debug, Clone)]
pub struct Cri {
    event_loop: Arc<Runtime>,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// What a command in a container did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
}

impl Output {
    /// Standard output without the last line end, if the command succeeded.
    pub fn ok(self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}{}", self.code, self.stdout, self.stderr);
        Ok(self.stdout.trim_end().to_owned())
    }
}

impl Cri {
    /// Connects to containerd's socket.
    pub fn connect(socket: &Path) -> Result<Cri> {
        let event_loop =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?.timeout(LIMIT);
        let channel = event_loop.block_on(endpoint.connect()).context("connect to containerd")?;
        Ok(Cri {
            event_loop: Arc::new(event_loop),
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            images: ImageServiceClient::new(channel),
        })
    }

    fn wait<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T> {
        let answer = self.event_loop.block_on(call);
        answer.map(tonic::Response::into_inner).with_context(|| what.to_owned())
    }

    /// Whether containerd has an image.
    pub fn has_image(&self, name: &str) -> Result<bool> {
        let image = Some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() });
        let mut images = self.images.clone();
        let request = ImageStatusRequest { image, ..ImageStatusRequest::default() };
        Ok(self.wait("ImageStatus", images.image_status(request))?.image.is_some())
    }

    /// Pulls an image.
    pub fn pull(&self, name: &str) -> Result<()> {
        let image = Some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() });
        let request = PullImageRequest { image, ..PullImageRequest::default() };
        self.wait("PullImage", self.images.clone().pull_image(request)).map(drop)
    }

    /// Removes an image.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        let image = Some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() });
        self.wait("RemoveImage", self.images.clone().remove_image(RemoveImageRequest { image })).map(drop)
    }

    /// Starts a pod; its id.
    pub fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Result<String> {
        let request =
            RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        Ok(self.wait("RunPodSandbox", self.runtime.clone().run_pod_sandbox(request))?.pod_sandbox_id)
    }

    /// Stops a pod.
    pub fn stop_pod(&self, id: &str) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.wait("StopPodSandbox", self.runtime.clone().stop_pod_sandbox(request)).map(drop)
    }

    /// Removes a pod.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.wait("RemovePodSandbox", self.runtime.clone().remove_pod_sandbox(request)).map(drop)
    }

    /// Where a pod is in its life, and its addresses.
    pub fn pod_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = self.wait("PodSandboxStatus", self.runtime.clone().pod_sandbox_status(request))?;
        answer.status.context("PodSandboxStatus without a status")
    }

    /// Ids of all pods.
    pub fn pods(&self) -> Result<Vec<String>> {
        let answer = self.wait(
            "ListPodSandbox",
            self.runtime.clone().list_pod_sandbox(ListPodSandboxRequest::default()),
        )?;
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    /// What a pod uses.
    pub fn pod_stats(&self, id: &str) -> Result<PodSandboxStats> {
        let request = PodSandboxStatsRequest { pod_sandbox_id: id.to_owned() };
        let answer = self.wait("PodSandboxStats", self.runtime.clone().pod_sandbox_stats(request))?;
        answer.stats.context("PodSandboxStats without statistics")
    }

    /// Makes a container in a pod; its id.
    pub fn create(&self, pod: &str, config: &ContainerConfig, of: &PodSandboxConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(of.clone()),
        };
        Ok(self.wait("CreateContainer", self.runtime.clone().create_container(request))?.container_id)
    }

    /// Starts a container.
    pub fn start(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.wait("StartContainer", self.runtime.clone().start_container(request)).map(drop)
    }

    /// Stops a container, killing it after `grace` seconds.
    pub fn stop(&self, id: &str, grace: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace };
        self.wait("StopContainer", self.runtime.clone().stop_container(request)).map(drop)
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Result<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.wait("RemoveContainer", self.runtime.clone().remove_container(request)).map(drop)
    }

    /// Where a container is in its life.
    pub fn status(&self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = self.wait("ContainerStatus", self.runtime.clone().container_status(request))?;
        answer.status.context("ContainerStatus without a status")
    }

    /// Ids of all containers.
    pub fn containers(&self) -> Result<Vec<String>> {
        self.list(ListContainersRequest::default())
    }

    /// Ids of a pod's containers.
    pub fn containers_of(&self, pod: &str) -> Result<Vec<String>> {
        let filter = ContainerFilter { pod_sandbox_id: pod.to_owned(), ..ContainerFilter::default() };
        self.list(ListContainersRequest { filter: Some(filter) })
    }

    fn list(&self, request: ListContainersRequest) -> Result<Vec<String>> {
        let answer = self.wait("ListContainers", self.runtime.clone().list_containers(request))?;
        Ok(answer.containers.into_iter().map(|container| container.id).collect())
    }

    /// Runs a command in a container to its end; `timeout` in seconds, 0 for none.
    pub fn exec(&self, id: &str, command: &[&str], timeout: i64) -> Result<Output> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd, timeout };
        let answer = self.wait("ExecSync", self.runtime.clone().exec_sync(request))?;
        Ok(Output {
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            code: answer.exit_code,
        })
    }

    /// Where to stream a command's input and output.
    pub fn exec_url(&self, request: ExecRequest) -> Result<String> {
        Ok(self.wait("Exec", self.runtime.clone().exec(request))?.url)
    }

    /// Where to stream a container's input and output.
    pub fn attach_url(&self, request: AttachRequest) -> Result<String> {
        Ok(self.wait("Attach", self.runtime.clone().attach(request))?.url)
    }

    /// Where to stream to a port of a pod.
    pub fn port_forward_url(&self, pod: &str, port: u16) -> Result<String> {
        let request = PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: vec![i32::from(port)] };
        Ok(self.wait("PortForward", self.runtime.clone().port_forward(request))?.url)
    }

    /// What a container uses.
    pub fn stats(&self, id: &str) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let answer = self.wait("ContainerStats", self.runtime.clone().container_stats(request))?;
        answer.stats.context("ContainerStats without statistics")
    }

    /// What the containers of a pod use.
    pub fn stats_of_pod(&self, pod: &str) -> Result<Vec<ContainerStats>> {
        let filter =
            ContainerStatsFilter { pod_sandbox_id: pod.to_owned(), ..ContainerStatsFilter::default() };
        let request = ListContainerStatsRequest { filter: Some(filter) };
        Ok(self.wait("ListContainerStats", self.runtime.clone().list_container_stats(request))?.stats)
    }

    /// Changes a container's limits.
    pub fn update(&self, id: &str, limits: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(limits),
            ..UpdateContainerResourcesRequest::default()
        };
        self.wait("UpdateContainerResources", self.runtime.clone().update_container_resources(request))
            .map(drop)
    }

    /// Has a container's log written to a new file.
    pub fn reopen_log(&self, id: &str) -> Result<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        self.wait("ReopenContainerLog", self.runtime.clone().reopen_container_log(request)).map(drop)
    }
}

/// Whether a call failed in this way.
pub fn failed_as<T>(result: &Result<T>, code: Code) -> bool {
    result.as_ref().err().and_then(|e| e.downcast_ref::<Status>()).is_some_and(|status| status.code() == code)
}
