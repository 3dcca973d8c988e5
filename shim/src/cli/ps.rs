//! `ctvm ps`: the sandboxes of this node.

use std::io::Write as _;

use clap::Args;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::cli::Failure;
use crate::cli::node::{self, Found, NodeError};
use crate::cli::table::{age, short, table};
use crate::sandbox::operator::status::{ContainerStatus, Status};

/// How to list them.
#[derive(Debug, Clone, Args)]
pub struct Ps {
    /// For programs: a JSON list
    #[arg(long)]
    pub json: bool,
    /// Whole ids
    #[arg(long)]
    pub full: bool,
}

/// A sandbox as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// containerd's namespace.
    pub namespace: String,
    /// Its id.
    pub sandbox: String,
    /// As in [`Status`]; `silent` when its shim does not answer, `dead` when that has ended.
    pub state: String,
    /// Seconds since its shim was started; none of one that is just being started.
    pub age_seconds: Option<u64>,
    /// Process number of its shim, also of a dead one.
    pub shim_pid: Option<u32>,
    /// Process number of its VMM, if that runs.
    pub vmm_pid: Option<u32>,
    /// vCPUs that the guest has online, where that is known.
    pub vcpus: Option<u8>,
    /// vCPUs asked for, where it answered.
    pub vcpus_asked: Option<u8>,
    /// The most vCPUs, where it answered.
    pub vcpus_max: Option<u8>,
    /// Guest memory, MiB, where that is known.
    pub memory_mib: Option<u32>,
    /// Guest memory asked for, MiB, where it answered.
    pub memory_asked_mib: Option<u32>,
    /// The most guest memory, MiB, where it answered.
    pub memory_max_mib: Option<u32>,
    /// Its containers, where it answered.
    pub containers: Option<Vec<ContainerStatus>>,
    /// What is wrong and what to do, where something is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// Looks at every sandbox of the node.
///
/// # Errors
/// [`NodeError::Read`].
pub fn rows() -> Result<Vec<Row>, NodeError> {
    let all = node::sandboxes()?;
    let now = since_boot();
    let statuses = node::each(&all, Found::status);
    Ok(all.iter().zip(statuses).map(|(found, status)| row(found, status, now)).collect())
}

fn row(found: &Found, status: Result<Status, NodeError>, now: f64) -> Row {
    let mut row = Row {
        namespace: found.namespace.clone(),
        sandbox: found.id.clone(),
        state: String::new(),
        age_seconds: found.state.shim.map(|shim| age_of(shim.start_ticks, now)),
        shim_pid: found.state.shim.map(|shim| shim.pid),
        vmm_pid: found.vmm(),
        vcpus: None,
        vcpus_asked: None,
        vcpus_max: None,
        memory_mib: None,
        memory_asked_mib: None,
        memory_max_mib: None,
        containers: None,
        remedy: None,
    };
    match status {
        Ok(status) => {
            row.state = status.state;
            (row.vcpus, row.memory_mib) = (status.vcpus, status.memory_mib);
            row.vcpus_asked = Some(status.vcpus_asked);
            row.vcpus_max = Some(status.vcpus_max);
            row.memory_asked_mib = Some(status.memory_asked_mib);
            row.memory_max_mib = Some(status.memory_max_mib);
            row.containers = Some(status.containers);
        }
        Err(error) => {
            let is_dead = matches!(error, NodeError::Dead { .. });
            row.state = if is_dead { "dead" } else { "silent" }.to_owned();
            row.remedy = Some(crate::error::chain(&error));
        }
    }
    row
}

/// `CLOCK_BOOTTIME`, on which processes' start times are.
fn since_boot() -> f64 {
    let now = clock_gettime(ClockId::Boottime);
    #[expect(clippy::cast_precision_loss, reason = "seconds since boot are far below 2^53")]
    let seconds = now.tv_sec as f64;
    seconds
}

fn age_of(start_ticks: u64, now: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "ticks since boot are far below 2^53")]
    let started = start_ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and seconds")]
    let age = (now - started).max(0.0) as u64;
    age
}

