//! The store of a registry (Distribution's, Debian's `docker-registry`), written as it lies on its disk, so that nothing has to be
//! pushed. `registry/storage/paths.go` of <https://github.com/distribution/distribution> has the picture.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// A store in a folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store below `folder`, which becomes the registry's `rootdirectory`.
    pub fn at(folder: &Path) -> Self {
        Self { root: folder.join("docker/registry/v2") }
    }

    /// Adds the only image of the OCI layout `layout` as `repository`:`tag`. Its blobs become hard links to the layout's.
    pub fn add(&self, layout: &Path, repository: &str, tag: &str) -> Result<()> {
        let index = read_json(&layout.join("index.json"))?;
        let manifest = digest(&index["manifests"][0])?;
        self.take(layout, manifest)?;
        let repository = self.root.join("repositories").join(repository);
        let manifests = repository.join("_manifests");
        link(&manifests.join("revisions/sha256").join(manifest), manifest)?;
        link(&manifests.join("tags").join(tag).join("current"), manifest)?;
        link(&manifests.join("tags").join(tag).join("index/sha256").join(manifest), manifest)?;
        let image = read_json(&layout.join("blobs/sha256").join(manifest))?;
        let layers = image["layers"].as_array().context("a manifest without layers")?;
        for descriptor in layers.iter().chain([&image["config"]]) {
            let hash = digest(descriptor)?;
            self.take(layout, hash)?;
            link(&repository.join("_layers/sha256").join(hash), hash)?;
        }
        Ok(())
    }

    fn take(&self, layout: &Path, hash: &str) -> Result<()> {
        let folder = self.root.join("blobs/sha256").join(&hash[..2]).join(hash);
        let to = folder.join("data");
        if to.exists() {
            return Ok(()); // images share layers
        }
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        let from = layout.join("blobs/sha256").join(hash);
        fs::hard_link(&from, to).with_context(|| format!("link {}", from.display()))
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
}

/// The hash in a descriptor.
fn digest(descriptor: &Value) -> Result<&str> {
    let text = descriptor["digest"].as_str().and_then(|text| text.strip_prefix("sha256:"));
    text.filter(|hash| hash.len() == 64).with_context(|| format!("no digest in {descriptor}"))
}

/// What the registry calls a link: a file with a digest in it.
fn link(folder: &Path, hash: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    fs::write(folder.join("link"), format!("sha256:{hash}")).context("write a link of the registry")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci;

    #[test]
    fn a_layout_becomes_a_tag() {
        let folder = tempfile::tempdir().unwrap();
        let layout = folder.path().join("layout");
        oci::make_layout(&layout).unwrap();
        fs::write(layout.join("layer"), "bytes").unwrap();
        let descriptor = oci::blob(&layout, &layout.join("layer"), "kind").unwrap();
        let layer = oci::Layer { descriptor, diff_id: "sha256:0".into() };
        let manifest = oci::write_image(&layout, std::slice::from_ref(&layer), "name", &Value::Null).unwrap();
        oci::write_index(&layout, std::slice::from_ref(&manifest)).unwrap();
        let store = Store::at(folder.path());
        store.add(&layout, "app", "one").unwrap();
        store.add(&layout, "app", "two").unwrap();
        let root = folder.path().join("docker/registry/v2");
        let current = root.join("repositories/app/_manifests/tags/two/current/link");
        assert_eq!(fs::read_to_string(current).unwrap(), manifest["digest"]);
        let hash = digest(&layer.descriptor).unwrap();
        let data = root.join("blobs/sha256").join(&hash[..2]).join(hash).join("data");
        assert_eq!(fs::read_to_string(data).unwrap(), "bytes");
        assert!(root.join("repositories/app/_layers/sha256").join(hash).join("link").exists());
    }
}
