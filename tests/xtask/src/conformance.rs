//! `cargo xtask conformance`: the CRI cases under each runtime and containerd, and the table of them in
//! `tests/CONFORMANCE.md`.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use lab_protocol::Command;

use crate::build;
use crate::cache::Cache;
use crate::lab::client::{Client, Streams};
use crate::lab::machine::{Machine, Shape};
use crate::product::{IN_LAB, Product};
use crate::steps::step;

/// One column may take this long.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// Runtime and release of containerd, a column each.
const COLUMNS: [(&str, &str); 3] = [("ctvm", "1.7"), ("ctvm-pod", "2.1"), ("runc", "1.7")];

const PROGRAM: &str = "ctvm-conformance";

/// Begins the file; the table follows.
const HEAD: &str = "# Conformance\n\n\
    What cri-tools' validation suite asks of a runtime, and some of what Kubernetes users do, walked through CRI by \
    a client of our own (`tests/cri`) in the lab, with runc beside it. `cargo xtask conformance` runs all and writes \
    this file; `cargo xtask test` runs the first column and fails where a case ends otherwise than here.\n\n\
    `pass`: done as asked. `fail`: not, for the reason given. `n/a`: has no meaning where containers have a kernel \
    of their own. `ctvm-pod` is ctvm by the Sandbox API (`sandboxer = \"shim\"`), without a pause container.\n";

/// Options of `xtask conformance`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this runtime, printed instead of written
    #[arg(long)]
    runtime: Option<String>,
    /// Only with this release of containerd: 1.6, 1.7 or 2.1
    #[arg(long)]
    release: Option<String>,
    /// Only cases whose group or name contains this
    filter: Option<String>,
}

/// Runs the cases; the result is this process's exit code.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    let product = Product::build(cache)?;
    product.add_stripped("tests", &step("build the cases", build::conformance)?, PROGRAM)?;
    let shape = Shape { product: Some(product), ..Shape::default() };
    let machine = step("start the lab", || Machine::start(cache, &shape))?;
    let wanted = |asked: &Option<String>, name: &str| asked.as_deref().is_none_or(|asked| asked == name);
    let mut reports = Vec::new();
    for (runtime, release) in COLUMNS {
        if !wanted(&options.runtime, runtime) || !wanted(&options.release, release) {
            continue;
        }
        let report = format!("/var/tmp/{runtime}-{release}.json");
        let filter = options.filter.as_deref().unwrap_or_default();
        step(&format!("{runtime} under containerd {release}"), || {
            let run = format!("{IN_LAB}/tests/{PROGRAM} run {runtime} {release} '{filter}' > {report}");
            let mut stdout = io::stdout();
            call(machine.client(), &run, &mut stdout).inspect_err(|_| machine.show_console())
        })?;
        reports.push(report);
    }
    ensure!(!reports.is_empty(), "no such runtime or release; there are {COLUMNS:?}");
    let mut table = Vec::new();
    call(machine.client(), &format!("{IN_LAB}/tests/{PROGRAM} table {}", reports.join(" ")), &mut table)?;
    let table = String::from_utf8(table).context("the table is no text")?;
    if options.runtime.is_some() || options.release.is_some() || options.filter.is_some() {
        println!("{table}");
        return Ok(0);
    }
    let path = build::workspace().join("tests/CONFORMANCE.md");
    std::fs::write(&path, format!("{HEAD}{table}")).with_context(|| format!("write {}", path.display()))?;
    println!("{}", path.display());
    Ok(0)
}

fn call(client: Client, script: &str, stdout: &mut dyn io::Write) -> Result<()> {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    let mut stderr = io::stderr();
    let streams = Streams { stdin: Box::new(io::empty()), stdout, stderr: &mut stderr };
    let code = client.run(&Command { argv, ..Command::default() }, streams, Some(LIMIT))?.shell_code();
    ensure!(code == 0, "{script}: exit code {code}");
    Ok(())
}
