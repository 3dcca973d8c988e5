//! Making containers and execs: root file system, binds, configuration, streams, and then the agent's part.
//!
//! What fails half-way is undone. A second `Create` for the same bundle succeeds without doing anything: containerd
//! repeats it when it was restarted in between.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::task::{CreateTaskRequest, ExecProcessRequest};
use agent_api::{PROCESS_TYPE_URL, SHARE_PATH, SPEC_TYPE_URL};
use containerd_shim_protos::events::task::{TaskCreate, TaskExecAdded, TaskIO};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use vmm_api::{FdIndex, FsCache, Op};

use crate::args;
use crate::container::hooks::{HookError, Moment, Subject};
use crate::container::image::ImageRoot;
use crate::container::io::{Copying, Fifos, Stdio, Streams};
use crate::container::logger::Owner;
use crate::container::overview::{Overview, Role};
use crate::container::rootfs::{HugePages, RootfsError};
use crate::container::spec::{GuestSpec, Place};
use crate::container::{Container, Phase, Process, rootfs, spec};
use crate::error::TaskError;
use crate::events::Event;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::sandbox::images;
use crate::sandbox::pod;
use crate::sandbox::streams::Expected;

/// How long the guest has to dial a stream after it said that a process is made. It dials first, so this is for
/// the news to overtake nothing.
const STREAM_TIMEOUT: Duration = Duration::from_secs(5);

/// How the guest sees a host directory.
#[derive(Debug, Clone, Copy)]
struct ShareOptions {
    read_only: bool,
    cache: FsCache,
    /// A layer of an overlay in the guest.
    layer: bool,
}

