//! A containerd of the test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::api::{Api, Status};
use crate::command::{Finished, run, run_with_input, wait_until};
use crate::{BIN, IMAGE, SHARE};

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.ctvm.v2";

/// Its shim's program.
pub const SHIM: &str = "containerd-shim-ctvm-v2";

/// A running containerd with the test image imported; stopped when dropped.
#[derive(Debug)]
pub struct Containerd {
    folder: TempDir,
    setup: Setup,
    daemon: Child,
    api: Api,
}

/// What kind of containerd to start.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Folder for all of its files.
    pub parent: PathBuf,
    /// `1.6`, `1.7` or `2.1`; the lab's own where it is not said.
    pub release: Option<String>,
    /// Namespace that `ctr` works in, and where images go.
    pub namespace: &'static str,
    /// The rest of `config.toml`, from the daemon's folder.
    pub config: fn(&Path) -> Result<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            parent: "/var/tmp".into(),
            release: None,
            namespace: "test",
            config: |_| Ok("disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n".to_owned()),
        }
    }
}

impl Setup {
    /// Starts it, and imports the test images.
    pub fn start(self) -> Result<Containerd> {
        let folder = tempfile::Builder::new().prefix("ctd").tempdir_in(&self.parent)?;
        let rest = (self.config)(folder.path())?;
        // What is no table comes before the first table.
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n{rest}\n[grpc]\naddress = \"{0}/sock\"\n",
            folder.path().display()
        );
        fs::write(folder.path().join("config.toml"), config)?;
        let daemon = self.spawn(folder.path())?;
        let api = Api::new(&folder.path().join("sock"), self.namespace)?;
        let mut containerd = Containerd { folder, setup: self, daemon, api };
        containerd.wait_until_ready(0)?;
        containerd.check_release()?;
        let image = Path::new(SHARE).join("image.tar");
        run(containerd.ctr().args(["images", "import"]).arg(image))?.ok().context("importing the images")?;
        Ok(containerd)
    }

    fn spawn(&self, folder: &Path) -> Result<Child> {
        let log = fs::File::options().create(true).append(true).open(folder.join("log"))?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "containerd", "--config"])
            .arg(folder.join("config.toml"))
            .env("PATH", self.path())
            // Collecting garbage is a third of its time in an emulated machine.
            .envs([("GOGC", "off"), ("GOMEMLIMIT", "256MiB")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        spawn_for_life(command).context("starting containerd")
    }

    /// Where programs are found: ours, then those of the asked release.
    fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap_or_default();
        match &self.release {
            Some(release) => format!("{BIN}:/opt/containerd/{release}/usr/bin:{path}"),
            None => format!("{BIN}:{path}"),
        }
    }
}

impl Containerd {
    /// Starts the lab's containerd, without CRI.
    pub fn start() -> Result<Containerd> {
        Setup::default().start()
    }

    /// The same, with its folder in `parent`.
    pub fn start_in(parent: &Path) -> Result<Containerd> {
        Setup { parent: parent.to_owned(), ..Setup::default() }.start()
    }

    /// Waits until it has logged that it serves, after the `logged` bytes of the one before. Each look by `ctr` would cost
    /// a third of what starting it does.
    fn wait_until_ready(&mut self, logged: usize) -> Result<()> {
        let ready = wait_until("containerd has booted", || {
            let ended = self.daemon.try_wait()?;
            ensure!(ended.is_none(), "containerd has ended as it started: {ended:?}");
            Ok(self.log().get(logged..).is_some_and(|new| new.contains("containerd successfully booted")))
        });
        ready.inspect_err(|_| self.show_log())
    }

    /// A release that is not there must not become another one in silence: `PATH` would find the lab's own.
    fn check_release(&self) -> Result<()> {
        let Some(release) = &self.setup.release else { return Ok(()) };
        let version = self.api.version()?;
        let rest = version.trim_start_matches('v').strip_prefix(&**release);
        ensure!(
            rest.is_some_and(|rest| rest.starts_with('.')),
            "asked for was {release}, and it is {version}"
        );
        Ok(())
    }

