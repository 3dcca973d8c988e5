//! Standard streams over containerd's Streaming service (`io_type = "streaming"`, containerd 2.1): what is true of fifos is
//! true of them.
#![cfg(feature = "lab")]

use anyhow::{Result, ensure};
use cri::{Daemon, report};

/// Groups of cases in which something is read or written.
const OF_STREAMS: [&str; 3] = ["Commands", "Streams", "Logs"];

#[test]
fn streams_do_what_fifos_do() -> Result<()> {
    let daemon = Daemon::start(Some("2.1"))?;
    let outcomes = OF_STREAMS.iter().flat_map(|group| report::run(&daemon.cri, "ctvm-stream", "2.1", group));
    let wrong = outcomes.filter(|(_, outcome)| outcome.word() != "pass");
    let wrong: Vec<String> = wrong.map(|(name, outcome)| format!("{name}: {outcome:?}")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // It was streams indeed: a container has no fifo in containerd's folders.
    let fifos = e2e::run(
        std::process::Command::new("find").arg(daemon.containerd.folder().join("state")).args(["-type", "p"]),
    )?
    .ok()?;
    ensure!(!fifos.lines().any(|path| path.contains("/io/")), "{fifos}");
    Ok(())
}

#[test]
fn a_containerd_that_is_restarted_takes_the_streams_up_again() -> Result<()> {
    let mut daemon = Daemon::start(Some("2.1"))?;
    let pod = cri::Pod::run(&daemon.cri, "ctvm-stream")?;
    let folder = pod.host_folder("data")?;
    let script = "echo before; until [ -e /data/go ]; do sleep 0.1; done; echo after; exit 7";
    let mut config = pod.container(&["sh", "-c", script]);
    config.mounts.push(cri::pod::mount(&folder, "/data"));
    let id = pod.start(&config)?;
    e2e::command::wait_until("its first word is logged", || {
        Ok(pod.log(&config).is_ok_and(|(out, _)| out == "before\n"))
    })?;
    daemon.containerd.kill()?;
    daemon.reconnect()?;
    std::fs::write(folder.join("go"), "")?;
    let exited = i32::from(k8s_cri::v1::ContainerState::ContainerExited);
    e2e::command::wait_until("the container has ended", || Ok(daemon.cri.status(&id)?.state == exited))?;
    ensure!(daemon.cri.status(&id)?.exit_code == 7, "{:?}", daemon.cri.status(&id)?);
    let log = pod.log(&config)?.0;
    ensure!(log == "before\nafter\n", "the log is {log:?}");
    daemon.cri.stop_pod(&pod.id)?;
    daemon.cri.remove_pod(&pod.id)
}
