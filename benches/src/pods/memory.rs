//! What one, five and twenty pods cost the host, each with one container that sleeps.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use benches::memory::footprint;
use benches::rows::Row;
use cri::{Cri, Pod};

use crate::{CTVM, Handler, RUNC};

const COUNTS: [usize; 3] = [1, 5, 20];
/// Memory of a pod's VM, MiB: the least there is.
const GUEST_MIB: u64 = 64;
/// What a pod may cost the host, MiB. No more pods are started than there is room for.
const POD_MIB: usize = 64 + 32;
/// For what is done after a start or an end.
const QUIET: Duration = Duration::from_secs(2);

/// Runs the part.
pub fn measure(cri: &Cri) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    // Pods of the first runtime stay while those of the second are looked at: all figures are differences.
    let mut pods = Vec::new();
    for handler in [RUNC, CTVM] {
        warm_up(cri, handler).with_context(|| format!("first pod of {}", handler.name))?;
        std::thread::sleep(QUIET);
        let (before, earlier) = (available_kib()?, Process::all()?);
        let mut running = 0;
        for count in COUNTS {
            if available_kib()? < ((count - running) * POD_MIB * 1024) as f64 {
                eprintln!("memory: no room for {count} pods of {}", handler.subject);
                break;
            }
            while running < count {
                let pod =
                    start(cri, handler).with_context(|| format!("pod {running} of {}", handler.name))?;
                pods.push(pod.0);
                running += 1;
            }
            std::thread::sleep(QUIET);
            let each_kib = (before - available_kib()?) / count as f64;
            rows.extend(row(handler, "host memory for each", count, vec![each_kib]));
            let mut parts = Parts::default();
            let now = Process::all()?;
            for (&shim, _) in now.iter().filter(|(pid, p)| p.is_shim() && !earlier.contains_key(pid)) {
                parts.add(shim, &now)?;
            }
            ensure!(parts.shim.len() == count, "{} shims run {count} pods", parts.shim.len());
            rows.extend(parts.rows(handler, count));
        }
    }
    Ok(rows)
}

/// A pod that has ended before the figures begin: the first one of a kind leaves something with containerd. Of ours, its
/// VM's size is looked at.
fn warm_up(cri: &Cri, handler: Handler) -> Result<()> {
    let (pod, container) = start(cri, handler)?;
    if handler != RUNC {
        let kib: u64 =
            cri.exec(&container, &["awk", "/^MemTotal:/ { print $2 }", "/proc/meminfo"], 0)?.ok()?.parse()?;
        ensure!(kib < GUEST_MIB * 1024, "a VM of {GUEST_MIB} MiB has {kib} KiB");
    }
    pod.end()
}

/// A pod, and its one container's id.
fn start(cri: &Cri, handler: Handler) -> Result<(Pod, String)> {
    let pod = Pod::run_with(cri, handler.name, |config| {
        config.annotations.insert("io.ctvm.memory_mib".into(), GUEST_MIB.to_string());
    })?;
    let container = pod.start(&pod.container(&["sleep", "100000"]))?;
    Ok((pod, container))
}

fn row(handler: Handler, what: &str, count: usize, kib: Vec<f64>) -> Option<Row> {
    let pods = if count == 1 { "1 pod".to_owned() } else { format!("{count} pods") };
    let mib = kib.into_iter().map(|kib| kib / 1024.0).collect();
    Row::of("pods", format!("{pods}, {what}"), handler.subject, "MiB", mib)
}

/// Memory of the processes of pods, KiB, a value for each pod.
#[derive(Debug, Default)]
struct Parts {
    shim: Vec<f64>,
    vmm: Vec<f64>,
    guest: Vec<f64>,
    /// Processes that are no VM's: of runc's pods, the pause process and the container's.
    processes: Vec<f64>,
}

impl Parts {
    /// Adds the pod of one shim.
    fn add(&mut self, shim: u32, all: &BTreeMap<u32, Process>) -> Result<()> {
        self.shim.push(footprint(shim, 0)?.own_pss as f64);
        let mut processes = 0;
        let mut is_vm = false;
        for (&pid, process) in all.iter().filter(|(pid, _)| is_below(**pid, shim, all)) {
            if process.name == "ctvm-vmm" {
                let vmm = footprint(pid, GUEST_MIB * 1024)?;
                ensure!(vmm.guest_rss > 0, "VMM {pid} has no memory of {GUEST_MIB} MiB");
                self.vmm.push(vmm.own_pss as f64);
                self.guest.push(vmm.guest_rss as f64);
                is_vm = true;
            } else {
                processes += footprint(pid, 0)?.own_pss;
            }
        }
        if !is_vm {
            ensure!(processes > 0, "shim {shim} has no process");
            self.processes.push(processes as f64);
        }
        Ok(())
    }

