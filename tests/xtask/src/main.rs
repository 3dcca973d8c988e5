//! Set-up, lab, demo, tests and benchmarks of this workspace.

mod apt;
mod build;
mod cache;
mod host;
mod lab;
mod steps;
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
    /// Run a command, as root, in a lab machine with a nested KVM
    Lab(lab::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = cache::Cache::open().map(|cache| cache.verify(arguments.verify)).and_then(|cache| {
        match &arguments.task {
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
