//! A handle on the guest's agent: its two services, each call with a deadline, each failure with its name.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_api::sandbox::{
    ForwardRequest, InfoRequest, InfoResponse, OomKillsRequest, OomKillsResponse, SandboxClient,
    SetupRequest, SetupResponse,
};
use agent_api::task::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, StartRequest, StatsRequest,
    StatsResponse, TaskClient, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

/// How much later than ours the RPC library's deadline is.
const LIBRARY_SLACK: Duration = Duration::from_secs(1);

/// Why the agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It refused or failed; the code is its own.
    #[error("{message}")]
    Refused {
        /// What it was asked.
        call: &'static str,
        /// Its code.
        code: ttrpc::Code,
        /// Its words.
        message: String,
    },
    /// The connection broke: the VM is gone, or soon will be.
    #[error("the guest agent is gone ({call}: {detail})")]
    Gone {
        /// What it was asked.
        call: &'static str,
        /// What the RPC library said.
        detail: String,
    },
    /// It did not answer.
    #[error("the guest agent did not answer {call} within {after:?}")]
    Deadline {
        /// What it was asked.
        call: &'static str,
        /// How long it had.
        after: Duration,
    },
    /// Its connection cannot be used.
    #[error("the guest agent's connection")]
    Connection(#[source] std::io::Error),
}

/// The agent of one running VM.
#[derive(Clone)]
pub struct Agent {
    task: TaskClient,
    sandbox: SandboxClient,
    deadline: Duration,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Agent {
    /// Takes the connection that the agent dialled. It is the server on it.
    ///
    /// # Errors
    /// [`AgentError::Connection`].
    pub fn new(socket: OwnedFd, deadline: Duration) -> Result<Self, AgentError> {
        let socket = Socket::try_from(UnixStream::from(socket)).map_err(AgentError::Connection)?;
        let client = Client::new(socket);
        Ok(Agent { task: TaskClient::new(client.clone()), sandbox: SandboxClient::new(client), deadline })
    }

    /// `Sandbox.Setup`.
    pub async fn setup(&self, request: &SetupRequest) -> Result<SetupResponse, AgentError> {
        self.within("Setup", self.sandbox.setup(self.context(), request)).await
    }

    /// `Sandbox.Info`.
    pub async fn info(&self) -> Result<InfoResponse, AgentError> {
        self.within("Info", self.sandbox.info(self.context(), &InfoRequest::new())).await
    }

    /// `Task.Create`.
    pub async fn create(&self, request: &CreateTaskRequest) -> Result<(), AgentError> {
        self.within("Create", self.task.create(self.context(), request)).await.map(drop)
    }

    /// `Task.Start`.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<(), AgentError> {
        let mut request = StartRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.within("Start", self.task.start(self.context(), &request)).await.map(drop)
    }

    /// `Task.Exec`.
    pub async fn exec(&self, request: &ExecProcessRequest) -> Result<(), AgentError> {
        self.within("Exec", self.task.exec(self.context(), request)).await.map(drop)
    }

    /// `Task.Kill`.
    pub async fn kill(&self, request: &KillRequest) -> Result<(), AgentError> {
        self.within("Kill", self.task.kill(self.context(), request)).await.map(drop)
    }

    /// `Task.Delete`.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<DeleteResponse, AgentError> {
        let mut request = DeleteRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.within("Delete", self.task.delete(self.context(), &request)).await
    }

    /// `Task.Wait`: as long as the process runs.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<WaitResponse, AgentError> {
        let mut request = WaitRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.task.wait(Context::default(), &request).await.map_err(|e| named("Wait", e))
    }

    /// `Task.Pids`.
    pub async fn pids(&self, id: &str) -> Result<PidsResponse, AgentError> {
        let mut request = PidsRequest::new();
        request.id = id.to_owned();
        self.within("Pids", self.task.pids(self.context(), &request)).await
    }

    /// `Task.Pause`.
    pub async fn pause(&self, id: &str) -> Result<(), AgentError> {
        let request = PauseRequest { id: id.to_owned(), ..PauseRequest::default() };
        self.within("Pause", self.task.pause(self.context(), &request)).await.map(drop)
    }

    /// `Task.Resume`.
    pub async fn resume(&self, id: &str) -> Result<(), AgentError> {
        let request = ResumeRequest { id: id.to_owned(), ..ResumeRequest::default() };
        self.within("Resume", self.task.resume(self.context(), &request)).await.map(drop)
    }

    /// `Task.Stats`.
    pub async fn stats(&self, request: &StatsRequest) -> Result<StatsResponse, AgentError> {
        self.within("Stats", self.task.stats(self.context(), request)).await
    }

    /// `Task.Update`.
    pub async fn update(&self, request: &UpdateTaskRequest) -> Result<(), AgentError> {
        self.within("Update", self.task.update(self.context(), request)).await.map(drop)
    }

    /// `Sandbox.OomKills`, at once.
    pub async fn oom_kills(&self, id: &str) -> Result<OomKillsResponse, AgentError> {
        let request = OomKillsRequest { id: id.to_owned(), ..OomKillsRequest::default() };
        self.within("OomKills", self.sandbox.oom_kills(self.context(), &request)).await
    }

    /// `Sandbox.OomKills`: until there are more than `seen`, or the container has ended.
    pub async fn more_oom_kills(&self, id: &str, seen: u64) -> Result<OomKillsResponse, AgentError> {
        let request = OomKillsRequest { id: id.to_owned(), beyond: Some(seen), ..OomKillsRequest::default() };
        self.sandbox.oom_kills(Context::default(), &request).await.map_err(|e| named("OomKills", e))
    }

    /// `Sandbox.Forward`. The stream is dialled when it answers.
    pub async fn forward(&self, request: &ForwardRequest) -> Result<(), AgentError> {
        self.within("Forward", self.sandbox.forward(self.context(), request)).await.map(drop)
    }

    /// `Task.ResizePty`.
    pub async fn resize_pty(&self, request: &ResizePtyRequest) -> Result<(), AgentError> {
        self.within("ResizePty", self.task.resize_pty(self.context(), request)).await.map(drop)
    }

    /// `Task.CloseIO`.
    pub async fn close_io(&self, request: &CloseIORequest) -> Result<(), AgentError> {
        self.within("CloseIO", self.task.close_io(self.context(), request)).await.map(drop)
    }

    /// The deadline, sent along so that the agent can give up too. The library's error of its own deadline looks like a
    /// broken connection, so it gets a little longer than `within`.
    fn context(&self) -> Context {
        with_duration(self.deadline + LIBRARY_SLACK)
    }

    async fn within<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        // The library's own deadline closes the whole connection when it strikes during a write; ours strikes first.
        match tokio::time::timeout(self.deadline, answer).await {
            Ok(answered) => answered.map_err(|e| named(call, e)),
            Err(_) => Err(AgentError::Deadline { call, after: self.deadline }),
        }
    }
}

fn named(call: &'static str, error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            AgentError::Refused { call, code: status.code(), message: status.message }
        }
        other => AgentError::Gone { call, detail: other.to_string() },
    }
}
