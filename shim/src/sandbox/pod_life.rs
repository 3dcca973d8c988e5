//! The life of a pod that containerd drives by the Sandbox API, from `CreateSandbox` to `ShutdownSandbox`.
//!
//! The VM begins to boot at `CreateSandbox`, and `StartSandbox` waits for it: pulling images and making networks go on
//! beside it. The pod ends with its VM; containers that still run then are reported as killed.

use std::sync::Arc;

use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, SandboxMetricsResponse, SandboxStatusResponse, StartSandboxResponse,
    WaitSandboxResponse,
};
use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::clock;
use crate::container::stats_v1;
use crate::error::TaskError;
use crate::sandbox::{Sandbox, pod};
use crate::vmm::ControlSlot;

/// CRI's words for a pod's state (`runtime.v1.PodSandboxState`).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Exit status of a pod whose VM ended by itself.
const LOST: u32 = 255;

/// What is known of a pod that the Sandbox API makes.
#[derive(Debug, Default)]
pub struct PodLife {
    /// What its VMM is spawned with; none once that is under way.
    slot: Option<ControlSlot>,
    created_at: Option<Timestamp>,
    exited_at: Option<Timestamp>,
    stop_asked: bool,
}

impl PodLife {
    /// One that is still to be made.
    pub fn awaited(slot: ControlSlot) -> Self {
        PodLife { slot: Some(slot), ..PodLife::default() }
    }
}

impl Sandbox {
    /// Whether the Sandbox API makes and ends this sandbox, rather than its first and its last container.
    pub fn is_pod(&self) -> bool {
        self.pod.lock().expect("no code panics while it holds this lock").is_some()
    }

    /// `CreateSandbox`: checks what is asked and begins to boot.
    ///
    /// # Errors
    /// [`TaskError::Pod`] for what cannot be made, [`TaskError::Exists`] for a second time.
    pub fn create_pod(self: &Arc<Self>, request: &CreateSandboxRequest) -> Result<(), TaskError> {
        let (overview, extras) = pod::read(request)?;
        let mut config = self.config.clone();
        config.fit_to_pod(&overview).map_err(|e| TaskError::Pod(crate::error::chain(&e)))?;
        let mut slot = self
            .change_pod(|life| {
                life.created_at = Some(clock::timestamp());
                life.slot.take()
            })
            .flatten()
            .ok_or_else(|| TaskError::Exists(request.sandbox_id.clone()))?;
        self.have_users(extras.users.as_ref());
        let sandbox = self.clone();
        tokio::spawn(async move { sandbox.boot(&overview, extras, config, &mut slot).await });
        Ok(())
    }

    /// `StartSandbox`: waits for the VM.
    ///
    /// # Errors
    /// What the boot failed with.
    pub async fn start_pod(&self) -> Result<StartSandboxResponse, TaskError> {
        let vm = self.vm().await?;
        let created_at = self.change_pod(|life| life.created_at.clone()).flatten();
        Ok(StartSandboxResponse { pid: vm.vmm.pid(), created_at: created_at.into(), ..Default::default() })
    }

    /// `StopSandbox`: ends the VM, and with it whatever runs in it.
    pub async fn stop_pod(&self) {
        self.change_pod(|life| life.stop_asked = true);
        if let Some(vm) = self.running_vm() {
            let exit = vm.vmm.stop(self.config.timeouts.shutdown()).await;
            log::info!("pod stopped: {exit}");
        }
    }

    /// `WaitSandbox`: waits for the VM's end.
    ///
    /// # Errors
    /// What the boot failed with.
    pub async fn wait_pod(&self) -> Result<WaitSandboxResponse, TaskError> {
        let vm = self.vm().await?;
        vm.vmm.exited().await;
        let ended = self.change_pod(|life| {
            let at = life.exited_at.get_or_insert_with(clock::timestamp).clone();
            (at, if life.stop_asked { 0 } else { LOST })
        });
        let (at, exit_status) = ended.unwrap_or_else(|| (clock::timestamp(), LOST));
        Ok(WaitSandboxResponse { exit_status, exited_at: MessageField::some(at), ..Default::default() })
    }

    /// `SandboxStatus`.
    pub fn pod_status(&self) -> SandboxStatusResponse {
        let vm = self.running_vm();
        let times = self.change_pod(|life| {
            if vm.is_none() && life.slot.is_none() {
                life.exited_at.get_or_insert_with(clock::timestamp);
            }
            (life.created_at.clone(), life.exited_at.clone())
        });
        let (created_at, exited_at) = times.unwrap_or_default();
        SandboxStatusResponse {
            sandbox_id: self.id.clone(),
            pid: vm.as_ref().map_or(0, |vm| vm.vmm.pid()),
            state: if vm.is_some() { READY } else { NOT_READY }.to_owned(),
            created_at: created_at.into(),
            exited_at: exited_at.into(),
            ..Default::default()
        }
    }

    /// `SandboxMetrics`: what all containers together have used, in containerd's message for this host's control groups.
    ///
    /// # Errors
    /// [`TaskError::Finished`] without a VM; what the agent says.
    pub async fn pod_metrics(&self) -> Result<SandboxMetricsResponse, TaskError> {
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        let stats = vm.agent.stats(&agent_api::task::StatsRequest::new()).await;
        let stats = stats.map_err(|e| self.explained(e))?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id.clone_from(&self.id);
        metrics.timestamp = MessageField::some(clock::timestamp());
        metrics.data = stats.stats.into_option().map(stats_v1::for_host).into();
        Ok(response)
    }

    fn change_pod<T>(&self, change: impl FnOnce(&mut PodLife) -> T) -> Option<T> {
        self.pod.lock().expect("no code panics while it holds this lock").as_mut().map(change)
    }
}
