//! RAFS version 6: an EROFS superblock, a second one of Nydus behind it, and tables of blobs and chunks.
//!
//! ```text
//! 1024  EROFS superblock, 128 bytes        blkszbits 12, root_nid 14, meta_blkaddr 40, extra_devices 86, devt_slotoff 88
//! 1152  Nydus' superblock, 256 bytes       flags 0, blob table 8 (offset) 16 (size), chunk size 20,
//!                                          chunk table 24 (offset) 32 (size), prefetch table 40 (offset) 48 (size)
//! 1408  device table, 128 bytes a blob     id 0, blocks 64, mapped_blkaddr 68
//!   …   blob table, 256 bytes a blob;  chunk table, 80 bytes a chunk;  prefetch table, 4 bytes an inode
//! ```

use vmm_api::image::MAX_BLOBS;

use super::blob_meta::HEADER;
use super::bytes::{u32_at, u64_at};
use super::erofs::Erofs;
use super::{
    BlobTable, Bytes, ChunkRecord, Image, MAX_BLOB, MAX_BOOTSTRAP, RafsError, ZranIndex, add_chunk,
    blob_name, settle,
};
use crate::codec::{Compressor, Digester};

const SUPER: u64 = 1024;
const EXT: u64 = SUPER + 128;
const MAGIC: u32 = 0xE0F5_E1E2;
const RAFS_V6: u32 = 0x4000_0000;

/// Flag of Nydus' superblock.
const TARFS: u64 = 0x200;

/// Blob features.
mod feature {
    pub const INLINED_FS_META: u32 = 0x2;
    pub const CHUNK_INFO_V2: u32 = 0x4;
    pub const ZRAN: u32 = 0x8;
    pub const SEPARATE: u32 = 0x10;
    pub const TARFS: u32 = 0x40;
    pub const ENCRYPTED: u32 = 0x100;
    pub const EXTERNAL: u32 = 0x800;
}

pub fn detect(bytes: Bytes) -> bool {
    bytes.u32("superblock", SUPER).is_ok_and(|magic| magic == MAGIC)
}

pub fn parse(bytes: Bytes) -> Result<Image, RafsError> {
    let compat = bytes.u32("superblock", SUPER + 8)?;
    if compat & RAFS_V6 == 0 {
        return Err(RafsError::NotRafs);
    }
    let block_bits = bytes.get("superblock", SUPER + 12, 1)?[0];
    if block_bits != 12 {
        let value = u64::from(block_bits);
        return Err(RafsError::Value { what: "the logarithm of the block size", value, limit: "not 12" });
    }
    if bytes.u64("superblock", EXT)? & TARFS != 0 {
        return Err(RafsError::Unsupported { blob: "of the image".into(), feature: "tarfs" });
    }
    let mut blobs = blobs(bytes)?;
    chunks(bytes, &mut blobs)?;
    settle(&mut blobs)?;
    let prefetch = prefetch(bytes, &blobs)?;
    Ok(Image { version: 6, blobs, prefetch })
}

fn blobs(bytes: Bytes) -> Result<Vec<BlobTable>, RafsError> {
    let table = bytes.u64("superblock", EXT + 8)?;
    let size = bytes.u32("superblock", EXT + 16)?;
    let records = bytes.records::<256>("blob table", table, u64::from(size))?;
    if records.len() > MAX_BLOBS {
        let value = records.len() as u64;
        return Err(RafsError::Value { what: "the number of blobs", value, limit: "more than 128" });
    }
    let count = bytes.u16("superblock", SUPER + 86)?;
    let slots = u64::from(bytes.u16("superblock", SUPER + 88)?) * 128;
    let devices = bytes.records::<128>("device table", slots, u64::from(count) * 128)?;
    if devices.len() != records.len() {
        return Err(RafsError::Devices);
    }
    let mut blobs = Vec::with_capacity(records.len());
    for (index, (record, device)) in records.iter().zip(devices).enumerate() {
        let blob = blob(index, record)?;
        if device[..64] != *blob.id.as_bytes() {
            return Err(RafsError::Devices);
        }
        blobs.push(blob);
    }
    Ok(blobs)
}

