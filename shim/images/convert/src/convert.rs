//! From an OCI image to a Nydus image.
//!
//! ```text
//! each layer ── fetch ── decompress, normalise ── build ──> a blob of chunks, and a bootstrap of the layer
//!                                                              merge ──> the image's bootstrap: whiteouts have taken effect
//! the new image: its blobs as layers, then a layer with the bootstrap in it, and the old configuration with new diff ids
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::name::ImageName;
use crate::oci::{Descriptor, Index, Manifest, annotation, media};
use crate::progress::{Progress, size};
use crate::rafs::{self, Layer, Options};
use crate::remote::Credentials;
use crate::store::{Raw, Store};
use crate::tar::{self, Folders};
use crate::values::Values;

/// What to convert, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// An OCI image.
    pub source: ImageName,
    /// Name of the Nydus image.
    pub destination: ImageName,
    /// A Nydus image whose chunks need not be stored again.
    pub parent: Option<ImageName>,
    /// Layers stay as they are and get an index (zran).
    pub reference: bool,
    /// How to build.
    pub options: Options,
    /// Architecture, as Go has it, where the source has several.
    pub architecture: String,
    /// How registries let us in.
    pub credentials: Credentials,
}

/// What a conversion did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// Digest of the new manifest.
    pub manifest: String,
    /// Bytes of the source's layers.
    pub source_bytes: u64,
    /// Bytes of the new blobs and of the bootstrap's layer.
    pub new_bytes: u64,
    /// Blobs of the parent that are used.
    pub parent_blobs: usize,
}

/// The architecture of this machine, as Go has it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Finds the image of a name: of several, that of the architecture.
pub async fn find(store: &Store, name: &ImageName, architecture: &str) -> Result<Manifest> {
    let mut raw = store.named(name).await?;
    // An index names manifests, and may name an index.
    for _ in 0..3 {
        let value: Value =
            serde_json::from_slice(&raw.bytes).with_context(|| format!("the manifest of {name}"))?;
        if value.get("manifests").is_none() {
            let manifest = serde_json::from_value(value);
            return manifest.with_context(|| format!("{name} is no OCI image ({})", raw.media_type));
        }
        let index: Index = serde_json::from_value(value).with_context(|| format!("the index of {name}"))?;
        let fits = |descriptor: &&Descriptor| match &descriptor.platform {
            Some(platform) => platform.os == "linux" && platform.architecture == architecture,
            None => index.manifests.len() == 1,
        };
        let Some(found) = index.manifests.iter().find(fits) else {
            bail!("{name} has no image for linux/{architecture}");
        };
        raw = store.manifest(found).await?;
    }
    bail!("{name}: an index of indexes of indexes")
}

/// Brings the bootstrap of a Nydus image into a file.
pub async fn fetch_bootstrap(store: &Store, name: &ImageName, manifest: &Manifest, to: &Path) -> Result<()> {
    let Some(layer) = manifest.bootstrap() else { bail!("{name} is no Nydus image: it has no bootstrap") };
    let packed = to.with_extension("layer");
    let mut progress = Progress::new(format!("bootstrap of {name}"), layer.size);
    store.fetch(layer, &packed, &mut progress).await?;
    progress.end();
    tar::read_bootstrap_layer(&packed, to)?;
    Ok(fs::remove_file(packed)?)
}

/// A parent: its store, and its blobs by their names.
struct Parent {
    store: Store,
    blobs: BTreeMap<String, Descriptor>,
    bootstrap: PathBuf,
}

