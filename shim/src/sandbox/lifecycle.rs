//! What happens to a container's processes after they were made: start, signals, the end, and being forgotten.

use std::sync::Arc;
use std::time::Duration;

use agent_api::task::{KillRequest, ResizePtyRequest};
use containerd_shim_protos::events::task::{TaskDelete, TaskExecStarted, TaskExit, TaskStart};
use protobuf::MessageField;
use ttrpc::Code;

use crate::agent::AgentError;
use crate::clock;
use crate::container::hooks::Moment;
use crate::container::{Container, Exit, Phase, Process};
use crate::error::TaskError;
use crate::events::Event;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::sandbox::operator::counters::ExitKind;
use crate::vmm::VmmError;

/// How long the end of a container waits for the ends of its execs, which die with it.
const EXECS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the VMM has to end after the agent's connection broke.
const VMM_TIMEOUT: Duration = Duration::from_secs(3);
/// The signal that nobody can ignore.
const SIGKILL: u32 = 9;
/// Exit code of a process that was killed by SIGKILL.
pub(super) const KILLED: u32 = 128 + SIGKILL;
/// Exit code of a process of which nobody knows how it ended: containerd's own.
const UNKNOWN: u32 = 255;

impl Sandbox {
    /// Lets a process's program run; the task's process number.
    ///
    /// # Errors
    /// [`TaskError::Phase`] when it is not just made, and whatever the agent says.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let (container, process) = self.process(id, exec_id)?;
        if exec_id.is_empty() {
            self.make_late(&container).await?;
        }
        let _turn = process.turn.lock().await;
        match process.phase() {
            Phase::Created => {}
            phase => return Err(TaskError::Phase { what: "start", phase: phase.name() }),
        }
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        vm.agent.start(id, exec_id).await.map_err(|e| self.explained(e))?;
        process.mark_started();
        let pid = container.pid();
        let event = if exec_id.is_empty() {
            let mut event = TaskStart::new();
            event.container_id = id.to_owned();
            event.pid = pid;
            Event::Start(event)
        } else {
            let mut event = TaskExecStarted::new();
            event.container_id = id.to_owned();
            event.exec_id = exec_id.to_owned();
            event.pid = pid;
            Event::ExecStarted(event)
        };
        self.events.publish(&event);
        if exec_id.is_empty() {
            self.reached(id, "container running");
            self.watch_oom(vm, container.clone());
            // One that fails is logged, and the container goes on.
            let _ = self.run_hooks(&container, Moment::Started).await;
        }
        Ok(pid)
    }

    /// Follows a process to its end.
    pub(super) fn watch_process(
        self: &Arc<Self>,
        vm: Arc<Vm>,
        container: Arc<Container>,
        process: Arc<Process>,
    ) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let mut is_lost = false;
            let status = match vm.agent.wait(&container.id, &process.exec_id).await {
                Ok(response) => response.exit_status,
                // Deleted before it was started, or a fault of the agent's.
                Err(AgentError::Refused { message, .. }) => {
                    log::debug!(container:% = container.id, exec:% = process.exec_id; "waiting for its end: {message}");
                    UNKNOWN
                }
                Err(e) => {
                    log::debug!(container:% = container.id, exec:% = process.exec_id; "waiting for its end: {e}");
                    is_lost = true;
                    lost(&vm).await
                }
            };
            sandbox.ended(&container, &process, status, is_lost).await;
        });
    }

    async fn ended(&self, container: &Container, process: &Process, status: u32, is_lost: bool) {
        // After `Start` has published: its event comes first.
        let _turn = process.turn.lock().await;
        // By this host's clock: a guest's may be behind, and an end before its start confuses everybody.
        let exit = Exit { status, at: clock::timestamp() };
        let timeouts = &self.config.timeouts;
        let is_init = process.exec_id.is_empty();
        let drained =
            async { process.copying.lock().await.drain(timeouts.drain(), timeouts.drain_quiet()).await };
        // The first process may end of the end of another.
        let oom = async {
            if process.was_started() && (is_init || exit.status == KILLED) {
                self.settle_oom(container).await;
            }
        };
        let (drained, ()) = tokio::join!(drained, oom);
        if !drained {
            log::debug!(container:% = container.id, exec:% = process.exec_id; "output is still open after its end");
        }
        if is_init {
            let execs =
                container.processes().into_iter().filter(|p| !p.exec_id.is_empty() && p.was_started());
            let all_ended = async {
                for exec in execs {
                    exec.ended().await;
                }
            };
            // One that outlives its container is none of the container's.
            let _ = tokio::time::timeout(EXECS_TIMEOUT, all_ended).await;
            self.reached(&container.id, "exited");
        }
        if !process.mark_stopped(exit.clone()) {
            return;
        }
        // An exec whose start failed never ran, so it does not end either.
        if is_init || process.was_started() {
            let kind = match is_lost {
                true => ExitKind::VmLost,
                false => ExitKind::of(exit.status, exit.status == KILLED && container.ends_by_oom()),
            };
            self.operator.counters.exited(!is_init, kind);
            self.tell_exit(container, process, exit);
        }
    }

    /// Tells containerd how a process ended.
    pub(super) fn tell_exit(&self, container: &Container, process: &Process, exit: Exit) {
        let mut event = TaskExit::new();
        event.container_id.clone_from(&container.id);
        event.id = if process.exec_id.is_empty() { &container.id } else { &process.exec_id }.clone();
        event.pid = container.pid();
        event.exit_status = exit.status;
        event.exited_at = MessageField::some(exit.at);
        self.events.publish(&Event::Exit(event));
    }

    /// Sends a signal. SIGKILL is carried out even by a guest that hangs: with its VM.
    ///
    /// # Errors
    /// [`TaskError::Finished`] when there is nobody to get it.
    pub async fn kill(&self, request: KillRequest) -> Result<(), TaskError> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        if request.exec_id.is_empty() && self.give_up(&container) {
            return Ok(());
        }
        if matches!(process.phase(), Phase::Stopped(_)) && !request.all {
            return Err(TaskError::Finished);
        }
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        match vm.agent.kill(&request).await {
            Err(e @ AgentError::Deadline { .. }) if request.signal == SIGKILL => {
                log::error!("{e}: killing the VM, as {} is to be killed", request.id);
                vm.vmm.kill();
                vm.vmm.exited().await;
                Ok(())
            }
            done => done.map_err(|e| self.explained(e)),
        }
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// Whatever the agent says.
    pub async fn resize_pty(&self, request: ResizePtyRequest) -> Result<(), TaskError> {
        self.process(&request.id, &request.exec_id)?;
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        vm.agent.resize_pty(&request).await.map_err(|e| self.explained(e))
    }

    /// Processes in a container, by the guest's numbers; its own, on the host, of a container that has ended.
    ///
    /// # Errors
    /// [`TaskError::NoContainer`] and whatever the agent says.
    pub async fn pids(&self, id: &str) -> Result<agent_api::task::PidsResponse, TaskError> {
        let (container, init) = self.process(id, "")?;
        if matches!(init.phase(), Phase::Stopped(_)) {
            return Ok(zombie(container.pid()));
        }
        let Some(vm) = self.running_vm() else { return Ok(agent_api::task::PidsResponse::new()) };
        vm.agent.pids(id).await.map_err(|e| self.explained(e))
    }

    /// Forgets an exec that has ended.
    ///
    /// # Errors
    /// [`TaskError::Phase`] while it runs.
    pub async fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let (container, process) = self.process(id, exec_id)?;
        if process.phase() == Phase::Running {
            return Err(TaskError::Phase { what: "delete", phase: "running" });
        }
        self.delete_in_guest(id, exec_id).await?;
        container.remove_exec(exec_id);
        process.copying.lock().await.stop();
        self.forget_fifos(&process.stdio);
        Ok((container.pid(), exit_of(&process)))
    }

    /// Removes a container that has ended; one that was never started is killed.
    ///
    /// # Errors
    /// [`TaskError::Phase`] while it runs.
    pub async fn delete(self: &Arc<Self>, id: &str) -> Result<(u32, Exit), TaskError> {
        let (container, process) = self.process(id, "")?;
        let _turn = container.turn.lock().await;
        // Another delete may have had its turn meanwhile.
        self.container(id)?;
        if process.phase() == Phase::Running {
            return Err(TaskError::Phase { what: "delete", phase: "running" });
        }
        self.give_up(&container);
        self.delete_in_guest(id, "").await?;
        if process.phase() == Phase::Created {
            // Its watcher hears of the end from the agent, too.
            let limit = self.config.timeouts.agent();
            if tokio::time::timeout(limit, process.ended()).await.is_err() {
                log::warn!(container:% = id; "deleted without an end");
            }
        }
        for process in container.processes() {
            process.copying.lock().await.stop();
            self.forget_fifos(&process.stdio);
        }
        self.unshare(&container).await;
        self.give_back_disks(id).await;
        // One that fails is logged, and the container is gone.
        let _ = self.run_hooks(&container, Moment::Deleted).await;
        self.containers.lock().expect("no code panics while it holds this lock").remove(id);
        self.leave_room(id);
        let (pid, exit) = (container.pid(), exit_of(&process));
        let mut event = TaskDelete::new();
        event.container_id = id.to_owned();
        event.id = id.to_owned();
        event.pid = pid;
        event.exit_status = exit.status;
        event.exited_at = MessageField::some(exit.at.clone());
        self.events.publish(&Event::Delete(event));
        self.one_less();
        Ok((pid, exit))
    }

    /// The agent's part of a delete. What is gone there, with its VM or without, needs no deleting.
    async fn delete_in_guest(&self, id: &str, exec_id: &str) -> Result<(), TaskError> {
        let Some(vm) = self.running_vm() else { return Ok(()) };
        match vm.agent.delete(id, exec_id).await {
            Ok(_) | Err(AgentError::Refused { code: Code::NOT_FOUND, .. } | AgentError::Gone { .. }) => {
                Ok(())
            }
            Err(e) => Err(self.explained(e)),
        }
    }

    /// The agent's error, with the VMM's reason where the connection broke because the VM is gone.
    pub(super) fn explained(&self, error: AgentError) -> TaskError {
        if matches!(error, AgentError::Gone { .. })
            && let super::Progress::Up(vm) = &*self.vm.borrow()
            && let Some(exit) = vm.vmm.exit()
        {
            return VmmError::Gone(exit.to_string()).into();
        }
        error.into()
    }
}

/// A process that has ended keeps its number until it is deleted, as on any Linux. A containerd that is started anew
/// takes a task without processes for one that was never made, and throws its exit code away.
fn zombie(pid: u32) -> agent_api::task::PidsResponse {
    let process = agent_api::task::ProcessInfo { pid, ..Default::default() };
    agent_api::task::PidsResponse { processes: vec![process], ..Default::default() }
}

/// The exit code of what ended with its VM. A VM without its agent is of no use to anyone, so it is stopped.
async fn lost(vm: &Vm) -> u32 {
    let exit = match tokio::time::timeout(VMM_TIMEOUT, vm.vmm.exited()).await {
        Ok(exit) => exit,
        Err(_) => {
            log::error!("the agent's connection broke although the VM runs: stopping it");
            vm.vmm.stop(VMM_TIMEOUT).await
        }
    };
    if exit.was_killed() { KILLED } else { UNKNOWN }
}

/// How a process ended; of one that never ran, that it was killed.
fn exit_of(process: &Process) -> Exit {
    match process.phase() {
        Phase::Stopped(exit) => exit,
        Phase::Created | Phase::Running => Exit { status: KILLED, at: clock::timestamp() },
    }
}
