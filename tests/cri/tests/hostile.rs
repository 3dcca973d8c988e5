//! Guests that mean harm, and hosts that have run out of something: each ends in the right status within a bound, a pod
//! beside it notices nothing, and nothing is left.
#![cfg(feature = "lab")]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri::harm::{self, Saboteur};
use cri::{Cri, Daemon, Pod};
use e2e::Census;
use e2e::command::wait_at_most;
use k8s_cri::v1::{ContainerConfig, ContainerState, Mount, PodSandboxState};

/// How long a guest's end may take to be known, on an emulated machine.
const BOUND: Duration = Duration::from_secs(120);
/// What containers end with when their VM has ended under them.
const LOST: [i32; 2] = [137, 255];
/// How much a VMM or a shim may grow of what its guest does.
const GROWTH: u64 = 8 << 20;

/// Of all tests, which come one after the other. It has had a pod, which makes what stays: folders of containerd's.
static DAEMON: LazyLock<Daemon> = LazyLock::new(|| {
    let daemon = Daemon::start(None).expect("containerd starts");
    Pod::run(&daemon.cri, "ctvm").and_then(Pod::end).expect("a pod comes and goes");
    daemon
});

/// A daemon with a pod that is no part of anything.
struct Ground {
    daemon: &'static Daemon,
    bystander: Pod,
    witness: String,
    before: Census,
}

impl Ground {
    fn start() -> Result<Ground> {
        let daemon = &*DAEMON;
        let bystander = Pod::run(&daemon.cri, "ctvm")?;
        let witness = bystander.start_forever()?;
        cri::pod::remove_empty_groups(); // of other tests' pods
        let before = Census::take_with(&[daemon.containerd.folder().join("state")])?;
        Ok(Ground { daemon, bystander, witness, before })
    }

    fn cri(&self) -> &Cri {
        &self.daemon.cri
    }

    fn pod(&self) -> Result<Pod> {
        Pod::run_with(self.cri(), "ctvm", harm::privileged)
    }

    /// The pod beside lives, and nothing of the other is left.
    fn unharmed(self) -> Result<()> {
        let alive = self.cri().exec(&self.witness, &["echo", "alive"], 0)?.ok()?;
        ensure!(alive == "alive", "the pod beside says {alive:?}");
        self.before.settle()?;
        self.bystander.end()
    }

    /// The pod's VM has ended, and CRI knows of the pod and the container.
    fn lost(&self, pod: Pod, container: &str) -> Result<()> {
        wait_at_most(BOUND, "the pod is not ready", || {
            Ok(self.cri().pod_status(&pod.id)?.state != i32::from(PodSandboxState::SandboxReady))
        })?;
        wait_at_most(BOUND, "the container has ended", || {
            Ok(self.cri().status(container)?.state == i32::from(ContainerState::ContainerExited))
        })?;
        let code = self.cri().status(container)?.exit_code;
        ensure!(LOST.contains(&code), "the container ended with {code}");
        pod.end_within(BOUND)
    }
}

/// A privileged container with the exerciser.
fn exerciser(pod: &Pod, words: &[&str]) -> ContainerConfig {
    let mut config = pod.container(&[&["/exerciser"], words].concat());
    cri::pod::security(&mut config).privileged = true;
    let program = cri::pod::mount(Path::new("/opt/ctvm/tests/exerciser"), "/exerciser");
    config.mounts.push(Mount { readonly: true, ..program });
    config
}

/// Memory that a process has for itself, without what it shares with files and its guest: private anonymous bytes of
/// mappings below 32 MiB.
fn own_memory(pid: i32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut size, mut total) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (key, value) =
            (words.next().unwrap_or_default(), words.next().and_then(|word| word.parse::<u64>().ok()));
        match (key, value) {
            ("Size:", Some(kib)) => size = kib,
            ("Anonymous:", Some(kib)) if size < 32 << 10 => total += kib << 10,
            _ => {}
        }
    }
    Ok(total)
}

#[test]
fn a_guest_that_panics() -> Result<()> {
    let ground = Ground::start()?;
    let pod = ground.pod()?;
    let saboteur = Saboteur::start(&pod, ground.cri())?;
    // The answer is lost with the guest.
    let _ = saboteur.run("echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero", 60);
    ground.lost(pod, &saboteur.id)?;
    ground.unharmed()
}