/// Converts.
pub async fn convert(request: &Request) -> Result<Done> {
    let work = TempDir::with_prefix("ctvm-convert").context("make a temporary folder")?;
    let blobs = work.path().join("blobs");
    fs::create_dir_all(&blobs)?;
    let source = Store::of(&request.source, &request.credentials)?;
    let target = Store::of(&request.destination, &request.credentials)?;
    let manifest = find(&source, &request.source, &request.architecture).await?;
    ensure!(manifest.bootstrap().is_none(), "{} is a Nydus image already", request.source);
    ensure!(!manifest.layers.is_empty(), "{} has no layers", request.source);
    ensure!(
        !(request.reference && request.parent.is_some()),
        "an index over plain layers stores no chunks: it has no use for a parent"
    );
    let parent = match &request.parent {
        Some(name) => Some(self::parent(name, request, work.path()).await?),
        None => None,
    };
    let mut options = request.options.clone();
    options.parent = parent.as_ref().map(|parent| parent.bootstrap.clone());

    let mut layers = Vec::with_capacity(manifest.layers.len());
    // Of a plain layer's digest: its index's, and the layer.
    let mut indexes = BTreeMap::new();
    let (mut folders, mut values) = (Folders::default(), Values::default());
    let count = manifest.layers.len();
    for (number, layer) in manifest.layers.iter().enumerate() {
        let file = work.path().join("layer");
        let mut progress = Progress::new(format!("layer {} of {count}", number + 1), layer.size);
        source.fetch(layer, &file, &mut progress).await?;
        progress.end();
        let progress = Progress::new(format!("build {} of {count}", number + 1), 0);
        let bootstrap = work.path().join(format!("{number}.boot"));
        let known = (!request.reference).then_some((&mut folders, &mut values));
        let built = build(&file, &bootstrap, &blobs, known, &options)
            .with_context(|| format!("layer {}", layer.digest))?;
        if let Some(index) = built {
            let hex = layer.hex().context("a layer without a SHA-256 digest")?;
            let mut progress = Progress::new("store the plain layer", layer.size);
            target.put(hex, &file, &mut progress).await?;
            progress.end();
            indexes.insert(hex.to_owned(), index);
        }
        progress.end();
        layers.push(bootstrap);
        fs::remove_file(&file)?;
    }
    let bootstrap = work.path().join("image.boot");
    let merged = rafs::merge(&layers, &bootstrap, options.parent.as_deref())?;
    if !values.is_empty() {
        let mut bytes = fs::read(&bootstrap)?;
        values.put_back(&mut bytes);
        fs::write(&bootstrap, bytes)?;
    }

    let mut done =
        Done { source_bytes: manifest.layers.iter().map(|layer| layer.size).sum(), ..Done::default() };
    let mut descriptors = Vec::new();
    for blob in &merged.blobs {
        let index = indexes.get(blob);
        let stored = index.unwrap_or(blob);
        let file = blobs.join(stored);
        let mut descriptor = if file.exists() {
            let bytes = fs::metadata(&file)?.len();
            let mut progress = Progress::new(format!("store the blob {}", &stored[..12]), bytes);
            done.new_bytes += bytes;
            target.put(stored, &file, &mut progress).await?;
            progress.end();
            blob_descriptor(stored, bytes)
        } else {
            let parent = parent.as_ref().with_context(|| format!("the blob {stored} was not built"))?;
            done.parent_blobs += 1;
            parent.take(stored, &target, work.path()).await?
        };
        if index.is_some() {
            descriptor.annotations.insert(annotation::REFERENCE.into(), format!("sha256:{blob}"));
        }
        descriptors.push(descriptor);
    }

    let layer = work.path().join("bootstrap.tar.gz");
    let uncompressed = tar::write_bootstrap_layer(&bootstrap, &layer)?;
    let (digest, bytes) = tar::digest(&layer)?;
    done.new_bytes += bytes;
    let mut progress = Progress::new("store the bootstrap", bytes);
    target.put(&digest, &layer, &mut progress).await?;
    progress.end();
    descriptors.push(Descriptor {
        media_type: media::LAYER_GZIP.into(),
        digest: format!("sha256:{digest}"),
        size: bytes,
        annotations: [
            (annotation::BOOTSTRAP.to_owned(), "true".to_owned()),
            (annotation::FS_VERSION.to_owned(), request.options.version.to_string()),
        ]
        .into(),
        platform: None,
    });
    let config = new_config(&source, &manifest.config, work.path(), &descriptors, &uncompressed).await?;
    let (digest, bytes) = tar::digest(&config)?;
    target.put(&digest, &config, &mut Progress::new("store the configuration", bytes)).await?;
    let new = Manifest {
        schema_version: 2,
        media_type: Some(media::MANIFEST.into()),
        config: Descriptor {
            media_type: media::CONFIG.into(),
            digest: format!("sha256:{digest}"),
            size: bytes,
            annotations: BTreeMap::new(),
            platform: None,
        },
        layers: descriptors,
        more: manifest.more.into_iter().filter(|(name, _)| name == "annotations").collect(),
    };
    let raw = Raw { media_type: media::MANIFEST.into(), bytes: serde_json::to_vec(&new)? };
    target.name(&request.destination, &raw).await?;
    done.manifest = {
        use sha2::Digest;
        format!("sha256:{:x}", sha2::Sha256::digest(&raw.bytes))
    };
    Ok(done)
}

