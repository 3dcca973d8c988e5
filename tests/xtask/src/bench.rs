//! `cargo xtask bench`: the benchmark harness in a lab machine whose clock counts instructions.

use std::io;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use lab_protocol::Command;

use crate::apt::Apt;
use crate::cache::Cache;
use crate::lab::client::Streams;
use crate::lab::image::Image;
use crate::lab::machine::{Machine, Shape};
use crate::product::{IN_LAB, Product};
use crate::steps::step;
use crate::{bench_images, build, container_image};

/// Options of `xtask bench`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only these groups of figures: boot, memory, size, run, resize (of it, sized alone), pods, nydus
    #[arg(long, value_delimiter = ',', value_name = "GROUP,…")]
    only: Vec<String>,
    /// Counted runs of each figure
    #[arg(long, default_value_t = 10)]
    runs: u32,
    /// Write the figures here as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the boot timeline here
    #[arg(long, default_value = "boot-timeline.svg")]
    svg: PathBuf,
    /// Ordinary time on two CPUs: quick to try, of no use as a figure
    #[arg(long)]
    inexact: bool,
    /// In group nydus, an image of 1 GiB too
    #[arg(long)]
    long: bool,
    /// Of group nydus only this part: start, read, memory, thread
    #[arg(long)]
    part: Option<String>,
    /// Write the picture of group nydus here
    #[arg(long, default_value = "nydus.svg")]
    nydus_svg: PathBuf,
}

/// Runs the benchmarks; the result is this process's exit code.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    let product = Product::build(cache)?;
    product.add("bin", &step("build the benchmark harness", build::bench)?)?;
    let wanted = |group| options.only.is_empty() || options.only.iter().any(|only| only == group);
    if wanted("pods") {
        let program = step("build the harness of group pods", build::bench_pods)?;
        product.add_stripped("bin", &program, "ctvm-bench-pods")?;
    }
    if wanted("resize") {
        product.add_stripped("share", &step("build the exerciser", build::exerciser)?, "exerciser")?;
        // Of the lab itself, for a peer that needs ACPI.
        product.add("share", &Image::get(cache, &Apt::open(cache)?)?.kernel())?;
    }
    if wanted("nydus") {
        product.add_stripped("share", &step("build the exerciser", build::exerciser)?, "exerciser")?;
        let image = container_image::get(cache, &Apt::open(cache)?)?;
        bench_images::make(cache, &product.folder().join("share"), &image, options.long)?;
    }
    let usual = Shape::default();
    // The large image is in it as the registry has it, as containerd has it packed and unpacked, and in page caches.
    let memory_mib = if options.long { usual.memory_mib / 3 * 4 } else { usual.memory_mib };
    let shape = Shape { exact: !options.inexact, product: Some(product), memory_mib, ..usual };
    let machine = step("start the lab", || Machine::start(cache, &shape))?;
    let mut argv: Vec<String> = [
        &format!("{IN_LAB}/bin/ctvm-bench"),
        "--json",
        "/tmp/rows.json",
        "--svg",
        "/tmp/timeline.svg",
        "--nydus-svg",
        "/tmp/nydus.svg",
        "--runs",
    ]
    .map(ToString::to_string)
    .to_vec();
    argv.push(options.runs.to_string());
    if !options.only.is_empty() {
        argv.extend(["--only".to_string(), options.only.join(",")]);
    }
    if let Some(part) = &options.part {
        argv.extend(["--part".to_string(), part.clone()]);
    }
    if options.long {
        argv.push("--long".to_string());
    }
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams { stdin: Box::new(io::empty()), stdout: &mut stdout, stderr: &mut stderr };
    let client = machine.client();
    let code = step("measure", || client.run(&Command { argv, ..Command::default() }, streams, None))
        .inspect_err(|_| machine.show_console())?
        .shell_code();
    if code != 0 {
        machine.show_console();
        return Ok(code);
    }
    if let Some(json) = &options.json {
        client.get("/tmp/rows.json", json)?;
    }
    if wanted("boot") {
        client.get("/tmp/timeline.svg", &options.svg)?;
    }
    let has_starts = options.part.as_deref().is_none_or(|part| part == "start");
    if wanted("nydus") && has_starts {
        client.get("/tmp/nydus.svg", &options.nydus_svg)?;
    }
    Ok(0)
}
