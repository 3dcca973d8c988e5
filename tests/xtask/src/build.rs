//! Builds of this workspace's packages, each with the flags it ships or runs with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The checkout's root.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).expect("this package lies two folders below the workspace").to_path_buf()
}

/// Cargo's target folder, as the calling cargo chose it.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The lab's PID 1, static.
pub fn lab_init() -> Result<PathBuf> {
    // A folder of its own: other flags in the shared one would rebuild everything at each turn.
    let folder = target().join("static");
    let mut command = cargo("build");
    command
        .args(["--package", "lab-init", "--bin", "lab-init", "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    run(&mut command)?;
    Ok(folder.join(TARGET).join("debug/lab-init"))
}

/// The one target: with it named, flags do not reach build scripts, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn cargo(verb: &str) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).args([verb, "--quiet", "--locked"]);
    command
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().context("start cargo")?;
    ensure!(status.success(), "cargo: {status}");
    Ok(())
}
