//! The Task service: containerd's requests, carried out on [`Container`]s.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_api::task::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, Task, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use agent_api::ttrpc::r#async::TtrpcContext;
use agent_api::ttrpc::{self, Code};
use async_trait::async_trait;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

use crate::container::{Container, Guest};
use crate::errors::TaskError;
use crate::pause::Pause;
use crate::process::Phase;
use crate::{cgroup, spec, stats};

/// How long `Start` waits for the bytes of a program that come as they are read, to say that they do not.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// Every container of the sandbox.
#[derive(Debug)]
pub struct Tasks {
    guest: Guest,
    pause: Pause,
    slots: Mutex<HashMap<String, Slot>>,
}

/// A name that is taken.
#[derive(Debug)]
enum Slot {
    Creating,
    There(Arc<Container>),
}

impl Tasks {
    /// None yet.
    pub fn new(guest: Guest) -> Self {
        Self { guest, pause: Pause::default(), slots: Mutex::default() }
    }

    /// How many containers there are.
    pub fn count(&self) -> usize {
        self.slots().len()
    }

    async fn make(&self, request: &CreateTaskRequest) -> Result<u32, TaskError> {
        spec::check_id(&request.id)?;
        match self.slots().entry(request.id.clone()) {
            Entry::Occupied(_) => return Err(TaskError::Exists(request.id.clone())),
            Entry::Vacant(entry) => entry.insert(Slot::Creating),
        };
        match Container::create(&self.guest, request, |id| self.pids_of(id)).await {
            Ok(container) => {
                let pid = container.init.pid();
                self.slots().insert(request.id.clone(), Slot::There(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                self.slots().remove(&request.id);
                Err(error)
            }
        }
    }

    /// The file that stands for a running container's process numbers; without a name, for the sandbox's own.
    fn pids_of(&self, id: &str) -> Result<PathBuf, TaskError> {
        if id.is_empty() {
            return self
                .pause
                .pids(&self.guest.users)
                .map_err(TaskError::io("make the sandbox's pause process"));
        }
        let container = self.container(id)?;
        match container.init.phase() {
            Phase::Created | Phase::Running => Ok(format!("/proc/{}/ns/pid", container.init.pid()).into()),
            Phase::Stopped(_) => Err(TaskError::State { what: "join it", state: "stopped" }),
        }
    }

    /// The container of that name.
    ///
    /// # Errors
    /// [`TaskError::NoContainer`], also while it is being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.slots().get(id) {
            Some(Slot::There(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(TaskError::NoContainer(id.to_owned())),
        }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().expect("no code panics while it holds this lock")
    }
}

#[async_trait]
impl Task for Tasks {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.make(&request).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, call: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&request.id)?;
        let pid = match request.exec_id.as_str() {
            "" => container.start(START_PATIENCE.min(half_of_deadline(call))).await?,
            exec_id => container.start_exec(exec_id).await?,
        };
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = StateResponse {
            bundle: container.bundle().display().to_string(),
            pid: process.pid(),
            stdin: process.names.stdin.clone(),
            stdout: process.names.stdout.clone(),
            stderr: process.names.stderr.clone(),
            terminal: process.names.terminal,
            id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        };
        response.status = match process.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running if container.is_paused() => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = timestamp(exit.at);
                Status::STOPPED
            }
        }
        .into();
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.kill(&request.exec_id, request.signal, request.all)?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        let (pid, exit) = if request.exec_id.is_empty() {
            let ended = container.delete().await?;
            self.slots().remove(&request.id);
            ended
        } else {
            container.delete_exec(&request.exec_id)?
        };
        let exited_at = timestamp(exit.at);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit.at), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.add_exec(&request).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.container(&request.id)?.pids()?;
        let process = |pid: i32| ProcessInfo { pid: pid.cast_unsigned(), ..Default::default() };
        Ok(PidsResponse { processes: pids.into_iter().map(process).collect(), ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        process.resize(cells(request.width), cells(request.height))?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self.container(&request.id)?.init.pid();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume()?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = match request.id.as_str() {
            "" => stats::of(&cgroup::of_all()),
            id => self.container(id)?.stats(),
        };
        let value = metrics.write_to_bytes().expect("a message of plain fields is always complete");
        let type_url = agent_api::METRICS_TYPE_URL.to_owned();
        let stats = MessageField::some(Any { type_url, value, ..Any::default() });
        Ok(StatsResponse { stats, ..Default::default() })
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let resources = spec::resources(request.resources.as_ref()).map_err(TaskError::from)?;
        container.update(&resources)?;
        Ok(Empty::new())
    }

    // The generated answer says "not found", which containerd takes for a container that is gone.

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let text = format!("{}/Checkpoint is not implemented by the agent", agent_api::TASK_SERVICE);
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::UNIMPLEMENTED, text)))
    }
}

/// A caller that does not say how long it waits waits for ever.
fn half_of_deadline(call: &TtrpcContext) -> Duration {
    match u64::try_from(call.timeout_nano) {
        Ok(nanos @ 1..) => Duration::from_nanos(nanos / 2),
        _ => Duration::MAX,
    }
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: since.as_secs().cast_signed(),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    })
}
