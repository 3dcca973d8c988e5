//! vCPUs and memory of a running VM: how long until the host knows that the guest has, or has given up, what it asked for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::rows::Row;
use e2e::vm::{Guest, GuestSpec, SHELL};
use vmm_api::{Ending, MemoryConfig, Op, Reply, Resized, Vcpus};

use crate::q35::Q35;

const GROUP: &str = "resize";
const BOOT_MIB: u32 = 256;
const MOST_MIB: u32 = BOOT_MIB + 4096;
const VCPUS: u8 = 8;
/// A vCPU: DESIGN's budget.
const BUDGET_MS: f64 = 5.0;
const SIZES: [(u32, &str); 3] = [(128, "128 MiB"), (1024, "1 GiB"), (4096, "4 GiB")];
const SYSFS: &str = "/sys/devices/system/cpu";

/// All rows.
pub fn group(runs: usize) -> Result<Vec<Row>> {
    let mut rows = vcpus(runs)?;
    rows.extend(by_sysfs(runs)?);
    rows.extend(memory(runs)?);
    rows.extend(by_acpi(runs)?);
    rows.extend(maximum()?);
    Ok(rows)
}

fn spec() -> GuestSpec {
    GuestSpec { memory: MemoryConfig::new(BOOT_MIB), script: SHELL.into(), ..GuestSpec::default() }
}

/// What a resize takes, in milliseconds; all of it has to be reached.
fn resize(guest: &mut Guest, vcpus: Option<u8>, memory_mib: Option<u32>) -> Result<f64> {
    let (took, resized) = try_resize(guest, vcpus, memory_mib)?;
    ensure!(resized.ending == Ending::Done, "{resized}");
    Ok(took)
}

/// What a resize takes, in milliseconds, and what came of it.
fn try_resize(guest: &mut Guest, vcpus: Option<u8>, memory_mib: Option<u32>) -> Result<(f64, Resized)> {
    let op = Op::Resize { vcpus: vcpus.map(Vcpus::Count), memory_mib, timeout_ms: 120_000 };
    let start = Instant::now();
    let reply = guest.client().call(op, &[], Duration::from_secs(150))?;
    let took = start.elapsed();
    let (Reply::Resized(resized), _) = reply else { bail!("resize answered {reply:?}") };
    Ok((took.as_secs_f64() * 1e3, resized))
}

/// A sign of life, which the lab wants even of slow exact time.
fn progress(what: &str, run: usize, runs: usize) {
    if run.is_multiple_of(10) {
        eprintln!("resize: {what}, {run} of {runs}");
    }
}

fn row(name: impl Into<String>, subject: &str, unit: &'static str, values: Vec<f64>) -> Result<Row> {
    Row::of(GROUP, name, subject, unit, values).context("no run")
}

fn vcpus(runs: usize) -> Result<Vec<Row>> {
    let mut guest = GuestSpec { max_vcpus: Some(VCPUS), ..spec() }.boot()?;
    guest.ask(":")?;
    let mut rows = vec![];
    for more in [1, VCPUS - 1] {
        let (mut first, mut added, mut removed) = (vec![], vec![], vec![]);
        for run in 0..=runs {
            progress("vCPUs", run, runs);
            let add = resize(&mut guest, Some(1 + more), None)?;
            // The first time a vCPU has to be made, and the guest's kernel makes its threads for it.
            let times = if run == 0 { &mut first } else { &mut added };
            times.push(add);
            let remove = resize(&mut guest, Some(1), None)?;
            if run > 0 {
                removed.push(remove);
            }
        }
        let budget = BUDGET_MS * f64::from(more);
        rows.push(row(format!("{more} vCPUs come, the first time"), "ctvm", "ms", first)?.budget(budget));
        rows.push(row(format!("{more} vCPUs come"), "ctvm", "ms", added)?.budget(budget));
        rows.push(row(format!("{more} vCPUs go"), "ctvm", "ms", removed)?);
    }
    Ok(rows)
}