    fn rows(self, handler: Handler, count: usize) -> impl Iterator<Item = Row> {
        let of = |what, values| row(handler, what, count, values);
        let (shim, vmm) = (of("shim, PSS", self.shim), of("VMM, PSS less guest memory", self.vmm));
        // The budgets are ours, not the peer's.
        let is_ours = vmm.is_some();
        let shim = shim.map(|row| if is_ours { row.budget(2.5) } else { row });
        [
            shim,
            vmm.map(|row| row.budget(1.5)),
            of("guest memory", self.guest),
            of("pause and container, PSS", self.processes),
        ]
        .into_iter()
        .flatten()
    }
}

/// A process of the machine.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    name: String,
    parent: u32,
}

impl Process {
    /// All, by number.
    fn all() -> Result<BTreeMap<u32, Process>> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // It may have ended since.
            let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
            all.insert(pid, Process::parse(&status).with_context(|| format!("status of {pid}"))?);
        }
        Ok(all)
    }

    fn parse(status: &str) -> Option<Process> {
        let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        Some(Process { name: value("Name:")?.to_owned(), parent: value("PPid:")?.parse().ok()? })
    }

    /// The kernel keeps 15 bytes of a name, which all shims share.
    fn is_shim(&self) -> bool {
        self.name == "containerd-shim"
    }
}

/// Whether a process is a child of `ancestor`, or a child of such a one.
fn is_below(pid: u32, ancestor: u32, all: &BTreeMap<u32, Process>) -> bool {
    let parents = std::iter::successors(all.get(&pid), |process| all.get(&process.parent));
    // A number is used again while the list is made: then there may be a circle.
    parents.take(all.len()).any(|process| process.parent == ancestor)
}

/// What new programs could have, KiB. That is more than `MemAvailable`, which leaves out the free pages that each CPU
/// keeps for itself: tens of MiB, after a VM has ended.
fn available_kib() -> Result<f64> {
    const PAGE_KIB: f64 = 4.0;
    let text = fs::read_to_string("/proc/meminfo")?;
    let value =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    let kib: f64 = value.trim().trim_end_matches(" kB").parse().context("MemAvailable")?;
    let of_cpus = pages_of_cpus(&fs::read_to_string("/proc/zoneinfo")?)? * PAGE_KIB;
    Ok(kib + of_cpus)
}

/// Free pages that CPUs keep for themselves: `count:` of each zone and CPU.
fn pages_of_cpus(zoneinfo: &str) -> Result<f64> {
    let counts = zoneinfo.lines().filter_map(|line| line.trim_start().strip_prefix("count:"));
    counts.map(|count| count.trim().parse::<f64>().context("a CPU's free pages")).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_are_found_by_their_parents() {
        let process = |name: &str, parent| Process { name: name.into(), parent };
        let all = BTreeMap::from([
            (1, process("init", 0)),
            (2, process("containerd-shim", 1)),
            (3, process("pause", 2)),
            (4, process("sh", 3)),
            (5, process("other", 1)),
            (6, process("circle", 7)),
            (7, process("circle", 6)),
        ]);
        let below: Vec<u32> = all.keys().copied().filter(|pid| is_below(*pid, 2, &all)).collect();
        assert_eq!(below, [3, 4]);
        assert_eq!(Process::parse("Name:\ta b\nState:\tS\nPPid:\t12\n"), Some(process("a b", 12)));
        assert_eq!(Process::parse("Name:\ta\n"), None);
    }

    #[test]
    fn free_pages_of_all_cpus_count() {
        let zones = "Node 0, zone Normal\n  pages free 100\n        high     16\n  pagesets\n    cpu: 0\n\
                     \x20             count:    52\n              high:     105\n    cpu: 1\n              count: 7\n";
        assert!((pages_of_cpus(zones).unwrap() - 59.0).abs() < 0.5);
        assert!(pages_of_cpus("count: x").is_err());
    }
}
