//! What a sandbox is, in short: the answer to `/status`, and what `ctvm ps` reads.

use serde::{Deserialize, Serialize};

use crate::container::{Container, Phase};
use crate::sandbox::{Progress, Sandbox};

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of the shim.
    pub version: String,
    /// `booting`, `running`, `failed` (the VM did not come up), `ended` (it is gone) or `closing`.
    pub state: String,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Its containers, by id.
    pub containers: Vec<ContainerStatus>,
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// containerd's id.
    pub id: String,
    /// The pod's name for it; elsewhere the id.
    pub name: String,
    /// `creating`, `created`, `running`, `paused` or `stopped`.
    pub state: String,
    /// Of its first process, when that has ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exit_code: Option<u32>,
    /// Execs that run.
    pub execs: usize,
}

/// States of containers, for those who count.
pub const CONTAINER_STATES: [&str; 5] = ["creating", "created", "running", "paused", "stopped"];

impl Status {
    /// The sandbox as it is now.
    pub fn of(sandbox: &Sandbox) -> Self {
        let state = match &*sandbox.vm.borrow() {
            _ if sandbox.is_closing() => "closing",
            Progress::Booting => "booting",
            Progress::Failed(_) => "failed",
            Progress::Up(vm) if vm.vmm.exit().is_some() => "ended",
            Progress::Up(_) => "running",
        };
        // The Sandbox API tells a pod's limits only when it makes the VM.
        let (vcpus, memory_mib) = match &*sandbox.vm.borrow() {
            Progress::Up(vm) => (vm.vcpus, vm.memory_mib),
            _ => (sandbox.config.vcpus, sandbox.config.memory_mib),
        };
        let mut containers: Vec<_> = sandbox.containers().iter().map(|c| ContainerStatus::of(c)).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: state.to_owned(),
            vcpus,
            memory_mib,
            containers,
        }
    }
}

impl ContainerStatus {
    fn of(container: &Container) -> Self {
        let phase = container.process("").map(|init| init.phase());
        let (state, exit_code) = match phase {
            None => ("creating", None),
            Some(Phase::Running) if container.is_paused() => ("paused", None),
            Some(Phase::Stopped(exit)) => ("stopped", Some(exit.status)),
            Some(phase) => (phase.name(), None),
        };
        let running = container.processes().into_iter();
        let execs = running.filter(|p| !p.exec_id.is_empty() && p.phase() == Phase::Running).count();
        ContainerStatus {
            id: container.id.clone(),
            name: container.name().to_owned(),
            state: state.to_owned(),
            exit_code,
            execs,
        }
    }
}
