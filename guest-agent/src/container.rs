//! One container: its files, its control group, its first process and its execs.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use agent_api::image;
use agent_api::task::CreateTaskRequest;
use libcontainer::container::Container as LibContainer;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use oci_spec::runtime::{LinuxSeccomp, PosixRlimit, Process as ProcessSpec, Spec};
use tokio::time::timeout;

use crate::boot::{BUNDLES, CONTAINERS};
use crate::cgroup::Cgroup;
use crate::container::console::Console;
use crate::container::execs::Exec;
use crate::devices::Nodes;
use crate::errors::TaskError;
use crate::host::Host;
use crate::huge_pages::{self, Reserved};
use crate::launch::{self, LaunchError, Launched, chain};
use crate::mounts::{self, Mounted};
use crate::payload::Payload;
use crate::process::{Phase, Process};
use crate::reaper::{Exit, Reaper};
use crate::stdio::{ChildEnds, Names, Wiring};
use crate::users::Users;
use crate::verdict::{self, Verdict};
use crate::{devices, pod, spec, sysctl};

mod console;
mod control;
mod execs;

/// The word for a container whose processes stand still, where another state's is [`Phase::name`].
const PAUSED: &str = "paused";

/// What containers share.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Where streams lead.
    pub host: Host,
    /// Who collects processes.
    pub reaper: Arc<Reaper>,
    /// The sandbox's users.
    pub users: Arc<Users>,
}

/// A container that exists, whatever its processes do.
#[derive(Debug)]
pub struct Container {
    id: String,
    guest: Guest,
    cgroup: Cgroup,
    filter: Option<LinuxSeccomp>,
    /// Its users are the sandbox's, not the guest's.
    own_users: bool,
    /// Its files are an image's that comes as it is read, and may not come.
    of_image: bool,
    /// Its first process.
    pub init: Arc<Process>,
    /// Of its program.
    verdict: Mutex<Option<Verdict>>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    /// Shared while an exec is started, held alone while the container is paused: an exec that is frozen half-made
    /// would leave its request hanging.
    starting: tokio::sync::RwLock<()>,
    files: Files,
}

/// What a container leaves on the guest's file systems: gone with this.
#[derive(Debug)]
struct Files {
    bundle: PathBuf,
    state: PathBuf,
    _root: Mounted,
    _huge_pages: Reserved,
    _nodes: Nodes,
}

impl Drop for Files {
    fn drop(&mut self) {
        for dir in [&self.bundle, &self.state] {
            if dir.exists()
                && let Err(error) = std::fs::remove_dir_all(dir)
            {
                log::warn!("{} stays: {error}", dir.display());
            }
        }
    }
}

/// The process's side of its standard streams, on its way into the launcher.
enum Ends {
    Pipes(ChildEnds),
    Console(PathBuf),
}

