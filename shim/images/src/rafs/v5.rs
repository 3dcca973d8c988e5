//! RAFS version 5: a table of inodes, and behind each regular file's inode its chunks.
//!
//! ```text
//! 0  superblock, 8192 bytes   magic 0, version 4, flags 16, inodes 24, inode table 32, prefetch table 40, blob table 48,
//!                             inode table entries 56, prefetch entries 60, blob table bytes 64, extended entries 68,
//!                             extended blob table 72
//!    inode, 128 bytes         mode 60, flags 80, child index 92, child count 96, name bytes 100, symlink bytes 102; then
//!                             name, symlink, attributes, each to a multiple of 8; then a regular file's chunks
//! ```

use std::collections::HashSet;

use vmm_api::image::MAX_BLOBS;

use super::bytes::{u16_at, u32_at, u64_at};
use super::{
    BlobTable, Bytes, ChunkRecord, ChunkRef, Image, MAX_BLOB, MAX_PREFETCH_FILES, RafsError, add_chunk,
    blob_name, chunk_at, settle,
};
use crate::codec::{Compressor, Digester};

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

pub fn parse(bytes: Bytes) -> Result<Image, RafsError> {
    let flags = bytes.u64("superblock", 16)?;
    let mut blobs = blobs(bytes, flags)?;
    if flags & flag::ENCRYPTED != 0 {
        let blob = blobs.first().map_or_else(String::new, |blob| blob.id.clone());
        return Err(RafsError::Unsupported { blob, feature: "encryption" });
    }
    let table = bytes.u64("superblock", 32)?;
    let entries = bytes.u32("superblock", 56)?;
    let inodes = Inodes { bytes, table: bytes.records::<4>("inode table", table, u64::from(entries) * 4)? };
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
            add_chunk(&mut blobs, ChunkRecord::read(record))?;
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
        let size = u64_at(record, 8);
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

struct Inodes<'a> {
    bytes: Bytes<'a>,
    table: &'a [[u8; 4]],
}

struct Inode {
    mode: u32,
    child_index: u32,
    child_count: u32,
    tail: u64,
}

impl<'a> Inodes<'a> {
    fn read(&self, place: u64) -> Result<Inode, RafsError> {
        const HAS_XATTR: u64 = 0x4;
        let record = self.bytes.get(WHAT, place, 128)?;
        let padded = |at| u64::from(u16_at(record, at)).next_multiple_of(8);
        let mut tail = place + 128 + padded(100) + padded(102);
        if u64_at(record, 80) & HAS_XATTR != 0 {
            let outside =
                RafsError::Value { what: WHAT, value: place, limit: "with attributes out of bounds" };
            let size = self.bytes.u64(WHAT, tail)?.checked_next_multiple_of(8);
            let end = size.and_then(|size| tail.checked_add(8)?.checked_add(size));
            tail = end.filter(|end| *end <= self.bytes.total()).ok_or(outside)?;
        }
        Ok(Inode {
            mode: u32_at(record, 60),
            child_index: u32_at(record, 92),
            child_count: u32_at(record, 96),
            tail,
        })
    }

    fn chunks(&self, inode: &Inode) -> Result<&'a [[u8; ChunkRecord::LEN]], RafsError> {
        if inode.mode & 0o170_000 != 0o100_000 {
            return Ok(&[]);
        }
        self.bytes.records(
            "a file's chunks",
            inode.tail,
            u64::from(inode.child_count) * ChunkRecord::LEN as u64,
        )
    }

    /// By number, from 1.
    fn number(&self, number: u32) -> Option<Inode> {
        let place = self.table.get(number.checked_sub(1)? as usize)?;
        self.read(u64::from(u32::from_le_bytes(*place)) << 3).ok()
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
        let Some(inode) = inodes.number(number) else { continue };
        if inode.mode & 0o170_000 == 0o040_000 {
            let last = inode.child_index.saturating_add(inode.child_count.min(65_536));
            open.extend((inode.child_index..last).rev());
            continue;
        }
        let records = inodes.chunks(&inode).unwrap_or_default().iter().map(ChunkRecord::read);
        let fresh = records.filter_map(|record| chunk_at(blobs, record.blob, record.chunk.offset));
        chunks.extend(fresh.filter(|chunk| known.insert(*chunk)));
    }
    Ok(chunks)
}
