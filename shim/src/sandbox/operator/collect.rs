//! Everything that is known of a sandbox, as metrics.
//!
//! Asked for, never polled. What does not answer is left out: the VMM, the agent and the kernel each have a second, all
//! three at once. One that is late is not asked again before it has answered, so that a VM that hangs does not fill up
//! with our questions; `ctvm_sandbox_up` and its fellows say which of them is silent.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_api::metrics::Metrics;
use agent_api::sandbox::InfoResponse;
use agent_api::task::StatsRequest;
use protobuf::Message as _;
use tokio::sync::oneshot;
use vmm_api::{Op, Reply, Stats};

use super::counters::ExitKind;
use super::exposition::{Exposition, Kind, seconds};
use super::images;
use super::memory::{self, Footprint};
use super::size;
use super::status::{CONTAINER_STATES, Status};
use crate::clock;
use crate::sandbox::boot::Vm;
use crate::sandbox::timeline::SHIM_START;
use crate::sandbox::{Progress, Sandbox, aside};

/// How long the answer waits for others.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a late VMM is waited for before it is asked once more.
const VMM_LIMIT: Duration = Duration::from_secs(3600);
/// Containers and device counters that are told of; a sandbox with more is not one that anybody graphs.
const MAX_CONTAINERS: usize = 128;
const MAX_COUNTERS: usize = 1024;

/// One question to each at a time.
#[derive(Debug, Default)]
pub struct Turns {
    vmm: Arc<tokio::sync::Mutex<()>>,
    agent: Arc<tokio::sync::Mutex<()>>,
    kernel: Arc<tokio::sync::Mutex<()>>,
}

/// What was answered in time.
#[derive(Debug, Default)]
struct Answers {
    /// By the VMM.
    stats: Option<Stats>,
    /// By the agent.
    info: Option<InfoResponse>,
    /// By the agent, of each container.
    containers: Vec<(String, Metrics)>,
    /// By the host's kernel.
    vmm: Option<Footprint>,
    vmm_cpu_us: Option<u64>,
    shim: Option<Footprint>,
    shim_cpu_us: Option<u64>,
}

/// Filled as the answers come. One that comes too late fills what nobody reads any more.
type Shared = Arc<Mutex<Answers>>;

/// Boxed, as all of this module's tasks: the event loop's code comes once for each type of task, and a shim's code is
/// memory of the host.
type Question = Pin<Box<dyn Future<Output = ()> + Send>>;

fn fill(answers: &Shared, fill: impl FnOnce(&mut Answers)) {
    fill(&mut answers.lock().expect("no code panics while it holds this lock"));
}

