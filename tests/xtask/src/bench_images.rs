//! The images of the figures of group `nydus`, made from Debian packages, as ordinary images and as Nydus images, in the store of a
//! registry.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::apt::{Apt, Package, Suite};
use crate::build;
use crate::cache::{Cache, Key, hash_file};
use crate::container_image::ContainerImage;
use crate::oci::{self, Layer};
use crate::registry::Store;
use crate::steps::{output, quietly, step};
use crate::tree::Tree;

const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// Packages of each layer above those below it; dependencies come with them. The first three make 300 MiB, all 1 GiB.
const LAYERS: [&[&str]; 5] = [
    &["base-files", "base-passwd", "bash", "coreutils", "dash", "mount", "python3"],
    &["nodejs"],
    &["git", "nginx", "python3-numpy", "redis-server"],
    &["golang-1.19"],
    &["openjdk-17-jdk-headless"],
];
const LAYERS_OF_300_MIB: usize = 3;

/// Makes the store below `folder`: repositories `small`, `medium` and, if `long`, `large`, each with the tags `oci` and `nydus`.
pub fn make(cache: &Cache, folder: &Path, image: &ContainerImage, long: bool) -> Result<()> {
    let apt = Apt::open(cache)?;
    let count = if long { LAYERS.len() } else { LAYERS_OF_300_MIB };
    let layers = apt.with_fresh_lists_if_needed(|| layers(cache, &apt, &LAYERS[..count]))?;
    let small = [small_layer(cache, image)?];
    let mut images = vec![("small", &small[..]), ("medium", &layers[..LAYERS_OF_300_MIB])];
    if long {
        images.push(("large", &layers[..]));
    }
    let store = Store::at(&folder.join("registry"));
    for (name, layers) in images {
        let work = folder.join("work");
        let (plain, nydus) = (work.join("oci"), work.join("nydus"));
        let layout = Layout { folder: plain.clone() };
        layout.write(layers)?;
        store.add(&plain, name, "oci")?;
        step(&format!("convert image {name}"), || {
            let mut convert = Command::new(build::target().join("service/ctvm-convert"));
            convert.arg("convert").args([&plain, &nydus].map(|folder| format!("oci:{}", folder.display())));
            quietly(cache, "convert", &mut convert)
        })?;
        store.add(&nydus, name, "nydus")?;
        fs::remove_dir_all(work).context("remove the layouts")?;
    }
    Ok(())
}

/// An image that is being put together from layers of the cache.
struct Layout {
    folder: PathBuf,
}

impl Layout {
    fn write(&self, folders: &[PathBuf]) -> Result<()> {
        oci::make_layout(&self.folder)?;
        let mut layers = Vec::new();
        for folder in folders {
            let copy = self.folder.join("layer");
            fs::copy(folder.join("layer.tar.gz"), &copy).context("copy a layer")?;
            let descriptor = oci::blob(&self.folder, &copy, GZIP_LAYER)?;
            let diff_id = fs::read_to_string(folder.join("diff_id")).context("read a layer's digest")?;
            layers.push(Layer { descriptor, diff_id });
        }
        let manifest = oci::write_image(&self.folder, &layers, "bench", &json!(["sh"]))?;
        oci::write_index(&self.folder, &[manifest])
    }
}

/// Folders of the cache with a layer each.
fn layers(cache: &Cache, apt: &Apt<'_>, lists: &[&[&str]]) -> Result<Vec<PathBuf>> {
    let mut request: Vec<&str> = Vec::new();
    let mut below: Vec<Package> = Vec::new();
    let mut folders = Vec::new();
    for list in lists {
        request.extend(*list);
        let all = apt.resolve(Suite::Bookworm, &request)?;
        let is_new = |package: &&Package| below.iter().all(|known| known.file != package.file);
        let packages: Vec<Package> = all.iter().filter(is_new).cloned().collect();
        let mut key = Key::new("bench layer", 1);
        for package in &packages {
            key = key.text(&package.file).text(&package.sha256);
        }
        folders.push(cache.entry("layer", &key, |folder| {
            let files = apt.fetch(Suite::Bookworm, &request, &packages)?;
            step(&format!("make a layer of {} packages", files.len()), || {
                layer(folder, |tree| {
                    tree.unpack(&files)?;
                    set_up(tree)
                })
            })
        })?);
        below = all;
    }
    Ok(folders)
}

/// The one program of a shell and its tools.
fn small_layer(cache: &Cache, image: &ContainerImage) -> Result<PathBuf> {
    let key = Key::new("small bench layer", 1).file(&image.busybox)?;
    cache.entry("layer", &key, |folder| {
        layer(folder, |tree| {
            fs::copy(&image.busybox, tree.path("usr/bin/busybox")).context("copy busybox")?;
            for name in output(Command::new(&image.busybox).arg("--list"))?.lines() {
                if name != "busybox" {
                    symlink("busybox", tree.path("usr/bin").join(name)).context("link an applet")?;
                }
            }
            fs::create_dir_all(tree.path("etc")).context("make /etc")?;
            fs::write(tree.path("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").context("write passwd")?;
            fs::write(tree.path("etc/group"), "root:x:0:\n").context("write group")
        })
    })
}

/// Packs the tree that `fill` fills; `layer.tar.gz` and `diff_id` of `folder`.
fn layer(folder: &Path, fill: impl FnOnce(&Tree) -> Result<()>) -> Result<()> {
    let (root, tar) = (folder.join("root"), folder.join("layer.tar"));
    let tree = Tree::create(&root)?;
    fill(&tree)?;
    for name in ["dev", "proc", "sys", "run", "tmp", "root"] {
        fs::create_dir_all(tree.path(name)).with_context(|| format!("make /{name}"))?;
    }
    oci::pack(&root, &tar)?;
    fs::remove_dir_all(root).context("remove the unpacked tree")?;
    fs::write(folder.join("diff_id"), format!("sha256:{}", hash_file(&tar)?)).context("write a digest")?;
    output(Command::new("gzip").args(["-6", "--no-name"]).arg(&tar)).map(drop)
}

/// What maintainer scripts would have done for a container.
fn set_up(tree: &Tree) -> Result<()> {
    for name in ["passwd", "group"] {
        let master = tree.path(&format!("usr/share/base-passwd/{name}.master"));
        if master.exists() {
            fs::copy(master, tree.path(&format!("etc/{name}")))
                .with_context(|| format!("make /etc/{name}"))?;
        }
    }
    Ok(())
}
