//! RAFS version 5: a table of inodes, and behind each regular file's inode its chunks.
//!
//! ```text
//! 0  superblock, 8192 bytes   magic 0, version 4, chunk size 12, flags 16, inodes 24, inode table 32, prefetch table 40,
//!                             blob table 48, inode table entries 56, prefetch entries 60, blob table bytes 64,
//!                             extended entries 68, extended blob table 72
//!    inode, 128 bytes         number 40, user 48, group 52, mode 60, size 64, flags 80, links 88, child index 92,
//!                             child count 96, name bytes 100, symlink bytes 102, device 104, nanoseconds 108, mtime 112;
//!                             then name, symlink, attributes, each to a multiple of 8; then a regular file's chunks
//!    extended entry, 64       chunks 0, uncompressed size 8
//! ```
//!
//! **Chunks are moved.** In a blob of version 5, uncompressed, a chunk begins where the one before it ends, at any byte. A guest that is to
//! read it as a disk needs it at a block's beginning. So in what [`parse`] gives, and in the cache file, the chunk with number `n` that is
//! at `offset` in the blob is at [`moved`]`(offset, n)`: its block's beginning and one block further for each chunk before it. That
//! depends on nothing but the chunk, so images that use different chunks of a blob agree on where they are. No two overlap: behind
//! a chunk that ends in the middle of a block, the next one gets a block of its own.

use std::collections::HashSet;

use vmm_api::image::MAX_BLOBS;

use super::bytes::{u16_at, u32_at, u64_at};
use super::{
    BlobTable, Bytes, ChunkRecord, ChunkRef, Image, MAX_BLOB, MAX_PREFETCH_FILES, RafsError, add_chunk,
    blob_name, chunk_at, settle,
};
use crate::codec::{Compressor, Digester};

/// Bytes of a block of a disk.
pub const BLOCK: u64 = 4096;

const MAGIC: u32 = 0x5241_4653;
const VERSION: u32 = 0x500;
const WHAT: &str = "an inode";

mod flag {
    pub const LZ4: u64 = 0x2;
    pub const BLAKE3: u64 = 0x4;
    pub const GZIP: u64 = 0x40;
    pub const ZSTD: u64 = 0x80;
    pub const ENCRYPTED: u64 = 0x0200_0000;
}

pub fn detect(bytes: Bytes) -> bool {
    bytes.u32("superblock", 0).is_ok_and(|magic| magic == MAGIC)
        && bytes.u32("superblock", 4).is_ok_and(|version| version == VERSION)
}

/// Where a chunk is in what is made of its blob.
pub fn moved(offset: u64, number: u32) -> u64 {
    (offset & !(BLOCK - 1)).saturating_add(u64::from(number) * BLOCK)
}

pub fn parse(bytes: Bytes) -> Result<Image, RafsError> {
    let flags = bytes.u64("superblock", 16)?;
    let mut blobs = blobs(bytes, flags)?;
    if flags & flag::ENCRYPTED != 0 {
        let blob = blobs.first().map_or_else(String::new, |blob| blob.id.clone());
        return Err(RafsError::Unsupported { blob, feature: "encryption" });
    }
    let inodes = Inodes::new(bytes)?;
    // Hard links share an inode's place.
    let mut seen = HashSet::new();
    for place in inodes.table {
        let place = u64::from(u32::from_le_bytes(*place)) << 3;
        // The table is padded to a multiple of 8 bytes.
        if place == 0 || !seen.insert(place) {
            continue;
        }
        let inode = inodes.read(place)?;
        for record in inodes.chunks(&inode)? {
            add_chunk(&mut blobs, moved_record(record))?;
        }
    }
    settle(&mut blobs)?;
    let prefetch = prefetch(&inodes, &blobs).unwrap_or_default();
    Ok(Image { version: 5, blobs, prefetch })
}

