//! Group `nydus`: images that start before they are downloaded, beside images that are downloaded, on a node with a real registry behind
//! a link of chosen speed.

mod link;
mod memory;
mod node;
mod pages;
mod picture;
mod read;
mod start;
mod thread;

use anyhow::Result;
use benches::rows::Row;
use clap::ValueEnum;

use self::node::Node;
pub use self::picture::draw as picture;

const GROUP: &str = "nydus";
const MIB: f64 = (1 << 20) as f64;

/// A part of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// From the start of a pull to a container's first output.
    Start,
    /// Reads in a container: throughput and latency.
    Read,
    /// What ten VMs of one image cost.
    Memory,
    /// What a VM's thread for images costs.
    Thread,
}

/// An image of the registry: `tests/xtask/src/bench_images.rs`.
#[derive(Debug)]
struct Image {
    /// As the figures name it.
    name: &'static str,
    repository: &'static str,
    /// Prints `ready`.
    command: &'static [&'static str],
    /// A start of it is counted for so many of the asked runs, one at least: they are long.
    runs_a_start: usize,
    /// Only there if asked for.
    long: bool,
}

const PYTHON: &[&str] = &["python3", "-c", "import http.server; print('ready', flush=True)"];

/// One static program.
const SMALL: Image =
    Image { name: "small", repository: "small", command: &["echo", "ready"], runs_a_start: 3, long: false };
/// Python, Node.js, git, nginx, Redis and what they need, of Debian 12.
const MEDIUM: Image =
    Image { name: "300 MiB", repository: "medium", command: PYTHON, runs_a_start: 10, long: false };
/// The same with Go and a JDK.
const LARGE: Image =
    Image { name: "1 GiB", repository: "large", command: PYTHON, runs_a_start: 20, long: true };

const IMAGES: [Image; 3] = [SMALL, MEDIUM, LARGE];

/// Runs the group, or one part of it; `long`: with the large image.
pub fn group(runs: usize, long: bool, part: Option<Part>) -> Result<Vec<Row>> {
    let wanted = |this| part.is_none_or(|part| part == this);
    let mut rows = Vec::new();
    if wanted(Part::Thread) {
        rows.extend(thread::measure(runs)?);
    }
    if part == Some(Part::Thread) {
        return Ok(rows);
    }
    let mut node = Node::start()?;
    if wanted(Part::Start) {
        rows.extend(start::measure(&mut node, runs, long)?);
    }
    if wanted(Part::Read) {
        rows.extend(read::measure(&mut node, runs)?);
    }
    if wanted(Part::Memory) {
        rows.extend(memory::measure(&mut node)?);
    }
    Ok(rows)
}
