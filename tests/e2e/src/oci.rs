//! OCI images made on the spot, in a layout folder: a tree for each layer, packed by `tar`, or archives with what no tree of the lab
//! could have.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::{SHARE, run, run_with_input};

/// What containerd calls an image that it [imports](Layout::pack).
pub const NAME: &str = "ctvm.local/original:latest";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Fills `tree` with what a container needs: busybox under the names of `applets`, and folders for the usual mounts.
pub fn busybox_tree(tree: &Path, applets: &[&str]) -> Result<()> {
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy(Path::new(SHARE).join("busybox"), tree.join("bin/busybox"))?;
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for applet in applets {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    Ok(())
}

/// `bytes` bytes that no compressor makes smaller, others for each `seed` but 0.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(bytes).collect()
}

/// What a layer is made of.
#[derive(Debug, Clone, Copy)]
pub enum Layer<'a> {
    /// All of a folder.
    Tree(&'a Path),
    /// Files of this machine at their own places.
    Files(&'a [PathBuf]),
}

impl Layer<'_> {
    fn pack(self, tar: &Path) -> Result<()> {
        let mut command = Command::new("tar");
        command.args(["--xattrs", "--numeric-owner", "-cf"]).arg(tar);
        match self {
            Layer::Tree(tree) => run(command.arg("-C").arg(tree).arg("."))?,
            Layer::Files(files) => {
                let below = |file: &PathBuf| Ok(file.strip_prefix("/")?.display().to_string());
                let names = files.iter().map(below).collect::<Result<Vec<_>>>()?.join("\n");
                run_with_input(command.args(["-C", "/", "--files-from=-"]), names.into_bytes())?
            }
        }
        .ok()
        .map(drop)
    }
}

/// An image layout in a folder of its own.
#[derive(Debug)]
pub struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// The layout `folder` with one image: a layer of each of `trees`, the lowest first, and `config`: see [`Layout::of`].
    pub fn new(folder: &Path, trees: &[&Path], config: &serde_json::Value) -> Result<Layout> {
        let layers: Vec<Layer<'_>> = trees.iter().map(|&tree| Layer::Tree(tree)).collect();
        Self::of(folder, &layers, config)
    }

    /// The layout `folder` with one image: `sources`, a layer each, the lowest first, and `config`, the image's
    /// [configuration](https://github.com/opencontainers/image-spec/blob/main/config.md) but for its `rootfs` and platform.
    pub fn of(folder: &Path, sources: &[Layer<'_>], config: &serde_json::Value) -> Result<Layout> {
        fs::create_dir_all(folder)?;
        let mut archives = Vec::new();
        for (number, source) in sources.iter().enumerate() {
            let tar = folder.join(format!("layer-{number}.tar"));
            source.pack(&tar)?;
            archives.push(tar);
        }
        Self::of_archives(folder, &archives, config)
    }

    /// The same with a layer of each of `archives`, which are moved into the layout. One that ends in `.gz` is compressed.
    pub fn of_archives(folder: &Path, archives: &[PathBuf], config: &serde_json::Value) -> Result<Layout> {
        let layout = Layout { folder: folder.to_owned() };
        fs::create_dir_all(layout.blobs())?;
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for archive in archives {
            let gzip = archive.extension().is_some_and(|extension| extension == "gz");
            let media_type = if gzip { format!("{LAYER}+gzip") } else { LAYER.to_owned() };
            let size = fs::metadata(archive)?.len();
            if gzip {
                let script = "gzip -dc \"$0\" | sha256sum";
                let sum = run(Command::new("sh").args(["-c", script]).arg(archive))?.ok()?;
                diff_ids.push(format!("sha256:{}", sum.split(' ').next().context("a digest")?));
            }
            let digest = layout.take(archive)?;
            if !gzip {
                diff_ids.push(digest.clone());
            }
            layers.push(json!({"mediaType": media_type, "digest": digest, "size": size}));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        })
        .to_string();
        let config = json!({"mediaType": CONFIG, "digest": layout.add(&config)?, "size": config.len()});
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers})
            .to_string();
        let manifest = json!({
            "mediaType": MANIFEST, "digest": layout.add(&manifest)?, "size": manifest.len(),
            "annotations": {"io.containerd.image.name": NAME},
        });
        fs::write(
            folder.join("index.json"),
            json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
        )?;
        fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
        Ok(layout)
    }

    /// How `ctvm image convert` is told of it.
    pub fn source(&self) -> String {
        format!("oci:{}", self.folder.display())
    }

    /// The layout as one file, for `ctr images import`.
    pub fn pack(&self, to: &Path) -> Result<()> {
        let folder = self.folder.as_os_str();
        run(Command::new("tar").arg("-cf").arg(to).arg("-C").arg(folder).args([
            "blobs",
            "index.json",
            "oci-layout",
        ]))?
        .ok()?;
        Ok(())
    }

    fn blobs(&self) -> PathBuf {
        self.folder.join("blobs/sha256")
    }

    fn add(&self, text: &str) -> Result<String> {
        let path = self.folder.join("new");
        fs::write(&path, text)?;
        self.take(&path)
    }

    /// Makes a file a blob, under the digest that is its name.
    fn take(&self, path: &Path) -> Result<String> {
        let sum = run(Command::new("sha256sum").arg(path))?.ok()?;
        let digest = sum.split(' ').next().context("a digest")?.to_owned();
        fs::rename(path, self.blobs().join(&digest))?;
        Ok(format!("sha256:{digest}"))
    }
}
