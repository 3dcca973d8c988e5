//! kill -9 of shim, VMM, containerd and the guest's agent, each at five points of a pod's life: everybody is told, the
//! pod can be removed, and nothing of it is left.
#![cfg(feature = "lab")]

use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cri::harm::{self, Saboteur};
use cri::{Cri, Daemon, Pod};
use e2e::command::wait_at_most;
use e2e::{Census, Events};
use k8s_cri::v1::{ContainerState, PodSandboxState};

/// How long a blow may take to show, on an emulated machine: it takes a second or so.
const BOUND: Duration = Duration::from_secs(60);

/// What a process that was killed with its VM is said to have ended with: SIGKILL, or containerd's "nobody knows".
const LOST: [i32; 2] = [137, 255];

/// Obeys SIGKILL only, and says so when it is asked to stop.
const STUBBORN: &str = "trap 'echo asked' TERM; echo ready; while :; do sleep 3600 & wait $!; done";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Shim,
    Vmm,
    Containerd,
    /// PID 1 of the guest, which takes the guest's kernel along.
    Agent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    PodBeingCreated,
    ContainerCreated,
    Running,
    ExecRunning,
    Stopping,
}

const POINTS: [Point; 5] =
    [Point::PodBeingCreated, Point::ContainerCreated, Point::Running, Point::ExecRunning, Point::Stopping];

/// A call under way in a thread of its own.
struct Call<T> {
    name: &'static str,
    answer: mpsc::Receiver<Result<T>>,
}

impl<T: Send + 'static> Call<T> {
    fn start(name: &'static str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Call<T> {
        let (to, answer) = mpsc::channel();
        // Nobody waits for it when the round has failed.
        std::thread::spawn(move || drop(to.send(work())));
        Call { name, answer }
    }

    /// How it ended, which it does within the bound.
    fn end(self) -> Result<Result<T>> {
        let answer = self.answer.recv_timeout(BOUND);
        answer.with_context(|| format!("{} goes on {BOUND:?} after the blow", self.name))
    }
}

/// One for all, who come one after the other.
static GROUND: LazyLock<Mutex<Ground>> = LazyLock::new(|| Mutex::new(Ground::start().expect("a ground")));

/// A daemon and what is followed of it.
struct Ground {
    daemon: Daemon,
    events: Events,
}

impl Ground {
    fn start() -> Result<Ground> {
        let daemon = Daemon::start(None)?;
        // The first pod makes the bridge, the control groups' parent, and folders of containerd's, which stay.
        let pod = Pod::run(&daemon.cri, "ctvm")?;
        pod.script("true")?;
        pod.end()?;
        cri::pod::remove_empty_groups(); // of other tests' pods
        let events = Events::follow(&daemon.containerd)?;
        Ok(Ground { daemon, events })
    }

    fn census(&self) -> Result<Census> {
        let folder = self.daemon.containerd.folder();
        Census::take_with(&[folder.join("state"), folder.join("ipam"), PathBuf::from("/var/lib/cni")])
    }

    fn strike(&mut self, victim: Victim, pod: &str, saboteur: Option<&Saboteur>) -> Result<()> {
        match victim {
            Victim::Shim => harm::kill(pod, "shim"),
            Victim::Vmm => harm::kill(pod, "vmm"),
            Victim::Containerd => self.daemon.containerd.kill(),
            Victim::Agent => saboteur.context("nobody is in the guest")?.kill_agent(),
        }
    }

    /// A new containerd, if it was the victim.
    fn mend(&mut self, victim: Victim) -> Result<()> {
        if victim == Victim::Containerd {
            self.daemon.reconnect()?;
            self.events = Events::follow(&self.daemon.containerd)?;
        }
        Ok(())
    }

    fn round(&mut self, victim: Victim, point: Point) -> Result<()> {
        let before = self.census()?;
        if point == Point::PodBeingCreated {
            self.while_pod_is_created(victim)?;
        } else {
            self.with_container(victim, point)?;
        }
        before.settle()
    }

    /// A blow when the VMM has begun.
    fn while_pod_is_created(&mut self, victim: Victim) -> Result<()> {
        let cri = self.daemon.cri.clone();
        let known = self.daemon.cri.pods()?;
        let call = Call::start("RunPodSandbox", move || {
            if victim != Victim::Agent {
                return Pod::run(&cri, "ctvm");
            }
            // There is nobody in the guest yet who could strike: this agent dies by itself, of its command line.
            Pod::run_with(&cri, "ctvm-lenient", |config| {
                let cmdline = "-- --connect unix:/nonexistent".to_owned();
                config.annotations.insert("io.ctvm.cmdline".into(), cmdline);
            })
        });
        if victim != Victim::Agent {
            let pod = being_created()?;
            self.strike(victim, &pod, None)?;
        }
        let Err(error) = call.end()? else { bail!("the pod was up before the blow") };
        ensure!(victim == Victim::Containerd || is_about_the_vm(&error), "RunPodSandbox says {error:#}");
        self.mend(victim)?;
        let left = self.daemon.cri.pods()?.into_iter().filter(|pod| !known.contains(pod));
        for pod in left {
            // Only a containerd that died leaves its half of a pod, for the kubelet to remove.
            ensure!(victim == Victim::Containerd, "CRI still has pod {pod}");
            self.daemon.cri.stop_pod(&pod)?;
            self.daemon.cri.remove_pod(&pod)?;
        }
        cri::pod::remove_empty_groups();
        Ok(())
    }