/// Builds a layer's bootstrap, with what is known of the layers below. Of a plain layer, which stays as it is: its index's digest.
fn build(
    layer: &Path,
    bootstrap: &Path,
    blobs: &Path,
    known: Option<(&mut Folders, &mut Values)>,
    options: &Options,
) -> Result<Option<String>> {
    let Some((folders, values)) = known else {
        let gzip = fs::read(layer).map(|bytes| bytes.starts_with(&[0x1f, 0x8b]))?;
        ensure!(gzip, "only gzip layers can be indexed");
        ensure!(
            tar::is_normal(tar::open_layer(layer)?)?,
            "its archive leaves out folders or device numbers, or has attributes with line ends, so it cannot be indexed as it is: convert without --reference"
        );
        let names = || -> Result<Vec<String>> {
            let entries = fs::read_dir(blobs)?.flatten();
            Ok(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        };
        let before = names()?;
        rafs::build_layer(Layer::Reference, layer, bootstrap, blobs, options)?;
        // A layer twice in an image has one index.
        return Ok(names()?.into_iter().find(|name| !before.contains(name)));
    };
    folders.next_layer();
    let plain = layer.with_extension("tar");
    let mut file = BufWriter::new(File::create(&plain)?);
    tar::normalise(tar::open_layer(layer)?, &mut file, folders, values)?;
    file.flush()?;
    drop(file);
    rafs::build_layer(Layer::Tar, &plain, bootstrap, blobs, options)?;
    fs::remove_file(plain)?;
    Ok(None)
}

async fn parent(name: &ImageName, request: &Request, work: &Path) -> Result<Parent> {
    let store = Store::of(name, &request.credentials)?;
    let manifest = find(&store, name, &request.architecture).await?;
    let bootstrap = work.join("parent.boot");
    fetch_bootstrap(&store, name, &manifest, &bootstrap).await?;
    let blobs = manifest.layers.iter().filter(|layer| layer.annotations.contains_key(annotation::BLOB));
    let blobs = blobs.filter_map(|layer| Some((layer.hex()?.to_owned(), layer.clone()))).collect();
    Ok(Parent { store, blobs, bootstrap })
}

impl Parent {
    /// Has a blob of the parent in the target too.
    async fn take(&self, hex: &str, target: &Store, work: &Path) -> Result<Descriptor> {
        let descriptor = self.blobs.get(hex).with_context(|| format!("the parent has no blob {hex}"))?;
        if !target.has(hex).await? {
            let file = work.join("taken");
            let mut progress = Progress::new(format!("the parent's blob {}", &hex[..12]), descriptor.size);
            self.store.fetch(descriptor, &file, &mut progress).await?;
            target.put(hex, &file, &mut progress).await?;
            progress.end();
        }
        Ok(blob_descriptor(hex, descriptor.size))
    }
}

fn blob_descriptor(hex: &str, bytes: u64) -> Descriptor {
    Descriptor {
        media_type: media::NYDUS_BLOB.into(),
        digest: format!("sha256:{hex}"),
        size: bytes,
        annotations: [(annotation::BLOB.to_owned(), "true".to_owned())].into(),
        platform: None,
    }
}

/// The configuration with the new layers' diff ids: a blob's is its digest.
async fn new_config(
    source: &Store,
    old: &Descriptor,
    work: &Path,
    layers: &[Descriptor],
    bootstrap: &str,
) -> Result<PathBuf> {
    let file = work.join("config.json");
    source.fetch(old, &file, &mut Progress::new("configuration", old.size)).await?;
    let mut config: Map<String, Value> =
        serde_json::from_slice(&fs::read(&file)?).context("understand the image's configuration")?;
    let (_, blobs) = layers.split_last().context("an image without a bootstrap")?;
    let mut ids: Vec<String> = blobs.iter().map(|layer| layer.digest.clone()).collect();
    ids.push(format!("sha256:{bootstrap}"));
    config.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": ids }));
    // As many entries with content as layers, which runtimes may count.
    let mut history: Vec<Value> =
        blobs.iter().map(|_| json!({ "created_by": "ctvm image convert" })).collect();
    history.push(json!({ "created_by": "ctvm image convert", "comment": "Nydus Bootstrap Layer" }));
    config.insert("history".into(), Value::Array(history));
    fs::write(&file, serde_json::to_vec(&config)?)?;
    Ok(file)
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}: {} of layers became {}",
            self.manifest,
            size(self.source_bytes),
            size(self.new_bytes)
        )?;
        match self.parent_blobs {
            0 => Ok(()),
            count => write!(f, " beside {count} blobs of the parent"),
        }
    }
}