impl Container {
    /// Makes the container up to the point where its program could start. `pids_of` tells the file that stands for another
    /// container's process numbers.
    pub async fn create(
        guest: &Guest,
        request: &CreateTaskRequest,
        pids_of: impl Fn(&str) -> Result<PathBuf, TaskError>,
    ) -> Result<Self, TaskError> {
        let id = &request.id;
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let mut config = spec::container(request.options.as_ref(), id, names.terminal)?;
        let own_users = pod::join(&mut config.spec, &guest.users, pids_of)?;
        pod::share_memory(&mut config.spec)?;
        sysctl::apply(&mut config.spec, &guest.users)?;
        devices::resolve(&mut config.spec)?;
        let (mut owner, mut nodes) = ((config.uid, config.gid), Nodes::default());
        if own_users {
            let outside = |uid, gid| Ok(guest.users.outside(uid, gid)?);
            owner = outside(config.uid, config.gid)?;
            nodes = devices::bind(&mut config.spec, id, outside)?;
        }
        let huge_pages = huge_pages::set_up(&mut config.spec)?;
        let root = config.spec.root().as_ref().expect("checked by `spec::container`").path().clone();
        let wiring = Wiring::dial(&guest.host, &names).await?;
        let files = Files {
            bundle: Path::new(BUNDLES).join(id),
            state: Path::new(CONTAINERS).join(id),
            _root: mounts::make_all(&request.rootfs, &root, &guest.users)?,
            _huge_pages: huge_pages,
            _nodes: nodes,
        };
        std::fs::create_dir_all(&files.bundle)
            .and_then(|()| spec::save(&config.spec, &files.bundle.join("config.json")))
            .map_err(TaskError::io("write the bundle"))?;

        let container = Self {
            id: id.clone(),
            guest: guest.clone(),
            cgroup: Cgroup::of(id),
            filter: config.spec.linux().as_ref().and_then(|linux| linux.seccomp().clone()),
            own_users,
            of_image: request.rootfs.iter().any(|mount| mount.type_ == image::MOUNT_TYPE),
            init: Arc::new(Process::planned(names)),
            verdict: Mutex::default(),
            execs: Mutex::default(),
            starting: tokio::sync::RwLock::default(),
            files,
        };
        let bundle = container.files.bundle.clone();
        let at_exit = {
            let (cgroup, id) = (container.cgroup.clone(), id.clone());
            let explain = container.explain_end(config.spec.process().as_ref());
            // A container without a pid namespace of its own leaves children that the kernel does not kill.
            move |exit| {
                explain(exit);
                if !config.own_pid_namespace
                    && let Err(error) = cgroup.signal(libc::SIGKILL)
                {
                    log::warn!(container:% = id; "children stay: {error}");
                }
            }
        };
        // Where it is among the sandbox's users, it may not raise them itself any more.
        let limits = process_limits(&config.spec).filter(|_| own_users).unwrap_or_default();
        let (teller, verdict) = verdict::channel().map_err(TaskError::io("make a pipe"))?;
        let (keep, of_image) = (vec![teller.fd()], container.of_image);
        let made = container
            .launch(&container.init, wiring, (owner, keep), at_exit, move |builder| {
                let syscall = create_syscall();
                for limit in &limits {
                    syscall.set_rlimit(limit).map_err(|error| chain(&error))?;
                }
                let payload = Payload::init(teller).of_image(of_image);
                let builder = builder.with_executor(payload);
                let made = builder.as_init(&bundle).with_systemd(false).with_detach(true).build();
                let pid = made.map_err(|error| chain(&error))?.pid();
                pid.map(nix_pid).ok_or_else(|| "container has no process".to_owned())
            })
            .await;
        if let Err(error) = made {
            if let Err(error) = container.cgroup.remove().await {
                log::warn!(container:% = id; "it could not be made, and its cgroup stays: {error}");
            }
            return Err(error);
        }
        *container.verdict() = Some(verdict);
        Ok(container)
    }

    /// Lets the container's program start; see [`Self::judge`] for `patience`.
    pub async fn start(&self, patience: Duration) -> Result<u32, TaskError> {
        match self.init.phase() {
            Phase::Created => {}
            phase => return Err(TaskError::State { what: "start", state: phase.name() }),
        }
        LibContainer::load(self.files.state.clone())
            .and_then(|mut container| container.start())
            .map_err(|error| LaunchError::Refused(chain(&error)))?;
        let verdict = self.verdict().take();
        if let Some(verdict) = verdict {
            self.judge(verdict, patience).await?;
        }
        self.init.mark_started();
        Ok(self.init.pid())
    }

    /// Fails if the container's program does not run. Where its bytes may be long in coming that is waited for, `patience` at most;
    /// what is known later is logged.
    async fn judge(&self, verdict: Verdict, patience: Duration) -> Result<(), TaskError> {
        let mut judged = Box::pin(verdict.wait());
        if self.of_image
            && let Ok(judged) = timeout(patience, &mut judged).await
        {
            return judged.map_or(Ok(()), |why| Err(LaunchError::Refused(why).into()));
        }
        let id = self.id.clone();
        tokio::spawn(async move {
            if let Some(why) = judged.await {
                log::error!(container:% = id; "{why}");
            }
        });
        Ok(())
    }

