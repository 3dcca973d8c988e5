//! OCI image layouts (OCI image-spec 1.1, image-layout.md), the same each time they are made.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cache::hash_file;

/// Media type of an image's manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A layer that is in a layout.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its descriptor.
    pub descriptor: Value,
    /// Digest of its uncompressed archive.
    pub diff_id: String,
}

/// Makes the folder of a layout.
pub fn make_layout(layout: &Path) -> Result<()> {
    fs::create_dir_all(layout.join("blobs/sha256")).context("make the layout")
}

/// Writes what refers to the images, last of all.
pub fn write_index(layout: &Path, manifests: &[Value]) -> Result<()> {
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?).context("write the index")?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
        .context("write the layout's mark")
}

/// Configuration and manifest of one image; the manifest's descriptor, by which it is `name` to containerd.
pub fn write_image(layout: &Path, layers: &[Layer], name: &str, command: &Value) -> Result<Value> {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": command,
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = json_blob(layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let layers: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    let mut manifest = json_blob(layout, &manifest, MANIFEST)?;
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
pub fn blob(layout: &Path, file: &Path, kind: &str) -> Result<Value> {
    let (hash, size) = (hash_file(file)?, fs::metadata(file).context("look at a blob")?.len());
    fs::rename(file, layout.join("blobs/sha256").join(&hash)).context("put a blob in place")?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{hash}"), "size": size}))
}

/// A tar file that is the same each time.
pub fn pack(folder: &Path, to: &Path) -> Result<()> {
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
