//! `ctvm logs`, `ctvm console` and `ctvm timeline`: what a sandbox tells of itself.

use std::io::{ErrorKind, Read as _, Write as _};

use clap::Args;

use crate::cli::Failure;
use crate::cli::node::{self, NodeError};
use crate::cli::table::table;
use crate::sandbox::timeline::SHIM_START;

/// Of which sandbox, and for how long.
#[derive(Debug, Clone, Args)]
pub struct Logs {
    /// Its id, or enough of it to be the only one; NAMESPACE/ID where it is in several
    pub sandbox: String,
    /// Go on with what comes, until the sandbox ends
    #[arg(long, short)]
    pub follow: bool,
}

/// Of which sandbox.
#[derive(Debug, Clone, Args)]
pub struct One {
    /// Its id, or enough of it to be the only one; NAMESPACE/ID where it is in several
    pub sandbox: String,
}

fn out(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|source| Failure::Local { what: "standard output", source })
}

/// Prints the log.
///
/// # Errors
/// See [`Failure`].
pub fn logs(options: &Logs) -> Result<(), Failure> {
    let found = node::find(&options.sandbox)?;
    if !options.follow {
        return out(found.get("/logs")?.as_bytes());
    }
    let mut stream = found.open("/logs?follow=1")?;
    let forever = stream.set_read_timeout(None);
    forever.map_err(|source| Failure::Local { what: "the connection to the sandbox", source })?;
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return Ok(()),
            Ok(n) => out(&part[..n])?,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // The shim was killed.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(source) => return Err(Failure::Local { what: "the connection to the sandbox", source }),
        }
    }
}

/// Prints what the console said.
///
/// # Errors
/// See [`Failure`].
pub fn console(options: &One) -> Result<(), Failure> {
    let text = node::find(&options.sandbox)?.get("/console")?;
    if text.is_empty() {
        eprintln!(
            "ctvm: the guest's console has said nothing: the kernel is told to be quiet. Its log is in `ctvm logs {}`; \
             cmdline = \"loglevel=7\" in the configuration makes it speak here",
            options.sandbox
        );
        return Ok(());
    }
    out(text.as_bytes())?;
    out(b"\n")
}

/// Prints the stages of the start.
///
/// # Errors
/// See [`Failure`].
pub fn timeline(options: &One) -> Result<(), Failure> {
    let found = node::find(&options.sandbox)?;
    let text = found.get("/timeline")?;
    let stages: Vec<(String, u64)> = serde_json::from_str(&text)
        .map_err(|e| NodeError::Answer { id: found.full_name(), text: format!("{text:?}: {e}") })?;
    out(stages_table(&stages).as_bytes())
}

fn stages_table(stages: &[(String, u64)]) -> String {
    let begin =
        stages.iter().find(|(stage, _)| stage == SHIM_START).or(stages.first()).map_or(0, |(_, at)| *at);
    let ms = |us: u64| format!("{}.{:02}", us / 1000, us % 1000 / 10);
    let mut before = begin;
    let rows: Vec<_> = stages
        .iter()
        .map(|(stage, at)| {
            let row = [ms(at.saturating_sub(begin)), ms(at.saturating_sub(before)), stage.clone()];
            before = *at;
            row
        })
        .collect();
    table(["MS", "STEP", "STAGE"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_told_from_the_first_one_on() {
        let stages = [("shim start", 1_000_000), ("vmm exec", 1_006_630), ("agent ready", 1_045_480)]
            .map(|(stage, at)| (stage.to_owned(), at));
        assert_eq!(
            stages_table(&stages),
            "MS     STEP   STAGE\n0.00   0.00   shim start\n6.63   6.63   vmm exec\n45.48  38.85  agent ready\n"
        );
        assert_eq!(stages_table(&[]), "MS  STEP  STAGE\n");
    }
}