/// Lists them.
///
/// # Errors
/// See [`Failure`].
pub fn run(options: &Ps) -> Result<(), Failure> {
    let rows = rows()?;
    let text = match options.json {
        true => serde_json::to_string_pretty(&rows).expect("our own types serialise") + "\n",
        false => listing(&rows, options.full),
    };
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|source| Failure::Local { what: "standard output", source })
}

fn listing(rows: &[Row], full: bool) -> String {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let cells: Vec<_> = rows
        .iter()
        .map(|row| {
            [
                row.namespace.clone(),
                short(&row.sandbox, full).to_owned(),
                row.state.clone(),
                or_dash(row.age_seconds.map(age)),
                or_dash(row.shim_pid.map(|pid| pid.to_string())),
                or_dash(row.vmm_pid.map(|pid| pid.to_string())),
                or_dash(row.vcpus_asked.map(|asked| of(row.vcpus, asked))),
                or_dash(row.memory_asked_mib.map(|asked| format!("{} MiB", of(row.memory_mib, asked)))),
                or_dash(row.containers.as_deref().map(|c| containers(c, full))),
            ]
        })
        .collect();
    let heading = ["NAMESPACE", "SANDBOX", "STATE", "AGE", "SHIM", "VMM", "VCPUS", "MEMORY", "CONTAINERS"];
    let mut text = table(heading, &cells);
    for remedy in rows.iter().filter_map(|row| row.remedy.as_deref()) {
        text.push_str(&format!("\n{remedy}\n"));
    }
    text
}

/// `2/4`: what there is of what was asked for.
fn of<T: std::fmt::Display>(reached: Option<T>, asked: T) -> String {
    reached.map_or_else(|| format!("?/{asked}"), |reached| format!("{reached}/{asked}"))
}

/// `app running, db stopped(3)`.
fn containers(all: &[ContainerStatus], full: bool) -> String {
    let say = |c: &ContainerStatus| {
        let code = c.exit_code.map(|code| format!("({code})")).unwrap_or_default();
        let name = if full { &c.id } else { short(&c.name, false) };
        format!("{name} {}{code}", c.state)
    };
    if all.is_empty() { "none".to_owned() } else { all.iter().map(say).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::state_file::{ProcessId, State};

    fn found(shim: Option<ProcessId>) -> Found {
        let state = State { shim, socket: "/x".into(), ..State::default() };
        Found { namespace: "k8s.io".into(), id: "web".into(), dir: "/nonexistent".into(), state }
    }

    #[test]
    fn a_sandbox_is_listed_with_its_containers() {
        let container = |id: &str, state: &str, exit_code| ContainerStatus {
            id: id.into(),
            name: format!("name-of-{id}"),
            state: state.into(),
            exit_code,
            execs: 0,
            image: None,
        };
        let status = Status {
            version: "1".into(),
            state: "running".into(),
            vcpus: Some(2),
            vcpus_asked: 4,
            vcpus_max: 8,
            memory_mib: None,
            memory_asked_mib: 512,
            memory_max_mib: 1024,
            containers: vec![container("a", "running", None), container("b", "stopped", Some(3))],
        };
        let shim = ProcessId { pid: 7, start_ticks: 1000 * rustix::param::clock_ticks_per_second() };
        let row = row(&found(Some(shim)), Ok(status), 1130.0);
        assert_eq!((row.age_seconds, row.shim_pid, row.vmm_pid), (Some(130), Some(7), None));
        let text = listing(&[row], false);
        let last = text.lines().last().unwrap();
        assert!(
            last.starts_with("k8s.io     web      running  2m   7     -    2/4    ?/512 MiB  "),
            "{text}"
        );
        assert!(last.ends_with("name-of-a running, name-of-b stopped(3)"), "{text}");
    }

    #[test]
    fn a_dead_one_is_listed_with_what_to_do() {
        let found = found(Some(ProcessId { pid: std::process::id(), start_ticks: 1 }));
        let row = row(&found, found.status(), 100.0);
        assert_eq!((row.state.as_str(), row.containers.as_ref()), ("dead", None));
        let text = listing(&[row], false);
        assert!(text.contains("sandbox k8s.io/web is dead: its shim has ended."), "{text}");
        assert!(text.contains("containerd-shim-ctvm-v2 -namespace k8s.io -id web delete"), "{text}");
    }
}
