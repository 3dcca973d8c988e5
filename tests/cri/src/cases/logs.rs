use std::fs;

use anyhow::{Result, ensure};
use e2e::command::wait_until;

use super::{Case, Ground, case};

pub(super) const CASES: &[Case] = &[
    case("output and errors are in the log, each under its name", streams),
    case("a log is reopened after it was moved away", reopen),
    case("a line without its end and a long line are whole", lines),
];

fn streams(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let config = pod.container(&["sh", "-c", "echo to out; echo to err >&2"]);
    let done = pod.finish(&config)?;
    ensure!((done.stdout.as_str(), done.stderr.as_str()) == ("to out\n", "to err\n"), "{done:?}");
    Ok(())
}

fn reopen(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let config = pod.container(&["sh", "-c", "n=0; while :; do echo $n; n=$((n+1)); sleep 0.2; done"]);
    let id = pod.start(&config)?;
    let log = pod.log_path(&config);
    wait_until("something is in the log", || Ok(fs::metadata(&log).is_ok_and(|m| m.len() > 0)))?;
    let old = log.with_extension("old");
    fs::rename(&log, &old)?;
    on.cri.reopen_log(&id)?;
    wait_until("something is in the new log", || Ok(fs::metadata(&log).is_ok_and(|m| m.len() > 0)))?;
    on.cri.stop(&id, 0)?;
    let numbers = |text: &str| -> Vec<u32> {
        text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect()
    };
    let all = [numbers(&fs::read_to_string(&old)?), numbers(&fs::read_to_string(&log)?)].concat();
    ensure!(all.iter().zip(0..).all(|(got, expected)| *got == expected), "lines are missing: {all:?}");
    Ok(())
}

fn lines(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let script = "yes x | tr -d '\\n' | head -c 50000; echo; printf last";
    let done = pod.finish(&pod.container(&["sh", "-c", script]))?;
    let mut lines = done.stdout.lines();
    ensure!(lines.next().map(str::len) == Some(50_000), "the long line is cut");
    ensure!(lines.next() == Some("last"), "the last line is not there");
    Ok(())
}
