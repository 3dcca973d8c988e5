//! Many pods at once, each asked, all removed, and nothing of them left.
#![cfg(feature = "lab")]

use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Result, ensure};
use cri::{Daemon, Pod};
use e2e::Census;
use k8s_cri::v1::{ContainerState, PodSandboxState};

/// Pods at once; what `xtask test --long` is for is the second.
const PODS: [usize; 2] = [12, 50];
/// The least that a VM may have.
const MEMORY_MIB: &str = "64";
/// Calls at a time, as many as a kubelet makes or more.
const CALLERS: usize = 8;

/// Does `work` once for each of `items`, some at a time; what it gave.
fn each<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let (items, done) = (Mutex::new(items), Mutex::new(Vec::new()));
    let next = || items.lock().expect("no code panics while it holds this lock").pop();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(item) = next() {
                        let result = work(item)?;
                        done.lock().expect("no code panics while it holds this lock").push(result);
                    }
                    Ok(())
                })
            })
            .collect();
        callers.into_iter().try_for_each(|caller| caller.join().expect("a caller does not panic"))
    })
    .map(|()| done.into_inner().expect("no code panics while it holds this lock"))
}

#[test]
fn many_pods_run_at_once() -> Result<()> {
    let count = PODS[usize::from(e2e::long())];
    let daemon = Daemon::start(None)?;
    let cri = &daemon.cri;
    let pod = Pod::run(cri, "ctvm")?;
    pod.script("true")?;
    pod.end()?;
    cri::pod::remove_empty_groups(); // of other tests' pods
    let before = Census::take_with(&[daemon.containerd.folder().join("state")])?;

    let started = Instant::now();
    let pods = each((0..count).collect(), |_| {
        let pod = Pod::run_with(cri, "ctvm", |config| {
            config.annotations.insert("io.ctvm.memory_mib".into(), MEMORY_MIB.into());
        })?;
        let container = pod.start_forever()?;
        Ok((pod, container))
    })?;
    eprintln!("{count} pods run after {:.0?}", started.elapsed());
    let mut answers = each(pods.iter().collect(), |(pod, container)| {
        let ready = cri.pod_status(&pod.id)?.state == i32::from(PodSandboxState::SandboxReady);
        let running = cri.status(container)?.state == i32::from(ContainerState::ContainerRunning);
        ensure!(ready && running, "{}: ready {ready}, running {running}", pod.config.hostname);
        cri.exec(container, &["hostname"], 0)?.ok()
    })?;
    answers.sort();
    let mut expected: Vec<_> = pods.iter().map(|(pod, _)| pod.config.hostname.clone()).collect();
    expected.sort();
    ensure!(answers == expected, "{answers:?} instead of {expected:?}");
    let free = std::fs::read_to_string("/proc/meminfo")?;
    eprintln!("{}", free.lines().find(|line| line.starts_with("MemAvailable")).unwrap_or_default());
    each(pods, |(pod, _)| pod.end())?;
    eprintln!("and are gone after {:.0?}", started.elapsed());
    before.settle()
}
