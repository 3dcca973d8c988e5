//! RAFS metadata (the *bootstrap*): which blobs an image has, and how each is cut into chunks.
//!
//! An image is hostile input: nothing here panics, allocates more than a small multiple of the bootstrap's size, or believes
//! an offset. What is not understood (encrypted, batched or tarfs blobs) is refused by name.

pub mod blob_meta;
mod bytes;
mod erofs;
pub mod lookup;
mod v5;
mod v5_as_erofs;
mod v6;

pub use bytes::Bytes;
pub use v5::moved;
pub use v5_as_erofs::v5_as_erofs;

use crate::codec::{Compressor, Digester};

/// Most bytes of a bootstrap: 512 MiB, some six million chunks.
pub const MAX_BOOTSTRAP: u64 = 512 << 20;

/// Most bytes of a chunk. Nydus knows 16 MiB.
pub const MAX_CHUNK: u32 = 16 << 20;

/// Most bytes of a blob, uncompressed: what 32 bits of blocks can address.
pub const MAX_BLOB: u64 = 1 << 44;

/// Most files of the image's own prefetch list, with what is in its folders.
const MAX_PREFETCH_FILES: usize = 65_536;

/// What is wrong with a bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum RafsError {
    /// Neither superblock is there.
    #[error("not a RAFS bootstrap: neither version 5 nor 6")]
    NotRafs,
    /// A structure lies outside.
    #[error("{what} at {offset} with {len} bytes lies outside the bootstrap of {bytes}")]
    Outside {
        /// Which.
        what: &'static str,
        /// Where it shall be.
        offset: u64,
        /// Its length.
        len: u64,
        /// Length of the bootstrap.
        bytes: u64,
    },
    /// A table's length is no multiple of its records'.
    #[error("{what} has {len} bytes, not a multiple of {record}")]
    Ragged {
        /// Which.
        what: &'static str,
        /// Its length.
        len: u64,
        /// A record's.
        record: usize,
    },
    /// A value that cannot be.
    #[error("{what} is {value}, {limit}")]
    Value {
        /// Which.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        limit: &'static str,
    },
    /// A blob's name is no SHA-256.
    #[error("blob {index} has a name that is no SHA-256")]
    BlobName {
        /// Which.
        index: usize,
    },
    /// Device table and blob table differ.
    #[error("the device table does not name the blobs of the blob table in its order")]
    Devices,
    /// Chunks overlap or lie outside their blob.
    #[error("blob {blob}: the chunk at {offset} overlaps another or lies outside of {bytes} bytes")]
    Chunk {
        /// Which blob.
        blob: String,
        /// Where in the uncompressed blob.
        offset: u64,
        /// The blob's size.
        bytes: u64,
    },
    /// A feature that is not supported.
    #[error("blob {blob}: {feature} is not supported; convert the image without it")]
    Unsupported {
        /// Which blob.
        blob: String,
        /// Which feature.
        feature: &'static str,
    },
}

/// How a chunk's bytes are kept in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// As they are.
    Plain,
    /// Compressed by the blob's compressor.
    Compressed,
}

/// One chunk of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Where its bytes are in the uncompressed blob.
    pub offset: u64,
    /// How many, 1 to [`MAX_CHUNK`].
    pub size: u32,
    /// Where they are in the blob as it is stored.
    pub stored_offset: u64,
    /// How many there.
    pub stored_size: u32,
    /// How they are stored.
    pub stored: Stored,
    /// Digest of the uncompressed bytes.
    pub digest: [u8; 32],
}

impl Chunk {
    /// The byte behind its last.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.size)
    }
}

/// Where the index over a plain gzip layer (zran) is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZranIndex {
    /// Blob that holds it, by its SHA-256; the layer itself holds nothing of ours.
    pub blob: String,
    /// Size of that blob.
    pub blob_size: u64,
    /// Offset of the compressed table in it.
    pub offset: u64,
    /// Compressed size of the table. Its header, [`blob_meta::HEADER`] bytes, follows.
    pub stored_size: u64,
    /// Its size.
    pub size: u64,
    /// How it is compressed.
    pub compressor: Compressor,
    /// How many chunks it describes.
    pub chunks: u32,
}

/// One blob of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobTable {
    /// Its SHA-256, 64 lower-case hexadecimal digits: safe as a file's name.
    pub id: String,
    /// Uncompressed size.
    pub bytes: u64,
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// How chunks are digested.
    pub digester: Digester,
    /// The blob is a plain OCI layer with an index.
    pub zran: Option<ZranIndex>,
    /// Its chunks that the image uses, by `offset`, without overlap, all inside of `bytes`.
    pub chunks: Vec<Chunk>,
}

impl BlobTable {
    /// Indices of the chunks that share a byte with `start..end`.
    pub fn chunks_in(&self, start: u64, end: u64) -> std::ops::Range<usize> {
        let first = self.chunks.partition_point(|chunk| chunk.end() <= start);
        let behind = self.chunks.partition_point(|chunk| chunk.offset < end);
        first..behind.max(first)
    }
}

/// A chunk of an image: index of the blob, and of the chunk in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// Index in [`Image::blobs`].
    pub blob: u32,
    /// Index in [`BlobTable::chunks`].
    pub chunk: u32,
}

/// What the service needs to know of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// RAFS version, 5 or 6.
    pub version: u8,
    /// Its blobs, in the order of the device table.
    pub blobs: Vec<BlobTable>,
    /// The image's own prefetch list.
    pub prefetch: Vec<ChunkRef>,
}

