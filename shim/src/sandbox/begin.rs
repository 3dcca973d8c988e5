//! How a sandbox begins: a VMM in the pod's place on the host, and a VM with its network and disks.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::config::Config;
use crate::container::overview::Overview;
use crate::sandbox::boot::{self, BootError, Hardware, Plan, Stage};
use crate::sandbox::disks::Disk;
use crate::sandbox::monitor::{Monitor, Place};
use crate::sandbox::net::{self, Joined, NetError, Network};
use crate::sandbox::pod::Extras;
use crate::sandbox::state_file::ProcessId;
use crate::sandbox::{Progress, Sandbox, aside, cgroup, forward};
use crate::vmm::ControlSlot;

impl Sandbox {
    /// Boots the VM for a pod of this configuration. To be called once.
    pub async fn boot(
        self: &Arc<Self>,
        overview: &Overview,
        extras: Extras,
        config: Config,
        slot: &mut ControlSlot,
    ) {
        let hostname = Some(overview.hostname.as_str()).filter(|h| !h.is_empty()).unwrap_or(&self.id);
        let plan = Plan {
            config,
            extras,
            name: self.id.clone(),
            // Linux' HOST_NAME_MAX is 64.
            hostname: hostname.chars().take(63).collect(),
        };
        self.resizer.boots_with(&plan.config).await;
        if let Err(e) = self.try_boot(overview, &plan, slot).await {
            log::error!("{}", crate::error::chain(&e));
            self.vm.send_replace(Progress::Failed(Arc::new(e)));
        }
    }

    async fn try_boot(
        self: &Arc<Self>,
        overview: &Overview,
        plan: &Plan,
        slot: &mut ControlSlot,
    ) -> Result<(), BootError> {
        // A configuration that asks for what cannot be had is refused by `Create`, with the reason.
        let disks = Disk::open_all(&overview.disks().unwrap_or_default())
            .map_err(|cause| BootError::early(Stage::Disks, cause))?;
        let monitor = self.spawn_monitor(overview, plan, slot)?;
        let connected = self.connect(overview, &monitor, plan.config.sizing().first().vcpus).await;
        let (namespace, network) = match connected {
            Ok(connected) => connected,
            Err(cause) => {
                monitor.vmm.stop(plan.config.timeouts.shutdown()).await;
                return Err(BootError::early(Stage::Network, cause));
            }
        };
        let (lost, lost_images) = mpsc::unbounded_channel();
        let vm = boot::boot(monitor, plan, Hardware { network, disks }, &self.timeline, lost).await?;
        self.grown(&vm);
        let vm = Arc::new(vm);
        self.vm.send_replace(Progress::Up(vm.clone()));
        tokio::spawn(self.clone().watch_vm(vm.clone()));
        tokio::spawn(self.clone().reopen_images(vm.clone(), lost_images));
        let groups = self.state.lock().expect("no code panics while it holds this lock").cgroups.clone();
        if !groups.is_empty() {
            tokio::spawn(self.clone().move_shim(groups));
        }
        // A namespace without a name is nobody's to enter.
        if !namespace.as_os_str().is_empty() {
            tokio::spawn(forward::serve(vm, namespace));
        }
        Ok(())
    }

    /// Starts the VMM, in the pod's control groups.
    fn spawn_monitor(
        &self,
        overview: &Overview,
        plan: &Plan,
        slot: &mut ControlSlot,
    ) -> Result<Monitor, BootError> {
        let groups = match self.config.host_cgroup {
            true => cgroup::directories(&overview.linux.cgroups_path),
            false => Vec::new(),
        };
        let spawned = |pid| {
            self.change_state(|state| {
                state.vmm = ProcessId::of(pid);
                state.cgroups.clone_from(&groups);
            });
            if let Err(e) = cgroup::enter(&groups, pid) {
                log::warn!("the VMM stays outside control group {:?}: {e}", overview.linux.cgroups_path);
            }
            // The pod's own score, not the daemon's protection. Lowering it may be forbidden, and is then left.
            let score = overview.process.oom_score_adj.unwrap_or(0);
            if let Err(e) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
                log::debug!("oom_score_adj {score} of the VMM: {e}");
            }
        };
        let place = if self.late.get().is_some() { Place::Own } else { Place::Ours };
        Monitor::spawn(&plan.config, slot, place, &self.timeline, spawned)
    }

    /// Has the pod pay for its shim as well. A move can take milliseconds, so nobody waits for it.
    async fn move_shim(self: Arc<Self>, groups: Vec<PathBuf>) {
        // Held for the move: an end meanwhile comes back after it.
        let mut home = self.home_groups.lock().await;
        *home = cgroup::current();
        let to = groups.clone();
        if let Err(e) = aside(move || cgroup::enter(&to, std::process::id())).await {
            log::debug!("the shim stays outside its control groups {groups:?}: {e}");
        }
    }

    /// Connects the pod's interfaces with taps for the VM; where the pod's network is, and what it is. What is to be undone
    /// is in the state file before it is done.
    async fn connect(
        &self,
        overview: &Overview,
        monitor: &Monitor,
        vcpus: u8,
    ) -> Result<(PathBuf, Network), NetError> {
        let late = self.late.get();
        let namespace = match late {
            Some(late) => late.network(&monitor.vmm).await.ok_or(NetError::Abandoned)?,
            None => overview.network().ok_or(NetError::Host)?.to_owned(),
        };
        if namespace.as_os_str().is_empty() {
            return Ok((namespace, Network::default()));
        }
        let path = namespace.clone();
        let interfaces = aside(move || net::look(&path)).await?;
        // What is found by a process number is another's when the process has ended. It ends with the pod's namespace.
        if late.is_none() {
            let names = interfaces.iter().map(|interface| interface.name.clone()).collect();
            let joined = Joined { namespace: namespace.clone(), interfaces: names };
            self.change_state(|state| state.network = Some(joined));
        }
        let path = namespace.clone();
        let network = aside(move || net::join(&path, &interfaces, vcpus)).await?;
        Ok((namespace, network))
    }
}
