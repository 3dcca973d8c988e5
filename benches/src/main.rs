//! `ctvm-bench`: every number the README quotes, measured in the lab machine beside a peer.
//!
//! It times whole processes from outside, with the lab's clock: in exact mode one nanosecond an instruction, so that
//! figures repeat. `cargo xtask bench` builds all that is needed, starts the lab in that mode and shows the result.

mod boot;
mod containers;
mod exits;
mod nydus;
mod q35;
mod resize;
mod size;
mod sized;
mod svg;
mod warm;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::rows::{self, Row};
use clap::{Parser, ValueEnum};

#[derive(Debug, Parser)]
#[command(about = "Measures ctvm beside its peers; runs in the lab machine")]
struct Arguments {
    /// Only these groups.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Group>,
    /// Counted runs of each quantity.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Write the rows here as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the boot timeline here.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Write the picture of group `nydus` here.
    #[arg(long)]
    nydus_svg: Option<PathBuf>,
    /// Of group `nydus` only this part.
    #[arg(long)]
    part: Option<nydus::Part>,
    /// In group `nydus`, an image of 1 GiB too.
    #[arg(long)]
    long: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Exec of the VMM to PID 1 and to agent ready, and exits.
    Boot,
    /// Private memory of VMM and shim, idle guest memory.
    Memory,
    /// Sizes on disk.
    Size,
    /// `ctr run` end to end.
    Run,
    /// vCPUs and memory come and go; what sizes cost a start.
    Resize,
    /// The latter alone.
    Sized,
    /// Pods as Kubernetes makes them: by `ctvm-bench-pods`, beside this program.
    Pods,
    /// Images that start before they are downloaded.
    Nydus,
}

/// Whole containers take long, and their medians settle soon.
const SIZED_RUNS: usize = 10;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let wanted = |group| arguments.only.is_empty() || arguments.only.contains(&group);
    warm::programs()?;
    let mut rows = Vec::new();
    if wanted(Group::Size) {
        rows.extend(size::group()?);
    }
    if wanted(Group::Boot) {
        let (boot, pictures) = boot::group(arguments.runs)?;
        rows.extend(boot);
        if let Some(file) = &arguments.svg {
            std::fs::write(file, svg::timeline(&pictures)).with_context(|| file.display().to_string())?;
        }
    }
    if wanted(Group::Memory) {
        rows.extend(boot::memory(arguments.runs)?);
        rows.extend(containers::memory(arguments.runs)?);
    }
    if wanted(Group::Run) {
        rows.extend(containers::group(arguments.runs)?);
    }
    if wanted(Group::Resize) {
        rows.extend(resize::group(arguments.runs)?);
    }
    if wanted(Group::Resize) || wanted(Group::Sized) {
        rows.extend(sized::group(arguments.runs.min(SIZED_RUNS))?);
    }
    if wanted(Group::Pods) {
        rows.extend(pods(arguments.runs)?);
    }
    if wanted(Group::Nydus) {
        let nydus = nydus::group(arguments.runs, arguments.long, arguments.part)?;
        if let Some(file) = &arguments.nydus_svg {
            std::fs::write(file, nydus::picture(&nydus)).with_context(|| file.display().to_string())?;
        }
        rows.extend(nydus);
    }
    print!("{}", rows::table(&rows));
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// The rows of the other program.
fn pods(runs: usize) -> Result<Vec<Row>> {
    let file = tempfile::NamedTempFile::new()?;
    let program = Path::new(e2e::BIN).join("ctvm-bench-pods");
    let mut command = Command::new(&program);
    command.arg("--runs").arg(runs.to_string()).arg("--json").arg(file.path());
    let status = command.status().with_context(|| format!("starting {}", program.display()))?;
    ensure!(status.success(), "{}: {status}", program.display());
    serde_json::from_slice(&std::fs::read(file.path())?).context("its rows")
}
