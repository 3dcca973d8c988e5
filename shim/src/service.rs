//! containerd's Task service: decode, one call, encode.
//!
//! Calls that change something run as tasks of their own: the RPC library drops a handler when its client goes away,
//! and a containerd that is restarted must not leave half a container behind.

use std::collections::HashMap;
use std::sync::Arc;

use agent_api::task::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, Task, UpdateTaskRequest, WaitRequest,
    WaitResponse, create_task,
};
use async_trait::async_trait;
use protobuf::{EnumOrUnknown, MessageField};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::container::Phase;
use crate::error::TaskError;
use crate::sandbox::Sandbox;

/// Name of the Task service up to containerd 1.7; messages and methods are those of the later name.
const TASK_V2: &str = "containerd.task.v2.Task";

/// The Task service of one sandbox.
#[derive(Debug, Clone)]
pub struct TaskService(pub Arc<Sandbox>);

/// The tables of methods to serve on one socket: Task v3, and the same under the name of v2.
pub fn services(sandbox: &Arc<Sandbox>) -> [HashMap<String, Service>; 2] {
    let table = || create_task(Arc::new(TaskService(sandbox.clone())));
    let v2 = table().into_values().map(|methods| (TASK_V2.to_owned(), methods)).collect();
    [table(), v2]
}

/// Carries a call out to its end, whether or not anyone still waits for it.
pub async fn run<T: Send + 'static>(
    call: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(call).await.unwrap_or_else(|e| Err(TaskError::Task(e.to_string())));
    result.map_err(|e| {
        log::debug!("refused: {}", e.chain());
        e.into()
    })
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        log::debug!(container:% = request.id; "create");
        let sandbox = self.0.clone();
        let pid = run(async move { sandbox.create(request).await }).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        log::debug!(container:% = request.id, exec:% = request.exec_id; "start");
        let sandbox = self.0.clone();
        let pid = run(async move { sandbox.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id, exec:% = request.exec_id; "exec");
        let sandbox = self.0.clone();
        run(async move { sandbox.exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (container, process) = self.0.process(&request.id, &request.exec_id)?;
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle.clone(),
            pid: container.pid(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        let status = match process.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running if container.is_paused() => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(exit.at);
                Status::STOPPED
            }
        };
        response.status = EnumOrUnknown::new(status);
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        let exit = process.ended().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id, exec:% = request.exec_id; "kill with signal {}", request.signal);
        let sandbox = self.0.clone();
        run(async move { sandbox.kill(request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        log::debug!(container:% = request.id, exec:% = request.exec_id; "delete");
        let sandbox = self.0.clone();
        let (pid, exit) = run(async move {
            match request.exec_id.as_str() {
                "" => sandbox.delete(&request.id).await,
                exec_id => sandbox.delete_exec(&request.id, exec_id).await,
            }
        })
        .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        Ok(self.0.pids(&request.id).await?)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.0.process(&request.id, &request.exec_id)?;
        if request.stdin {
            // The end of the fifo follows what is in it; telling the agent would overtake that.
            process.copying.lock().await.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.0.resize_pty(request).await?;
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.container(&request.id).map_or(0, |container| container.pid()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id; "shutdown, now={}", request.now);
        let sandbox = self.0.clone();
        // A pod of the Sandbox API lives on without containers.
        if !sandbox.is_pod() {
            run(async move {
                sandbox.shutdown_for(&request.id, request.now).await;
                Ok(())
            })
            .await?;
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id; "pause");
        let sandbox = self.0.clone();
        run(async move { sandbox.pause(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id; "resume");
        let sandbox = self.0.clone();
        run(async move { sandbox.resume(&request.id).await }).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.0.stats(&request).await?)
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        log::debug!(container:% = request.id; "update");
        let sandbox = self.0.clone();
        run(async move { sandbox.update(request).await }).await?;
        Ok(Empty::new())
    }

    // The generated answer says "not found", which containerd takes for a container that is gone.

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(TaskError::Unimplemented("checkpointing a container").into())
    }
}
