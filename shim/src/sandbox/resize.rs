//! The VM's size while it runs: it follows the limits of the pod's containers, by the rule of
//! [`size`](crate::config::size).
//!
//! ```text
//! Create ──> grow the VM ──> the agent's Create
//! Update ──> grow the VM ──> limits in the guest ──> shrink the VM
//! Delete ──────────────────> the agent's Delete ──> shrink the VM, in the background
//! ctvm resize ─────────────> the VM alone, until the pod's next change
//! ```
//!
//! One change at a time: whoever holds the pod's turn is its owner. So no container is ever without what its limits
//! promise it, and what the shim believes to be set is what is set: limits are noted when the guest has taken them, and
//! sizes as the VMM reports them. A size that nobody knows (the guest did not answer) is asked for again by the next
//! change.
//!
//! A container that may use certain CPUs keeps them: the VM does not shrink below the last of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::task::UpdateTaskRequest;
use vmm_api::{Ending, Op, Reply, Resized, Vcpus};

use crate::config::Config;
use crate::config::size::{Size, Sizing};
use crate::container::limits::Limits;
use crate::container::overview::OverviewResources;
use crate::error::{TaskError, chain};
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::vmm::{Vmm, VmmError};

mod sizes;

pub use sizes::{Change, Sizes};

/// How much longer than the resize itself the VMM's answer may take: it has a grace of its own, and asks the guest
/// first what it does not know.
const ANSWER_SLACK: Duration = Duration::from_secs(10);

/// Why the VM does not have the size that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It cannot become so large.
    #[error(
        "with it the pod needs {needed}, and its VM can have {max} at most (max_vcpus, max_memory_mib); \
         nothing was changed"
    )]
    Beyond {
        /// The pod's size by its limits.
        needed: Size,
        /// The most.
        max: Size,
    },
    /// A container may use CPUs that would go.
    #[error(
        "container {container:?} may use CPU {cpu}, so the VM keeps {keeps} vCPUs; asked for were {asked}"
    )]
    Held {
        /// The container.
        container: String,
        /// The last of its CPUs.
        cpu: u8,
        /// vCPUs that stay.
        keeps: u8,
        /// vCPUs asked for.
        asked: u8,
    },
    /// An earlier change took all the time.
    #[error("another change of the VM's size has not ended within {0:?}")]
    Busy(Duration),
    /// It ended otherwise than asked.
    #[error("{resized}; {limits}")]
    Ended {
        /// How.
        resized: Resized,
        /// What became of the container's limits.
        limits: &'static str,
    },
}

/// Who has the VM resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// The boot of one that boots small.
    Boot,
    /// A container that is made.
    Create,
    /// A container whose limits are changed.
    Update,
    /// A container that is gone.
    Delete,
    /// `ctvm resize`.
    Operator,
}

impl By {
    /// All of them.
    pub const ALL: [By; 5] = [By::Boot, By::Create, By::Update, By::Delete, By::Operator];

    /// As a label.
    pub fn as_str(self) -> &'static str {
        match self {
            By::Boot => "boot",
            By::Create => "create",
            By::Update => "update",
            By::Delete => "delete",
            By::Operator => "operator",
        }
    }
}

/// What the pod's size is made of.
#[derive(Debug)]
struct Pod {
    sizing: Sizing,
    containers: BTreeMap<String, Limits>,
}

impl Pod {
    fn size(&self) -> Size {
        self.sizing.size(self.containers.values().map(Limits::need))
    }

    /// vCPUs that stay because a container may use the last of them.
    fn held(&self) -> u8 {
        self.holder().map_or(0, |(_, cpu)| cpu.saturating_add(1))
    }

    fn holder(&self) -> Option<(&str, u8)> {
        let held = self.containers.iter().filter_map(|(id, limits)| Some((id.as_str(), limits.last_cpu?)));
        held.max_by_key(|(_, cpu)| *cpu)
    }
}

/// The size of one sandbox's VM, and the turn to change it.
#[derive(Debug)]
pub struct Resizer {
    pod: tokio::sync::Mutex<Pod>,
    sizes: Mutex<Sizes>,
}

impl Resizer {
    /// Of a sandbox with this configuration.
    pub fn new(config: &Config) -> Self {
        Resizer {
            pod: tokio::sync::Mutex::new(Pod { sizing: config.sizing(), containers: BTreeMap::new() }),
            sizes: Mutex::new(Sizes::booting(config)),
        }
    }

    /// The VM boots with this configuration after all. No container exists yet.
    pub async fn boots_with(&self, config: &Config) {
        self.pod.lock().await.sizing = config.sizing();
        *self.sizes() = Sizes::booting(config);
    }

