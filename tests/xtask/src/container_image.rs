//! A container image made on the spot from Debian packages, as an OCI layout in a tar file (OCI image-spec 1.1,
//! image-layout.md), which `ctr images import` reads.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::apt::{Apt, Suite};
use crate::cache::{Cache, Key, hash_file};
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
    fs::create_dir_all(layout.join("blobs/sha256")).context("make the layout")?;
    let layer = layout.join("layer");
    pack(&root, &layer)?;
    write_layout(&layout, &layer)?;
    pack(&layout, &folder.join("image.tar"))?;
    fs::remove_dir_all(root).and_then(|()| fs::remove_dir_all(layout)).context("remove the work folders")
}

/// Moves the layer in and writes what refers to it, ending with the index.
fn write_layout(layout: &Path, layer: &Path) -> Result<()> {
    let diff_id = format!("sha256:{}", hash_file(layer)?);
    let layer = blob(layout, layer, "application/vnd.oci.image.layer.v1.tar")?;
    let manifests = [(NAME, json!(["sh"])), (PAUSE_NAME, json!(PAUSE))]
        .into_iter()
        .map(|(name, command)| write_image(layout, &layer, &diff_id, name, &command))
        .collect::<Result<Vec<_>>>()?;
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?).context("write the index")?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
        .context("write the layout's mark")
}

/// Configuration and manifest of one image; the manifest's descriptor.
fn write_image(layout: &Path, layer: &Value, diff_id: &str, name: &str, command: &Value) -> Result<Value> {
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": command,
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let config = json_blob(layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]});
    let mut manifest = json_blob(layout, &manifest, kind)?;
    manifest["annotations"] =
        json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "latest"});
    Ok(manifest)
}

fn json_blob(layout: &Path, content: &Value, kind: &str) -> Result<Value> {
    let file = layout.join("part");
    fs::write(&file, serde_json::to_vec(content)?).context("write a blob")?;
    blob(layout, &file, kind)
}

/// Moves `file` to its place by content and returns its descriptor.
fn blob(layout: &Path, file: &Path, kind: &str) -> Result<Value> {
    let (hash, size) = (hash_file(file)?, fs::metadata(file).context("look at a blob")?.len());
    fs::rename(file, layout.join("blobs/sha256").join(&hash)).context("put a blob in place")?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{hash}"), "size": size}))
}

/// A tar file that is the same each time.
fn pack(folder: &Path, to: &Path) -> Result<()> {
    let part = to.with_extension("part");
    let status = Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-C"])
        .arg(folder)
        .args(["--exclude=./layer.part", "-cf"])
        .arg(&part)
        .arg(".")
        .status()
        .context("start tar")?;
    ensure!(status.success(), "tar: {status}");
    fs::rename(part, to).context("put the archive in place")
}
