//! What is done to a container that exists: standing still and going on, its counters and its limits.

use agent_api::RESOURCES_TYPE_URL;
use agent_api::task::{StatsRequest, StatsResponse, UpdateTaskRequest};
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};

use crate::container::{Phase, Process, stats_v1};
use crate::error::TaskError;
use crate::events::Event;
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Stops every process of a container where it is. Whether it is paused already is the agent's to say: its answer to
    /// an earlier call may have been lost.
    ///
    /// # Errors
    /// [`TaskError::Phase`] when it does not run; whatever the agent says.
    pub async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let (container, init) = self.process(id, "")?;
        // The event comes before that of the end.
        let _turn = init.turn.lock().await;
        alive("pause", &init)?;
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        vm.agent.pause(id).await.map_err(|e| self.explained(e))?;
        container.set_paused(true);
        self.events
            .publish(&Event::Paused(TaskPaused { container_id: id.to_owned(), ..TaskPaused::default() }));
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let (container, init) = self.process(id, "")?;
        let _turn = init.turn.lock().await;
        alive("resume", &init)?;
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        vm.agent.resume(id).await.map_err(|e| self.explained(e))?;
        container.set_paused(false);
        self.events
            .publish(&Event::Resumed(TaskResumed { container_id: id.to_owned(), ..TaskResumed::default() }));
        Ok(())
    }

    /// Changes a container's limits in the guest, and the VM's size with them. Annotations are not looked at: none has a
    /// meaning here.
    ///
    /// # Errors
    /// [`TaskError::Phase`] when it has ended, [`TaskError::Request`] for anything but Linux's resources,
    /// [`TaskError::Resize`] when the VM cannot follow; whatever the agent says.
    pub async fn update(&self, mut request: UpdateTaskRequest) -> Result<(), TaskError> {
        let (_, init) = self.process(&request.id, "")?;
        if let phase @ Phase::Stopped(_) = init.phase() {
            return Err(TaskError::Phase { what: "change the limits of", phase: phase.name() });
        }
        let resources =
            request.resources.as_mut().ok_or(TaskError::Request("the update has no resources"))?;
        if resources.type_url.rsplit('/').next() != RESOURCES_TYPE_URL.rsplit('/').next() {
            return Err(TaskError::Request("the update's resources are not of type LinuxResources"));
        }
        RESOURCES_TYPE_URL.clone_into(&mut resources.type_url);
        request.annotations.clear();
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        self.change_limits(&vm, &request).await
    }

    /// What a container has used, by the guest's counters, in this host's shape.
    ///
    /// # Errors
    /// [`TaskError::Finished`] when its VM is gone, and the counters with it; whatever the agent says.
    pub async fn stats(&self, request: &StatsRequest) -> Result<StatsResponse, TaskError> {
        self.process(&request.id, "")?;
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        let mut response = vm.agent.stats(request).await.map_err(|e| self.explained(e))?;
        response.stats = response.stats.take().map(stats_v1::for_host).into();
        Ok(response)
    }
}

fn alive(what: &'static str, init: &Process) -> Result<(), TaskError> {
    match init.phase() {
        Phase::Running => Ok(()),
        phase => Err(TaskError::Phase { what, phase: phase.name() }),
    }
}
