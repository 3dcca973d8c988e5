//! `ctvm top`: what each sandbox uses of this host, from `/proc`, so that a sandbox that hangs is shown too.

use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use clap::Args;

use crate::cli::Failure;
use crate::cli::ps::{self, Row};
use crate::cli::table::{mib, short, table};
use crate::sandbox::operator::memory::{self, Footprint};

/// Time over which `--once` looks at the processors.
const ONCE: Duration = Duration::from_secs(1);

/// How to show them.
#[derive(Debug, Clone, Args)]
pub struct Top {
    /// One table over a second, for scripts
    #[arg(long)]
    pub once: bool,
    /// Seconds between two tables
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
    /// Whole ids
    #[arg(long)]
    pub full: bool,
}

/// Processor time by process, at one moment.
#[derive(Debug)]
struct Sample {
    at: Instant,
    rows: Vec<Row>,
    cpu_us: HashMap<u32, u64>,
}

impl Sample {
    fn take() -> Result<Self, Failure> {
        let rows = ps::rows()?;
        let pids = rows.iter().flat_map(|row| [row.vmm_pid, row.shim_pid]).flatten();
        let cpu_us = pids.filter_map(|pid| Some((pid, memory::cpu_us(pid).ok()?))).collect();
        Ok(Sample { at: Instant::now(), rows, cpu_us })
    }

    /// What part of a processor a process has used since `before`, in tenths of a percent.
    fn permille(&self, before: &Sample, pid: Option<u32>) -> Option<u64> {
        let pid = pid?;
        let used = self.cpu_us.get(&pid)?.saturating_sub(*before.cpu_us.get(&pid)?);
        let passed = u64::try_from((self.at - before.at).as_micros()).unwrap_or(u64::MAX).max(1);
        Some(used.saturating_mul(1000) / passed)
    }
}

/// Shows them, for ever unless `--once`.
///
/// # Errors
/// See [`Failure`].
pub fn run(options: &Top) -> Result<(), Failure> {
    let clear = std::io::stdout().is_terminal() && !options.once;
    let mut before = Sample::take()?;
    // The first table comes soon, too.
    std::thread::sleep(ONCE);
    loop {
        let now = Sample::take()?;
        let mut text = shown(&now, &before, options.full);
        if clear {
            // Cursor home, each line to its end cleared, and all that is below.
            text = format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"));
        }
        let mut stdout = std::io::stdout();
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        written.map_err(|source| Failure::Local { what: "standard output", source })?;
        if options.once {
            return Ok(());
        }
        before = now;
        std::thread::sleep(Duration::from_secs(options.interval));
    }
}

fn shown(now: &Sample, before: &Sample, full: bool) -> String {
    let mut rows: Vec<(u64, [String; 9])> = now
        .rows
        .iter()
        .map(|row| {
            let size = row.memory_mib.map_or_else(|| "?".to_owned(), |n| mib(u64::from(n) << 20));
            let vmm = row.vmm_pid.and_then(|pid| memory::footprint(pid).ok());
            let shim = row.shim_pid.and_then(|pid| memory::footprint(pid).ok());
            let vmm_cpu = now.permille(before, row.vmm_pid);
            let shim_cpu = now.permille(before, row.shim_pid);
            let of = |footprint: Option<Footprint>, part: fn(Footprint) -> u64| {
                footprint.map_or_else(|| "-".to_owned(), |f| mib(part(f)))
            };
            let percent =
                |n: Option<u64>| n.map_or_else(|| "-".to_owned(), |n| format!("{}.{}", n / 10, n % 10));
            let running = |c: &[_]| running(c).to_string();
            let cells = [
                row.namespace.clone(),
                short(&row.sandbox, full).to_owned(),
                row.state.clone(),
                percent(vmm_cpu),
                of(vmm, |f| f.private),
                vmm.map_or_else(|| "-".to_owned(), |f| format!("{} of {size}", mib(f.guest))),
                percent(shim_cpu),
                of(shim, |f| f.private),
                row.containers.as_deref().map_or_else(|| "-".to_owned(), running),
            ];
            (vmm_cpu.unwrap_or(0), cells)
        })
        .collect();
    // The busiest first; the order of `ps` among the others.
    rows.sort_by_key(|(cpu, _)| std::cmp::Reverse(*cpu));
    let rows: Vec<_> = rows.into_iter().map(|(_, cells)| cells).collect();
    let heading = [
        "NAMESPACE",
        "SANDBOX",
        "STATE",
        "VM %CPU",
        "VMM PRIVATE",
        "GUEST MEMORY",
        "SHIM %CPU",
        "SHIM PRIVATE",
        "RUNNING",
    ];
    table(heading, &rows)
}

fn running(containers: &[crate::sandbox::operator::status::ContainerStatus]) -> usize {
    containers.iter().filter(|c| c.state == "running").count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sandbox: &str, vmm_pid: Option<u32>) -> Row {
        Row {
            namespace: "ns".into(),
            sandbox: sandbox.into(),
            state: "running".into(),
            age_seconds: None,
            shim_pid: None,
            vmm_pid,
            vcpus: None,
            vcpus_asked: None,
            vcpus_max: None,
            memory_mib: None,
            memory_asked_mib: None,
            memory_max_mib: None,
            containers: Some(vec![]),
            remedy: None,
        }
    }

    #[test]
    fn the_busiest_is_first_and_what_nobody_knows_is_a_dash() {
        // Above every process number that Linux gives.
        const IDLE: u32 = 5_000_001;
        const BUSY: u32 = 5_000_002;
        const NEW: u32 = 5_000_003;
        let rows =
            vec![row("idle", Some(IDLE)), row("busy", Some(BUSY)), row("new", Some(NEW)), row("gone", None)];
        let at = Instant::now();
        let cpu = |us: &[(u32, u64)]| us.iter().copied().collect();
        let before = Sample { at, rows: rows.clone(), cpu_us: cpu(&[(IDLE, 5_000), (BUSY, 0)]) };
        let now = Sample {
            at: at + Duration::from_secs(2),
            rows,
            cpu_us: cpu(&[(IDLE, 7_000), (BUSY, 3_001_000), (NEW, 9)]),
        };
        let text = shown(&now, &before, false);
        let lines: Vec<Vec<&str>> = text.lines().skip(1).map(|l| l.split_whitespace().collect()).collect();
        let seen: Vec<_> = lines.iter().map(|l| (l[1], l[3])).collect();
        assert_eq!(seen, [("busy", "150.0"), ("idle", "0.1"), ("new", "-"), ("gone", "-")]);
        assert_eq!(lines[0][4..], ["-", "-", "-", "-", "0"]);
    }
}