    /// How large the VM is, as far as is known.
    pub fn now(&self) -> Sizes {
        *self.sizes()
    }

    /// Takes what came of a change.
    pub fn note(&self, resized: &Resized) {
        self.sizes().note(resized);
    }

    fn sizes(&self) -> std::sync::MutexGuard<'_, Sizes> {
        self.sizes.lock().expect("no code panics while it holds this lock")
    }
}

/// Has a VMM change the VM's size.
///
/// # Errors
/// [`VmmError`]: what came of it is not known then, unless it was refused.
pub async fn change(vmm: &Vmm, change: Change, timeout: Duration) -> Result<Resized, VmmError> {
    let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
    let op = Op::Resize { vcpus: change.vcpus.map(Vcpus::Count), memory_mib: change.memory_mib, timeout_ms };
    match vmm.call(op, &[], timeout + ANSWER_SLACK).await? {
        (Reply::Resized(resized), _) => Ok(resized),
        _ => Err(VmmError::Answer { op: "resize" }),
    }
}

impl Sandbox {
    /// Changes the VM's size, and notes what came of it. The caller has the turn.
    async fn set_size(
        &self,
        vm: &Vm,
        by: By,
        wanted: Change,
        timeout: Duration,
    ) -> Result<Resized, VmmError> {
        self.operator.counters.resized(by);
        let changed = change(&vm.vmm, wanted, timeout).await;
        match &changed {
            Ok(resized) => {
                self.resizer.note(resized);
                log::info!("{resized} ({})", by.as_str());
            }
            // Nothing was tried.
            Err(VmmError::Refused { .. }) => {}
            Err(_) => {
                let mut sizes = self.resizer.sizes();
                sizes.vcpus = sizes.vcpus.filter(|_| wanted.vcpus.is_none());
                sizes.memory_mib = sizes.memory_mib.filter(|_| wanted.memory_mib.is_none());
            }
        }
        changed
    }

