//! The QEMU that emulates the lab machine: Debian's source with the patches in `tests/lab/qemu`, which says what is
//! wrong without them, and Debian's firmware.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{Apt, Suite};
use crate::build::workspace;
use crate::cache::{Cache, Key};
use crate::packages;
use crate::steps::{output, quietly, step};
use crate::tree::Tree;

const SOURCE: &str = "qemu";

/// Packages with what QEMU loads into a machine, and where in them that lies.
const FIRMWARE: [&str; 2] = ["qemu-system-data", "seabios"];
const FIRMWARE_FOLDERS: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// A QEMU with its firmware.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    firmware: Tree,
}

impl Qemu {
    /// From the cache, built if need be.
    pub fn get(cache: &Cache, apt: &Apt<'_>) -> Result<Self> {
        apt.with_fresh_lists_if_needed(|| {
            Ok(Self { program: program(cache, apt)?, firmware: firmware(cache, apt)? })
        })
    }

    /// Its command line so far.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        for folder in FIRMWARE_FOLDERS {
            command.arg("-L").arg(self.firmware.path(folder));
        }
        command
    }
}

fn program(cache: &Cache, apt: &Apt<'_>) -> Result<PathBuf> {
    let source = apt.resolve_source(Suite::Trixie, SOURCE)?;
    let recipe = workspace().join("tests/lab/qemu");
    let compiler = output(Command::new("gcc").arg("--version"))?;
    let key = Key::new("qemu", 1)
        .folder(&recipe)?
        .text(&source.sha256)
        .text(compiler.lines().next().unwrap_or_default());
    let folder = cache.entry("qemu", &key, |folder| {
        packages::ensure(cache)?;
        let archive = apt.fetch_source(Suite::Trixie, SOURCE, &source)?;
        let work = folder.join("work");
        let mut build = Command::new(recipe.join("build"));
        build.args([&archive, &work, folder]);
        step("build the lab's QEMU (2 to 5 minutes)", || quietly(cache, "qemu", &mut build))?;
        std::fs::remove_dir_all(&work).context("remove the work folder")
    })?;
    Ok(folder.join("qemu-system-x86_64"))
}

fn firmware(cache: &Cache, apt: &Apt<'_>) -> Result<Tree> {
    let packages: Vec<_> = apt
        .resolve(Suite::Trixie, &FIRMWARE)?
        .into_iter()
        .filter(|package| FIRMWARE.contains(&package.name()))
        .collect();
    let key = packages.iter().fold(Key::new("firmware", 1), |key, package| key.text(&package.sha256));
    let folder = cache.entry("firmware", &key, |folder| {
        let files = apt.fetch(Suite::Trixie, &FIRMWARE, &packages)?;
        step("unpack the lab's firmware", || Tree::create(folder)?.unpack(&files))
    })?;
    Ok(Tree::at(&folder))
}
