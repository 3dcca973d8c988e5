use anyhow::{Result, ensure};
use k8s_cri::v1::{ContainerState, PodSandboxState};

use super::{Case, Ground, case};
use crate::{Cri, Pod};

pub(super) const CASES: &[Case] = &[
    case("a pod is run, listed, stopped and removed", pod_life),
    case("stopping and removing a pod may be repeated", pod_idempotence),
    case("a container is created, started, stopped and removed", container_life),
    case("stopping and removing a container may be repeated", container_idempotence),
    case("a container's exit code is reported", exit_code),
    case("a container that ignores SIGTERM is killed after its grace period", grace),
    case("a running container is removed", remove_running),
    case("a container is restarted in a live pod", restart),
    case("init containers run one after the other before a sidecar and the main container", init_containers),
    case("a pod that is stopped ends its containers", stop_ends_containers),
    case("a container that cannot start says why", bad_command),
];

fn state_of(cri: &Cri, id: &str) -> Result<ContainerState> {
    Ok(ContainerState::try_from(cri.status(id)?.state)?)
}

fn pod_life(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let id = pod.id.clone();
    ensure!(on.cri.pods()?.contains(&id), "the pod is not listed");
    ensure!(on.cri.pod_status(&id)?.state == i32::from(PodSandboxState::SandboxReady), "it is not ready");
    on.cri.stop_pod(&id)?;
    ensure!(on.cri.pod_status(&id)?.state == i32::from(PodSandboxState::SandboxNotready), "it is ready");
    on.cri.remove_pod(&id)?;
    ensure!(!on.cri.pods()?.contains(&id), "the removed pod is listed");
    ensure!(on.cri.pod_status(&id).is_err(), "the removed pod has a status");
    Ok(())
}

fn pod_idempotence(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    for _ in 0..2 {
        on.cri.stop_pod(&pod.id)?;
    }
    for _ in 0..2 {
        on.cri.remove_pod(&pod.id)?;
    }
    on.cri.stop_pod(&pod.id)
}

fn container_life(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let config = pod.forever();
    let id = on.cri.create(&pod.id, &config, &pod.config)?;
    ensure!(on.cri.containers()?.contains(&id), "the container is not listed");
    ensure!(state_of(&on.cri, &id)? == ContainerState::ContainerCreated, "it is not created");
    on.cri.start(&id)?;
    ensure!(state_of(&on.cri, &id)? == ContainerState::ContainerRunning, "it does not run");
    pod.wait_until_ready(&config)?;
    on.cri.stop(&id, 60)?;
    let status = on.cri.status(&id)?;
    ensure!(status.state == i32::from(ContainerState::ContainerExited), "it has not ended");
    ensure!(status.exit_code == 0, "exit code {} of one that ends at SIGTERM", status.exit_code);
    ensure!(status.started_at > status.created_at && status.finished_at > status.started_at, "{status:?}");
    on.cri.remove(&id)?;
    ensure!(!on.cri.containers()?.contains(&id), "the removed container is listed");
    pod.end()
}

fn container_idempotence(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let id = pod.start_forever()?;
    for _ in 0..2 {
        on.cri.stop(&id, 60)?;
    }
    for _ in 0..2 {
        on.cri.remove(&id)?;
    }
    pod.end()
}

fn exit_code(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    for code in [0, 1, 42, 137] {
        let id = pod.start(&pod.container(&["sh", "-c", &format!("exit {code}")]))?;
        let got = pod.exit_code(&id)?;
        ensure!(got == code, "exit code {got} instead of {code}");
        let reason = on.cri.status(&id)?.reason;
        let expected = if code == 0 { "Completed" } else { "Error" };
        ensure!(reason == expected, "reason {reason} after exit code {code}");
    }
    pod.end()
}

fn grace(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let script = "trap '' TERM; while :; do sleep 1; done";
    let id = pod.start(&pod.container(&["sh", "-c", script]))?;
    on.cri.stop(&id, 1)?;
    let code = pod.exit_code(&id)?;
    ensure!(code == 137, "exit code {code} after SIGKILL");
    pod.end()
}

fn remove_running(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let id = pod.start_forever()?;
    on.cri.remove(&id)?;
    ensure!(!on.cri.containers()?.contains(&id), "the removed container is listed");
    pod.end()
}

fn restart(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let sidecar = pod.start_forever()?;
    let mut config = pod.container(&["sh", "-c", "echo attempt; exit 1"]);
    for attempt in 0..3 {
        config.metadata.get_or_insert_default().attempt = attempt;
        config.log_path = format!("attempt-{attempt}.log");
        let done = pod.finish(&config)?;
        ensure!(done.code == 1 && done.stdout == "attempt\n", "attempt {attempt}: {done:?}");
        let id = on
            .cri
            .containers()?
            .into_iter()
            .find(|id| on.cri.status(id).is_ok_and(|s| s.metadata.as_ref() == config.metadata.as_ref()));
        on.cri.remove(&id.ok_or_else(|| anyhow::anyhow!("attempt {attempt} is not listed"))?)?;
    }
    ensure!(state_of(&on.cri, &sidecar)? == ContainerState::ContainerRunning, "the sidecar has ended");
    pod.end()
}

fn init_containers(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let shared = pod.host_folder("shared")?;
    let run = |script: &str| {
        let mut config = pod.container(&["sh", "-c", script]);
        config.mounts.push(crate::pod::mount(&shared, "/shared"));
        config
    };
    for step in ["one", "two"] {
        pod.finish(&run(&format!("echo {step} >> /shared/steps")))?.ok()?;
    }
    let sidecar = pod.start(&run("while :; do sleep 1; done"))?;
    let main = pod.finish(&run("cat /shared/steps"))?.ok()?;
    ensure!(main == "one\ntwo", "the main container saw {main:?}");
    ensure!(state_of(&on.cri, &sidecar)? == ContainerState::ContainerRunning, "the sidecar has ended");
    pod.end()
}

fn stop_ends_containers(on: &Ground) -> Result<()> {
    let pod = Pod::run(&on.cri, &on.handler)?;
    let ids = [pod.start_forever()?, pod.start_forever()?];
    on.cri.stop_pod(&pod.id)?;
    for id in &ids {
        ensure!(state_of(&on.cri, id)? == ContainerState::ContainerExited, "container {id} runs on");
    }
    pod.end()
}

fn bad_command(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let id = on.cri.create(&pod.id, &pod.container(&["/no/such/program"]), &pod.config);
    // Some runtimes look for the program when they create, others when they start.
    let error = match id {
        Ok(id) => on.cri.start(&id),
        Err(e) => Err(e),
    };
    let Err(error) = error else { anyhow::bail!("a program that is not there was started") };
    let text = format!("{error:#}");
    ensure!(text.contains("/no/such/program"), "the error does not name the program: {text}");
    ensure!(pod.script("echo on")? == "on", "the pod is of no use after it");
    pod.end()
}
