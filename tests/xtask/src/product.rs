//! Everything the lab gets to see of ctvm: built, gathered in one folder, made into one disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Apt;
use crate::cache::Cache;
use crate::guest::{self, Flavour, Kernel};
use crate::steps::{both, output, quietly, step};
use crate::{build, container_image, packages};

/// Where the folder is in the lab. The end-to-end tests and benchmarks know these places.
pub const IN_LAB: &str = "/opt/ctvm";

/// Where the shim leaves a copy of each sandbox's timeline in the lab.
pub const TIMELINES: &str = "/var/tmp/ctvm-timelines";

/// A folder with `bin`, `share` and `tests`, removed when dropped.
#[derive(Debug)]
pub struct Product {
    folder: PathBuf,
}

impl Product {
    /// Builds what ships, and gathers it.
    pub fn build(cache: &Cache) -> Result<Self> {
        Self::build_with(cache, Flavour::Shipped)
    }

    /// The same with another guest kernel.
    pub fn build_with(cache: &Cache, flavour: Flavour) -> Result<Self> {
        packages::ensure(cache)?;
        let kernel = guest::kernel(cache, flavour)?;
        let in_guest = || step("build the agent", build::agent);
        let on_host = || step("build monitor, shim and command line", build::host_programs);
        let of_images = || step("build image service and converter", build::image_programs);
        let (agent, (programs, images)) = both(in_guest, || both(on_host, of_images))?;
        let rootfs = guest::rootfs(cache, &agent)?;
        let image = container_image::get(cache, &Apt::open(cache)?)?;
        let product = Self { folder: cache.folder("run")?.join(format!(".product-{}", std::process::id())) };
        let _ = fs::remove_dir_all(&product.folder); // of an earlier process with our number
        for program in programs.iter().chain(&images) {
            product.add("bin", program)?;
        }
        let Kernel { vmlinux, bzimage } = kernel;
        for file in [&vmlinux, &bzimage, &rootfs, &image.archive, &image.busybox] {
            product.add("share", file)?;
        }
        fs::write(product.folder.join("share/config.toml"), config())
            .context("write the shim's configuration")?;
        Ok(product)
    }

    /// Adds a file under its own name.
    pub fn add(&self, below: &str, file: &Path) -> Result<()> {
        let name = file.file_name().context("no file name")?.to_string_lossy();
        let folder = self.make(below)?;
        // A copy, no hard link: cargo may replace what it built in place.
        fs::copy(file, folder.join(&*name)).with_context(|| format!("copy {}", file.display()))?;
        Ok(())
    }

    /// Adds a program without what only a debugger wants, which is most of a test's size.
    pub fn add_stripped(&self, below: &str, program: &Path, name: &str) -> Result<()> {
        let to = self.make(below)?.join(name);
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(program)).map(drop)
    }

    fn make(&self, below: &str) -> Result<PathBuf> {
        let folder = self.folder.join(below);
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(folder)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the folder's content a disk for the lab machine at `path`.
    pub fn write_disk(&self, cache: &Cache, path: &Path) -> Result<()> {
        let mut command = Command::new("mkfs.erofs");
        quietly(cache, "mkfs.erofs", command.args(["--all-root", "-T0"]).arg(path).arg(&self.folder))
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder); // the next one of the same process number removes it
    }
}

fn config() -> String {
    format!(
        "kernel = \"{IN_LAB}/share/vmlinux\"\nimage = \"{IN_LAB}/share/rootfs.erofs\"\n\
         vmm = \"{IN_LAB}/bin/ctvm-vmm\"\ntimeline_dir = \"{TIMELINES}\"\n"
    )
}
