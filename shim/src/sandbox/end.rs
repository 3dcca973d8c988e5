//! How a sandbox ends: once, and with nothing left of it on the host.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use crate::sandbox::state_file::{self, State};
use crate::sandbox::{Sandbox, aside, cgroup, net};

/// How far the end of the sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closing {
    /// Not asked for.
    No,
    /// The VM is being stopped and the files removed.
    Asked,
    /// Nothing is left but this process.
    Done,
}

impl Sandbox {
    /// Ends the sandbox if no container is left in it, or `now`. Everything of it on the host is gone when this
    /// returns, save this process. Says whether it ended.
    pub async fn shutdown(&self, now: bool) -> bool {
        let left = self.containers.lock().expect("no code panics while it holds this lock").len();
        if left > 0 && !now {
            log::debug!("shutdown: {left} container(s) left");
            return false;
        }
        // Before the VM ends, so that its end is no news.
        if !begins(&self.closing) {
            self.closed().await;
            return true;
        }
        if let Some(late) = self.late.get() {
            late.abandon();
        }
        // A boot on its way is given a moment.
        let vm = tokio::time::timeout(Duration::from_secs(1), self.vm()).await;
        if let Ok(Ok(vm)) = &vm {
            let exit = vm.vmm.stop(self.config.timeouts.shutdown()).await;
            log::info!("VM stopped: {exit}");
        }
        let state = self.state.lock().expect("no code panics while it holds this lock").clone();
        if let (Err(_), Some(vmm)) = (&vm, &state.vmm) {
            log::warn!("the VM still boots: killing its VMM");
            if let Err(e) = vmm.end(Duration::ZERO) {
                log::warn!("killing the VMM: {e}");
            }
        }
        let home = std::mem::take(&mut *self.home_groups.lock().await);
        if let Err(e) = aside(move || cgroup::enter(&home, std::process::id())).await {
            log::warn!("leaving the pod's control groups: {e}");
        }
        if let Err(e) = remove_leftovers(&state, &self.state_dir) {
            log::warn!("cleaning up: {e}");
        }
        log::info!("timeline {}", self.timeline.to_json());
        self.closing.send_replace(Closing::Done);
        true
    }

    /// [`Sandbox::shutdown`] for the container `id`. containerd deletes the containers of a lost VM in any order. Once that
    /// which gave the sandbox its name is gone it has `delete` clean up, and asks for nothing more, whatever is left.
    pub async fn shutdown_for(&self, id: &str, now: bool) {
        if id == self.id && self.container(id).is_err() {
            self.let_go.store(true, Ordering::Relaxed);
        }
        self.shutdown(now).await;
    }

    /// A container was deleted.
    pub(super) fn one_less(self: &Arc<Self>) {
        if self.let_go.load(Ordering::Relaxed) {
            let sandbox = Arc::clone(self);
            tokio::spawn(async move { sandbox.shutdown(false).await });
        }
    }

    /// Waits for [`Sandbox::shutdown`] to be done.
    pub async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        // The sender is in `self`, so this cannot fail before it is done.
        let _ = closing.wait_for(|closing| *closing == Closing::Done).await;
    }

    /// Whether the sandbox is on its way out.
    pub(super) fn is_closing(&self) -> bool {
        *self.closing.borrow() != Closing::No
    }
}

/// Begins the end of a sandbox, once: containerd asks for each container of a pod, and one that asks when it is done must
/// not undo that.
fn begins(closing: &watch::Sender<Closing>) -> bool {
    closing.send_if_modified(|closing| {
        let first = *closing == Closing::No;
        if first {
            *closing = Closing::Asked;
        }
        first
    })
}

/// Removes what is left of a sandbox whose processes have ended: socket, control group, redirections, state directory.
///
/// # Errors
/// The first that failed; the others are tried all the same.
pub fn remove_leftovers(state: &State, state_dir: &Path) -> std::io::Result<()> {
    let socket = match std::fs::remove_file(&state.socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    let group = cgroup::remove(&state.cgroups);
    let network = state.network.as_ref().map_or(Ok(()), net::leave).map_err(std::io::Error::other);
    let dir = state_file::remove_dir(state_dir);
    socket.and(group).and(network).and(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_is_done_stays_done() {
        let closing = watch::Sender::new(Closing::No);
        assert!(begins(&closing) && !begins(&closing));
        assert_eq!(*closing.borrow(), Closing::Asked);
        closing.send_replace(Closing::Done);
        assert!(!begins(&closing));
        assert_eq!(*closing.borrow(), Closing::Done);
    }
}
