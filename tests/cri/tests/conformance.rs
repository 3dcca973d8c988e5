//! Every case under our runtime ends as `tests/CONFORMANCE.md` says, which `cargo xtask conformance` writes.
#![cfg(feature = "lab")]

use anyhow::Result;
use cri::{Daemon, report};

const TABLE: &str = include_str!("../../CONFORMANCE.md");

#[test]
fn every_case_ends_as_the_table_says() -> Result<()> {
    let disk = e2e::SmallFs::ext4(1 << 30)?;
    let daemon = Daemon::start_with_host_ports_in("1.7", disk.path())?;
    let outcomes = report::run(&daemon.cri, "ctvm", "1.7", "");
    let column = report::column("ctvm", "1.7");
    let different: Vec<String> = outcomes
        .iter()
        .filter(|(name, outcome)| report::lookup(TABLE, &column, name) != Some(outcome.word()))
        .map(|(name, outcome)| format!("{name}: {outcome:?}"))
        .collect();
    assert!(different.is_empty(), "not as in tests/CONFORMANCE.md:\n{}", different.join("\n"));
    Ok(())
}
