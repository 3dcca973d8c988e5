//! Runs the fuzz targets of every component that has a `fuzz` folder: a workspace of its own whose programs are
//! libFuzzer mains, and a script `run TARGET SECONDS` that builds and feeds one of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build::{list, target, workspace};
use crate::cache::Cache;
use crate::steps::{output, step};
use crate::test::{Count, some_at_a_time};

/// Runs every target for `seconds`. A target counts as one test.
pub fn all(cache: &Cache, seconds: u32, filter: Option<&str>) -> Result<Count> {
    let mut wanted = Vec::new();
    for folder in folders()? {
        let names = targets(&folder)?.into_iter().filter(|name| filter.is_none_or(|f| name.contains(f)));
        wanted.extend(names.map(|name| (folder.clone(), name)));
    }
    Ok(some_at_a_time(&wanted, |(folder, name)| {
        let mut count = Count::default();
        match step(&format!("fuzz {name} for {seconds} s"), || fuzz(cache, folder, name, seconds)) {
            Ok(()) => count.passed += 1,
            Err(error) => {
                eprintln!("{error:#}");
                count.failed += 1;
                count.failures.push(format!("fuzz::{name}"));
            }
        }
        count
    }))
}

/// The components' fuzz folders.
fn folders() -> Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for item in fs::read_dir(workspace()).context("list the workspace")? {
        let folder = item.context("list the workspace")?.path().join("fuzz");
        if folder.join("run").exists() {
            folders.push(folder);
        }
    }
    folders.sort();
    Ok(folders)
}

/// Names of the programs in a fuzz folder.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(folder.join("Cargo.toml"));
    let metadata: Value = serde_json::from_str(&output(&mut cargo)?).context("read cargo's metadata")?;
    let names = programs(&metadata);
    ensure!(!names.is_empty(), "{} has no fuzz target", folder.display());
    Ok(names)
}

fn programs(metadata: &Value) -> Vec<String> {
    let targets = list(&metadata["packages"]).iter().flat_map(|package| list(&package["targets"]));
    let programs = targets.filter(|target| list(&target["kind"]).iter().any(|kind| kind == "bin"));
    programs.filter_map(|target| target["name"].as_str().map(String::from)).collect()
}

fn fuzz(cache: &Cache, folder: &Path, name: &str, seconds: u32) -> Result<()> {
    let status = Command::new(folder.join("run"))
        .args([name, &seconds.to_string()])
        .env("CARGO_TARGET_DIR", target().join("fuzz"))
        // Inputs found are where the next run starts; inputs that failed are kept.
        .env("CTVM_FUZZ_CORPUS", cache.folder("fuzz")?)
        .env("CTVM_FUZZ_ARTIFACTS", cache.folder("fuzz-failures")?)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("start {}/run", folder.display()))?;
    ensure!(status.success(), "fuzz target {name}: {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_the_programs() {
        let target = |kind: &str, name: &str| serde_json::json!({"kind": [kind], "name": name});
        let targets = [target("bin", "chains"), target("lib", "fuzz"), target("bin", "mmio")];
        let metadata = serde_json::json!({"packages": [{"name": "fuzz", "targets": targets}]});
        assert_eq!(programs(&metadata), ["chains", "mmio"]);
    }
}