impl Image {
    /// Reads a bootstrap.
    pub fn parse(bootstrap: &[u8]) -> Result<Self, RafsError> {
        let bytes = Bytes::new(bootstrap);
        if bytes.total() > MAX_BOOTSTRAP {
            let limit = "more than 512 MiB";
            return Err(RafsError::Value { what: "the bootstrap's size", value: bytes.total(), limit });
        }
        if v6::detect(bytes) {
            v6::parse(bytes)
        } else if v5::detect(bytes) {
            v5::parse(bytes)
        } else {
            Err(RafsError::NotRafs)
        }
    }
}

/// A record of 80 bytes that both versions use (`RafsV5ChunkInfo`), read but not checked.
struct ChunkRecord {
    blob: u32,
    flags: u32,
    chunk: Chunk,
}

impl ChunkRecord {
    const LEN: usize = 80;
    const COMPRESSED: u32 = 1;
    const ENCRYPTED: u32 = 4;
    const BATCH: u32 = 8;

    fn read(record: &[u8; Self::LEN]) -> Self {
        let flags = bytes::u32_at(record, 36);
        let stored = if flags & Self::COMPRESSED == 0 { Stored::Plain } else { Stored::Compressed };
        let mut digest = [0; 32];
        digest.copy_from_slice(&record[..32]);
        Self {
            blob: bytes::u32_at(record, 32),
            flags,
            chunk: Chunk {
                stored_size: bytes::u32_at(record, 40),
                size: bytes::u32_at(record, 44),
                stored_offset: bytes::u64_at(record, 48),
                offset: bytes::u64_at(record, 56),
                stored,
                digest,
            },
        }
    }
}

/// Puts a chunk into its blob's table after checking all but its neighbours.
fn add_chunk(blobs: &mut [BlobTable], record: ChunkRecord) -> Result<ChunkRef, RafsError> {
    let ChunkRecord { blob: index, flags, chunk } = record;
    let value = |what, value, limit| RafsError::Value { what, value, limit };
    let Some(blob) = blobs.get_mut(index as usize) else {
        return Err(value("a chunk's blob", u64::from(index), "more than there are"));
    };
    if flags & ChunkRecord::ENCRYPTED != 0 {
        return Err(RafsError::Unsupported { blob: blob.id.clone(), feature: "encryption" });
    }
    if flags & ChunkRecord::BATCH != 0 {
        return Err(RafsError::Unsupported { blob: blob.id.clone(), feature: "a batch of chunks" });
    }
    if chunk.size == 0 || chunk.size > MAX_CHUNK {
        return Err(value("a chunk's size", u64::from(chunk.size), "not 1 to 16 MiB"));
    }
    // zran: the layer's compressor is the layer's, and the chunk's place in it is in the index.
    if blob.zran.is_none() {
        if chunk.stored_size == 0 || chunk.stored_size > MAX_CHUNK {
            let size = u64::from(chunk.stored_size);
            return Err(value("a chunk's compressed size", size, "not 1 to 16 MiB"));
        }
        if chunk.stored == Stored::Plain && chunk.stored_size != chunk.size {
            let size = u64::from(chunk.stored_size);
            return Err(value("the stored size of an uncompressed chunk", size, "not its size"));
        }
        if chunk.stored_offset > MAX_BLOB {
            return Err(value("a chunk's offset", chunk.stored_offset, "more than a blob can have"));
        }
    }
    let inside = chunk.offset.checked_add(u64::from(chunk.size)).is_some_and(|end| end <= blob.bytes);
    if !inside {
        return Err(RafsError::Chunk { blob: blob.id.clone(), offset: chunk.offset, bytes: blob.bytes });
    }
    blob.chunks.push(chunk);
    let chunk = u32::try_from(blob.chunks.len() - 1).unwrap_or(u32::MAX);
    Ok(ChunkRef { blob: index, chunk })
}

/// Sorts each blob's chunks, drops doubles (a chunk that several files share), refuses overlap.
fn settle(blobs: &mut [BlobTable]) -> Result<(), RafsError> {
    for blob in blobs {
        blob.chunks.sort_by_key(|chunk| chunk.offset);
        blob.chunks.dedup();
        for pair in blob.chunks.windows(2) {
            if pair[0].end() > pair[1].offset {
                let (blob, bytes) = (blob.id.clone(), blob.bytes);
                return Err(RafsError::Chunk { blob, offset: pair[1].offset, bytes });
            }
        }
        blob.chunks.shrink_to_fit();
    }
    Ok(())
}

/// The chunk of `blob` that begins at `offset`.
fn chunk_at(blobs: &[BlobTable], blob: u32, offset: u64) -> Option<ChunkRef> {
    let table = &blobs.get(blob as usize)?.chunks;
    let chunk = table.binary_search_by_key(&offset, |chunk| chunk.offset).ok()?;
    Some(ChunkRef { blob, chunk: u32::try_from(chunk).ok()? })
}

/// A blob's name out of a field that may be padded with zeros.
fn blob_name(index: usize, field: &[u8]) -> Result<String, RafsError> {
    let name = field.split(|byte| *byte == 0).next().unwrap_or_default();
    let fine = name.len() == 64 && name.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if fine { Ok(String::from_utf8_lossy(name).into_owned()) } else { Err(RafsError::BlobName { index }) }
}
