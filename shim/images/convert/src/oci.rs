//! The OCI image format, as far as a converter changes it. What is not known here is kept as it is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Media types.
pub mod media {
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
}

/// Annotations of a Nydus image's layers.
pub mod annotation {
    pub const BLOB: &str = "containerd.io/snapshot/nydus-blob";
    pub const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
    pub const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
    /// The layer that an index (zran) is over.
    pub const REFERENCE: &str = "containerd.io/snapshot/nydus-ref";
    /// A manifest's name in a layout folder.
    pub const NAME: &str = "org.opencontainers.image.ref.name";
    pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
}

/// Where the bootstrap is in its layer.
pub const BOOTSTRAP_FILE: &str = "image/image.boot";

/// A reference to content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// Notes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// For which platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// The digest's hexadecimal digits, if it is a SHA-256.
    pub fn hex(&self) -> Option<&str> {
        let hex = self.digest.strip_prefix("sha256:")?;
        (hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))).then_some(hex)
    }
}

/// A platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Architecture, as Go has it.
    pub architecture: String,
    /// Operating system.
    pub os: String,
    /// The rest.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// An index of manifests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// What this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    pub manifests: Vec<Descriptor>,
    /// The rest.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// What this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
    /// The rest.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

impl Manifest {
    /// The layer that holds the bootstrap, if this is a Nydus image.
    pub fn bootstrap(&self) -> Option<&Descriptor> {
        self.layers.iter().find(|layer| layer.annotations.contains_key(annotation::BOOTSTRAP))
    }
}