/// The same by a program of the guest that writes to sysfs, as agents do. What asking it anything takes is taken off.
fn by_sysfs(runs: usize) -> Result<Vec<Row>> {
    let mut guest = GuestSpec { vcpus: VCPUS, ..spec() }.boot()?;
    let mut time = |command: &str| -> Result<f64> {
        let start = Instant::now();
        guest.ask(command)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let write = |cpus: std::ops::Range<u8>, value| {
        cpus.map(|cpu| format!("echo {value} > {SYSFS}/cpu{cpu}/online")).collect::<Vec<_>>().join("; ")
    };
    time(&write(1..VCPUS, 0))?;
    let mut rows = vec![];
    for more in [1, VCPUS - 1] {
        let (mut added, mut removed) = (vec![], vec![]);
        for run in 0..=runs {
            progress("vCPUs by sysfs", run, runs);
            let nothing = time(":")?;
            let add = time(&write(1..1 + more, 1))?;
            let remove = time(&write(1..1 + more, 0))?;
            if run > 0 {
                added.push((add - nothing).max(0.0));
                removed.push((remove - nothing).max(0.0));
            }
        }
        rows.push(row(format!("{more} vCPUs come"), "sysfs in the guest", "ms", added)?);
        rows.push(row(format!("{more} vCPUs go"), "sysfs in the guest", "ms", removed)?);
    }
    Ok(rows)
}

fn memory(runs: usize) -> Result<Vec<Row>> {
    let memory = MemoryConfig { max_mib: Some(MOST_MIB), ..MemoryConfig::new(BOOT_MIB) };
    let mut guest = GuestSpec { memory, ..spec() }.boot()?;
    guest.ask(":")?;
    let mut rows = vec![];
    for (mib, what) in SIZES {
        let (mut added, mut removed, mut left) = (vec![], vec![], vec![]);
        for run in 0..=runs {
            progress(what, run, runs);
            let add = resize(&mut guest, None, Some(BOOT_MIB + mib))?;
            // A page that cannot be moved may keep a block or two.
            let (remove, resized) = try_resize(&mut guest, None, Some(BOOT_MIB))?;
            let reached = resized.memory_mib.and_then(|memory| memory.reached).context("memory unknown")?;
            if run > 0 {
                added.push(add);
                removed.push(remove);
                left.push(f64::from(reached - BOOT_MIB));
            }
        }
        rows.push(row(format!("{what} come"), "ctvm", "ms", added)?);
        rows.push(row(format!("{what} go"), "ctvm", "ms", removed)?);
        rows.push(row(format!("{what} go: still there"), "ctvm", "MiB", left)?);
    }
    Ok(rows)
}

/// The same by QEMU's own hotplug.
fn by_acpi(runs: usize) -> Result<Vec<Row>> {
    let subject = crate::q35::name()?;
    let mut guest = Q35::boot(VCPUS)?;
    let mut rows = vec![];
    let mut measure = |what: String,
                       guest: &mut Q35,
                       come: &dyn Fn(&mut Q35) -> Result<f64>,
                       go: &dyn Fn(&mut Q35) -> Result<f64>| {
        let (mut added, mut removed) = (vec![], vec![]);
        for run in 0..=runs {
            progress(&format!("{what} by QEMU"), run, runs);
            let (add, remove) = (come(guest)?, go(guest)?);
            if run > 0 {
                added.push(add);
                removed.push(remove);
            }
        }
        rows.push(row(format!("{what} come"), &subject, "ms", added)?);
        rows.push(row(format!("{what} go"), &subject, "ms", removed)?);
        anyhow::Ok(())
    };
    for more in [1, VCPUS - 1] {
        let all = 1 + u32::from(more);
        measure(format!("{more} vCPUs"), &mut guest, &|guest| guest.set_cpus(all), &|guest| {
            guest.set_cpus(1)
        })?;
    }
    for (mib, what) in SIZES {
        let (come, go) =
            (move |guest: &mut Q35| guest.add_memory(mib), move |guest: &mut Q35| guest.remove_memory(mib));
        measure(what.to_owned(), &mut guest, &come, &go)?;
    }
    Ok(rows)
}

/// What a maximum costs a guest that never reaches it.
fn maximum() -> Result<Vec<Row>> {
    let total = |spec: GuestSpec| -> Result<f64> {
        let mut guest = spec.boot()?;
        let line = guest.ask("grep MemTotal /proc/meminfo")?;
        let kib: f64 = line.split_whitespace().nth(1).context("MemTotal without a number")?.parse()?;
        Ok(kib)
    };
    let plain = total(spec())?;
    let vcpus = total(GuestSpec { max_vcpus: Some(32), ..spec() })?;
    let memory = MemoryConfig { max_mib: Some(MOST_MIB), ..MemoryConfig::new(BOOT_MIB) };
    let more = total(GuestSpec { memory, ..spec() })?;
    Ok(vec![
        row("guest memory for 31 vCPUs that may come", "ctvm", "KiB", vec![plain - vcpus])?,
        row("guest memory for 4 GiB that may come", "ctvm", "KiB", vec![plain - more])?,
    ])
}