impl Sandbox {
    /// Makes a container; the task's process number.
    ///
    /// # Errors
    /// Any [`TaskError`]; nothing of the container is left then.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, TaskError> {
        if !args::is_name(&request.id) {
            return Err(TaskError::BadName(request.id));
        }
        if !request.checkpoint.is_empty() {
            return Err(TaskError::Unimplemented("creating a container from a checkpoint"));
        }
        if self.is_closing() {
            return Err(TaskError::Closing);
        }
        let container = Container::new(&request.id, &request.bundle);
        let turn = container.turn.clone().try_lock_owned().expect("a new lock is free");
        let existing = {
            let mut containers = self.containers.lock().expect("no code panics while it holds this lock");
            let existing = containers.get(&request.id).cloned();
            if existing.is_none() {
                containers.insert(request.id.clone(), container.clone());
            }
            existing
        };
        if let Some(existing) = existing {
            return self.create_again(&existing, &request).await;
        }
        let made = match self.late_for(&request.id) {
            Some(late) => self.hold(late, &container, &request).await,
            None => self.make(&container, &request).await,
        };
        if let Err(e) = made {
            self.forget_fifos(&stdio_of_create(&request));
            log::error!(container:% = request.id; "creating it: {}", e.chain());
            self.unshare(&container).await;
            self.give_back_disks(&request.id).await;
            self.containers.lock().expect("no code panics while it holds this lock").remove(&request.id);
            self.leave_room(&request.id);
            return Err(e);
        }
        drop(turn);
        Ok(container.pid())
    }

    async fn create_again(
        &self,
        existing: &Container,
        request: &CreateTaskRequest,
    ) -> Result<u32, TaskError> {
        let _turn = existing.turn.lock().await;
        let same = existing.bundle == request.bundle
            && existing.process("").is_some_and(|init| {
                init.stdio == stdio_of_create(request) && !matches!(init.phase(), Phase::Stopped(_))
            });
        if same { Ok(existing.pid()) } else { Err(TaskError::Exists(request.id.clone())) }
    }

    pub(super) async fn make(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: &CreateTaskRequest,
    ) -> Result<(), TaskError> {
        let id = &container.id;
        let bundle = Path::new(&request.bundle);
        // What can be wrong on this side comes first, before the guest is asked for anything.
        let stdio = stdio_of_create(request);
        let fifos = Fifos::open(&stdio, Owner { namespace: &self.namespace, id }, &self.streaming).await?;
        self.note_fifos(&stdio);
        let (overview, mut guest) = self.read_bundle(id, bundle)?;
        if let Some(size) = guest.shm().map(|shm| rootfs::tmpfs_size(shm).unwrap_or(spec::SHM_SIZE)) {
            guest.set_shm_size(size);
        }
        if self.is_pod() {
            pod::add_mounts(&mut guest.config);
        }
        for warning in &guest.warnings {
            log::warn!(container:% = id; "{warning}");
        }
        if let Some(name) = overview.name() {
            container.set_name(name);
        }
        container.set_hooks(overview.hooks.clone(), subject(&container.id, &container.bundle, &overview));
        let root = rootfs::parse(&request.rootfs)?;
        if let rootfs::Root::Image(image) = &root {
            image.is_for(self.users()).map_err(RootfsError::from)?;
            for warning in &image.warnings {
                log::warn!(container:% = id; "{warning}");
            }
            guest.set_root(&images::root_path(id));
        }

        let vm = self.vm().await?;
        // What stands for the pod does nothing.
        if overview.role() != Role::Pod {
            self.make_room(&vm, id, overview.linux.resources.limits().without_cpus()).await?;
        }
        if container.pid() == 0 {
            container.set_pid(self.free_pid(&vm));
        }
        for (index, disk) in guest.disks.clone().iter().enumerate() {
            let number = self.disk(&vm, id, disk).await?;
            guest.set_disk(index, number);
        }
        let rootfs = match root {
            rootfs::Root::Tree(layers) => {
                let stage = self.state_dir.join("layers").join(id);
                let (root, options) = tree(bundle, &layers, &overview, &stage)?;
                self.share(&vm, container, id, root, options).await?;
                Vec::new()
            }
            rootfs::Root::Image(image) => {
                self.share_layers(&vm, container, &image).await?;
                self.add_image(&vm, id, &image).await?
            }
        };
        for (index, bind) in guest.binds.clone().into_iter().enumerate() {
            if let Some(HugePages { volume, page }) = rootfs::huge_pages(&bind.source) {
                guest.set_huge_pages(index, &volume, page);
                continue;
            }
            let stage = self.bind_stage(&bind.share);
            let tree = rootfs::host_tree(&bind.source, &stage, bind.live, bind.map.as_ref())?;
            if let Some(file) = &tree.file {
                let in_guest = Path::new(SHARE_PATH).join(&bind.share).join(file);
                guest.set_bind_source(index, &in_guest);
            }
            let options = ShareOptions { read_only: bind.read_only, cache: FsCache::Shared, layer: false };
            self.share(&vm, container, &bind.share, tree.dir, options).await?;
        }

        let named = Named::new(&vm, &stdio);
        let mut to_agent = CreateTaskRequest::new();
        to_agent.id.clone_from(id);
        to_agent.bundle.clone_from(&request.bundle);
        to_agent.terminal = stdio.terminal;
        (to_agent.stdin, to_agent.stdout, to_agent.stderr) = named.names();
        to_agent.options = MessageField::some(any(SPEC_TYPE_URL, guest.to_json()));
        drop(guest);
        to_agent.rootfs = rootfs;
        vm.agent.create(&to_agent).await.map_err(|e| self.explained(e))?;
        if let Err(e) = self.run_hooks(container, Moment::Made).await {
            // What is said is the hook's failure, whatever comes of this.
            let _ = vm.agent.delete(id, "").await;
            let _ = self.run_hooks(container, Moment::Deleted).await;
            return Err(e.into());
        }
        let copying = named.copying(fifos, request.terminal).await?;
        let process = match container.process("") {
            // Somebody may wait for its end already.
            Some(held) => {
                *held.copying.lock().await = copying;
                held
            }
            None => Process::new("", stdio, copying),
        };
        container.set_init(process.clone());
        self.operator.counters.made(container.name());
        self.reached(id, "container created");

        let mut event = TaskCreate::new();
        event.container_id.clone_from(id);
        event.bundle.clone_from(&request.bundle);
        event.rootfs.clone_from(&request.rootfs);
        event.pid = container.pid();
        event.io = MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        });
        self.events.publish(&Event::Create(event));
        self.watch_process(vm, container.clone(), process);
        Ok(())
    }

    /// The container's configuration, as it is and for the guest.
    pub(super) fn read_bundle(&self, id: &str, bundle: &Path) -> Result<(Overview, GuestSpec), TaskError> {
        let path = bundle.join("config.json");
        let config = std::fs::read(&path)
            .map_err(|source| TaskError::Bundle { path: path.display().to_string(), source })?;
        let config = spec::parse(&config)?;
        let overview = Overview::of(&config)?;
        let container_of = &|pid| self.container_with_pid(pid);
        let place = Place { id, share_path: SHARE_PATH, container_of, users: self.users() };
        let guest = spec::for_guest(config, overview.role(), place)?;
        Ok((overview, guest))
    }

    /// Runs what the container wants run at this moment.
    ///
    /// # Errors
    /// Of the first that fails.
    pub(super) async fn run_hooks(&self, container: &Container, moment: Moment) -> Result<(), HookError> {
        let Some((hooks, subject)) = container.hooks() else { return Ok(()) };
        hooks.run(moment, subject).await.inspect_err(|e| {
            log::warn!(container:% = container.id; "{}", crate::error::chain(e));
        })
    }

    /// Shows a directory to the guest.
    async fn share(
        &self,
        vm: &Vm,
        container: &Container,
        name: &str,
        dir: OwnedFd,
        options: ShareOptions,
    ) -> Result<(), TaskError> {
        let ShareOptions { read_only, cache, layer } = options;
        let mount =
            Op::FsMount { share: None, at: name.to_owned(), dir: FdIndex(0), read_only, cache, layer };
        vm.vmm.call(mount, &[dir.as_fd()], self.config.timeouts.vmm()).await?;
        container.add_share(name);
        Ok(())
    }

    /// Shows what lies over an image: layers of the host, and the directory that is written to.
    async fn share_layers(&self, vm: &Vm, container: &Container, image: &ImageRoot) -> Result<(), TaskError> {
        // A snapshot belongs to its container: containerd hands it out once, and writes nothing into it.
        let options = |read_only| ShareOptions { read_only, cache: FsCache::Exclusive, layer: true };
        for (index, layer) in image.layers.iter().enumerate() {
            let dir = rootfs::layer(layer, image.maps.as_ref())?;
            self.share(vm, container, &images::layer_share(&container.id, index), dir, options(true)).await?;
        }
        if let Some(upper) = &image.upper {
            // Without what the host has mounted there.
            let dir = rootfs::clone_tree(&upper.parent, false)?;
            self.share(vm, container, &images::upper_share(&container.id), dir, options(false)).await?;
        }
        Ok(())
    }

    /// Takes the container's directories back from the guest.
    pub(super) async fn unshare(&self, container: &Container) {
        if let Some(vm) = self.running_vm() {
            self.detach_images(&vm, &container.id).await;
        }
        for name in container.take_shares() {
            if let Some(vm) = self.running_vm() {
                let unmount = Op::FsUnmount { share: None, at: name.clone() };
                if let Err(e) = vm.vmm.call(unmount, &[], self.config.timeouts.vmm()).await {
                    log::warn!(container:% = container.id; "taking share {name} back: {}", crate::error::chain(&e));
                }
            }
            let stage = self.bind_stage(&name);
            if stage.exists()
                && let Err(e) = std::fs::remove_dir_all(&stage)
            {
                log::warn!(container:% = container.id; "{}: {e}", stage.display());
            }
        }
    }

    fn bind_stage(&self, share: &str) -> PathBuf {
        self.state_dir.join("binds").join(share)
    }

    /// Makes an exec.
    ///
    /// # Errors
    /// Any [`TaskError`]; nothing of the exec is left then.
    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<(), TaskError> {
        if !args::is_name(&request.exec_id) {
            return Err(TaskError::BadName(request.exec_id));
        }
        let (container, init) = self.process(&request.id, "")?;
        match init.phase() {
            Phase::Running => {}
            phase => return Err(TaskError::Phase { what: "add an exec to", phase: phase.name() }),
        }
        if container.process(&request.exec_id).is_some() {
            return Err(TaskError::Exists(request.exec_id));
        }
        let spec = request.spec.as_ref().ok_or(TaskError::Request("the exec has no process"))?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let owner = Owner { namespace: &self.namespace, id: &request.exec_id };
        let fifos = Fifos::open(&stdio, owner, &self.streaming).await?;
        self.note_fifos(&stdio);
        let made = self.make_exec(&container, &request, &spec.value, &stdio, fifos).await;
        if made.is_err() {
            self.forget_fifos(&stdio);
        }
        made
    }

    async fn make_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        request: &ExecProcessRequest,
        spec: &[u8],
        stdio: &Stdio,
        fifos: Fifos,
    ) -> Result<(), TaskError> {
        let vm = self.running_vm().ok_or(TaskError::Finished)?;
        let named = Named::new(&vm, stdio);
        let mut to_agent = ExecProcessRequest::new();
        to_agent.id.clone_from(&request.id);
        to_agent.exec_id.clone_from(&request.exec_id);
        to_agent.terminal = request.terminal;
        (to_agent.stdin, to_agent.stdout, to_agent.stderr) = named.names();
        to_agent.spec = MessageField::some(any(PROCESS_TYPE_URL, spec.to_vec()));
        vm.agent.exec(&to_agent).await.map_err(|e| self.explained(e))?;
        let copying = named.copying(fifos, request.terminal).await?;
        let process = Process::new(&request.exec_id, stdio.clone(), copying);
        if !container.add_exec(process.clone()) {
            return Err(TaskError::Exists(request.exec_id.clone()));
        }
        let mut event = TaskExecAdded::new();
        event.container_id.clone_from(&request.id);
        event.exec_id.clone_from(&request.exec_id);
        self.events.publish(&Event::ExecAdded(event));
        self.watch_process(vm, container.clone(), process);
        Ok(())
    }
}