    /// Carries one step of a change out. A part of it is given back if the sizes `before` are known, else kept.
    async fn step(
        &self,
        vm: &Vm,
        by: By,
        wanted: Change,
        limits: &'static str,
        before: Option<Sizes>,
    ) -> Result<(), TaskError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let resized = self.set_size(vm, by, wanted, self.config.timeouts.resize()).await?;
        if resized.ending == Ending::Done {
            return Ok(());
        }
        // A guest that does not answer is not asked for more; the next change finds out what it has.
        if let Some(before) = before
            && resized.ending == Ending::Partial
        {
            self.give_back(vm, by, before, wanted).await;
        }
        Err(ResizeError::Ended { resized, limits }.into())
    }

    /// Takes back what `grown` has reached, if the guest can.
    async fn give_back(&self, vm: &Vm, by: By, before: Sizes, grown: Change) {
        let back = self.resizer.now().back(before, grown);
        if back.is_empty() {
            return;
        }
        if let Err(e) = self.set_size(vm, by, back, self.config.timeouts.resize()).await {
            log::warn!("giving back what the VM was grown by: {}", chain(&e));
        }
    }

    /// The VM has booted. Where it could not grow meanwhile, the first container that needs more tries again.
    pub(super) fn grown(&self, vm: &Vm) {
        let Some(grown) = &vm.grown else { return };
        self.operator.counters.resized(By::Boot);
        match grown {
            Ok(resized) => {
                self.resizer.note(resized);
                log::info!("{resized} ({})", By::Boot.as_str());
            }
            Err(e) => log::warn!("growing the VM that booted small: {}", chain(e)),
        }
    }

    /// A container with these limits is about to be made in the guest.
    ///
    /// # Errors
    /// [`ResizeError::Ended`] when the VM could have been large enough, and the guest could not.
    pub(super) async fn make_room(&self, vm: &Vm, id: &str, limits: Limits) -> Result<(), TaskError> {
        let mut pod = self.resizer.pod.lock().await;
        pod.containers.insert(id.to_owned(), limits);
        let (now, goal) = (self.resizer.now(), pod.size());
        if goal.max(now.max) != now.max {
            // A limit may be far above what is ever used, so it is no reason to refuse the container.
            log::warn!(container:% = id; "with it the pod needs {goal}, and its VM can have {} at most", now.max);
        }
        let (grow, _) = now.steps(goal, pod.held());
        let limits = "the container was not made";
        self.step(vm, By::Create, grow, limits, Some(now)).await
    }

    /// A container is no more, or never was. The VM shrinks when it can, and nobody waits for that.
    pub(super) fn leave_room(self: &Arc<Self>, id: &str) {
        let (sandbox, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let mut pod = sandbox.resizer.pod.lock().await;
            // One of the same name may be there again.
            if sandbox.container(&id).is_ok() || pod.containers.remove(&id).is_none() || sandbox.is_closing()
            {
                return;
            }
            let Some(vm) = sandbox.running_vm() else { return };
            let (_, shrink) = sandbox.resizer.now().steps(pod.size(), pod.held());
            if let Err(e) = sandbox.step(&vm, By::Delete, shrink, "its container is gone", None).await {
                log::warn!(container:% = id; "shrinking the VM after it: {}", e.chain());
            }
        });
    }

    /// Changes a container's limits in the guest, and the VM's size with them. `request` is checked.
    ///
    /// # Errors
    /// [`ResizeError::Beyond`] and [`ResizeError::Ended`] for the VM, with what was reached and what became of the
    /// limits; whatever the agent says, and nothing has changed then.
    pub(super) async fn change_limits(&self, vm: &Vm, request: &UpdateTaskRequest) -> Result<(), TaskError> {
        let id = &request.id;
        let resources: OverviewResources = serde_json::from_slice(&request.resources.value)
            .map_err(|_| TaskError::Request("the update's resources cannot be read"))?;
        let mut pod = self.resizer.pod.lock().await;
        let old = pod.containers.get(id).copied().unwrap_or_default();
        let new = old.changed(&resources);
        let before = pod.size();
        let mut after = Pod { sizing: pod.sizing, containers: pod.containers.clone() };
        after.containers.insert(id.clone(), new);
        // The promise is of all containers of a pod, or of the one that the sandbox is named after.
        if id == &self.id || !pod.containers.contains_key(&self.id) {
            after.sizing.moved(old.need(), new.need());
        }
        let (now, goal) = (self.resizer.now(), after.size());
        // One that was above the maximum before may stay there.
        let beyond = |goal: u32, before: u32, max: u32| goal > max && goal > before;
        if beyond(goal.vcpus.into(), before.vcpus.into(), now.max.vcpus.into())
            || beyond(goal.memory_mib, before.memory_mib, now.max.memory_mib)
        {
            return Err(ResizeError::Beyond { needed: goal, max: now.max }.into());
        }
        let (grow, _) = now.steps(goal, pod.held());
        self.step(vm, By::Update, grow, "the container's limits are as they were", Some(now)).await?;
        if let Err(e) = vm.agent.update(request).await {
            self.give_back(vm, By::Update, now, grow).await;
            return Err(self.explained(e));
        }
        *pod = after;
        let (_, shrink) = self.resizer.now().steps(goal, pod.held());
        let limits = "the container's limits are changed, and its VM is larger than they need";
        self.step(vm, By::Update, shrink, limits, None).await
    }

    /// Changes the VM's size as its operator wants it. It stays so until the pod's next change.
    ///
    /// # Errors
    /// [`ResizeError::Held`], [`ResizeError::Busy`]; [`TaskError::Finished`] without a VM; whatever the VMM says. What
    /// the guest could not do is no error: the answer tells.
    pub async fn resize(&self, wanted: Change, timeout: Duration) -> Result<Resized, TaskError> {
        let begun = tokio::time::Instant::now();
        let pod = tokio::time::timeout(timeout, self.resizer.pod.lock());
        let pod = pod.await.map_err(|_| ResizeError::Busy(timeout))?;
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        if let (Some(asked), Some((container, cpu))) = (wanted.vcpus, pod.holder())
            && asked <= cpu
        {
            let (container, keeps) = (container.to_owned(), cpu.saturating_add(1));
            return Err(ResizeError::Held { container, cpu, keeps, asked }.into());
        }
        let left = timeout.saturating_sub(begun.elapsed());
        Ok(self.set_size(&vm, By::Operator, wanted, left).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u8, memory_mib: u32) -> Size {
        Size { vcpus, memory_mib }
    }

    #[test]
    fn limits_are_of_containers_and_the_last_cpu_is_held() {
        let config = Config { max_memory_mib: 4096, max_vcpus: 8, ..Config::default() };
        let mut pod = Pod { sizing: config.sizing(), containers: BTreeMap::new() };
        assert_eq!((pod.size(), pod.held()), (size(1, 256), 0));
        let limits = |json: &str| Limits::default().changed(&serde_json::from_str(json).unwrap());
        pod.containers.insert("a".into(), limits(r#"{"memory":{"limit":314572800},"cpu":{"quota":150000}}"#));
        pod.containers.insert("b".into(), limits(r#"{"cpu":{"quota":50001,"cpus":"0-1"}}"#));
        assert_eq!((pod.size(), pod.held(), pod.holder()), (size(3, 364), 2, Some(("b", 1))));
    }
}