    /// Process number of the daemon.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// `kill -9` for the daemon; what it started goes on.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill().context("killing containerd")?;
        self.daemon.wait()?;
        Ok(())
    }

    /// An orderly end of the daemon; what it started goes on.
    pub fn stop(&mut self) -> Result<()> {
        run(Command::new("kill").args(["-TERM", &self.daemon.id().to_string()]))?.ok()?;
        self.daemon.wait()?;
        Ok(())
    }

    /// A new daemon in the place of one that has ended, which finds what the old one knew.
    pub fn start_again(&mut self) -> Result<()> {
        let logged = self.log().len();
        self.daemon = self.setup.spawn(self.folder.path())?;
        self.wait_until_ready(logged)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it is asked without `ctr`.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    /// A `ctr` that talks to this containerd.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.env("PATH", self.setup.path());
        command.arg("--address").arg(self.socket()).args(["--namespace", self.setup.namespace]);
        command
    }

    /// `ctr run` of the test image in the foreground: `options` before the image, then the command.
    pub fn run(&self, options: &[&str], id: &str, command: &[&str]) -> Result<Finished> {
        run(&mut self.run_command(options, id, command))
    }

    /// The same, with something on the container's standard input.
    pub fn run_with_input(&self, id: &str, command: &[&str], input: Vec<u8>) -> Result<Finished> {
        run_with_input(&mut self.run_command(&["--rm"], id, command), input)
    }

    /// The `ctr run` command itself, not yet started.
    pub fn run_command(&self, options: &[&str], id: &str, command: &[&str]) -> Command {
        let mut ctr = self.ctr();
        ctr.args(["run", "--runtime", RUNTIME]).args(options).arg(IMAGE).arg(id).args(command);
        ctr
    }

    /// `ctr tasks …`.
    pub fn task(&self, arguments: &[&str]) -> Result<Finished> {
        run(self.ctr().arg("tasks").args(arguments))
    }

    /// Runs a command in a running container.
    pub fn exec(&self, id: &str, exec_id: &str, command: &[&str]) -> Result<Finished> {
        run(self.ctr().args(["tasks", "exec", "--exec-id", exec_id, id]).args(command))
    }

    /// Where a task is in its life, or nothing when there is no such task.
    pub fn status(&self, id: &str) -> Result<Option<Status>> {
        self.api.status(id)
    }

    /// Waits until the task has this status.
    pub fn wait_for(&self, id: &str, status: Status) -> Result<()> {
        wait_until(&format!("{id} is {status:?}"), || Ok(self.status(id)? == Some(status)))
    }

    /// Waits until the task is running no longer, however it has ended.
    pub fn wait_until_over(&self, id: &str) -> Result<()> {
        wait_until("the task is no longer running", || Ok(self.status(id)? != Some(Status::Running)))
    }

    /// Kills a task's first process, and with it the task.
    pub fn kill_task(&self, id: &str) -> Result<()> {
        self.api.kill(id, libc::SIGKILL)
    }

    /// Removes a task, killed first if need be, and its container and snapshot.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.api.remove_task(id)?;
        ensure!(self.api.remove_container(id)?, "there is no container {id}");
        Ok(())
    }

    /// Removes the record that `ctr` leaves of a container that it could not start, if there is one.
    pub fn remove_record(&self, id: &str) -> Result<()> {
        self.api.remove_container(id).map(drop)
    }

    /// What containerd (and the shims through it) has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Shows the end of its log.
    pub fn show_log(&self) {
        let log = self.log();
        let tail: Vec<&str> = log.lines().rev().take(60).collect();
        eprintln!("--- end of containerd's log ---");
        tail.iter().rev().for_each(|line| eprintln!("{line}"));
    }

    /// The bundle of a task.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.folder.path().join("state/io.containerd.runtime.v2.task").join(self.setup.namespace).join(id)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() || self.log().contains("goroutine ") {
            self.show_log();
        }
        // Both fail only when it is dead already.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Process ids of all processes with this name.
pub fn pids_of(name: &str) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Ok(comm) = fs::read_to_string(entry.path().join("comm")) else { continue };
        // The kernel keeps 15 bytes of a name.
        if comm.trim_end() == &name[..name.len().min(15)] {
            pids.push(pid);
        }
    }
    Ok(pids)
}

/// Starts a program from a thread that ends with this program. A parent-death signal comes when the thread ends that made the
/// process, and a test's may end before the next test; a static, in which tests share a daemon, is never dropped.
fn spawn_for_life(mut command: Command) -> std::io::Result<Child> {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if send.send(command.spawn()).is_ok() {
            loop {
                std::thread::park();
            }
        }
    });
    receive.recv().map_err(std::io::Error::other)?
}

/// `kill -9`.
pub fn kill_9(pid: i32) -> Result<()> {
    run(Command::new("kill").args(["-9", &pid.to_string()]))?.ok()?;
    Ok(())
}
