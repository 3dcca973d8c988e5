//! Whether an image is what it says: every blob its digest, every chunk its own, every file its chunks.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use images::codec::{Compressor, decompress};
use images::rafs::blob_meta::Index;
use images::rafs::{BlobTable, Image, Stored};
use images::zran;
use tempfile::TempDir;

use crate::convert::{fetch_bootstrap, find};
use crate::files;
use crate::name::ImageName;
use crate::oci::Descriptor;
use crate::progress::Progress;
use crate::remote::Credentials;
use crate::store::Store;

/// What was found right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// RAFS version.
    pub version: u8,
    /// Regular files.
    pub files: usize,
    /// Blobs.
    pub blobs: usize,
    /// Chunks.
    pub chunks: usize,
    /// Their bytes, uncompressed.
    pub bytes: u64,
}

/// Checks the image of a name: everything of it is fetched.
pub async fn check(name: &ImageName, architecture: &str, credentials: &Credentials) -> Result<Checked> {
    let work = TempDir::with_prefix("ctvm-check").context("make a temporary folder")?;
    let store = Store::of(name, credentials)?;
    let manifest = find(&store, name, architecture).await?;
    let bootstrap = work.path().join("image.boot");
    fetch_bootstrap(&store, name, &manifest, &bootstrap).await?;
    let image = Image::parse(&fs::read(&bootstrap)?).context("the bootstrap")?;
    let checked = check_files(&bootstrap, &image)?;
    for blob in &image.blobs {
        // A plain layer is in no manifest: its index is, with the layer's name in an annotation.
        let size = match &blob.zran {
            None => {
                manifest.layers.iter().find(|layer| layer.hex() == Some(&blob.id)).map(|layer| layer.size)
            }
            Some(_) => Some(0),
        };
        let size = size.with_context(|| format!("the blob {} is not in the manifest", blob.id))?;
        let data = work.path().join("blob");
        fetch(&store, &blob.id, size, &data).await?;
        let index = match &blob.zran {
            None => None,
            Some(zran) => {
                let listed = manifest.layers.iter().find(|layer| layer.hex() == Some(&zran.blob));
                let listed =
                    listed.with_context(|| format!("the index {} is not in the manifest", zran.blob))?;
                let file = work.path().join("index");
                fetch(&store, &zran.blob, listed.size, &file).await?;
                Some(fs::read(file)?)
            }
        };
        let mut progress = Progress::new(format!("verify {}", &blob.id[..12]), blob.bytes);
        check_blob(blob, &data, index.as_deref(), &mut progress)
            .with_context(|| format!("the blob {}", blob.id))?;
        progress.end();
    }
    Ok(checked)
}

/// Checks a bootstrap in a file with its blobs in a folder.
pub fn check_folder(bootstrap: &Path, blobs: &Path) -> Result<Checked> {
    let bytes = fs::read(bootstrap).with_context(|| format!("read {}", bootstrap.display()))?;
    let image = Image::parse(&bytes).context("the bootstrap")?;
    let checked = check_files(bootstrap, &image)?;
    for blob in &image.blobs {
        let index = match &blob.zran {
            None => None,
            Some(zran) => {
                Some(fs::read(blobs.join(&zran.blob)).with_context(|| format!("the index {}", zran.blob))?)
            }
        };
        let mut progress = Progress::new(format!("verify {}", &blob.id[..12]), blob.bytes);
        check_blob(blob, &blobs.join(&blob.id), index.as_deref(), &mut progress)
            .with_context(|| format!("the blob {}", blob.id))?;
        progress.end();
    }
    Ok(checked)
}

async fn fetch(store: &Store, hex: &str, size: u64, to: &Path) -> Result<()> {
    let descriptor = |size| Descriptor {
        media_type: String::new(),
        digest: format!("sha256:{hex}"),
        size,
        annotations: std::collections::BTreeMap::new(),
        platform: None,
    };
    let mut progress = Progress::new(format!("blob {}", &hex[..12]), size);
    if size > 0 {
        store.fetch(&descriptor(size), to, &mut progress).await?;
    } else {
        // Of unknown size: its digest is what counts.
        store.fetch_any(&descriptor(0), to, &mut progress).await?;
    }
    progress.end();
    Ok(())
}

/// Both readers of RAFS, the field's and ours, find the same: every file's bytes are in chunks.
fn check_files(bootstrap: &Path, image: &Image) -> Result<Checked> {
    let (files, blobs) = files::of_bootstrap(bootstrap)?;
    let ours: Vec<&str> = image.blobs.iter().map(|blob| blob.id.as_str()).collect();
    ensure!(blobs == ours, "the blobs are {blobs:?} by one reading, {ours:?} by the other");
    for file in &files {
        let held: u64 = file.pieces.iter().map(|piece| piece.len).sum();
        ensure!(held == file.size, "{} has {} bytes, its chunks {held}", file.path.display(), file.size);
        for piece in &file.pieces {
            let blob = image.blobs.get(piece.blob as usize).context("a chunk of no blob")?;
            let known = blob.chunks.binary_search_by_key(&piece.offset, |chunk| chunk.offset);
            ensure!(known.is_ok(), "{} has a chunk that is in no table", file.path.display());
        }
    }
    Ok(Checked {
        version: image.version,
        files: files.len(),
        blobs: blobs.len(),
        chunks: image.blobs.iter().map(|blob| blob.chunks.len()).sum(),
        bytes: image.blobs.iter().flat_map(|blob| &blob.chunks).map(|chunk| u64::from(chunk.size)).sum(),
    })
}

fn check_blob(blob: &BlobTable, data: &Path, index: Option<&[u8]>, progress: &mut Progress) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let (digest, _) = crate::tar::digest(data)?;
    ensure!(digest == blob.id, "its digest is {digest}");
    let file = fs::File::open(data)?;
    let read = |offset: u64, len: u32| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, offset).with_context(|| format!("{len} bytes at {offset}"))?;
        Ok(bytes)
    };
    let index = index.map(|index| Index::open(blob, index)).transpose().context("its index")?;
    let mut last = None;
    let mut inflated = Vec::new();
    for (at, chunk) in blob.chunks.iter().enumerate() {
        let bytes = if let Some(index) = &index {
            let place = index.places[at];
            if last != Some(place.context) {
                let context = &index.contexts[place.context as usize];
                inflated = zran::inflate(
                    context,
                    index.dictionary(context),
                    &read(context.offset, context.stored_size)?,
                )?;
                last = Some(place.context);
            }
            let from = place.offset as usize;
            inflated.get(from..from + chunk.size as usize).context("a chunk outside of its context")?.to_vec()
        } else {
            let compressor = match chunk.stored {
                Stored::Plain => Compressor::None,
                Stored::Compressed => blob.compressor,
            };
            let stored = read(chunk.stored_offset, chunk.stored_size)?;
            decompress(compressor, &stored, chunk.size as usize)
                .with_context(|| format!("the chunk at {}", chunk.offset))?
        };
        if blob.digester.digest(&bytes) != chunk.digest {
            bail!("the chunk at {} has another digest than the bootstrap says", chunk.offset);
        }
        progress.add(u64::from(chunk.size));
    }
    Ok(())
}
