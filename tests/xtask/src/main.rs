//! Set-up, lab, demo, tests and benchmarks of this workspace.

mod apt;
mod bench;
mod bench_images;
mod build;
mod cache;
mod conformance;
mod container_image;
mod demo;
mod fuzz;
mod guest;
mod host;
mod lab;
mod oci;
mod packages;
mod product;
mod registry;
mod steps;
mod test;
mod tree;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, lab, demo, tests and benchmarks of ctvm.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    /// Compare the hashes of all cached files, not only sizes and times
    #[arg(long, global = true)]
    verify: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a container in a microVM, from nothing
    Demo(demo::Options),
    /// Run every test
    Test(test::Options),
    /// Measure ctvm beside its peers
    Bench(bench::Options),
    /// Walk through CRI's cases and write the table of them
    Conformance(conformance::Options),
    /// Build the guest kernel; prints its path last
    Kernel,
    /// Build the guest image; prints its path last
    Rootfs,
    /// Run a command, as root, in a lab machine with a nested KVM
    Lab(lab::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = cache::Cache::open().map(|cache| cache.verify(arguments.verify)).and_then(|cache| {
        match &arguments.task {
            Task::Demo(options) => demo::main(&cache, options),
            Task::Test(options) => test::main(&cache, options),
            Task::Bench(options) => bench::main(&cache, options),
            Task::Conformance(options) => conformance::main(&cache, options),
            Task::Kernel => kernel(&cache),
            Task::Rootfs => rootfs(&cache),
            Task::Lab(options) => lab::main(&cache, options),
        }
    });
    match result {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn kernel(cache: &cache::Cache) -> anyhow::Result<u8> {
    packages::ensure(cache)?;
    println!("{}", guest::kernel(cache, guest::Flavour::Shipped)?.vmlinux.display());
    Ok(0)
}

fn rootfs(cache: &cache::Cache) -> anyhow::Result<u8> {
    packages::ensure(cache)?;
    let agent = steps::step("build the agent", build::agent)?;
    println!("{}", guest::rootfs(cache, &agent)?.display());
    Ok(0)
}
