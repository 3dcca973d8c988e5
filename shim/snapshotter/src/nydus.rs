//! Nydus images: which layers they have, and what their containers get.
//!
//! A Nydus image's layers are blobs, and last its bootstrap, an ordinary tar with `image/image.boot` in it. Their annotations come as
//! labels (container.md of the project's research, section 3). Blobs are not unpacked: the image service reads them by parts.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::api::Mount;
use crate::error::SnapshotError;
use crate::mounts;
use crate::snapshot::{Labels, Snapshot};
use crate::store::Store;

/// A layer that is a blob.
pub const BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// A layer that is the bootstrap.
pub const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// `5` or `6`.
pub const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
/// The image's name, which CRI says when `disable_snapshot_annotations` is false.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The committed snapshot that containerd would like to have.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// Type of the mount that runtimes for VMs understand.
pub const MOUNT_TYPE: &str = "fuse.nydus-overlayfs";
/// Where the bootstrap is in its layer.
const IMAGE: &str = "image/image.boot";

/// What operators say.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Registries (`HOST` or `HOST:PORT`) that are asked without TLS.
    pub plain_http: Vec<String>,
}

/// The snapshot that containerd wants, when it asks for a layer that nobody needs to unpack.
pub fn blob_target(labels: &Labels) -> Option<&str> {
    labels.contains_key(BLOB).then(|| labels.get(TARGET).map(String::as_str)).flatten()
}

/// Whether this is a bootstrap, unpacked or being unpacked.
pub fn is_bootstrap(snapshot: &Snapshot) -> bool {
    snapshot.labels.contains_key(BOOTSTRAP)
}

/// The mount of `top`, which stands on ordinary `layers`, if any, and those on the image of `bootstrap`.
pub(crate) fn mount(
    store: &Store,
    config: &Config,
    top: &Snapshot,
    layers: &[&Snapshot],
    bootstrap: &Snapshot,
) -> Result<Mount, SnapshotError> {
    let source = store.files(bootstrap).join(IMAGE);
    let extra = json!({
        "source": source,
        "config": backend(config, &bootstrap.labels)?,
        "snapshotdir": store.files(top).parent(),
        "fs_version": fs_version(&bootstrap.labels),
    });
    // The last of `lowerdir` is where a host has the image mounted, as nydus-snapshotter has it; ours mounts none.
    let with_image: Vec<&Snapshot> = layers.iter().copied().chain([bootstrap]).collect();
    let mut options = mounts::options(store, top, &with_image)?;
    options.push(format!("extraoption={}", STANDARD.encode(extra.to_string())));
    Ok(mounts::overlay(MOUNT_TYPE, options))
}

/// `v5` or `v6`; converters of the field write 6 where they say nothing.
fn fs_version(labels: &Labels) -> String {
    format!("v{}", labels.get(FS_VERSION).map_or("6", String::as_str))
}

/// The daemon configuration that says where the image's blobs are. Empty where containerd did not say the image's name: the image
/// service then knows by itself or not at all.
fn backend(config: &Config, labels: &Labels) -> Result<String, SnapshotError> {
    let Some(image) = labels.get(IMAGE_REF) else { return Ok(String::new()) };
    let (host, repository) = parse_reference(image).ok_or_else(|| {
        SnapshotError::Invalid(format!("image {image:?} is not HOST/REPOSITORY[:TAG][@DIGEST]"))
    })?;
    let mut registry = json!({ "host": host, "repo": repository });
    if config.plain_http.iter().any(|plain| plain == host) {
        registry["scheme"] = Value::from("http");
    }
    let config = json!({
        "device": {
            "backend": { "type": "registry", "config": registry },
            "cache": { "type": "blobcache", "config": {} },
        },
        "mode": "direct",
        "digest_validate": true,
    });
    Ok(config.to_string())
}

/// Host and repository of a whole image name.
fn parse_reference(image: &str) -> Option<(&str, &str)> {
    let (host, rest) = image.split_once('/')?;
    let rest = rest.split_once('@').map_or(rest, |(rest, _)| rest);
    // A tag has no slash; a port has been split off with the host.
    let repository = match rest.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => rest,
    };
    let host = if host == "docker.io" { "registry-1.docker.io" } else { host };
    (!host.is_empty() && !repository.is_empty()).then_some((host, repository))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_images_are_taken_apart() {
        for (image, expected) in [
            ("localhost:5000/a/b:latest", Some(("localhost:5000", "a/b"))),
            ("example.org/app@sha256:00", Some(("example.org", "app"))),
            ("example.org/app:1@sha256:00", Some(("example.org", "app"))),
            ("docker.io/library/debian:12", Some(("registry-1.docker.io", "library/debian"))),
            ("example.org/app", Some(("example.org", "app"))),
            ("app", None),
            ("example.org/:1", None),
        ] {
            assert_eq!(parse_reference(image), expected, "{image}");
        }
    }

    #[test]
    fn the_daemon_is_told_where_blobs_are() {
        let config = Config { plain_http: vec!["localhost:5000".into()] };
        let labels = Labels::from([(IMAGE_REF.to_owned(), "localhost:5000/app:1".to_owned())]);
        let value: Value = serde_json::from_str(&backend(&config, &labels).unwrap()).unwrap();
        let expected = json!({"type": "registry", "config": {"host": "localhost:5000", "repo": "app", "scheme": "http"}});
        assert_eq!(value["device"]["backend"], expected);
        assert_eq!(backend(&config, &Labels::new()).unwrap(), "");
        let odd = Labels::from([(IMAGE_REF.to_owned(), "app".to_owned())]);
        assert!(backend(&config, &odd).unwrap_err().to_string().contains("\"app\""));
    }
}
