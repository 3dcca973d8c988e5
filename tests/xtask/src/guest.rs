//! Guest kernel and guest image: the build scripts beside their recipes, run when what goes into them changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::apt::{Apt, Suite};
use crate::build::workspace;
use crate::cache::{Cache, Key};
use crate::steps::{output, quietly, step};

/// Debian's package with the kernel's source.
const SOURCE: &str = "linux-source-6.1";

/// The guest kernel in both forms.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub vmlinux: PathBuf,
    pub bzimage: PathBuf,
}

/// Which kernel is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// What ships.
    Shipped,
    /// One that looks for its own mistakes: lockdep, KASAN, checks for sleeping in atomic context.
    Debug,
}

/// Names a folder with `vmlinux` and `bzImage` to use in place of building them: for work on the kernel itself, and
/// for trying one of another version.
const INSTEAD: &str = "CTVM_KERNEL";

/// The guest kernel, built when its recipe, its source or the compiler changed.
pub fn kernel(cache: &Cache, flavour: Flavour) -> Result<Kernel> {
    if let Some(folder) = std::env::var_os(INSTEAD).map(PathBuf::from) {
        eprintln!("{INSTEAD}: using the kernel in {}", folder.display());
        return Ok(Kernel { vmlinux: folder.join("vmlinux"), bzimage: folder.join("bzImage") });
    }
    let apt = Apt::open(cache)?;
    let compiler = output(Command::new("gcc").arg("--version"))?;
    let recipe = workspace().join("kernel-config");
    let folder = apt.with_fresh_lists_if_needed(|| {
        let packages: Vec<_> = apt
            .resolve(Suite::Bookworm, &[SOURCE])?
            .into_iter()
            .filter(|package| package.name() == SOURCE)
            .collect();
        let [package] = &packages[..] else {
            anyhow::bail!("bookworm has {} packages {SOURCE}", packages.len())
        };
        let (name, extra, time): (_, &[&str], _) = match flavour {
            Flavour::Shipped => ("kernel", &[], "6 to 10 minutes"),
            Flavour::Debug => {
                ("kernel that looks for its mistakes", &["--with", "debug"], "10 to 20 minutes")
            }
        };
        let key = Key::new(name, 1)
            .folder(&recipe)?
            .text(&package.sha256)
            .text(compiler.lines().next().unwrap_or_default());
        cache.entry("kernel", &key, |folder| {
            let deb = apt.fetch(Suite::Bookworm, &[SOURCE], &packages)?.remove(0);
            step(&format!("build the guest {name} ({time})"), || build_kernel(&recipe, &deb, folder, extra))
        })
    })?;
    Ok(Kernel { vmlinux: folder.join("vmlinux"), bzimage: folder.join("bzImage") })
}

fn build_kernel(recipe: &Path, deb: &Path, folder: &Path, extra: &[&str]) -> Result<()> {
    let work = folder.join("work");
    // Named after the package: the script notes in its manifest where the source came from.
    let name = deb.file_stem().context("package without a name")?.to_string_lossy().replace("_all", "");
    let unpacked = work.join("package");
    fs::create_dir_all(&unpacked).context("make a work folder")?;
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
    let archive = unpacked.join("usr/src").join(format!("{SOURCE}.tar.xz"));
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&work))?;
    fs::remove_dir_all(&unpacked).context("remove the unpacked package")?;
    fs::rename(work.join(SOURCE), work.join(&name)).context("name the source")?;
    let mut build = Command::new(recipe.join("build"));
    build.current_dir(&work).args(["--source", &name, "--bzimage", "--work"]).arg(work.join("objects"));
    let status = build
        .args(extra)
        .arg("--out")
        .arg(folder)
        .stdout(std::io::stderr())
        .status()
        .context("start kernel-config/build")?;
    ensure!(status.success(), "kernel-config/build: {status}");
    fs::remove_dir_all(&work).context("remove the work folder")
}

/// The guest image around `agent`.
pub fn rootfs(cache: &Cache, agent: &Path) -> Result<PathBuf> {
    let recipe = workspace().join("rootfs");
    let maker = output(Command::new("dpkg-query").args(["--show", "erofs-utils"]))?;
    let key = Key::new("rootfs", 1).folder(&recipe)?.file(agent)?.text(&maker);
    let folder = cache.entry("rootfs", &key, |folder| {
        let mut build = Command::new(recipe.join("build"));
        build.arg("--agent").arg(agent).arg("--out").arg(folder.join("rootfs.erofs"));
        step("make the guest image", || quietly(cache, "rootfs", &mut build))
    })?;
    Ok(folder.join("rootfs.erofs"))
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().with_context(|| format!("start {program}"))?;
    ensure!(status.success(), "{program}: {status}");
    Ok(())
}
