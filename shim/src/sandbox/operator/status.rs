//! What a sandbox is, in short: the answer to `/status`, and what `ctvm ps` reads.

use serde::{Deserialize, Serialize};

use crate::container::{Container, Phase};
use crate::sandbox::{Progress, Sandbox};

/// A sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of the shim.
    pub version: String,
    /// `booting`, `running`, `failed` (the VM did not come up), `ended` (it is gone) or `closing`.
    pub state: String,
    /// vCPUs that the guest has online; none: it has not said.
    pub vcpus: Option<u8>,
    /// vCPUs asked for.
    pub vcpus_asked: u8,
    /// The most vCPUs.
    pub vcpus_max: u8,
    /// Guest memory, MiB; none: the guest has not said.
    pub memory_mib: Option<u32>,
    /// Guest memory asked for, MiB.
    pub memory_asked_mib: u32,
    /// The most guest memory, MiB.
    pub memory_max_mib: u32,
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
    /// How it has its image, where that is a Nydus image: `disk` or `memory`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<String>,
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
        let sizes = sandbox.resizer.now();
        let mut containers: Vec<_> =
            sandbox.containers().iter().map(|c| ContainerStatus::of(c, sandbox)).collect();
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: state.to_owned(),
            vcpus: sizes.vcpus,
            vcpus_asked: sizes.asked.vcpus,
            vcpus_max: sizes.max.vcpus,
            memory_mib: sizes.memory_mib,
            memory_asked_mib: sizes.asked.memory_mib,
            memory_max_mib: sizes.max.memory_mib,
            containers,
        }
    }
}

impl ContainerStatus {
    fn of(container: &Container, sandbox: &Sandbox) -> Self {
        let image = match &*sandbox.vm.borrow() {
            Progress::Up(vm) => vm.images.of(&container.id),
            _ => None,
        };
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
            image: image.map(|by| by.name().to_owned()),
        }
    }
}
