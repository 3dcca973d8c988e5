//! `cargo xtask bench`: the benchmark harness in a lab machine whose clock counts instructions.

use std::io;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use lab_protocol::Command;

use crate::apt::Apt;
use crate::build;
use crate::cache::Cache;
use crate::lab::client::Streams;
use crate::lab::image::Image;
use crate::lab::machine::{Machine, Shape};
use crate::product::{IN_LAB, Product};
use crate::steps::step;

/// Options of `xtask bench`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this group of figures: boot, memory, size, run, resize, pods
    #[arg(long)]
    only: Option<String>,
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
}

/// Runs the benchmarks; the result is this process's exit code.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    let product = Product::build(cache)?;
    product.add("bin", &step("build the benchmark harness", build::bench)?)?;
    let wanted = |group| options.only.as_deref().is_none_or(|only| only == group);
    if wanted("pods") {
        let program = step("build the harness of group pods", build::bench_pods)?;
        product.add_stripped("bin", &program, "ctvm-bench-pods")?;
    }
    if wanted("resize") {
        product.add_stripped("share", &step("build the exerciser", build::exerciser)?, "exerciser")?;
        // Of the lab itself, for a peer that needs ACPI.
        product.add("share", &Image::get(cache, &Apt::open(cache)?)?.kernel())?;
    }
    let shape = Shape { exact: !options.inexact, product: Some(product), ..Shape::default() };
    let machine = step("start the lab", || Machine::start(cache, &shape))?;
    let mut argv: Vec<String> = [
        &format!("{IN_LAB}/bin/ctvm-bench"),
        "--json",
        "/tmp/rows.json",
        "--svg",
        "/tmp/timeline.svg",
        "--runs",
    ]
    .map(ToString::to_string)
    .to_vec();
    argv.push(options.runs.to_string());
    if let Some(only) = &options.only {
        argv.extend(["--only".to_string(), only.clone()]);
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
    Ok(0)
}
