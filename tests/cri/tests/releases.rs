//! Three releases of containerd, each restarted and killed under running pods, and nothing left of it in the end.
#![cfg(feature = "lab")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::{Cri, Daemon, Pod};
use e2e::census::Census;
use e2e::command::wait_until;
use k8s_cri::v1::{ContainerState, PodSandboxState};

/// Something in the way of a daemon's life.
type Blow = fn(&mut Daemon) -> Result<()>;

fn survives(release: &str, blow: Blow) -> Result<()> {
    let mut daemon = Daemon::start(Some(release))?;
    // The first pod makes the bridge and the control groups' parent, which stay.
    Pod::run(&daemon.cri, "ctvm")?.end()?;
    let before = Census::take()?;

    let pod = Pod::run(&daemon.cri, "ctvm")?;
    let running = pod.start_forever()?;
    let folder = pod.host_folder("sign")?;
    let mut config =
        pod.container(&["sh", "-c", "until [ -e /sign/end ]; do sleep 0.1; done; echo last words; exit 7"]);
    config.mounts.push(cri::pod::mount(&folder, "/sign"));
    let ending = pod.start(&config)?;
    let created = daemon.cri.create(&pod.id, &pod.container(&["echo", "late"]), &pod.config)?;

    blow(&mut daemon)?;
    // One container ends while nobody listens.
    std::fs::write(folder.join("end"), "")?;
    std::thread::sleep(Duration::from_secs(3));
    daemon.reconnect()?;
    let cri = &daemon.cri;

    let status = cri.pod_status(&pod.id)?;
    ensure!(status.state == i32::from(PodSandboxState::SandboxReady), "the pod is not ready any more");
    ensure!(state(cri, &running)? == ContainerState::ContainerRunning, "a container was lost");
    ensure!(cri.exec(&running, &["echo", "alive"], 0)?.ok()? == "alive", "a container does not answer");
    wait_until("the end of a container is known", || {
        Ok(state(cri, &ending)? == ContainerState::ContainerExited)
    })?;
    let ended = cri.status(&ending)?;
    ensure!(ended.exit_code == 7, "exit code {} instead of 7", ended.exit_code);
    wait_until("the last words are in the log", || Ok(pod.log(&config)?.0 == "last words\n"))?;
    cri.start(&created).context("starting a container that was made before")?;
    ensure!(pod.script("echo new")? == "new", "no container can be added");
    ensure!(cri.stats(&running)?.cpu.is_some(), "no statistics");
    cri.stop(&running, 60)?;
    ensure!(cri.status(&running)?.exit_code == 0, "the container did not end in good order");

    pod.end()?;
    before.settle()
}

fn state(cri: &Cri, id: &str) -> Result<ContainerState> {
    Ok(ContainerState::try_from(cri.status(id)?.state)?)
}

fn kill(daemon: &mut Daemon) -> Result<()> {
    daemon.containerd.kill()
}

fn stop(daemon: &mut Daemon) -> Result<()> {
    daemon.containerd.stop()
}

#[test]
fn pods_outlive_a_kill_of_containerd_1_6() -> Result<()> {
    survives("1.6", kill)
}

#[test]
fn pods_outlive_a_kill_of_containerd_1_7() -> Result<()> {
    survives("1.7", kill)
}

#[test]
fn pods_outlive_a_restart_of_containerd_1_7() -> Result<()> {
    survives("1.7", stop)
}

#[test]
fn pods_outlive_a_kill_of_containerd_2_1() -> Result<()> {
    survives("2.1", kill)
}
