//! What is left after a sandbox ended, well or badly: nothing.
#![cfg(feature = "lab")]

use anyhow::Result;
use e2e::command::wait_until;
use e2e::containerd::{kill_9, pids_of};
use e2e::{Census, Containerd, SmallFs, run};

const SHIM: &str = "containerd-shim-ctvm-v2";
const VMM: &str = "ctvm-vmm";

/// Starts a container that sleeps, does `harm` while it runs, and checks that all counts come back.
fn survives(containerd: &Containerd, id: &str, harm: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = Census::take()?;
    containerd.run(&["-d"], id, &["sleep", "1000"])?.ok()?;
    containerd.wait_for(id, "RUNNING")?;
    assert_eq!(pids_of(VMM)?.len(), 1);
    harm()?;
    wait_until("the task is no longer running", || Ok(containerd.status(id)?.as_deref() != Some("RUNNING")))?;
    containerd.remove(id)?;
    assert_eq!(containerd.status(id)?, None);
    before.settle()?;
    // And the next one works.
    assert_eq!(containerd.run(&["--rm"], &format!("{id}-next"), &["true"])?.code, 0);
    before.settle()
}

#[test]
fn every_count_comes_back() -> Result<()> {
    let containerd = Containerd::start()?;
    // The first container makes what containerd keeps for good (its own folders).
    containerd.run(&["--rm"], "first", &["true"])?.ok()?;
    let before = Census::take()?;
    for round in 0..3 {
        containerd.run(&["--rm"], &format!("again-{round}"), &["true"])?.ok()?;
    }
    before.settle()?;
    survives(&containerd, "killed", || {
        containerd.task(&["kill", "--signal", "KILL", "killed"])?.ok()?;
        Ok(())
    })?;
    survives(&containerd, "vmm-killed", || kill_9(pids_of(VMM)?[0]))?;
    survives(&containerd, "shim-killed", || pids_of(SHIM)?.into_iter().try_for_each(kill_9))?;
    survives(&containerd, "both-killed", || {
        pids_of(SHIM)?.into_iter().chain(pids_of(VMM)?).try_for_each(kill_9)
    })
}

#[test]
fn a_host_without_room_for_a_sandbox_says_so_and_nothing_is_left() -> Result<()> {
    let containerd = Containerd::start()?;
    containerd.run(&["--rm"], "first", &["true"])?.ok()?;
    let before = Census::take()?;
    {
        let small = SmallFs::mount(64 << 10)?;
        let _mount = Bind::over(small.path(), "/run/ctvm")?;
        small.fill()?;
        let full = Census::take()?;
        let finished = containerd.run(&["--rm"], "full", &["true"])?;
        assert_ne!(finished.code, 0);
        assert!(finished.errors().contains("No space left on device"), "{}", finished.errors());
        assert!(finished.errors().contains("/run/ctvm/"), "which place is full: {}", finished.errors());
        run(containerd.ctr().args(["containers", "rm", "full"]))?; // `ctr` leaves its record
        full.settle()?;
    }
    before.settle()?;
    assert_eq!(containerd.run(&["--rm"], "room-again", &["true"])?.code, 0);
    before.settle()
}

#[test]
fn a_container_that_fills_its_root_gets_an_error_and_others_go_on() -> Result<()> {
    let before = Census::take()?;
    {
        let small = SmallFs::mount(32 << 20)?;
        let containerd = Containerd::start_in(small.path())?;
        let script =
            "dd if=/dev/zero of=/fill bs=1M; echo code=$?; echo lives > /dev/shm/x && cat /dev/shm/x";
        let finished = containerd.run(&["--rm"], "fills", &["sh", "-c", script])?;
        assert_eq!(finished.text(), "code=1\nlives", "{}", finished.errors());
        assert!(finished.errors().contains("No space left on device"), "{}", finished.errors());
        assert_eq!(containerd.run(&["--rm"], "after", &["true"])?.code, 0);
    }
    before.settle()
}

/// A bind mount over an existing folder; unmounted when dropped.
struct Bind(&'static str);

impl Bind {
    fn over(source: &std::path::Path, target: &'static str) -> Result<Bind> {
        run(std::process::Command::new("mount").arg("--bind").arg(source).arg(target))?.ok()?;
        Ok(Bind(target))
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = run(std::process::Command::new("umount").args(["-l", self.0])); // a lazy unmount always succeeds
    }
}
