//! A large image of Debian's files, on a registry behind a slow link: its program runs before a tenth of it came, and in the end every
//! file is what it was.
#![cfg(feature = "lab")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cri::image_node::{self, story};
use cri::{ImageNode, Pod};
use e2e::command::{wait_at_most, wait_until};
use e2e::oci::Layer;
use e2e::{Link, Netns, run_with_input};
use k8s_cri::v1::ContainerState;

/// Files of Debian packages that are in the image, a layer each, by their folders. The first has the libraries of the program.
const LAYERS: [&[&str]; 3] = [
    &["/usr/lib64", "/usr/lib/x86_64-linux-gnu"],
    &["/usr/bin"],
    &["/usr/sbin", "/usr/share", "/usr/lib/bfd-plugins"],
];
/// Programs and data are left out that are larger, and libraries. With `xtask test --long` nothing is, and the image has 300 MiB.
const LARGE: [u64; 2] = [1536 << 10, 8 << 20];
/// The least that the image has; what `--long` is for is the second.
const LEAST: [u64; 2] = [48 << 20, 300 << 20];
/// How long reading all of it may take.
const WALK: Duration = Duration::from_secs(1200);

/// Files and links below folders.
fn files_of(folders: &[&str]) -> Result<Vec<PathBuf>> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let (kind, path) = (entry.file_type()?, entry.path());
            if kind.is_dir() {
                walk(&path, found)?;
            } else if kind.is_symlink() || (kind.is_file() && is_wanted(&path)?) {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    for folder in folders.iter().filter(|folder| Path::new(folder).is_dir()) {
        walk(Path::new(folder), &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn is_wanted(path: &Path) -> Result<bool> {
    let is_library = LAYERS[0].iter().any(|folder| path.starts_with(folder));
    Ok(e2e::long() || fs::metadata(path)?.len() <= LARGE[usize::from(is_library)])
}

/// Folders for the usual mounts, and links as Debian has them.
fn skeleton(tree: &Path) -> Result<()> {
    for folder in ["etc", "proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    for (link, to) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        symlink(to, tree.join(link))?;
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/bash\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\n")?;
    Ok(())
}

/// The lines that `md5sum` prints of files.
fn sums(files: &[PathBuf]) -> Result<BTreeSet<String>> {
    let names: Vec<u8> = files.iter().flat_map(|file| format!("{}\0", file.display()).into_bytes()).collect();
    let said = run_with_input(Command::new("xargs").args(["-0", "md5sum", "--"]), names)?.ok()?;
    Ok(said.lines().map(str::to_owned).collect())
}

#[test]
fn debian_starts_over_a_slow_link_and_every_file_is_right() -> Result<()> {
    // The first namespace with a name leaves a mount for those to come.
    drop(Netns::make("first")?);
    story(slow_link)
}

fn slow_link() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let tree = folder.path().join("tree");
    skeleton(&tree)?;
    let layers = LAYERS.iter().map(|folders| files_of(folders)).collect::<Result<Vec<_>>>()?;
    let regular: Vec<PathBuf> = layers.concat().into_iter().filter(|f| !f.is_symlink()).collect();
    let bytes = regular.iter().try_fold(0, |sum, file| anyhow::Ok(sum + fs::metadata(file)?.size()))?;
    ensure!(bytes >= LEAST[usize::from(e2e::long())], "{} files of {bytes} bytes are too few", regular.len());

    let started = Instant::now();
    let node = ImageNode::start(None, "", Some(Link::make("slow")?))?;
    let sources: Vec<Layer<'_>> = layers.iter().map(|files| Layer::Files(files)).collect();
    let name = node.push("debian", &[&[Layer::Tree(&tree)], &sources[..]].concat(), None)?;
    let stored = node.stored()?;
    eprintln!("{} files of {bytes} bytes, {stored} stored, after {:.0?}", regular.len(), started.elapsed());
    node.cri().pull(&name)?;
    let link = node.link.as_ref().context("a link")?;
    link.slow_down("16mbit", "30ms")?;

    // Debian's own bash, linked against Debian's libraries.
    let pod = Pod::run(node.cri(), "ctvm")?;
    let script = "echo ${BASH_VERSION%%.*}; exec sleep 100000";
    let config = image_node::app(&pod, &name, &["/usr/bin/bash", "-c", script]);
    let began = Instant::now();
    pod.start(&config)?;
    wait_until("bash has said its version", || Ok(pod.log(&config)?.0 == "5\n"))
        .with_context(|| format!("the log is {:?}", pod.log(&config)))?;
    let came = node.wire.bytes();
    eprintln!("bash runs {:.1?} after its creation began, with {came} of {stored} bytes", began.elapsed());
    ensure!(came > 0 && came < stored / 10, "{came} of {stored} bytes came before the program ran");

    // All of it, as fast as the link can be.
    link.speed_up()?;
    let walk =
        "set -o pipefail; cd / && find usr -type f -print0 | xargs -0 md5sum -- | sed 's_  usr_  /usr_'";
    let config = image_node::app(&pod, &name, &["/usr/bin/bash", "-c", walk]);
    let walks = pod.start(&config)?;
    wait_at_most(WALK, "every file is read", || {
        Ok(node.cri().status(&walks)?.state == i32::from(ContainerState::ContainerExited))
    })?;
    let (code, (told, errors)) = (node.cri().status(&walks)?.exit_code, pod.log(&config)?);
    ensure!(code == 0 && errors.is_empty(), "the walk: {code}: {errors}");
    let told: BTreeSet<String> = told.lines().map(str::to_owned).collect();
    let wanted = sums(&regular)?;
    let differences: Vec<_> = told.symmetric_difference(&wanted).take(10).collect();
    ensure!(differences.is_empty(), "{} sums, told {}: {differences:#?}", wanted.len(), told.len());
    let all = node.wire.bytes();
    ensure!(all <= stored, "{all} bytes of {stored} came: some twice");
    eprintln!("{} files are right, {:.0?} after the start", wanted.len(), started.elapsed());

    pod.end()?;
    node.end(&[&name])
}
