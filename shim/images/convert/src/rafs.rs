//! The Nydus builder: of folders and layers to blobs and bootstraps.
//!
//! The builder crates write for `nydusd` and everyone else who reads RAFS, so what they write is what the field reads. They are
//! a program's insides made public: a context of many fields, and some state of its own for each build.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use nydus_api::ConfigV2;
use nydus_builder::attributes::Attributes;
use nydus_builder::{
    ArtifactStorage, BlobManager, BootstrapManager, BuildContext, Builder, ConversionType, DirectoryBuilder,
    Features, HashChunkDict, Merger, Prefetch, PrefetchPolicy, TarballBuilder, WhiteoutSpec,
};
use nydus_rafs::metadata::{RafsSuperConfig, RafsVersion};
use nydus_storage::device::BlobFeatures;
use nydus_utils::{compress, digest};

/// How to build.
#[derive(Debug, Clone)]
pub struct Options {
    /// RAFS version, 5 or 6.
    pub version: u8,
    /// How chunks are compressed: `none`, `lz4_block`, `gzip` or `zstd`.
    pub compressor: String,
    /// Bytes of a chunk, a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Chunks of an image that exists already are named and not stored again: its bootstrap.
    pub parent: Option<PathBuf>,
    /// Paths to fetch ahead, one a line, are read from standard input.
    pub prefetch: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { version: 6, compressor: "zstd".into(), chunk_size: 1 << 20, parent: None, prefetch: false }
    }
}

/// What a layer is built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// An uncompressed tar archive; its chunks go into a blob of their own.
    Tar,
    /// A gzip-compressed tar archive that stays where it is; only an index over it is made (zran).
    Reference,
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The bootstrap.
    pub bootstrap: PathBuf,
    /// Blobs that it names, the parent's first.
    pub blobs: Vec<String>,
}

/// Builds `bootstrap` of a folder, and its blob in `blobs`.
pub fn build_folder(folder: &Path, bootstrap: &Path, blobs: &Path, options: &Options) -> Result<Built> {
    ensure!(folder.is_dir(), "{} is no folder", folder.display());
    build(ConversionType::DirectoryToRafs, folder, bootstrap, blobs, options)
}

/// Builds `bootstrap` of one layer, and its blob or its index in `blobs`.
pub fn build_layer(
    kind: Layer,
    layer: &Path,
    bootstrap: &Path,
    blobs: &Path,
    options: &Options,
) -> Result<Built> {
    let conversion = match kind {
        Layer::Tar => ConversionType::TarToRafs,
        Layer::Reference => ConversionType::TargzToRef,
    };
    build(conversion, layer, bootstrap, blobs, options)
}

fn build(
    conversion: ConversionType,
    source: &Path,
    bootstrap: &Path,
    blobs: &Path,
    options: &Options,
) -> Result<Built> {
    std::fs::create_dir_all(blobs).with_context(|| format!("make {}", blobs.display()))?;
    let version = version(options)?;
    let by_reference = conversion.is_to_ref();
    let (compressor, digester) = if by_reference {
        (compress::Algorithm::GZip, digest::Algorithm::Sha256)
    } else {
        let compressor: compress::Algorithm =
            options.compressor.parse().with_context(|| format!("compressor {}", options.compressor))?;
        (compressor, digest::Algorithm::Blake3)
    };
    let policy = if options.prefetch && !by_reference { PrefetchPolicy::Fs } else { PrefetchPolicy::None };
    let mut context = BuildContext::new(
        String::new(),
        version.is_v6(),
        0,
        compressor,
        digester,
        true,
        WhiteoutSpec::Oci,
        conversion,
        source.to_owned(),
        Prefetch::new(policy)?,
        Some(ArtifactStorage::FileDir((blobs.to_owned(), String::new()))),
        None,
        false,
        Features::new(),
        false,
        Attributes::default(),
    );
    context.set_fs_version(version);
    context.set_chunk_size(options.chunk_size);
    let config = ConfigV2::new("ctvm");
    config.internal.set_blob_accessible(true);
    context.set_configuration(Arc::new(config));
    if by_reference {
        ensure!(version.is_v6(), "an index over a plain layer needs version 6");
        context.blob_features.insert(BlobFeatures::CHUNK_INFO_V2);
        context.blob_features.insert(BlobFeatures::SEPARATE);
    }
    let mut manager = BlobManager::new(digester, false);
    if let Some(parent) = &options.parent {
        let known = RafsSuperConfig {
            version,
            compressor,
            digester,
            chunk_size: options.chunk_size,
            batch_size: 0,
            explicit_uidgid: true,
            is_tarfs_mode: false,
        };
        let dictionary = HashChunkDict::from_bootstrap_file(parent, quiet_config(), &known)
            .with_context(|| format!("read the chunks of the parent {}", parent.display()))?;
        manager.set_chunk_dict(Arc::new(dictionary));
    }
    let storage = Some(ArtifactStorage::SingleFile(bootstrap.to_owned()));
    let mut bootstraps = BootstrapManager::new(storage, None);
    let built = if conversion == ConversionType::DirectoryToRafs {
        DirectoryBuilder::new().build(&mut context, &mut bootstraps, &mut manager)
    } else {
        TarballBuilder::new(conversion).build(&mut context, &mut bootstraps, &mut manager)
    };
    let built = built.with_context(|| format!("build of {}", source.display()))?;
    // A bootstrap of what is kept elsewhere: nothing is.
    let _ = std::fs::remove_file(bootstrap.with_extension("external"));
    Ok(Built { bootstrap: bootstrap.to_owned(), blobs: built.blobs })
}

/// Merges the bootstraps of an image's layers, lowest first, into `bootstrap`: whiteouts and opaque folders have taken effect.
pub fn merge(layers: &[PathBuf], bootstrap: &Path, parent: Option<&Path>) -> Result<Built> {
    let mut context = BuildContext::default();
    let config = quiet_config();
    // The blobs' names in the layers' bootstraps are right: nothing was inlined into them.
    config.internal.set_blob_accessible(true);
    context.configuration = Arc::clone(&config);
    let merged = Merger::merge(
        &mut context,
        None,
        layers.to_vec(),
        None,
        None,
        None,
        None,
        None,
        ArtifactStorage::SingleFile(bootstrap.to_owned()),
        parent.map(Path::to_owned),
        config,
    )
    .context("merge the layers' bootstraps")?;
    Ok(Built { bootstrap: bootstrap.to_owned(), blobs: merged.blobs })
}

fn version(options: &Options) -> Result<RafsVersion> {
    ensure!(matches!(options.version, 5 | 6), "RAFS version {}: there are 5 and 6", options.version);
    let size = options.chunk_size;
    ensure!(
        size.is_power_of_two() && (4 << 10..=16 << 20).contains(&size),
        "a chunk of {size} bytes: a power of two from 4 KiB to 16 MiB is wanted"
    );
    Ok(if options.version == 5 { RafsVersion::V5 } else { RafsVersion::V6 })
}

/// A configuration under which no blob is looked for.
pub(crate) fn quiet_config() -> Arc<ConfigV2> {
    Arc::new(ConfigV2::new("ctvm"))
}
