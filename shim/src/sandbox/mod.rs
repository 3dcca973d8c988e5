//! One sandbox: a VM, its containers, and what becomes of them.
//!
//! The VM is booted when the serving process starts, while containerd is still connecting; the first `Create` waits
//! for it. Everything on the host that belongs to the sandbox is in its state file before it exists.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use agent_api::users::IdMaps;
use tokio::sync::{mpsc, watch};

use crate::clock;
use crate::config::Config;
use crate::container::io::Stdio;
use crate::container::overview::Overview;
use crate::container::{Container, Process};
use crate::error::TaskError;
use crate::events::Publisher;
use crate::sandbox::boot::{BootError, Hardware, Plan, Stage, Vm};
use crate::sandbox::disks::Disk;
use crate::sandbox::late::Late;
use crate::sandbox::monitor::{Monitor, Place};
use crate::sandbox::net::{Joined, NetError, Network};
use crate::sandbox::operator::Operator;
use crate::sandbox::pod::Extras;
use crate::sandbox::pod_life::PodLife;
use crate::sandbox::resize::Resizer;
use crate::sandbox::state_file::{ProcessId, State};
use crate::sandbox::timeline::Timeline;
use crate::streaming::Desk;
use crate::vmm::ControlSlot;

pub mod boot;
pub mod cgroup;
pub mod complaints;
pub mod console;
pub mod control;
pub mod create;
pub mod disks;
pub mod forward;
pub mod guest_log;
pub mod images;
pub mod late;
pub mod lifecycle;
pub mod monitor;
pub mod net;
pub mod oom;
pub mod operator;
pub mod pod;
pub mod pod_life;
pub mod relay;
pub mod resize;
pub mod state_file;
pub mod streams;
pub mod timeline;
pub mod vmm_log;

/// The sandbox of this process.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id, that of its first container.
    pub id: String,
    /// The operator's wishes, changed by the pod's annotations.
    pub config: Config,
    /// Events to containerd.
    pub events: Arc<Publisher>,
    /// When what happened.
    pub timeline: Timeline,
    /// What its operator may ask.
    pub operator: Operator,
    /// Streams of processes that containerd dials.
    pub streaming: Arc<Desk>,
    /// How large its VM is.
    pub resizer: Resizer,
    namespace: String,
    state_dir: PathBuf,
    state: Mutex<State>,
    vm: watch::Sender<Progress>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    closing: watch::Sender<Closing>,
    /// Nobody will ask for its end any more: the last container that is deleted ends it.
    let_go: AtomicBool,
    /// The control groups that this process came from, once it has left them.
    home_groups: tokio::sync::Mutex<Vec<PathBuf>>,
    /// For a sandbox of the Sandbox API alone.
    pod: Mutex<Option<PodLife>>,
    /// The containers' users, if they are not the guest's.
    users: OnceLock<IdMaps>,
    /// What waits for the pod's network, if that comes late.
    late: OnceLock<Late>,
}

/// How far the end of the sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// Not asked for.
    No,
    /// The VM is being stopped and the files removed.
    Asked,
    /// Nothing is left but this process.
    Done,
}

/// How far the VM is.
#[derive(Debug, Clone)]
enum Progress {
    Booting,
    Up(Arc<Vm>),
    Failed(Arc<BootError>),
}

impl Sandbox {
    /// A sandbox without a VM yet; its state file is written.
    ///
    /// # Errors
    /// When the state file cannot be written.
    pub fn new(
        namespace: &str,
        id: &str,
        config: Config,
        state_dir: &Path,
        socket: &Path,
        events: Arc<Publisher>,
    ) -> std::io::Result<Arc<Self>> {
        let shim = ProcessId::of(std::process::id());
        let state = State { shim, socket: socket.to_owned(), ..State::default() };
        state.write(state_dir)?;
        let timeline = Timeline::new(state_dir, config.timeline_dir.as_deref(), namespace, id);
        let resizer = Resizer::new(&config);
        Ok(Arc::new(Sandbox {
            id: id.to_owned(),
            config,
            resizer,
            events,
            timeline,
            operator: Operator::default(),
            streaming: Desk::new(socket),
            namespace: namespace.to_owned(),
            state_dir: state_dir.to_owned(),
            state: Mutex::new(state),
            vm: watch::Sender::new(Progress::Booting),
            containers: Mutex::default(),
            closing: watch::Sender::new(Closing::No),
            let_go: AtomicBool::new(false),
            home_groups: tokio::sync::Mutex::default(),
            pod: Mutex::default(),
            users: OnceLock::new(),
            late: OnceLock::new(),
        }))
    }

    /// Has the Sandbox API make the pod; its VMM is spawned with `slot`.
    pub fn await_pod(&self, slot: ControlSlot) {
        *self.pod.lock().expect("no code panics while it holds this lock") = Some(PodLife::awaited(slot));
    }

    /// Notes that the pod's network comes late, before anybody asks for the pod.
    pub fn await_network(&self) {
        self.late.get_or_init(Late::default);
    }

    /// Notes that the containers have users of their own, before there is one of them. To be called once.
    pub fn have_users(&self, users: Option<&IdMaps>) {
        if let Some(users) = users {
            // A second pod is refused before it comes here.
            let _ = self.users.set(users.clone());
        }
    }

    /// The containers' users, if they are not the guest's.
    fn users(&self) -> Option<&IdMaps> {
        self.users.get()
    }

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

    /// Waits for the VM to be up.
    ///
    /// # Errors
    /// [`TaskError::Boot`] when it did not come up, [`TaskError::Vmm`] when it is gone since.
    pub async fn vm(&self) -> Result<Arc<Vm>, TaskError> {
        let mut progress = self.vm.subscribe();
        loop {
            match &*progress.borrow_and_update() {
                Progress::Booting => {}
                Progress::Up(vm) => return Ok(vm.clone()),
                Progress::Failed(error) => return Err(error.clone().into()),
            }
            progress.changed().await.map_err(|_| TaskError::Closing)?;
        }
    }

