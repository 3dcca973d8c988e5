//! `ctvm-bench-pods`: group `pods` of the figures, pods as Kubernetes makes them, beside runc's and beside QEMU's
//! network device.
//!
//! One containerd drives all runtimes, so that they alone differ. A program of its own, and built without
//! optimisation: CRI's client is large, and what is measured is done by other processes.

mod device;
mod life;
mod memory;
mod network;
mod traffic;

use std::path::PathBuf;

use anyhow::{Context, Result};
use benches::{rows, timeline};
use clap::{Parser, ValueEnum};
use cri::Daemon;

/// The containerd that has the Sandbox API.
const RELEASE: &str = "2.1";

/// A runtime handler of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handler {
    /// As CRI names it.
    pub name: &'static str,
    /// As the figures name it.
    pub subject: &'static str,
}

/// Ours with a pause container, which each containerd can drive.
pub const CTVM: Handler = Handler { name: "ctvm", subject: "ctvm" };
/// Ours without.
pub const CTVM_POD: Handler = Handler { name: "ctvm-pod", subject: "ctvm, Sandbox API" };
/// The peer.
pub const RUNC: Handler = Handler { name: "runc", subject: "runc (no VM)" };

#[derive(Debug, Parser)]
#[command(about = "Measures pods; runs in the lab machine")]
struct Arguments {
    /// Only this part.
    #[arg(long)]
    only: Option<Part>,
    /// Counted runs of each quantity.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Write the rows here as JSON, in place of a table.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Start, exec and end of a pod.
    Life,
    /// Throughput and latency between host and guest.
    Network,
    /// Memory for each of many pods.
    Memory,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let wanted = |part| arguments.only.is_none_or(|only| only == part);
    std::fs::create_dir_all(timeline::FOLDER)?;
    let daemon = Daemon::start(Some(RELEASE))?;
    let mut rows = Vec::new();
    if wanted(Part::Life) {
        rows.extend(life::measure(&daemon.cri, arguments.runs)?);
    }
    if wanted(Part::Network) {
        rows.extend(network::measure(&daemon.cri, arguments.runs)?);
    }
    if wanted(Part::Memory) {
        rows.extend(memory::measure(&daemon.cri)?);
    }
    match &arguments.json {
        Some(file) => std::fs::write(file, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| file.display().to_string()),
        None => {
            print!("{}", rows::table(&rows));
            Ok(())
        }
    }
}
