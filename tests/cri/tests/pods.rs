//! Pods as the kubelet makes them.
#![cfg(feature = "lab")]

use std::sync::LazyLock;

use anyhow::Result;
use cri::{Daemon, Pod};

/// One containerd for all tests of this file.
static DAEMON: LazyLock<Daemon> = LazyLock::new(|| Daemon::start(None).expect("containerd starts"));

#[test]
fn a_pod_runs_several_containers() -> Result<()> {
    let cri = &DAEMON.cri;
    let pod = Pod::run(cri, "ctvm")?;
    let first = pod.start_forever()?;
    let second = pod.start_forever()?;
    assert_eq!(cri.exec(&first, &["hostname"], 0)?.ok()?, pod.config.hostname);
    assert_eq!(cri.exec(&second, &["hostname"], 0)?.ok()?, pod.config.hostname);
    assert_eq!(pod.script("echo hello")?, "hello");
    pod.end()
}
