//! A place that has images, read from and written to in the same way.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::layout::Layout;
use crate::name::ImageName;
use crate::oci::Descriptor;
use crate::progress::Progress;
use crate::remote::{Credentials, Remote};

/// Most bytes of a manifest or an index.
pub const MAX_MANIFEST: u64 = 8 << 20;

/// A repository of a registry, or a layout folder.
#[derive(Debug)]
pub enum Store {
    /// A folder.
    Layout(Layout),
    /// A registry.
    Remote(Box<Remote>),
}

/// A manifest or an index as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    /// What it says it is.
    pub media_type: String,
    /// It.
    pub bytes: Vec<u8>,
}

impl Store {
    /// The store of a name.
    pub fn of(name: &ImageName, credentials: &Credentials) -> Result<Self> {
        Ok(match name {
            ImageName::Layout { folder, .. } => Store::Layout(Layout::new(folder)),
            ImageName::Registry { scheme, host, repository, .. } => {
                Store::Remote(Box::new(Remote::new(scheme, host, repository, credentials)?))
            }
        })
    }

    /// What the name names.
    pub async fn named(&self, name: &ImageName) -> Result<Raw> {
        match (self, name) {
            (Store::Layout(layout), ImageName::Layout { reference, .. }) => {
                layout.named(reference.as_deref())
            }
            (Store::Remote(remote), ImageName::Registry { reference, .. }) => {
                remote.manifest(reference).await
            }
            _ => unreachable!("a store is made of a name of its kind"),
        }
        .with_context(|| format!("read the manifest of {name}"))
    }

    /// The manifest of a descriptor.
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Raw> {
        let raw = match self {
            Store::Layout(layout) => layout.manifest(descriptor)?,
            Store::Remote(remote) => remote.manifest(&descriptor.digest).await?,
        };
        let got = format!("sha256:{:x}", Sha256::digest(&raw.bytes));
        ensure!(got == descriptor.digest, "the manifest {} has the digest {got}", descriptor.digest);
        Ok(raw)
    }

    /// Brings a blob into a file, verified.
    pub async fn fetch(&self, descriptor: &Descriptor, to: &Path, progress: &mut Progress) -> Result<()> {
        let size = self.fetch_any(descriptor, to, progress).await?;
        let Descriptor { digest, size: wanted, .. } = descriptor;
        ensure!(size == *wanted, "the blob {digest} has {size} bytes, not {wanted}");
        Ok(())
    }

    /// As [`Store::fetch`], of a blob whose size is not known where the descriptor says 0. Its size.
    pub async fn fetch_any(
        &self,
        descriptor: &Descriptor,
        to: &Path,
        progress: &mut Progress,
    ) -> Result<u64> {
        let digest = &descriptor.digest;
        ensure!(descriptor.hex().is_some(), "{digest} is no SHA-256 digest");
        let fetched = match self {
            Store::Layout(layout) => layout.fetch(descriptor, to, progress),
            Store::Remote(remote) => remote.fetch(descriptor, to, progress).await,
        };
        fetched.with_context(|| format!("fetch the blob {digest}"))?;
        let (got, size) = crate::tar::digest(to)?;
        ensure!(
            descriptor.hex() == Some(got.as_str()),
            "the blob {digest} came with the digest sha256:{got}"
        );
        Ok(size)
    }

    /// Whether a blob is there.
    pub async fn has(&self, hex: &str) -> Result<bool> {
        match self {
            Store::Layout(layout) => Ok(layout.has(hex)),
            Store::Remote(remote) => remote.has(hex).await,
        }
    }

    /// Puts a blob there, unless it is. Whether it was not.
    pub async fn put(&self, hex: &str, from: &Path, progress: &mut Progress) -> Result<bool> {
        if self.has(hex).await? {
            return Ok(false);
        }
        match self {
            Store::Layout(layout) => layout.put(hex, from, progress),
            Store::Remote(remote) => remote.put(hex, from, progress).await,
        }
        .with_context(|| format!("store the blob sha256:{hex}"))?;
        Ok(true)
    }

    /// Gives a manifest the name.
    pub async fn name(&self, name: &ImageName, raw: &Raw) -> Result<()> {
        match (self, name) {
            (Store::Layout(layout), ImageName::Layout { reference, .. }) => {
                layout.name(reference.as_deref(), raw)
            }
            (Store::Remote(remote), ImageName::Registry { reference, .. }) => {
                remote.name(reference, raw).await
            }
            _ => unreachable!("a store is made of a name of its kind"),
        }
        .with_context(|| format!("store the manifest as {name}"))
    }
}