/// Has `question` asked when the one before it is done, and waits for it in patience. Says whether it was done.
async fn ask(turn: &Arc<tokio::sync::Mutex<()>>, question: Question) -> bool {
    let (done_tx, done) = oneshot::channel();
    let asked = async {
        let turn = turn.clone().lock_owned().await;
        let in_turn: Question = Box::pin(async move {
            question.await;
            drop(turn);
            // Whoever asked may have lost patience.
            let _ = done_tx.send(());
        });
        tokio::spawn(in_turn);
        done.await.is_ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or(false)
}

/// The sandbox's metrics as text.
pub async fn metrics(sandbox: &Arc<Sandbox>) -> String {
    let begun = Instant::now();
    let vm = sandbox.running_vm();
    let status = Status::of(sandbox);
    let seen = Shared::default();
    let turns = &sandbox.operator.turns;
    // The walk through a large guest's pages would hold up the pod's calls, so it has a thread.
    let kernel = Box::pin(look_from_outside(vm.clone(), seen.clone()));
    if let Some(vm) = &vm {
        let monitor = Box::pin(ask_monitor(vm.clone(), seen.clone()));
        let agent = Box::pin(look_inside(vm.clone(), running(&status), seen.clone()));
        tokio::join!(ask(&turns.vmm, monitor), ask(&turns.agent, agent), ask(&turns.kernel, kernel));
    } else {
        ask(&turns.kernel, kernel).await;
    }
    let mut seen = seen.lock().expect("no code panics while it holds this lock");
    write(sandbox, vm.is_some(), &status, &std::mem::take(&mut *seen), begun)
}

fn write(sandbox: &Sandbox, runs: bool, status: &Status, seen: &Answers, begun: Instant) -> String {
    let labels = [("namespace", sandbox.namespace.as_str()), ("sandbox", sandbox.id.as_str())];
    let mut to = Exposition::new(&labels);
    let up = runs && seen.stats.is_some() && seen.info.is_some();
    to.gauge("ctvm_sandbox_up", "1 if the VM runs and its monitor and agent answered within a second.", up);
    to.gauge("ctvm_vmm_up", "1 if the monitor answered.", seen.stats.is_some());
    to.gauge("ctvm_agent_up", "1 if the guest's agent answered.", seen.info.is_some());
    describe(&mut to, status, seen.info.as_ref());
    start(&mut to, sandbox);
    ends(&mut to, sandbox);
    size::write(&mut to, status, seen.stats.as_ref(), &sandbox.operator.counters.read());
    if let Some(stats) = &seen.stats {
        devices(&mut to, stats);
        images::describe(&mut to, stats);
    }
    if let Progress::Up(vm) = &*sandbox.vm.borrow() {
        images::count(&mut to, &vm.images);
    }
    cost(&mut to, seen);
    guest(&mut to, seen, sandbox);
    let help = "Time it took to collect these.";
    to.gauge("ctvm_scrape_duration_seconds", help, begun.elapsed().as_secs_f64());
    to.finish()
}

/// Ids of containers that have counters.
fn running(status: &Status) -> Vec<String> {
    let containers = status.containers.iter().filter(|c| matches!(&*c.state, "running" | "paused"));
    containers.map(|c| c.id.clone()).take(MAX_CONTAINERS).collect()
}

async fn ask_monitor(vm: Arc<Vm>, answers: Shared) {
    match vm.vmm.call(Op::Stats, &[], VMM_LIMIT).await {
        Ok((Reply::Stats(stats), _)) => fill(&answers, |a| a.stats = Some(*stats)),
        Ok(_) => {}
        Err(e) => log::debug!("the VMM's counters: {}", crate::error::chain(&e)),
    }
}

async fn look_inside(vm: Arc<Vm>, ids: Vec<String>, answers: Shared) {
    match vm.agent.info().await {
        Ok(info) => fill(&answers, |a| a.info = Some(info)),
        Err(e) => return log::debug!("the agent's view: {e}"),
    }
    for id in ids {
        let request = StatsRequest { id: id.clone(), ..StatsRequest::default() };
        // One that has just ended has none.
        let Ok(response) = vm.agent.stats(&request).await else { continue };
        match Metrics::parse_from_bytes(&response.stats.value) {
            Ok(metrics) => fill(&answers, |a| a.containers.push((id, metrics))),
            Err(e) => log::debug!(container:% = id; "its counters cannot be read: {e}"),
        }
    }
}

async fn look_from_outside(vm: Option<Arc<Vm>>, answers: Shared) {
    let look = move || {
        let me = std::process::id();
        let vmm = vm.as_ref().map(|vm| vm.vmm.pid());
        let footprint = vm.and_then(|vm| memory::footprint(vm.vmm.pid()).ok());
        let (own, own_cpu_us) = (memory::footprint(me).ok(), memory::cpu_us(me).ok());
        fill(&answers, |a| {
            (a.vmm, a.vmm_cpu_us) = (footprint, vmm.and_then(|pid| memory::cpu_us(pid).ok()));
            (a.shim, a.shim_cpu_us) = (own, own_cpu_us);
        });
    };
    aside(look).await;
}

fn describe(to: &mut Exposition, status: &Status, info: Option<&InfoResponse>) {
    let (kernel, agent) = info.map_or(("", ""), |i| (i.kernel_release.as_str(), i.agent_version.as_str()));
    to.family("ctvm_sandbox_info", Kind::Gauge, "Always 1; versions and the state are in the labels.")
        .sample(
            &[
                ("state", &status.state),
                ("shim_version", &status.version),
                ("agent_version", &cut(agent)),
                ("kernel", &cut(kernel)),
            ],
            1_u64,
        );
    let mut containers = to.family("ctvm_containers", Kind::Gauge, "Containers of the sandbox, by state.");
    for state in CONTAINER_STATES {
        let count = status.containers.iter().filter(|c| c.state == state).count();
        containers.sample(&[("state", state)], count);
    }
}

/// What the guest calls itself, at a length that a label may have.
fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn start(to: &mut Exposition, sandbox: &Sandbox) {
    let stages = sandbox.timeline.stages();
    // Not simply the first: when the kernel began is a guest's word.
    let Some(&(_, begin)) = stages.iter().find(|(stage, _)| stage == SHIM_START) else { return };
    to.gauge(
        "ctvm_sandbox_uptime_seconds",
        "Time since the shim was started.",
        seconds(clock::monotonic_us().saturating_sub(begin)),
    );
    let help = "When a stage of the start was reached, since the shim was started.";
    let mut family = to.family("ctvm_start_stage_seconds", Kind::Gauge, help);
    for (stage, at) in &stages {
        let (stage, container) = match stage.strip_suffix(')').and_then(|s| s.split_once(" (")) {
            Some((stage, container)) => (stage, container),
            None if stage.starts_with("container ") || stage == "exited" => (stage.as_str(), &*sandbox.id),
            None => (stage.as_str(), ""),
        };
        let labels = [("stage", stage), ("container", container)];
        let labels = if container.is_empty() { &labels[..1] } else { &labels };
        family.sample(labels, seconds(at.saturating_sub(begin)));
    }
}

fn ends(to: &mut Exposition, sandbox: &Sandbox) {
    let counts = sandbox.operator.counters.read();
    let help = "Ends of containers' first processes and of execs, by kind: success (code 0), error (1 to 128), \
                signal (above 128), oom (killed for want of memory), vm_lost.";
    let mut exits = to.family("ctvm_process_exits_total", Kind::Counter, help);
    for is_exec in [false, true] {
        for kind in ExitKind::ALL {
            let count = counts.exits.get(&(is_exec, kind)).copied().unwrap_or(0);
            let process = if is_exec { "exec" } else { "container" };
            exits.sample(&[("process", process), ("kind", kind.as_str())], count);
        }
    }
    let help = "How often a container of that name was made again in this sandbox.";
    let mut restarts = to.family("ctvm_container_restarts_total", Kind::Counter, help);
    for (name, count) in &counts.restarts {
        restarts.sample(&[("name", name)], *count);
    }
}

fn devices(to: &mut Exposition, stats: &Stats) {
    let mut exits =
        to.family("ctvm_vcpu_exits_total", Kind::Counter, "Exits of vCPUs to the monitor, by kind.");
    for (kind, count) in stats.exits.iter().take(MAX_COUNTERS) {
        exits.sample(&[("kind", kind)], *count);
    }
    let help = "Counters of the VM's devices; each device's design page says what they count.";
    let mut family = to.family("ctvm_device_counter_total", Kind::Counter, help);
    let counters =
        stats.devices.iter().flat_map(|(d, counters)| counters.iter().map(move |(c, n)| (d, c, n)));
    for (device, counter, count) in counters.take(MAX_COUNTERS) {
        family.sample(&[("device", device), ("counter", counter)], *count);
    }
}

fn cost(to: &mut Exposition, host: &Answers) {
    if let Some(vmm) = host.vmm {
        to.gauge(
            "ctvm_vmm_memory_private_bytes",
            "The monitor's own pages, guest memory apart.",
            vmm.private,
        );
        to.gauge("ctvm_vmm_memory_shared_bytes", "The monitor's pages that others have too.", vmm.shared);
        to.gauge(
            "ctvm_vmm_memory_pss_bytes",
            "The monitor's proportional set size less guest memory.",
            vmm.pss,
        );
        to.gauge("ctvm_guest_memory_resident_bytes", "Guest memory that the host has given.", vmm.guest);
        let help = "Of that what other processes share.";
        to.gauge("ctvm_guest_memory_shared_bytes", help, vmm.guest_shared);
        let help =
            "Images that the guest has as memory, as far as it has touched them: the host's page cache.";
        to.gauge("ctvm_image_memory_resident_bytes", help, vmm.images);
    }
    if let Some(us) = host.vmm_cpu_us {
        let help = "Processor time of the monitor, the guest's included.";
        to.counter("ctvm_vmm_cpu_seconds_total", help, seconds(us));
    }
    if let Some(shim) = host.shim {
        to.gauge("ctvm_shim_memory_private_bytes", "The shim's own pages.", shim.private);
        to.gauge("ctvm_shim_memory_pss_bytes", "The shim's proportional set size.", shim.pss);
        let help = "The shim's resident set size.";
        to.gauge("ctvm_shim_memory_resident_bytes", help, shim.private + shim.shared);
    }
    if let Some(us) = host.shim_cpu_us {
        to.counter("ctvm_shim_cpu_seconds_total", "Processor time of the shim.", seconds(us));
    }
}

fn guest(to: &mut Exposition, agent: &Answers, sandbox: &Sandbox) {
    if let Some(info) = &agent.info {
        let bytes = |kib: u64| kib.saturating_mul(1024);
        to.gauge("ctvm_agent_memory_total_bytes", "MemTotal of the guest.", bytes(info.memory_total_kib));
        let help = "MemAvailable of the guest.";
        to.gauge("ctvm_agent_memory_available_bytes", help, bytes(info.memory_available_kib));
        to.gauge("ctvm_agent_resident_bytes", "Resident memory of the agent.", bytes(info.agent_rss_kib));
        to.gauge("ctvm_agent_threads", "Threads of the agent.", info.agent_threads);
        to.gauge("ctvm_agent_containers", "Containers that the agent knows.", info.containers);
        to.gauge("ctvm_agent_cpus", "CPUs online in the guest.", info.cpus);
    }
    let all = &agent.containers;
    let help = "Processor time of the container in the guest.";
    let mut family = to.family("ctvm_container_cpu_seconds_total", Kind::Counter, help);
    for (id, metrics) in all {
        family.sample(&[("container", id)], seconds(metrics.cpu.usage_usec));
    }
    let help = "Memory of the container's control group in the guest.";
    let mut family = to.family("ctvm_container_memory_usage_bytes", Kind::Gauge, help);
    for (id, metrics) in all {
        family.sample(&[("container", id)], metrics.memory.usage);
    }
    let help = "Its limit; absent where there is none.";
    let mut family = to.family("ctvm_container_memory_limit_bytes", Kind::Gauge, help);
    for (id, metrics) in all.iter().filter(|(_, m)| (1..u64::MAX).contains(&m.memory.usage_limit)) {
        family.sample(&[("container", id)], metrics.memory.usage_limit);
    }
    let mut family = to.family("ctvm_container_pids", Kind::Gauge, "Processes and threads of the container.");
    for (id, metrics) in all {
        family.sample(&[("container", id)], metrics.pids.current);
    }
    let help = "Processes of the container killed for want of memory.";
    let mut family = to.family("ctvm_container_oom_kills_total", Kind::Counter, help);
    for container in sandbox.containers().iter().take(MAX_CONTAINERS) {
        family.sample(&[("container", &container.id)], container.oom_kills());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_is_late_is_asked_once_and_heard_when_it_is_back() {
        let turn = Arc::default();
        let (answer, late) = oneshot::channel::<()>();
        let late: Question = Box::pin(async { late.await.expect("answered in the end") });
        assert!(!ask(&turn, late).await);
        // It still has the turn: nobody is asked.
        assert!(!ask(&turn, Box::pin(async { panic!("asked again") })).await);
        answer.send(()).unwrap();
        assert!(ask(&turn, Box::pin(async {})).await);
    }

    #[test]
    fn what_a_guest_calls_itself_is_cut() {
        assert_eq!(cut(&format!("6.1\n{}", "x".repeat(100))), format!("6.1{}", "x".repeat(61)));
    }
}
