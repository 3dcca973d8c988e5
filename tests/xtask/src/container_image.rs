//! A container image made on the spot from Debian packages, as an OCI layout in a tar file, which `ctr images import` reads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::apt::{Apt, Suite};
use crate::cache::{Cache, Key, hash_file};
use crate::oci::{self, Layer};
use crate::steps::{output, step};
use crate::tree::Tree;

/// Its name in containerd.
pub const NAME: &str = "ctvm.local/demo:latest";

/// The same files under a second name, as an image that does nothing until it is told to end: what CRI runs as a
/// pod's first container.
const PAUSE_NAME: &str = "ctvm.local/pause:latest";
const PAUSE: [&str; 3] = ["sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"];

/// What it holds: one static program that is a shell and all the usual tools, and the files that say "Debian".
const PACKAGES: [&str; 2] = ["base-files", "busybox-static"];

/// The image and, by itself, the static program in it.
#[derive(Debug, Clone)]
pub struct ContainerImage {
    pub archive: PathBuf,
    pub busybox: PathBuf,
}

/// From the cache, made if need be.
pub fn get(cache: &Cache, apt: &Apt<'_>) -> Result<ContainerImage> {
    let folder = apt.with_fresh_lists_if_needed(|| {
        let packages: Vec<_> = apt
            .resolve(Suite::Bookworm, &PACKAGES)?
            .into_iter()
            .filter(|package| PACKAGES.contains(&package.name())) // a static program needs none of its dependencies
            .collect();
        ensure!(packages.len() == PACKAGES.len(), "bookworm lacks some of {PACKAGES:?}");
        let mut key = Key::new("container image", 2).text(NAME).text(PAUSE[2]);
        for package in &packages {
            key = key.text(&package.file).text(&package.sha256);
        }
        cache.entry("image", &key, |folder| {
            let files = apt.fetch(Suite::Bookworm, &PACKAGES, &packages)?;
            step("make the container image", || make(folder, &files))
        })
    })?;
    Ok(ContainerImage { archive: folder.join("image.tar"), busybox: folder.join("busybox") })
}

fn make(folder: &Path, packages: &[PathBuf]) -> Result<()> {
    let root = folder.join("root");
    let tree = Tree::create(&root)?;
    tree.unpack(packages)?;
    let busybox = tree.path("usr/bin/busybox");
    fs::copy(&busybox, folder.join("busybox")).context("copy busybox")?;
    for name in output(Command::new(&busybox).arg("--list"))?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", tree.path("usr/bin").join(name)).with_context(|| format!("link {name}"))?;
    }
    fs::write(
        tree.path("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    fs::write(tree.path("etc/group"), "root:x:0:\nstaff:x:50:nobody\nnogroup:x:65534:\n")?;
    for name in ["dev", "proc", "sys", "run", "tmp", "root"] {
        fs::create_dir_all(tree.path(name)).with_context(|| format!("make /{name}"))?;
    }
    let layout = folder.join("layout");
    oci::make_layout(&layout)?;
    let layer = layout.join("layer");
    oci::pack(&root, &layer)?;
    write_layout(&layout, &layer)?;
    oci::pack(&layout, &folder.join("image.tar"))?;
    fs::remove_dir_all(root).and_then(|()| fs::remove_dir_all(layout)).context("remove the work folders")
}

/// Moves the layer in and writes what refers to it, ending with the index.
fn write_layout(layout: &Path, layer: &Path) -> Result<()> {
    let diff_id = format!("sha256:{}", hash_file(layer)?);
    let descriptor = oci::blob(layout, layer, "application/vnd.oci.image.layer.v1.tar")?;
    let layers = [Layer { descriptor, diff_id }];
    let manifests = [(NAME, json!(["sh"])), (PAUSE_NAME, json!(PAUSE))]
        .into_iter()
        .map(|(name, command)| oci::write_image(layout, &layers, name, &command))
        .collect::<Result<Vec<_>>>()?;
    oci::write_index(layout, &manifests)
}
