//! The conformance cases by hand: run a column, or make the table of several.
//!
//! `ctvm-conformance run RUNTIME RELEASE [CASE] > REPORT` runs the cases that contain CASE, and
//! `ctvm-conformance table REPORT…` prints the table. `cargo xtask conformance` does both in the lab.

use anyhow::{Context, Result, bail};
use cri::{Daemon, report};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["run", handler, release] => run(handler, release, ""),
        ["run", handler, release, filter] => run(handler, release, filter),
        ["table", ref reports @ ..] if !reports.is_empty() => {
            let mut columns = Vec::new();
            for path in reports {
                let text = std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
                columns.push(report::read(&text).with_context(|| format!("read {path}"))?);
            }
            print!("{}", report::table(&columns));
            Ok(())
        }
        _ => bail!("usage: ctvm-conformance run RUNTIME RELEASE [CASE] > REPORT | table REPORT…"),
    }
}

fn run(handler: &str, release: &str, filter: &str) -> Result<()> {
    // containerd 2.1 asks for id-mapped mounts.
    let disk = e2e::SmallFs::ext4(1 << 30)?;
    let daemon = Daemon::start_with_host_ports_in(release, disk.path())?;
    let outcomes = report::run(&daemon.cri, handler, release, filter);
    println!("{}", report::write(&report::column(handler, release), &outcomes));
    Ok(())
}
