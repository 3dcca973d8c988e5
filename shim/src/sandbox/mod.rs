//! One sandbox: a VM, its containers, and what becomes of them.
//!
//! The VM is booted when the serving process starts, while containerd is still connecting; the first `Create` waits
//! for it. Everything on the host that belongs to the sandbox is in its state file before it exists.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use agent_api::users::IdMaps;
use tokio::sync::watch;

use crate::clock;
use crate::config::Config;
use crate::container::io::Stdio;
use crate::container::{Container, Process};
use crate::error::TaskError;
use crate::events::Publisher;
use crate::sandbox::boot::{BootError, Vm};
use crate::sandbox::end::Closing;
use crate::sandbox::late::Late;
use crate::sandbox::operator::Operator;
use crate::sandbox::pod_life::PodLife;
use crate::sandbox::resize::Resizer;
use crate::sandbox::state_file::{ProcessId, State};
use crate::sandbox::timeline::Timeline;
use crate::streaming::Desk;
use crate::vmm::ControlSlot;

mod begin;
pub mod boot;
pub mod cgroup;
pub mod complaints;
pub mod console;
pub mod control;
pub mod create;
pub mod disks;
mod end;
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

pub use end::remove_leftovers;

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