    /// A blow to a pod with a container.
    fn with_container(&mut self, victim: Victim, point: Point) -> Result<()> {
        let cri = self.daemon.cri.clone();
        let pod = Pod::run_with(&cri, "ctvm", harm::privileged)?;
        let saboteur = (victim == Victim::Agent).then(|| Saboteur::start(&pod, &cri)).transpose()?;
        let config = pod.container(&["sh", "-c", STUBBORN]);
        let id = cri.create(&pod.id, &config, &pod.config)?;
        if point != Point::ContainerCreated {
            cri.start(&id)?;
            pod.wait_until_ready(&config)?;
        }
        let call = under_way(point, &cri, &pod, &id, &config)?;

        self.strike(victim, &pod.id, saboteur.as_ref())?;

        let ended = call.map(Call::end).transpose()?;
        self.mend(victim)?;
        let cri = self.daemon.cri.clone();
        if victim == Victim::Containerd {
            ensure!(pod_is_ready(&cri, &pod.id)?, "the pod is lost");
            if point == Point::ContainerCreated {
                cri.start(&id)?;
                pod.wait_until_ready(&config)?;
            }
            ensure!(state(&cri, &id)? == ContainerState::ContainerRunning, "the container is lost");
            ensure!(cri.exec(&id, &["echo", "alive"], 0)?.ok()? == "alive", "the container does not answer");
            cri.stop(&id, 0)?;
        } else {
            wait_at_most(BOUND, "the pod is not ready", || Ok(!pod_is_ready(&cri, &pod.id)?))?;
            if let Some(Ok(code)) = ended {
                ensure!(point == Point::Stopping || LOST.contains(&code), "the exec ended with {code}");
            }
        }
        if victim != Victim::Containerd && point == Point::ContainerCreated {
            let refused = cri.start(&id);
            ensure!(refused.is_err(), "a container started in a pod that is gone");
        } else {
            self.ended_as_lost(&id)?;
        }
        if victim != Victim::Containerd {
            self.told(&pod.id)?;
        }
        pod.end_within(BOUND)
    }

    /// CRI and containerd both know how the container ended.
    fn ended_as_lost(&self, id: &str) -> Result<()> {
        let cri = &self.daemon.cri;
        wait_at_most(BOUND, "the container has ended", || {
            Ok(state(cri, id)? == ContainerState::ContainerExited)
        })?;
        let code = cri.status(id)?.exit_code;
        ensure!(LOST.contains(&code), "the container ended with {code}");
        self.told(id)
    }

    /// The end of a task was told, once.
    fn told(&self, id: &str) -> Result<()> {
        wait_at_most(BOUND, "the exit is told", || Ok(!self.events.exits(id).is_empty()))?;
        let exits = self.events.exits(id);
        ensure!(matches!(exits[..], [137 | 255]), "told of {id}: {exits:?}");
        Ok(())
    }
}

/// What a point has under way when the blow falls.
fn under_way(
    point: Point,
    cri: &Cri,
    pod: &Pod,
    id: &str,
    config: &k8s_cri::v1::ContainerConfig,
) -> Result<Option<Call<i32>>> {
    let (cri, id) = (cri.clone(), id.to_owned());
    let call = match point {
        Point::PodBeingCreated | Point::ContainerCreated | Point::Running => return Ok(None),
        Point::ExecRunning => {
            let script = "echo begun > /proc/1/fd/1; sleep 1000";
            Call::start("ExecSync", move || Ok(cri.exec(&id, &["sh", "-c", script], 0)?.code))
        }
        Point::Stopping => Call::start("StopContainer", move || cri.stop(&id, 600).map(|()| 0)),
    };
    let word = if point == Point::Stopping { "asked" } else { "begun" };
    wait_at_most(BOUND, "the call is under way", || Ok(pod.log(config)?.0.contains(word)))?;
    Ok(Some(call))
}

/// The one pod whose VMM has just begun.
fn being_created() -> Result<String> {
    let deadline = Instant::now() + BOUND;
    loop {
        let found = harm::pods_with_state().into_iter().find(|pod| harm::pid(pod, "vmm").is_some());
        if let Some(pod) = found {
            return Ok(pod);
        }
        ensure!(Instant::now() < deadline, "no VMM begins");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether an error says what happened.
fn is_about_the_vm(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    ["boot failed", "VMM is gone", "ttrpc: closed", "shim"].iter().any(|word| text.contains(word))
}

fn pod_is_ready(cri: &Cri, id: &str) -> Result<bool> {
    Ok(cri.pod_status(id)?.state == i32::from(PodSandboxState::SandboxReady))
}

fn state(cri: &Cri, id: &str) -> Result<ContainerState> {
    Ok(ContainerState::try_from(cri.status(id)?.state)?)
}

fn rounds(victim: Victim) -> Result<()> {
    let mut ground = GROUND.lock().unwrap_or_else(PoisonError::into_inner);
    let mut failed = Vec::new();
    for point in POINTS {
        let started = Instant::now();
        if let Err(error) = ground.round(victim, point) {
            failed.push(format!("{point:?}: {error:#}"));
        }
        eprintln!("{victim:?} killed, {point:?}: {:.1?}", started.elapsed());
    }
    if !failed.is_empty() {
        ground.daemon.containerd.show_log();
    }
    ensure!(failed.is_empty(), "{victim:?} killed:\n{}", failed.join("\n"));
    Ok(())
}

#[test]
fn the_shim_is_killed_at_five_points() -> Result<()> {
    rounds(Victim::Shim)
}

#[test]
fn the_vmm_is_killed_at_five_points() -> Result<()> {
    rounds(Victim::Vmm)
}

#[test]
fn containerd_is_killed_at_five_points() -> Result<()> {
    rounds(Victim::Containerd)
}

#[test]
fn the_agent_is_killed_at_five_points() -> Result<()> {
    rounds(Victim::Agent)
}
