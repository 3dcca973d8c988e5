//! Containers made, asked, killed and removed by several callers at once, for a while: nothing fails and nothing is left.
//! What `containerd-stress` does, which Debian does not ship, with execs and pods besides.
#![cfg(feature = "lab")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri::{Cri, Daemon, Pod};
use e2e::Census;

/// For how long; what `xtask test --long` is for is the second.
const TIMES: [Duration; 2] = [Duration::from_secs(20), Duration::from_secs(30 * 60)];
/// Callers at a time.
const WORKERS: usize = 4;
/// Containers of a pod, one after the other, before it is replaced.
const CONTAINERS: usize = 6;
/// Failures that are shown.
const SHOWN: usize = 20;

/// What was done, and what failed.
#[derive(Default)]
struct Tally {
    pods: AtomicUsize,
    containers: AtomicUsize,
    execs: AtomicUsize,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn failed(&self, what: &str, error: &anyhow::Error) {
        let mut failures = self.failures.lock().expect("no code panics while it holds this lock");
        failures.push(format!("{what}: {error:#}"));
    }
}

/// One container's life: the odd ones are killed, the even ones are asked to end and do.
fn container(cri: &Cri, pod: &Pod, number: usize, tally: &Tally) -> Result<()> {
    let id = pod.start_forever().context("making and starting it")?;
    for exec in 0..2 {
        let word = format!("{number}-{exec}");
        let said = cri.exec(&id, &["echo", &word], 60).context("an exec")?.ok()?;
        ensure!(said == word, "an exec said {said:?} in place of {word:?}");
        tally.execs.fetch_add(1, Ordering::Relaxed);
    }
    let (grace, code) = if number.is_multiple_of(2) { (60, 0) } else { (0, 137) };
    cri.stop(&id, grace).context("stopping it")?;
    let ended = cri.status(&id)?.exit_code;
    ensure!(ended == code, "it ended with {ended} in place of {code}");
    cri.remove(&id).context("removing it")?;
    tally.containers.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn worker(cri: &Cri, until: Instant, tally: &Tally) {
    while Instant::now() < until {
        let pod = Pod::run_with(cri, "ctvm", |config| {
            config.annotations.insert("io.ctvm.memory_mib".into(), "64".into());
        });
        let pod = match pod {
            Ok(pod) => pod,
            Err(error) => {
                tally.failed("a pod", &error);
                continue;
            }
        };
        for number in 0..CONTAINERS {
            if Instant::now() > until {
                break;
            }
            if let Err(error) = container(cri, &pod, number, tally) {
                tally.failed("a container", &error);
            }
        }
        if let Err(error) = pod.end() {
            tally.failed("ending a pod", &error);
        }
        tally.pods.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn containers_come_and_go_for_a_while() -> Result<()> {
    let time = TIMES[usize::from(std::env::var_os("CTVM_LONG").is_some())];
    let daemon = Daemon::start(None)?;
    let cri = &daemon.cri;
    let pod = Pod::run(cri, "ctvm")?;
    pod.script("true")?;
    pod.end()?;
    cri::pod::remove_empty_groups(); // of other tests' pods
    let before = Census::take_with(&[daemon.containerd.folder().join("state")])?;

    let (tally, until) = (Tally::default(), Instant::now() + time);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| worker(cri, until, &tally));
        }
    });
    let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
    let (pods, containers, execs) = (count(&tally.pods), count(&tally.containers), count(&tally.execs));
    let failures = tally.failures.into_inner().expect("no code panics while it holds this lock");
    eprintln!(
        "{WORKERS} callers, {time:?}: {pods} pods, {containers} containers, {execs} execs, {} failures",
        failures.len()
    );
    ensure!(
        failures.is_empty(),
        "{} failures, the first of them:\n{}",
        failures.len(),
        failures[..failures.len().min(SHOWN)].join("\n")
    );
    ensure!(containers > 0, "nothing was done");
    before.settle()
}