fn blobs(bytes: Bytes, flags: u64) -> Result<Vec<BlobTable>, RafsError> {
    let digester = if flags & flag::BLAKE3 == 0 { Digester::Sha256 } else { Digester::Blake3 };
    let compressor = match flags & (flag::LZ4 | flag::GZIP | flag::ZSTD) {
        0 => Compressor::None,
        flag::LZ4 => Compressor::Lz4,
        flag::GZIP => Compressor::Gzip,
        flag::ZSTD => Compressor::Zstd,
        value => return Err(RafsError::Value { what: "the compressors", value, limit: "more than one" }),
    };
    let table = bytes.get("blob table", bytes.u64("superblock", 48)?, bytes.u32("superblock", 64)?.into())?;
    let count = u64::from(bytes.u32("superblock", 68)?);
    let extended = bytes.records::<64>("extended blob table", bytes.u64("superblock", 72)?, count * 64)?;
    let mut blobs = Vec::new();
    let mut rest = table;
    // An entry: two numbers of old, the name, and a zero unless it is the last.
    while rest.len() > 8 {
        let index = blobs.len();
        if index >= MAX_BLOBS {
            let value = index as u64 + 1;
            return Err(RafsError::Value { what: "the number of blobs", value, limit: "more than 128" });
        }
        let name = rest[8..].split(|byte| *byte == 0).next().unwrap_or_default();
        rest = rest.get(8 + name.len() + 1..).unwrap_or_default();
        let id = blob_name(index, name)?;
        let Some(record) = extended.get(index) else {
            let feature = "a blob without a size (an image of Nydus 1)";
            return Err(RafsError::Unsupported { blob: id, feature });
        };
        // As large as the chunks' places can take it.
        let (chunks, size) = (u32_at(record, 0), u64_at(record, 8));
        let size = size.saturating_add(BLOCK - 1) & !(BLOCK - 1);
        let size = size.saturating_add(u64::from(chunks) * BLOCK);
        if size > MAX_BLOB {
            return Err(RafsError::Value { what: "a blob's size", value: size, limit: "more than 16 TiB" });
        }
        blobs.push(BlobTable { id, bytes: size, compressor, digester, zran: None, chunks: Vec::new() });
        // Padding to a multiple of 8 is shorter than an entry.
        if rest.iter().all(|byte| *byte == 0) {
            break;
        }
    }
    Ok(blobs)
}

/// The inodes, by number from 1: the root's.
pub struct Inodes<'a> {
    bytes: Bytes<'a>,
    table: &'a [[u8; 4]],
}

/// A name in the tree, and what it is the name of. Of a file with several names, each has an inode.
pub struct Inode<'a> {
    /// 128 bytes, see above.
    record: &'a [u8],
    /// Type and permissions.
    pub mode: u32,
    /// Of a folder: the number of its first child.
    pub child_index: u32,
    /// Of a folder: how many children it has, with numbers one after the other. Of a file: how many chunks.
    pub child_count: u32,
    /// Its name.
    pub name: &'a [u8],
    /// Where it leads to.
    pub symlink: &'a [u8],
    /// Attributes: each its length in 4 bytes, its name, a zero, and its value.
    pub attributes: &'a [u8],
    tail: u64,
}

impl Inode<'_> {
    /// Bytes that it has.
    pub fn size(&self) -> u64 {
        u64_at(self.record, 64)
    }

    /// User and group.
    pub fn owner(&self) -> [u32; 2] {
        [u32_at(self.record, 48), u32_at(self.record, 52)]
    }

    /// When it was changed: seconds and nanoseconds.
    pub fn mtime(&self) -> (u64, u32) {
        (u64_at(self.record, 112), u32_at(self.record, 108))
    }

    /// How many names it has.
    pub fn links(&self) -> u32 {
        u32_at(self.record, 88)
    }

    /// Of a device: its numbers, as Linux puts them into 32 bits.
    pub fn device(&self) -> u32 {
        u32_at(self.record, 104)
    }

    /// The number of the first inode with this file's contents: its own, unless the file has several names.
    pub fn first(&self) -> u64 {
        u64_at(self.record, 40)
    }
}

/// A chunk, and the byte of its file where it begins.
pub fn file_offset(record: &[u8; ChunkRecord::LEN]) -> u64 {
    u64_at(record, 64)
}

/// A chunk with the place that it is given.
pub fn moved_record(record: &[u8; ChunkRecord::LEN]) -> ChunkRecord {
    let mut read = ChunkRecord::read(record);
    read.chunk.offset = moved(read.chunk.offset, u32_at(record, 72));
    read
}