fn blob(index: usize, record: &[u8; 256]) -> Result<BlobTable, RafsError> {
    let id = blob_name(index, &record[..64])?;
    let value = |what, value, limit| RafsError::Value { what, value, limit };
    let compressor = Compressor::from_rafs(u32_at(record, 76));
    let digester = Digester::from_rafs(u32_at(record, 80));
    let features = u32_at(record, 84);
    let bytes = u64_at(record, 96);
    let unsupported = |feature| RafsError::Unsupported { blob: id.clone(), feature };
    for (bit, name) in [
        (feature::TARFS, "tarfs"),
        (feature::ENCRYPTED, "encryption"),
        (feature::EXTERNAL, "an external back end"),
    ] {
        if features & bit != 0 {
            return Err(unsupported(name));
        }
    }
    if bytes > MAX_BLOB {
        return Err(value("a blob's size", bytes, "more than 16 TiB"));
    }
    let zran = match features & feature::ZRAN {
        0 => None,
        _ => Some(zran(&id, features, record)?),
    };
    Ok(BlobTable {
        bytes,
        compressor: compressor
            .ok_or_else(|| value("a blob's compressor", u64::from(u32_at(record, 76)), "not 0 to 3"))?,
        digester: digester
            .ok_or_else(|| value("a blob's digester", u64::from(u32_at(record, 80)), "not 0 or 1"))?,
        zran,
        chunks: Vec::new(),
        id,
    })
}

fn zran(id: &str, features: u32, record: &[u8; 256]) -> Result<ZranIndex, RafsError> {
    let unsupported = |feature| RafsError::Unsupported { blob: id.to_owned(), feature };
    if features & feature::CHUNK_INFO_V2 == 0 || features & feature::SEPARATE == 0 {
        return Err(unsupported("a zran index inside of its layer"));
    }
    // Its name would be the bootstrap's file name: `nydus-image` writes such files, a registry's images are merged.
    if features & feature::INLINED_FS_META != 0 {
        return Err(unsupported("a zran index that holds the bootstrap (merge the bootstrap)"));
    }
    let value = |what, value, limit| RafsError::Value { what, value, limit };
    let digest: String = record[168..200].iter().map(|byte| format!("{byte:02x}")).collect();
    let compressor = u32_at(record, 108);
    let index = ZranIndex {
        blob: digest,
        blob_size: u64_at(record, 200),
        offset: u64_at(record, 112),
        stored_size: u64_at(record, 120),
        size: u64_at(record, 128),
        compressor: Compressor::from_rafs(compressor)
            .ok_or_else(|| value("a zran index's compressor", u64::from(compressor), "not 0 to 3"))?,
        chunks: u32_at(record, 72),
    };
    if index.size > MAX_BOOTSTRAP || index.stored_size > index.size {
        return Err(value("a zran index's size", index.size, "more than 512 MiB or less than compressed"));
    }
    let end = index.offset.checked_add(index.stored_size).and_then(|end| end.checked_add(HEADER));
    if index.blob_size > MAX_BOOTSTRAP || end.is_none_or(|end| end > index.blob_size) {
        return Err(value(
            "the size of a zran index's blob",
            index.blob_size,
            "more than 512 MiB or less than the index",
        ));
    }
    Ok(index)
}

fn chunks(bytes: Bytes, blobs: &mut [BlobTable]) -> Result<(), RafsError> {
    let table = bytes.u64("superblock", EXT + 24)?;
    let size = bytes.u64("superblock", EXT + 32)?;
    if size == 0 && blobs.is_empty() {
        return Ok(());
    }
    for record in bytes.records::<{ ChunkRecord::LEN }>("chunk table", table, size)? {
        add_chunk(blobs, ChunkRecord::read(record))?;
    }
    Ok(())
}

fn prefetch(bytes: Bytes, blobs: &[BlobTable]) -> Result<Vec<super::ChunkRef>, RafsError> {
    let table = bytes.u64("superblock", EXT + 40)?;
    let size = bytes.u32("superblock", EXT + 48)?;
    // Old images of nothing have a size without a table.
    if table == 0 || size == 0 {
        return Ok(Vec::new());
    }
    let records = bytes.records::<4>("prefetch table", table, u64::from(size))?;
    let inodes = inodes(bytes)?;
    let nids = records.iter().map(|nid| u64::from(u32::from_le_bytes(*nid))).filter(|nid| *nid != 0);
    Ok(Erofs::new(bytes, inodes, blobs).chunks_of(nids))
}

/// Where inode 0 would be.
fn inodes(bytes: Bytes) -> Result<u64, RafsError> {
    Ok(u64::from(bytes.u32("superblock", SUPER + 40)?) * 4096)
}

/// Where inode 0 would be, and the number of the root's.
pub fn roots(bytes: Bytes) -> Result<(u64, u64), RafsError> {
    Ok((inodes(bytes)?, u64::from(bytes.u16("superblock", SUPER + 14)?)))
}