    /// The VM, if it is up and has not ended.
    pub fn running_vm(&self) -> Option<Arc<Vm>> {
        match &*self.vm.borrow() {
            Progress::Up(vm) if vm.vmm.exit().is_none() => Some(vm.clone()),
            _ => None,
        }
    }

    /// What the guest's console said last; of a VM that did not come up, what the error tells of it.
    pub fn console_text(&self) -> String {
        match &*self.vm.borrow() {
            Progress::Up(vm) => vm.console.text(),
            Progress::Failed(error) => error.last_words.clone(),
            Progress::Booting => String::new(),
        }
    }

    /// What containerd takes for a task's process: a number that names a thread of the VMM here, as one of the guest's
    /// would name some other process, or none. A thread each, the first for the first container, for a container that
    /// joins another's process numbers names it by this one alone; when there are more containers than threads, the
    /// rest share the first.
    fn free_pid(&self, vm: &Vm) -> u32 {
        let vmm = vm.vmm.pid();
        let mut taken: Vec<u32> = self.containers().iter().map(|container| container.pid()).collect();
        if self.is_pod() {
            // The pod's own.
            taken.push(vmm);
        }
        let mut threads: Vec<u32> = std::fs::read_dir(format!("/proc/{vmm}/task"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        threads.sort_unstable();
        threads.into_iter().find(|thread| !taken.contains(thread)).unwrap_or(vmm)
    }

    /// The one container that has this process number on the host; no name for the pod itself.
    fn container_with_pid(&self, pid: u32) -> Option<String> {
        if self.is_pod() && self.running_vm().is_some_and(|vm| vm.vmm.pid() == pid) {
            return Some(String::new());
        }
        let containers = self.containers();
        let mut having = containers.iter().filter(|container| container.pid() == pid);
        match (having.next(), having.next()) {
            (Some(container), None) => Some(container.id.clone()),
            _ => None,
        }
    }

    /// Logs how the VM ended, and ends what never ran: the rest is told by its own watcher.
    async fn watch_vm(self: Arc<Self>, vm: Arc<Vm>) {
        let exit = vm.vmm.exited().await;
        if self.is_closing() {
            return;
        }
        let words = vm.console.last_words();
        if words.is_empty() {
            log::warn!("the VM ended: {exit}");
        } else {
            log::warn!("the VM ended: {exit}; its console's last words: {words:?}");
        }
        for container in self.containers() {
            log::warn!(container:% = container.id; "ended with its VM: {exit}");
        }
    }

    /// The container of that name.
    ///
    /// # Errors
    /// [`TaskError::NoContainer`].
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let containers = self.containers.lock().expect("no code panics while it holds this lock");
        containers.get(id).cloned().ok_or_else(|| TaskError::NoContainer(id.to_owned()))
    }

    /// The container and the process that a request means.
    ///
    /// # Errors
    /// [`TaskError::NoContainer`] and [`TaskError::NoExec`].
    pub fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id).ok_or_else(|| match exec_id {
            "" => TaskError::NoContainer(id.to_owned()),
            exec => TaskError::NoExec { container: id.to_owned(), exec: exec.to_owned() },
        })?;
        Ok((container, process))
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.lock().expect("no code panics while it holds this lock").values().cloned().collect()
    }

    fn change_state(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().expect("no code panics while it holds this lock");
        change(&mut state);
        // What is ending removes the file with its directory, and nobody would do so again.
        if *self.closing.borrow() != Closing::No {
            return;
        }
        if let Err(e) = state.write(&self.state_dir) {
            log::error!("state file in {}: {e}", self.state_dir.display());
        }
    }

    /// A process has these streams from now on.
    fn note_fifos(&self, stdio: &Stdio) {
        self.change_state(|state| state.fifos.extend(stdio.paths()));
    }

    /// The process is no more, and what becomes of its fifos is its client's business.
    fn forget_fifos(&self, stdio: &Stdio) {
        self.change_state(|state| state.fifos.retain(|fifo| !stdio.paths().any(|path| path == *fifo)));
    }

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
    fn one_less(self: &Arc<Self>) {
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
    fn is_closing(&self) -> bool {
        *self.closing.borrow() != Closing::No
    }

    /// Notes a stage of the container that gave the sandbox its name; of others with their ids.
    fn reached(&self, container: &str, stage: &str) {
        let at = clock::monotonic_us();
        if container == self.id {
            self.timeline.reached_at(stage, at);
        } else {
            self.timeline.reached_at(&format!("{stage} ({container})"), at);
        }
        self.timeline.save();
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

/// Does what blocks for a while on a thread of its own; where the host has none to give, right here.
async fn aside<T, F>(work: F) -> T
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (done, result) = tokio::sync::oneshot::channel();
    let work = Arc::new(Mutex::new(Some(work)));
    let take =
        |work: &Mutex<Option<F>>| work.lock().expect("taking does not panic").take().expect("taken once");
    let theirs = work.clone();
    let runtime = tokio::runtime::Handle::current();
    let thread = std::thread::Builder::new().name("aside".into()).spawn(move || {
        // What is opened there is for the event loop here.
        let _context = runtime.enter();
        // Nobody waits for it any more when the sandbox has ended.
        let _ = done.send(take(&theirs)());
    });
    match thread {
        Ok(_) => result.await.expect("work of ours does not panic"),
        Err(e) => {
            log::warn!("no thread to be had, so calls wait for a moment: {e}");
            take(&work)()
        }
    }
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