impl<'a> Inodes<'a> {
    /// The table's.
    pub fn new(bytes: Bytes<'a>) -> Result<Self, RafsError> {
        let (table, entries) = (bytes.u64("superblock", 32)?, bytes.u32("superblock", 56)?);
        let table = bytes.records::<4>("inode table", table, u64::from(entries) * 4)?;
        Ok(Inodes { bytes, table })
    }

    /// How many numbers there are.
    pub fn count(&self) -> usize {
        self.table.len()
    }

    fn read(&self, place: u64) -> Result<Inode<'a>, RafsError> {
        const HAS_XATTR: u64 = 0x4;
        let record = self.bytes.get(WHAT, place, 128)?;
        let (name, symlink) = (u64::from(u16_at(record, 100)), u64::from(u16_at(record, 102)));
        let symlink_at = place + 128 + name.next_multiple_of(8);
        let mut tail = symlink_at + symlink.next_multiple_of(8);
        let mut attributes: &[u8] = &[];
        if u64_at(record, 80) & HAS_XATTR != 0 {
            let outside =
                RafsError::Value { what: WHAT, value: place, limit: "with attributes out of bounds" };
            let size = self.bytes.u64(WHAT, tail)?;
            let padded = size.checked_next_multiple_of(8).ok_or(outside)?;
            attributes =
                &self.bytes.get("attributes", tail + 8, padded)?[..usize::try_from(size).unwrap_or(0)];
            tail += 8 + padded;
        }
        Ok(Inode {
            record,
            mode: u32_at(record, 60),
            child_index: u32_at(record, 92),
            child_count: u32_at(record, 96),
            name: self.bytes.get("a name", place + 128, name)?,
            symlink: self.bytes.get("a symbolic link", symlink_at, symlink)?,
            attributes,
            tail,
        })
    }

    /// A regular file's chunks.
    pub fn chunks(&self, inode: &Inode) -> Result<&'a [[u8; ChunkRecord::LEN]], RafsError> {
        if inode.mode & 0o170_000 != 0o100_000 {
            return Ok(&[]);
        }
        self.bytes.records(
            "a file's chunks",
            inode.tail,
            u64::from(inode.child_count) * ChunkRecord::LEN as u64,
        )
    }

    /// By number, from 1. None for a number that there is not.
    pub fn number(&self, number: u32) -> Result<Option<Inode<'a>>, RafsError> {
        let place = number.checked_sub(1).and_then(|index| self.table.get(index as usize));
        // The table is padded.
        let place = place.map(|place| u64::from(u32::from_le_bytes(*place)) << 3).filter(|place| *place != 0);
        place.map(|place| self.read(place)).transpose()
    }
}

fn prefetch(inodes: &Inodes, blobs: &[BlobTable]) -> Result<Vec<ChunkRef>, RafsError> {
    let table = inodes.bytes.u64("superblock", 40)?;
    let entries = inodes.bytes.u32("superblock", 60)?;
    let list = inodes.bytes.records::<4>("prefetch table", table, u64::from(entries) * 4)?;
    let mut open: Vec<u32> =
        list.iter().take(MAX_PREFETCH_FILES).map(|number| u32::from_le_bytes(*number)).collect();
    open.reverse();
    let (mut seen, mut known, mut chunks) = (HashSet::new(), HashSet::new(), Vec::new());
    while let Some(number) = open.pop() {
        if seen.len() >= MAX_PREFETCH_FILES {
            break;
        }
        if !seen.insert(number) {
            continue;
        }
        let Ok(Some(inode)) = inodes.number(number) else { continue };
        if inode.mode & 0o170_000 == 0o040_000 {
            let last = inode.child_index.saturating_add(inode.child_count.min(65_536));
            open.extend((inode.child_index..last).rev());
            continue;
        }
        let records = inodes.chunks(&inode).unwrap_or_default().iter().map(moved_record);
        let fresh = records.filter_map(|record| chunk_at(blobs, record.blob, record.chunk.offset));
        chunks.extend(fresh.filter(|chunk| known.insert(*chunk)));
    }
    Ok(chunks)
}