/// What hooks are told.
fn subject(id: &str, bundle: &str, overview: &Overview) -> Subject {
    Subject {
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        annotations: overview.annotations.clone(),
        network: overview.network().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned),
    }
}

/// The container's root directory as the host puts it together, and how the guest sees it.
fn tree(
    bundle: &Path,
    layers: &[rootfs::Layer],
    overview: &Overview,
    stage: &Path,
) -> Result<(OwnedFd, ShareOptions), TaskError> {
    if layers.is_empty() {
        // A directory that is there already: `ctr run --rootfs`, or mounts that containerd made itself.
        let path = bundle.join(&overview.root.path);
        let layer = rootfs::Layer::Bind { source: path, recursive: true, read_only: false, maps: None };
        let options = ShareOptions { read_only: false, cache: FsCache::Shared, layer: false };
        return Ok((rootfs::assemble(&[layer], bundle, stage)?, options));
    }
    let root = rootfs::assemble(layers, &bundle.join("rootfs"), stage)?;
    // A snapshot belongs to its container: containerd hands it out once, and writes nothing into it.
    let read_only = layers.iter().any(rootfs::Layer::read_only);
    Ok((root, ShareOptions { read_only, cache: FsCache::Exclusive, layer: false }))
}

/// The streams of a process under the names that the agent is told.
struct Named {
    stdin: Option<Expected>,
    stdout: Option<Expected>,
    stderr: Option<Expected>,
}

