//! An OCI image layout folder: `index.json`, `oci-layout`, `blobs/sha256/…`.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::oci::{Descriptor, Index, annotation, media};
use crate::progress::Progress;
use crate::store::{MAX_MANIFEST, Raw};

/// A layout folder.
#[derive(Debug)]
pub struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// In `folder`, which need not be there before something is written.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn blob(&self, hex: &str) -> PathBuf {
        self.folder.join("blobs/sha256").join(hex)
    }

    fn index(&self) -> Result<Option<Index>> {
        let path = self.folder.join("index.json");
        if !path.exists() {
            return Ok(None);
        }
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&bytes).map(Some).with_context(|| format!("understand {}", path.display()))
    }

    /// The manifest of that name.
    pub fn named(&self, name: Option<&str>) -> Result<Raw> {
        let index = self.index()?.with_context(|| format!("{} has no index.json", self.folder.display()))?;
        let named = |descriptor: &&Descriptor| {
            name.is_none_or(|name| {
                // The tag alone, or as containerd writes it, the whole.
                let names = [annotation::NAME, annotation::CONTAINERD_NAME];
                names.iter().any(|key| descriptor.annotations.get(*key).is_some_and(|its| its == name))
                    || descriptor.digest == name
            })
        };
        let found: Vec<&Descriptor> = index.manifests.iter().filter(named).collect();
        match found.as_slice() {
            [one] => self.manifest(one),
            [] => bail!("there is none of that name"),
            several => bail!("there are {}: name one as oci:FOLDER:NAME", several.len()),
        }
    }

    /// A manifest.
    pub fn manifest(&self, descriptor: &Descriptor) -> Result<Raw> {
        let hex = descriptor.hex().with_context(|| format!("{} is no SHA-256 digest", descriptor.digest))?;
        ensure!(descriptor.size <= MAX_MANIFEST, "a manifest of {} bytes", descriptor.size);
        let bytes = fs::read(self.blob(hex)).with_context(|| format!("read {}", self.blob(hex).display()))?;
        Ok(Raw { media_type: descriptor.media_type.clone(), bytes })
    }

    /// Copies a blob.
    pub fn fetch(&self, descriptor: &Descriptor, to: &Path, progress: &mut Progress) -> Result<()> {
        let hex = descriptor.hex().context("no SHA-256 digest")?;
        copy(&self.blob(hex), to, progress)
    }

    /// Whether a blob is there.
    pub fn has(&self, hex: &str) -> bool {
        self.blob(hex).is_file()
    }

    /// Puts a blob there.
    pub fn put(&self, hex: &str, from: &Path, progress: &mut Progress) -> Result<()> {
        self.make()?;
        let new = self.blob(&format!("{hex}.new"));
        copy(from, &new, progress)?;
        Ok(fs::rename(&new, self.blob(hex))?)
    }

    /// Gives a manifest the name; what had it is not the image of that name any more.
    pub fn name(&self, name: Option<&str>, raw: &Raw) -> Result<()> {
        self.make()?;
        let hex = format!("{:x}", Sha256::digest(&raw.bytes));
        fs::write(self.blob(&hex), &raw.bytes)?;
        let mut index = self.index()?.unwrap_or_else(|| Index {
            schema_version: 2,
            media_type: Some(media::INDEX.into()),
            manifests: Vec::new(),
            more: serde_json::Map::new(),
        });
        index.manifests.retain(|known| known.annotations.get(annotation::NAME).map(String::as_str) != name);
        let named = name.map(|name| (annotation::NAME.to_owned(), name.to_owned()));
        index.manifests.push(Descriptor {
            media_type: raw.media_type.clone(),
            digest: format!("sha256:{hex}"),
            size: raw.bytes.len() as u64,
            annotations: named.into_iter().collect(),
            platform: None,
        });
        let (path, new) = (self.folder.join("index.json"), self.folder.join("index.json.new"));
        fs::write(&new, serde_json::to_vec_pretty(&index)?)?;
        Ok(fs::rename(new, path)?)
    }

    fn make(&self) -> Result<()> {
        let blobs = self.folder.join("blobs/sha256");
        fs::create_dir_all(&blobs).with_context(|| format!("make {}", blobs.display()))?;
        Ok(fs::write(self.folder.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?)
    }
}

fn copy(from: &Path, to: &Path, progress: &mut Progress) -> Result<()> {
    let mut source = fs::File::open(from).with_context(|| format!("open {}", from.display()))?;
    let mut target = fs::File::create(to).with_context(|| format!("make {}", to.display()))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = source.read(&mut buffer).with_context(|| format!("read {}", from.display()))?;
        if count == 0 {
            return Ok(());
        }
        target.write_all(&buffer[..count]).with_context(|| format!("write {}", to.display()))?;
        progress.add(count as u64);
    }
}
