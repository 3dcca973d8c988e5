//! What is left after a sandbox ended, well or badly: nothing.
#![cfg(feature = "lab")]

use anyhow::Result;
use e2e::command::wait_until;
use e2e::containerd::{kill_9, pids_of};
use e2e::{Census, Containerd};

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
