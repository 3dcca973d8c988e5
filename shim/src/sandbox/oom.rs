//! The news of processes that the guest's kernel killed for want of memory.
//!
//! A container's watcher asks the agent, which answers when there was one. That may come late: the kernel tells of the
//! first kill at once and of the next ones a hundredth of a second apart. So whoever tells of a process's end asks once
//! more before; both note what they hear in one place, and what is news there is told, once.

use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::events::task::TaskOOM;

use crate::container::Container;
use crate::events::Event;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;

/// Least time between two events of the watcher: a container that is killed for ever, or a guest that lies, must not
/// crowd other events out of their queue.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the news of an end waits for the count: an agent that does not answer holds nothing back.
const LAST_COUNT: Duration = Duration::from_secs(5);

impl Sandbox {
    /// Follows a container from its start to its end.
    pub(super) fn watch_oom(self: &Arc<Self>, vm: Arc<Vm>, container: Arc<Container>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            loop {
                match vm.agent.more_oom_kills(&container.id, container.oom_kills()).await {
                    Ok(count) => {
                        sandbox.note_oom(&container, count.kills);
                        if count.ended {
                            return;
                        }
                    }
                    Err(e) => {
                        log::debug!(container:% = container.id; "watching its memory: {e}");
                        return;
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
    }

    /// Asks for what the watcher may not have heard yet.
    pub(super) async fn settle_oom(&self, container: &Container) {
        let Some(vm) = self.running_vm() else { return };
        match tokio::time::timeout(LAST_COUNT, vm.agent.oom_kills(&container.id)).await {
            Ok(Ok(count)) => self.note_oom(container, count.kills),
            Ok(Err(e)) => log::debug!(container:% = container.id; "its memory at its end: {e}"),
            Err(_) => {
                log::warn!(container:% = container.id; "the agent does not tell how it ended within {LAST_COUNT:?}");
            }
        }
    }

    fn note_oom(&self, container: &Container, kills: u64) {
        if container.note_oom_kills(kills) {
            log::info!(container:% = container.id; "{kills} process(es) killed for want of memory so far");
            let event = TaskOOM { container_id: container.id.clone(), ..TaskOOM::default() };
            self.events.publish(&Event::Oom(event));
        }
    }
}
