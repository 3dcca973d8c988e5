//! What tests ask containerd itself, by gRPC: a `ctr` for each question takes 0.1 s of a processor of an emulated machine that is idle
//! otherwise, and 0.4 s of one that is not.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    DeleteContainerRequest, DeleteTaskRequest, GetContainerRequest, GetImageRequest, GetRequest, KillRequest,
    ListPidsRequest, SubscribeRequest, UpdateImageRequest, WaitRequest,
};
use containerd_client::types::v1::Process;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status as Refusal};

use crate::command::LIMIT;

pub use containerd_client::types::Envelope;
pub use containerd_client::types::v1::Status;

/// A connection to a containerd's socket, in one of its namespaces.
#[derive(Debug)]
pub struct Api {
    event_loop: Runtime,
    channel: Channel,
    namespace: &'static str,
}

impl Api {
    /// Connects with the first call, and again when containerd was started anew.
    pub fn new(socket: &Path, namespace: &'static str) -> Result<Api> {
        let event_loop =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
        let channel = {
            let _context = event_loop.enter();
            endpoint.connect_lazy()
        };
        Ok(Api { event_loop, channel, namespace })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().expect("a word"));
        request
    }

    fn wait<T>(&self, call: impl Future<Output = Result<Response<T>, Refusal>>) -> Result<T, Refusal> {
        let limited = async { tokio::time::timeout(LIMIT, call).await };
        let answer = self.event_loop.block_on(limited);
        answer
            .map_err(|_| Refusal::deadline_exceeded(format!("no answer within {LIMIT:?}")))?
            .map(Response::into_inner)
    }

    /// containerd's version, as `1.7.24`.
    pub fn version(&self) -> Result<String> {
        let answer = self.wait(VersionClient::new(self.channel.clone()).version(()));
        Ok(answer.context("ask for the version")?.version)
    }

    fn process(&self, id: &str) -> Result<Option<Process>> {
        let request = self.request(GetRequest { container_id: id.to_owned(), ..GetRequest::default() });
        let answer = self.wait(TasksClient::new(self.channel.clone()).get(request));
        Ok(unless_gone(answer).with_context(|| format!("ask for task {id}"))?.and_then(|it| it.process))
    }

    /// Where a task is in its life, or nothing when there is no such task.
    pub fn status(&self, id: &str) -> Result<Option<Status>> {
        Ok(self.process(id)?.map(|process| process.status()))
    }

    /// Sends a signal to a task's first process.
    pub fn kill(&self, id: &str, signal: i32) -> Result<()> {
        let signal = u32::try_from(signal)?;
        let request =
            self.request(KillRequest { container_id: id.to_owned(), signal, ..KillRequest::default() });
        let answer = self.wait(TasksClient::new(self.channel.clone()).kill(request));
        answer.with_context(|| format!("send task {id} signal {signal}")).map(drop)
    }

    /// How many processes containerd knows a task to have.
    pub fn processes(&self, id: &str) -> Result<usize> {
        let request = self.request(ListPidsRequest { container_id: id.to_owned() });
        let answer = self.wait(TasksClient::new(self.channel.clone()).list_pids(request));
        Ok(answer.with_context(|| format!("ask for the processes of task {id}"))?.processes.len())
    }

    /// Removes a container and its snapshot; whether there was one.
    pub fn remove_container(&self, id: &str) -> Result<bool> {
        let mut containers = ContainersClient::new(self.channel.clone());
        let request = self.request(GetContainerRequest { id: id.to_owned() });
        let answer = unless_gone(self.wait(containers.get(request)));
        let Some(answer) = answer.with_context(|| format!("ask for container {id}"))? else {
            return Ok(false);
        };
        let request = self.request(DeleteContainerRequest { id: id.to_owned() });
        self.wait(containers.delete(request)).with_context(|| format!("remove container {id}"))?;
        let container = answer.container.context("an answer without a container")?;
        let (snapshotter, key) = (container.snapshotter, container.snapshot_key);
        if !key.is_empty() {
            let request = self.request(RemoveSnapshotRequest { snapshotter, key });
            let answer = self.wait(SnapshotsClient::new(self.channel.clone()).remove(request));
            unless_gone(answer).with_context(|| format!("remove the snapshot of {id}"))?;
        }
        Ok(true)
    }

    /// Removes a task, if there is one, killed first if need be.
    pub fn remove_task(&self, id: &str) -> Result<()> {
        let Some(process) = self.process(id)? else { return Ok(()) };
        let container_id = id.to_owned();
        let mut tasks = TasksClient::new(self.channel.clone());
        if process.status() != Status::Stopped {
            let request = KillRequest {
                container_id: container_id.clone(),
                signal: u32::try_from(libc::SIGKILL)?,
                all: true,
                ..KillRequest::default()
            };
            unless_gone(self.wait(tasks.kill(self.request(request))))
                .with_context(|| format!("kill task {id}"))?;
            let request = WaitRequest { container_id: container_id.clone(), ..WaitRequest::default() };
            unless_gone(self.wait(tasks.wait(self.request(request))))
                .with_context(|| format!("wait for task {id}"))?;
        }
        unless_gone(self.wait(tasks.delete(self.request(DeleteTaskRequest { container_id }))))
            .with_context(|| format!("remove task {id}"))?;
        // The fifos are those of the `ctr` that has started it.
        for fifo in [process.stdin, process.stdout, process.stderr] {
            let fifo = Path::new(&fifo);
            if let Some(folder) = fifo.parent().filter(|folder| folder.starts_with("/run/containerd/fifo")) {
                // Either may have been removed with another of the three.
                let _ = fs::remove_file(fifo);
                let _ = fs::remove_dir(folder);
            }
        }
        Ok(())
    }

    /// Sets one label of an image, which is an event.
    pub fn label_image(&self, image: &str, key: &str, value: &str) -> Result<()> {
        let mut images = ImagesClient::new(self.channel.clone());
        let request = self.request(GetImageRequest { name: image.to_owned() });
        let answer = self.wait(images.get(request)).with_context(|| format!("ask for image {image}"))?;
        let mut changed = answer.image.context("an answer without an image")?;
        changed.labels.insert(key.to_owned(), value.to_owned());
        let mask = prost_types::FieldMask { paths: vec![format!("labels.{key}")] };
        let request = UpdateImageRequest {
            image: Some(changed),
            update_mask: Some(mask),
            ..UpdateImageRequest::default()
        };
        let answer = self.wait(images.update(self.request(request)));
        answer.with_context(|| format!("label image {image}")).map(drop)
    }

    /// Calls `heard` with each event from now on, on a thread of this connection's, until containerd ends.
    pub fn subscribe(&self, mut heard: impl FnMut(Envelope) + Send + 'static) {
        let mut events = EventsClient::new(self.channel.clone());
        let request = self.request(SubscribeRequest::default());
        self.event_loop.spawn(async move {
            let Ok(answer) = events.subscribe(request).await else { return };
            let mut stream = answer.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                heard(event);
            }
        });
    }
}

/// An answer, or nothing where what was asked about is not there (any more).
fn unless_gone<T>(answer: Result<T, Refusal>) -> Result<Option<T>, Refusal> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(refusal) if refusal.code() == Code::NotFound => Ok(None),
        Err(refusal) => Err(refusal),
    }
}
