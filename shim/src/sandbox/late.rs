//! A pod whose network comes late.
//!
//! Up to 1.7, containerd has the runtime make the network namespace of a pod with users of its own. It finds it by the
//! process number of the pod's task, once there is one, and its CNI plugins work before the task is started:
//!
//! ```text
//!  containerd                      shim
//!    Create ─────────────────────> a VMM in a network namespace of its own; its number is the task's
//!    pins /proc/PID/ns/net, CNI
//!    Start ──────────────────────> interfaces are found, the VM boots, the pod's container is made, and started
//! ```
//!
//! Of a task that is not started, the container has a first process that never runs; a kill or a delete ends it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use agent_api::task::CreateTaskRequest;
use tokio::sync::watch;

use crate::clock;
use crate::container::io::Copying;
use crate::container::{Container, Exit, Process};
use crate::error::TaskError;
use crate::sandbox::Sandbox;
use crate::sandbox::create::stdio_of_create;
use crate::sandbox::lifecycle::KILLED;
use crate::vmm::Vmm;

/// How far such a network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nobody knows where it would be.
    Nowhere,
    /// In the namespace of this process, the VMM, it is being made.
    Making(u32),
    /// It is there.
    There,
    /// The pod ends without.
    Abandoned,
}

/// What waits for the network.
#[derive(Debug)]
pub struct Late {
    stage: watch::Sender<Stage>,
    pod: Mutex<Option<CreateTaskRequest>>,
}

impl Default for Late {
    fn default() -> Self {
        Late { stage: watch::Sender::new(Stage::Nowhere), pod: Mutex::default() }
    }
}

impl Late {
    /// Has the network made in the VMM's namespace, and waits for it; none when the pod ends before, or its VMM.
    pub async fn network(&self, vmm: &Vmm) -> Option<PathBuf> {
        let pid = vmm.pid();
        // It may have been abandoned before it was begun.
        self.stage.send_if_modified(|stage| {
            let begins = *stage == Stage::Nowhere;
            if begins {
                *stage = Stage::Making(pid);
            }
            begins
        });
        let mut stage = self.stage.subscribe();
        let decided = stage.wait_for(|stage| matches!(stage, Stage::There | Stage::Abandoned));
        let stage = tokio::select! {
            biased;
            _ = vmm.exited() => Stage::Abandoned,
            decided = decided => *decided.expect("the sender is in `self`"),
        };
        (stage == Stage::There).then(|| PathBuf::from(format!("/proc/{pid}/ns/net")))
    }

    /// The pod ends.
    pub fn abandon(&self) {
        self.stage.send_replace(Stage::Abandoned);
    }

    /// Waits for the VMM in whose namespace the network will be.
    async fn vmm(&self) -> Result<u32, TaskError> {
        let mut stage = self.stage.subscribe();
        let known = stage.wait_for(|stage| *stage != Stage::Nowhere).await.expect("the sender is in `self`");
        match *known {
            Stage::Making(pid) => Ok(pid),
            _ => Err(TaskError::Closing),
        }
    }

    /// The pod that waits, who waits no longer then.
    fn take(&self) -> Option<CreateTaskRequest> {
        self.pod.lock().expect("no code panics while it holds this lock").take()
    }
}

impl Sandbox {
    /// What is known of the network, if `id` is the pod's container and the network comes late.
    pub(super) fn late_for(&self, id: &str) -> Option<&Late> {
        self.late.get().filter(|_| id == self.id)
    }

    /// `Create` of the pod's container: checks what is asked, and gives it the VMM's process number.
    ///
    /// # Errors
    /// Any [`TaskError`] of a configuration that cannot be, and that of a boot that has failed.
    pub(super) async fn hold(
        &self,
        late: &Late,
        container: &Container,
        request: &CreateTaskRequest,
    ) -> Result<(), TaskError> {
        self.read_bundle(&request.id, Path::new(&request.bundle))?;
        let pid = tokio::select! {
            pid = late.vmm() => pid?,
            // It comes up no sooner than this has returned.
            failed = self.vm() => failed?.vmm.pid(),
        };
        container.set_pid(pid);
        container.set_init(Process::new("", stdio_of_create(request), Copying::default()));
        *late.pod.lock().expect("no code panics while it holds this lock") = Some(request.clone());
        log::info!(
            "the pod's network is made in the namespace of the VMM, process {pid}, before the VM boots"
        );
        Ok(())
    }

    /// `Start` of the pod's container: makes it now, with what network there is.
    ///
    /// # Errors
    /// Any [`TaskError`]; the container has ended then.
    pub(super) async fn make_late(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), TaskError> {
        let Some(late) = self.late_for(&container.id) else { return Ok(()) };
        // A second `Start` waits for what comes of the first.
        let _turn = container.turn.lock().await;
        let Some(request) = late.take() else { return Ok(()) };
        late.stage.send_replace(Stage::There);
        let made = self.make(container, &request).await;
        if let Err(e) = &made {
            log::error!(container:% = container.id; "making it late: {}", e.chain());
            self.never_ran(container);
        }
        made
    }

    /// Ends a pod's container that waits to be made. Says whether it did.
    pub(super) fn give_up(&self, container: &Container) -> bool {
        let waits = self.late_for(&container.id).and_then(Late::take).is_some();
        if waits {
            self.never_ran(container);
        }
        waits
    }

    fn never_ran(&self, container: &Container) {
        let Some(process) = container.process("") else { return };
        let exit = Exit { status: KILLED, at: clock::timestamp() };
        if process.mark_stopped(exit.clone()) {
            self.tell_exit(container, &process, exit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_abandoned_network_has_no_vmm() {
        let late = Late::default();
        late.abandon();
        assert!(matches!(late.vmm().await, Err(TaskError::Closing)));
        assert!(late.take().is_none());
    }
}