impl Named {
    /// Invents what `stdio` asks for. A terminal is one stream, whatever containerd names.
    fn new(vm: &Vm, stdio: &Stdio) -> Self {
        let wanted = |uri: &str| (!uri.is_empty()).then(|| vm.streams.expect());
        if stdio.terminal {
            return Named { stdin: None, stdout: Some(vm.streams.expect()), stderr: None };
        }
        Named { stdin: wanted(&stdio.stdin), stdout: wanted(&stdio.stdout), stderr: wanted(&stdio.stderr) }
    }

    /// stdin, stdout and stderr for the agent.
    fn names(&self) -> (String, String, String) {
        let name = |stream: &Option<Expected>| stream.as_ref().map(|s| s.id.to_string()).unwrap_or_default();
        (name(&self.stdin), name(&self.stdout), name(&self.stderr))
    }

    /// Waits for the guest to have dialled, and copies from then on.
    async fn copying(self, fifos: Fifos, terminal: bool) -> Result<Copying, TaskError> {
        let streams = Streams {
            stdin: dialled("stdin", self.stdin).await?,
            stdout: dialled("stdout", self.stdout).await?,
            stderr: dialled("stderr", self.stderr).await?,
        };
        Copying::start(fifos, streams, terminal).map_err(TaskError::Watch)
    }
}

async fn dialled(
    name: &'static str,
    stream: Option<Expected>,
) -> Result<Option<std::os::unix::net::UnixStream>, TaskError> {
    match stream {
        None => Ok(None),
        Some(stream) => stream.connection(STREAM_TIMEOUT).await.map(Some).ok_or(TaskError::Stream(name)),
    }
}

pub(super) fn stdio_of_create(request: &CreateTaskRequest) -> Stdio {
    Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}

fn any(type_url: &str, value: Vec<u8>) -> Any {
    let mut any = Any::new();
    any.type_url = type_url.to_owned();
    any.value = value;
    any
}
