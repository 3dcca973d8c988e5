//! A host that has run out of processes or of file descriptors, at every point of a sandbox's start: each ends in an error
//! that names what is missing, within a bound, nothing is left, and the next sandbox works.
#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::{Census, Containerd, Finished, run};
use tempfile::TempDir;

/// How long one attempt may take, on an emulated machine.
const BOUND: Duration = Duration::from_secs(120);

/// Our shim behind a script that limits it first. `delete`, which comes when the host has recovered, is not limited.
struct Limited {
    containerd: Containerd,
    folder: TempDir,
}

impl Limited {
    fn new() -> Result<Limited> {
        let containerd = Containerd::start()?;
        containerd.run(&["--rm"], "first", &["true"])?.ok()?;
        let folder = tempfile::Builder::new().prefix("limited").tempdir_in("/var/tmp")?;
        let config = fs::read_to_string("/etc/ctvm/config.toml")?;
        // All processes of a sandbox stay where the script puts them.
        fs::write(folder.path().join("config.toml"), format!("host_cgroup = false\n{config}"))?;
        let limited = Limited { containerd, folder };
        let script = format!(
            "#!/bin/sh\nexport CTVM_CONFIG={0}/config.toml\ncase \"$*\" in *start) . {0}/limit;; esac\n\
             exec {1}/containerd-shim-ctvm-v2 \"$@\"\n",
            limited.folder.path().display(),
            e2e::BIN
        );
        fs::write(limited.runtime(), script)?;
        fs::set_permissions(limited.runtime(), fs::Permissions::from_mode(0o755))?;
        Ok(limited)
    }

    fn runtime(&self) -> PathBuf {
        self.folder.path().join("containerd-shim-limited-v2")
    }

    /// A sandbox whose shim begins with `limit`.
    fn attempt(&self, id: &str, limit: &str) -> Result<Finished> {
        fs::write(self.folder.path().join("limit"), limit)?;
        let mut ctr = self.containerd.ctr();
        ctr.args(["run", "--rm", "--runtime"]).arg(self.runtime());
        let finished = run(ctr.args([e2e::IMAGE, id, "echo", "works"]))?;
        // `ctr` leaves the record of what it could not start.
        self.containerd.remove_record(id)?;
        Ok(finished)
    }

    /// Raises a limit from `first` on until a sandbox works with it. What the ones before it say has to name a shortage.
    fn sweep(
        &self,
        name: &str,
        first: u32,
        step: usize,
        limit: impl Fn(u32) -> String,
        shortages: &[&str],
    ) -> Result<()> {
        let before = Census::take()?;
        let (mut failures, mut unclear) = (0, Vec::new());
        for value in (first..first + 100).step_by(step) {
            let begun = Instant::now();
            let finished = self.attempt(&format!("{name}-{value}"), &limit(value))?;
            let took = begun.elapsed();
            ensure!(took < BOUND, "with {name} limited to {value}, {took:.0?}: {}", finished.errors());
            before.settle()?;
            if finished.code == 0 {
                ensure!(finished.text() == "works", "{finished:?}");
                eprintln!("{name}: {failures} attempts failed, {value} are enough");
                ensure!(failures > 0, "no limit of {name} was too low");
                ensure!(unclear.is_empty(), "unclear:\n{}", unclear.join("\n"));
                // And without a limit.
                self.attempt(&format!("{name}-after"), "")?.ok()?;
                return before.settle();
            }
            failures += 1;
            let said = finished.errors();
            eprintln!("{name} {value}, {took:.1?}: {}", said.trim());
            if !shortages.iter().any(|shortage| said.contains(shortage)) {
                unclear.push(format!("{value}: {}", said.trim()));
            }
        }
        anyhow::bail!("no limit of {name} was high enough")
    }
}

/// A control group with a limit of processes.
struct Group(PathBuf);

impl Group {
    fn make(name: &str) -> Result<Group> {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+pids")?;
        let group = root.join(name);
        fs::create_dir(&group)?;
        Ok(Group(group))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It is empty when the test has succeeded.
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_host_out_of_processes_says_so() -> Result<()> {
    let limited = Limited::new()?;
    let group = Group::make("exhausted")?;
    let path = group.0.display();
    let limit = |count| format!("echo {count} > {path}/pids.max; echo $$ > {path}/cgroup.procs");
    limited.sweep("pids", 1, 1, limit, &["Resource temporarily unavailable"])
}

#[test]
fn a_host_out_of_file_descriptors_says_so() -> Result<()> {
    let limited = Limited::new()?;
    let step = if std::env::var_os("CTVM_LONG").is_some() { 1 } else { 3 };
    limited.sweep(
        "files",
        4,
        step,
        |count| format!("ulimit -n {count}"),
        &["Too many open files", "RLIMIT_NOFILE"],
    )
}

#[test]
fn a_shim_out_of_file_descriptors_refuses_an_exec_and_goes_on() -> Result<()> {
    let containerd = Containerd::start()?;
    containerd.run(&["--rm"], "first", &["true"])?.ok()?;
    let before = Census::take()?;
    containerd.run(&["-d"], "full", &["sleep", "1000"])?.ok()?;
    let state: serde_json::Value = serde_json::from_slice(&fs::read("/run/ctvm/test/full/state.json")?)?;
    let shim = state["shim"]["pid"].as_i64().context("a sandbox has a shim")?;
    let limit = |files: &str| {
        let (pid, files) = (shim.to_string(), format!("--nofile={files}"));
        run(std::process::Command::new("prlimit").args(["--pid", &pid, &files]))?.ok()
    };
    let taken = fs::read_dir(format!("/proc/{shim}/fd"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
        .collect::<Result<Vec<u32>>>()?;
    let free = (0..).find(|number| !taken.contains(number)).expect("a process has few descriptors");
    limit(&format!("{free}:4096"))?;
    let begun = Instant::now();
    let refused = containerd.exec("full", "e1", &["true"])?;
    ensure!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    ensure!(refused.code != 0 && refused.errors().contains("Too many open files"), "{refused:?}");
    limit("1024:4096")?;
    containerd.exec("full", "e2", &["true"])?.ok()?;
    containerd.remove("full")?;
    before.settle()
}
