//! Runs the fuzz targets: programs of the workspace's packages whose name ends in `fuzz`, each a libFuzzer main.
//!
//! The toolchain is stable, so coverage comes from LLVM's own pass by way of stable `-C` options, without a
//! sanitizer: a target fails by panicking, by running out of memory or by not ending.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::build::{cargo, run, target};
use crate::cache::Cache;
use crate::steps::{output, quietly, step};
use crate::test::Count;

/// Coverage as libFuzzer wants it: a counter an edge, a table of places, and operands of comparisons.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions --cfg fuzzing";

/// Named, so that coverage does not get into build scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program to fuzz with and the package it is from.
#[derive(Debug, PartialEq, Eq)]
struct FuzzTarget {
    package: String,
    /// The package's folder; `corpus/<name>` in it holds first inputs, where there are any.
    folder: PathBuf,
    name: String,
}

/// Runs every target for `seconds`. A target counts as one test.
pub fn all(cache: &Cache, seconds: u32, filter: Option<&str>) -> Result<Count> {
    let text = output(cargo("metadata").args(["--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&text).context("read cargo's metadata")?;
    let targets: Vec<_> = find(&metadata)
        .into_iter()
        .filter(|target| filter.is_none_or(|filter| target.name.contains(filter)))
        .collect();
    let mut count = Count::default();
    for target in &targets {
        let program = step(&format!("build the fuzz target {}", target.name), || build(target))?;
        let done =
            step(&format!("fuzz {} for {seconds} s", target.name), || fuzz(cache, target, &program, seconds));
        match done {
            Ok(()) => count.passed += 1,
            Err(error) => {
                eprintln!("{error:#}");
                count.failed += 1;
                count.failures.push(format!("fuzz::{}", target.name));
            }
        }
    }
    Ok(count)
}

fn find(metadata: &Value) -> Vec<FuzzTarget> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    for package in list(&metadata["packages"]) {
        let (Some(name), Some(manifest)) = (package["name"].as_str(), package["manifest_path"].as_str())
        else {
            continue;
        };
        if !name.ends_with("fuzz") {
            continue;
        }
        let folder = Path::new(manifest).parent().unwrap_or(Path::new("/")).to_path_buf();
        for target in list(&package["targets"]) {
            let is_program = list(&target["kind"]).iter().any(|kind| kind == "bin");
            if let (true, Some(target)) = (is_program, target["name"].as_str()) {
                found.push(FuzzTarget { package: name.into(), folder: folder.clone(), name: target.into() });
            }
        }
    }
    found
}

fn build(fuzz_target: &FuzzTarget) -> Result<PathBuf> {
    let folder = target().join("fuzz");
    let mut command = cargo("build");
    command
        .args([
            "--release",
            "--package",
            &fuzz_target.package,
            "--bin",
            &fuzz_target.name,
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&folder)
        .env("RUSTFLAGS", COVERAGE)
        // What ships is stripped, one unit and without unwinding: nothing for a target that must say where it fell.
        .envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_STRIP", "false")]);
    run(&mut command)?;
    Ok(folder.join(TARGET).join("release").join(&fuzz_target.name))
}

fn fuzz(cache: &Cache, fuzz_target: &FuzzTarget, program: &Path, seconds: u32) -> Result<()> {
    let corpus = cache.folder(&format!("fuzz/{}", fuzz_target.name))?;
    let crashes = cache.folder("fuzz-failures")?;
    let mut command = Command::new(program);
    command
        .args([
            &format!("-max_total_time={seconds}"),
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
        ])
        .arg(format!("-artifact_prefix={}/{}-", crashes.display(), fuzz_target.name))
        .arg(corpus)
        .env("RUST_BACKTRACE", "1");
    let first = fuzz_target.folder.join("corpus").join(&fuzz_target.name);
    if first.is_dir() {
        command.arg(first);
    }
    quietly(cache, &format!("fuzz-{}", fuzz_target.name), &mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_programs_of_fuzz_packages() {
        let target = |kind: &str, name: &str| serde_json::json!({"kind": [kind], "name": name});
        let metadata = serde_json::json!({"packages": [
            {"name": "virtio-fuzz", "manifest_path": "/w/fuzz/Cargo.toml", "targets": [target("bin", "queue"), target("lib", "common")]},
            {"name": "vmm", "manifest_path": "/w/vmm/Cargo.toml", "targets": [target("bin", "ctvm-vmm")]},
        ]});
        let expected =
            FuzzTarget { package: "virtio-fuzz".into(), folder: "/w/fuzz".into(), name: "queue".into() };
        assert_eq!(find(&metadata), [expected]);
    }
}