    /// What to do at the end of a process: log what an operator would not guess.
    fn explain_end(&self, spec: Option<&ProcessSpec>) -> impl FnOnce(Exit) + Send + use<> {
        let program = spec.and_then(|spec| spec.args().as_ref()?.first().cloned());
        let (id, program) = (self.id.clone(), program.filter(|_| self.of_image));
        move |exit| {
            if let Some(why) = program.and_then(|program| verdict::of_end(&program, exit.status)) {
                log::error!(container:% = id; "{why}");
            }
        }
    }

    /// The process that a request means: an exec's by its id, the first by "".
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() { Ok(self.init.clone()) } else { Ok(self.exec(exec_id)?.process.clone()) }
    }

    /// Sends a signal to one process or to all of the container's.
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), TaskError> {
        if !all {
            return self.process(exec_id)?.signal(signal);
        }
        let number = crate::process::signal_number(signal)?;
        self.cgroup.signal(number).map_err(TaskError::io("signal the container's processes"))
    }

    /// Every process in the container.
    pub fn pids(&self) -> Result<Vec<i32>, TaskError> {
        self.cgroup.pids().map_err(TaskError::io("read the container's control group"))
    }

    /// Removes everything of the container but its files, which go with the object. A container that was never
    /// started is killed first.
    pub async fn delete(&self) -> Result<(u32, Exit), TaskError> {
        let exit = match self.init.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created => {
                self.init.signal(libc::SIGKILL.cast_unsigned())?;
                self.init.wait().await
            }
            phase @ Phase::Running => {
                return Err(TaskError::State { what: "delete", state: phase.name() });
            }
        };
        self.cgroup.remove().await.map_err(TaskError::io("remove the container's control group"))?;
        Ok((self.init.pid(), exit))
    }

    /// Where its configuration is, for `State`.
    pub fn bundle(&self) -> &Path {
        &self.files.bundle
    }

    async fn launch(
        &self,
        process: &Process,
        wiring: Wiring,
        ((uid, gid), keep): ((u32, u32), Vec<RawFd>),
        at_exit: impl FnOnce(Exit) + Send + 'static,
        build: impl FnOnce(ContainerBuilder) -> Result<i32, String> + Send,
    ) -> Result<(), TaskError> {
        let id = self.id.clone();
        let reaper = &self.guest.reaper;
        if process.names.terminal {
            let console = Console::listen().map_err(TaskError::io("listen for the terminal"))?;
            let ends = Ends::Console(console.path.clone());
            let Launched { pid, launching } =
                launch::run(reaper, &self.id, &keep, move || build(builder(id, ends)?)).await?;
            let exit = reaper.watch(pid);
            drop(launching);
            let master = console.receive().map_err(TaskError::io("receive the terminal"))?;
            let flow = wiring.terminal(master, uid, &exit)?;
            process.launched(pid, exit, flow, at_exit);
        } else {
            let (ends, pipes) = wiring.pipes(uid, gid)?;
            let streams = [&ends.stdin, &ends.stdout, &ends.stderr].map(AsRawFd::as_raw_fd);
            let keep: Vec<RawFd> = streams.into_iter().chain(keep).collect();
            let ends = Ends::Pipes(ends);
            let Launched { pid, launching } =
                launch::run(reaper, &self.id, &keep, move || build(builder(id, ends)?)).await?;
            let exit = reaper.watch(pid);
            drop(launching);
            let flow = pipes.run(&exit);
            process.launched(pid, exit, flow, at_exit);
        }
        Ok(())
    }

    fn verdict(&self) -> MutexGuard<'_, Option<Verdict>> {
        self.verdict.lock().expect("no code panics while it holds this lock")
    }
}

fn builder(id: String, ends: Ends) -> Result<ContainerBuilder, String> {
    let builder = ContainerBuilder::new(id, SyscallType::default())
        .with_root_path(CONTAINERS)
        .map_err(|error| chain(&error))?;
    Ok(match ends {
        Ends::Console(path) => builder.with_console_socket(Some(path)),
        Ends::Pipes(ChildEnds { stdin, stdout, stderr }) => {
            builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr)
        }
    })
}

fn process_limits(spec: &Spec) -> Option<Vec<PosixRlimit>> {
    spec.process().as_ref()?.rlimits().clone()
}

/// The library has its own, older `nix`.
fn nix_pid(pid: impl Into<i32>) -> i32 {
    pid.into()
}