#[test]
fn a_guest_that_fills_its_memory() -> Result<()> {
    let ground = Ground::start()?;
    let pod = ground.pod()?;
    let saboteur = Saboteur::start(&pod, ground.cri())?;
    // What is in a tmpfs is nobody's to give back: the kernel kills, until it must kill itself or the rest have enough. That
    // may be a guest in which nothing can be started any more.
    let script = "mkdir /fill; mount -t tmpfs -o size=100% none /fill; \
                  for n in 1 2 3 4; do cat /dev/zero > /fill/$n & done; wait";
    let _ = saboteur.run(script, 60);
    let status = ground.cri().status(&saboteur.id)?;
    if status.state == i32::from(ContainerState::ContainerExited) {
        ensure!(LOST.contains(&status.exit_code), "the container ended with {}", status.exit_code);
    }
    pod.end_within(BOUND)?;
    ground.unharmed()
}

#[test]
fn a_guest_that_hangs() -> Result<()> {
    let ground = Ground::start()?;
    // With a runtime that does not wait so long: twice, while the guest takes all of a CPU.
    let pod = Pod::run_with(ground.cri(), "ctvm-impatient", harm::privileged)?;
    let config = exerciser(&pod, &["spin"]);
    let id = pod.start(&config)?;
    wait_at_most(BOUND, "it spins", || Ok(pod.log(&config).is_ok_and(|(out, _)| out == "spinning\n")))?;
    wait_at_most(BOUND, "the guest does not answer", || Ok(ground.cri().exec(&id, &["true"], 5).is_err()))?;
    let asked = Instant::now();
    pod.end_within(BOUND)?;
    eprintln!("a pod whose guest hangs was removed in {:.0?}", asked.elapsed());
    ground.unharmed()
}

#[test]
fn a_guest_that_opens_10_000_connections() -> Result<()> {
    let ground = Ground::start()?;
    let pod = ground.pod()?;
    let id = pod.start_forever()?;
    let pids = ["vmm", "shim"].map(|of| harm::pid(&pod.id, of).context("a pod has both"));
    let [vmm, shim] = pids;
    let (vmm, shim) = (vmm?, shim?);
    let before = (own_memory(vmm)?, own_memory(shim)?);
    let logged = ground.daemon.containerd.log().lines().count();
    for kind in ["vsock", "tcp"] {
        let done = pod.finish(&exerciser(&pod, &[kind, "10000"]))?;
        eprintln!("{kind}: {}", done.stdout.trim());
        ensure!(done.code == 0, "{done:?}");
    }
    let after = (own_memory(vmm)?, own_memory(shim)?);
    eprintln!("VMM and shim, bytes of their own: {before:?} before, {after:?} after");
    ensure!(after.0 < before.0 + GROWTH && after.1 < before.1 + GROWTH, "{before:?} grew to {after:?}");
    let lines = ground.daemon.containerd.log().lines().count() - logged;
    ensure!(lines < 500, "10,000 connections are {lines} lines in the log");
    // The pod itself can go on.
    wait_at_most(BOUND, "the pod takes commands again", || {
        Ok(ground.cri().exec(&id, &["true"], 0).is_ok_and(|done| done.code == 0))
    })?;
    pod.end_within(BOUND)?;
    ground.unharmed()
}

#[test]
fn a_guest_that_floods_a_host_that_does_not_read() -> Result<()> {
    let ground = Ground::start()?;
    let pod = ground.pod()?;
    let config = pod.container(&["sh", "-c", "until [ -e /data/go ]; do sleep 0.1; done; exec yes flood"]);
    let folder = pod.host_folder("data")?;
    let config = ContainerConfig { mounts: vec![cri::pod::mount(&folder, "/data")], ..config };
    let id = pod.start(&config)?;
    let pid = |of| harm::pid(&pod.id, of).context("a pod has both");
    let (vmm, shim) = (pid("vmm")?, pid("shim")?);
    let before = (own_memory(vmm)?, own_memory(shim)?);
    // containerd stands still: nobody takes what is in the pipes.
    let daemon = ground.daemon.containerd.pid().to_string();
    let signal = |name: &str| e2e::run(std::process::Command::new("kill").args([name, &daemon]))?.ok();
    signal("-STOP")?;
    fs::write(folder.join("go"), "")?;
    std::thread::sleep(Duration::from_secs(10));
    let after = (own_memory(vmm)?, own_memory(shim)?);
    signal("-CONT")?;
    eprintln!("VMM and shim, bytes of their own: {before:?} before, {after:?} after");
    ensure!(after.0 < before.0 + GROWTH && after.1 < before.1 + GROWTH, "{before:?} grew to {after:?}");
    wait_at_most(BOUND, "what was written arrives", || {
        Ok(pod.log(&config).is_ok_and(|(out, _)| out.starts_with("flood\n")))
    })?;
    ground.cri().stop(&id, 0)?;
    let code = ground.cri().status(&id)?.exit_code;
    ensure!(code == 137, "the flood ended with {code}");
    pod.end_within(BOUND)?;
    ground.unharmed()
}
