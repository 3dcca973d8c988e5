//! Long steps: one line each with the time it took; what tools print goes to a log that is shown on failure.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;

/// How many lines of a log are shown when its step fails.
const SHOWN_LINES: usize = 60;

/// Says what is being done and, when done, how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    eprintln!("==> {what} …");
    let result = work();
    let outcome = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("    {what}: {outcome} in {:.1} s", start.elapsed().as_secs_f32());
    result
}

/// Does both at once: builds leave a CPU idle whenever they link. Both end, also when one fails.
pub fn both<A, B: Send>(
    one: impl FnOnce() -> Result<A>,
    other: impl FnOnce() -> Result<B> + Send,
) -> Result<(A, B)> {
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(other);
        (one(), other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    Ok((one?, other?))
}

/// Runs `command` with its output in a log file of the cache; a failure shows the log's end.
pub fn quietly(cache: &Cache, name: &str, command: &mut Command) -> Result<()> {
    let path = cache.folder("logs")?.join(format!("{name}-{}.log", std::process::id()));
    let status = run_logged(command, &path)?;
    if status.success() {
        let _ = std::fs::remove_file(&path); // only failures are worth keeping
        return Ok(());
    }
    show_tail(&path);
    bail!("{}: {status} (log: {})", command.get_program().to_string_lossy(), path.display())
}

fn run_logged(command: &mut Command, path: &PathBuf) -> Result<ExitStatus> {
    let log = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let also = log.try_clone().context("clone the log's descriptor")?;
    command
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        .status()
        .with_context(|| format!("start {}", command.get_program().to_string_lossy()))
}

/// Shows the end of a log on standard error.
pub fn show_tail(path: &Path) {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    eprintln!("--- end of {}", path.display());
    for line in &lines[lines.len().saturating_sub(SHOWN_LINES)..] {
        eprintln!("{line}");
    }
    eprintln!("---");
}

/// What `command` prints, when it succeeds.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} printed something that is not UTF-8"))
}
