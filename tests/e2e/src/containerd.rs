//! A containerd of the test's own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::command::{Finished, run, run_with_input, wait_until};
use crate::{BIN, IMAGE, SHARE};

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.ctvm.v2";

/// A running containerd with the test image imported; stopped when dropped.
#[derive(Debug)]
pub struct Containerd {
    folder: TempDir,
    daemon: Child,
}

impl Containerd {
    /// Starts containerd with root, state and socket in a folder of its own, and imports the test image.
    pub fn start() -> Result<Containerd> {
        Self::start_in(Path::new("/var/tmp"))
    }

    /// The same, with its folder in `parent`.
    pub fn start_in(parent: &Path) -> Result<Containerd> {
        let folder = tempfile::Builder::new().prefix("ctd").tempdir_in(parent)?;
        let config = folder.path().join("config.toml");
        fs::write(
            &config,
            format!(
                "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{0}/sock\"\n",
                folder.path().display()
            ),
        )?;
        let log = fs::File::create(folder.path().join("log"))?;
        let path = std::env::var("PATH").unwrap_or_default();
        let daemon = Command::new("containerd")
            .arg("--config")
            .arg(&config)
            .env("PATH", format!("{BIN}:{path}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting containerd")?;
        let containerd = Containerd { folder, daemon };
        wait_until("containerd answers", || Ok(run(containerd.ctr().arg("version"))?.code == 0))?;
        let image = Path::new(SHARE).join("image.tar");
        run(containerd.ctr().args(["images", "import"]).arg(image))?.ok().context("importing the image")?;
        Ok(containerd)
    }

    /// A `ctr` that talks to this containerd.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.folder.path().join("sock")).args(["--namespace", "test"]);
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

    /// `RUNNING`, `STOPPED`, … or nothing when there is no such task.
    pub fn status(&self, id: &str) -> Result<Option<String>> {
        let list = self.task(&["list"])?.ok()?;
        let row = list.lines().find(|l| l.split_whitespace().next() == Some(id));
        Ok(row.and_then(|l| l.split_whitespace().last()).map(str::to_owned))
    }

    /// Waits until the task has this status.
    pub fn wait_for(&self, id: &str, status: &str) -> Result<()> {
        wait_until(&format!("{id} is {status}"), || Ok(self.status(id)?.as_deref() == Some(status)))
    }

    /// Removes a task, killed first if need be, and its container.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.task(&["rm", "--force", id])?;
        run(self.ctr().args(["containers", "rm", id]))?.ok()?;
        Ok(())
    }

    /// What containerd (and the shims through it) has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The bundle of a task.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.folder.path().join("state/io.containerd.runtime.v2.task/test").join(id)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- end of containerd's log ---");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
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

/// `kill -9`.
pub fn kill_9(pid: i32) -> Result<()> {
    run(Command::new("kill").args(["-9", &pid.to_string()]))?.ok()?;
    Ok(())
}
