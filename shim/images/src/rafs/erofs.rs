//! As much of EROFS as it takes to know the chunks of the files in a prefetch list.
//!
//! What is broken is left out: the list only says what will be read soon.

use std::collections::HashSet;

use super::bytes::{u16_at, u32_at, u64_at};
use super::lookup::Extent;
use super::{BlobTable, Bytes, ChunkRef, MAX_PREFETCH_FILES, RafsError, chunk_at};

const BLOCK: u64 = 4096;
const WHAT: &str = "an inode of the prefetch list";

pub struct Erofs<'a> {
    bytes: Bytes<'a>,
    /// Where inode 0 would be.
    inodes: u64,
    blobs: &'a [BlobTable],
}

/// The chunks of a regular file.
struct Chunks {
    /// Bytes of each but the last.
    size: u64,
    /// Where each is, blob and offset in it; none is a hole.
    places: Vec<Option<(u32, u64)>>,
}

struct Inode {
    mode: u16,
    layout: u16,
    size: u64,
    /// First block, or the chunks' format.
    union: u32,
    /// What follows the inode and its extended attributes.
    tail: u64,
}

impl<'a> Erofs<'a> {
    pub fn new(bytes: Bytes<'a>, inodes: u64, blobs: &'a [BlobTable]) -> Self {
        Self { bytes, inodes, blobs }
    }

    /// The chunks of these files and of all files below these folders, in that order, each once.
    pub fn chunks_of(&self, nids: impl Iterator<Item = u64>) -> Vec<ChunkRef> {
        let mut open: Vec<u64> = nids.take(MAX_PREFETCH_FILES).collect();
        open.reverse();
        let (mut seen, mut known, mut chunks) = (HashSet::new(), HashSet::new(), Vec::new());
        while let Some(nid) = open.pop() {
            if seen.len() >= MAX_PREFETCH_FILES {
                break;
            }
            if !seen.insert(nid) {
                continue;
            }
            let Ok(inode) = self.inode(nid) else { continue };
            match inode.mode & 0o170_000 {
                0o100_000 => {
                    let fresh = self.file(&inode).unwrap_or_default().into_iter();
                    chunks.extend(fresh.filter(|chunk| known.insert(*chunk)));
                }
                0o040_000 => {
                    let children = self.folder(&inode).unwrap_or_default();
                    open.extend(children.iter().rev().map(|(_, nid)| nid));
                }
                _ => {}
            }
        }
        chunks
    }

    fn inode(&self, nid: u64) -> Result<Inode, RafsError> {
        let outside = RafsError::Value { what: WHAT, value: nid, limit: "outside the bootstrap" };
        let at = nid.checked_mul(32).and_then(|at| at.checked_add(self.inodes)).ok_or(outside)?;
        let format = self.bytes.u16(WHAT, at)?;
        let extended = format & 1 != 0;
        let len = if extended { 64 } else { 32 };
        let record = self.bytes.get(WHAT, at, len)?;
        let xattrs = match u64::from(u16_at(record, 2)) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        Ok(Inode {
            mode: u16_at(record, 4),
            layout: (format >> 1) & 7,
            size: if extended { u64_at(record, 8) } else { u64::from(u32_at(record, 8)) },
            union: u32_at(record, 16),
            tail: at + len + xattrs,
        })
    }

    fn file(&self, inode: &Inode) -> Result<Vec<ChunkRef>, RafsError> {
        let chunk = |(blob, offset): (u32, u64)| chunk_at(self.blobs, blob, offset);
        Ok(self.chunks(inode)?.places.into_iter().flatten().filter_map(chunk).collect())
    }

    fn chunks(&self, inode: &Inode) -> Result<Chunks, RafsError> {
        const CHUNK_BASED: u16 = 4;
        const INDEXES: u32 = 0x20;
        const HOLE: u32 = u32::MAX;
        if inode.layout != CHUNK_BASED || inode.union & INDEXES == 0 {
            return Ok(Chunks { size: BLOCK, places: Vec::new() });
        }
        let size = BLOCK << (inode.union & 0x1f);
        let indexes = inode.tail.next_multiple_of(8);
        let count = inode.size.div_ceil(size);
        let records = self.bytes.records::<8>(WHAT, indexes, count.saturating_mul(8))?;
        let place = |record: &[u8; 8]| {
            let (device, block) = (u16_at(record, 2) & 0xff, u32_at(record, 4));
            let blob = u32::from(device.checked_sub(1)?);
            (block != HOLE).then_some((blob, u64::from(block) * BLOCK))
        };
        Ok(Chunks { size, places: records.iter().map(place).collect() })
    }

    /// The inode of this name in a folder.
    pub fn child(&self, folder: u64, name: &[u8]) -> Result<Option<u64>, RafsError> {
        let inode = self.inode(folder)?;
        if inode.mode & 0o170_000 != 0o040_000 {
            return Ok(None);
        }
        Ok(self.folder(&inode)?.into_iter().find(|(other, _)| *other == name).map(|(_, nid)| nid))
    }

    /// Where the bytes of a regular file of at most `max` are.
    pub fn extents(&self, nid: u64, max: u64) -> Result<Option<Vec<Extent>>, RafsError> {
        let inode = self.inode(nid)?;
        if inode.mode & 0o170_000 != 0o100_000 {
            return Ok(None);
        }
        if inode.size > max {
            return Err(RafsError::Value {
                what: "a file's size",
                value: inode.size,
                limit: "more than 4 MiB",
            });
        }
        let Chunks { size, places } = self.chunks(&inode)?;
        let mut left = inode.size;
        let extents = places.into_iter().map(|place| {
            let len = left.min(size);
            left -= len;
            let (blob, offset) = place.unzip();
            Extent { blob, offset: offset.unwrap_or(0), len }
        });
        let extents = extents.collect();
        let whole =
            RafsError::Value { what: "a file's layout", value: inode.layout.into(), limit: "not by chunks" };
        if left == 0 { Ok(Some(extents)) } else { Err(whole) }
    }

    fn folder(&self, inode: &Inode) -> Result<Vec<(&'a [u8], u64)>, RafsError> {
        const INLINE: u16 = 2;
        let mut children = Vec::new();
        let first = u64::from(inode.union) * BLOCK;
        let blocks = inode.size.div_ceil(BLOCK).min(MAX_PREFETCH_FILES as u64);
        for block in 0..blocks {
            let len = (inode.size - block * BLOCK).min(BLOCK);
            let last = block + 1 == blocks;
            let at = if last && inode.layout == INLINE { inode.tail } else { first + block * BLOCK };
            let block = self.bytes.get("a folder", at, len)?;
            // The names begin behind the last entry.
            let count = usize::from(u16_at(block, 8)) / 12;
            let entries = block.as_chunks::<12>().0;
            for (index, entry) in entries.iter().take(count).enumerate() {
                let name = usize::from(u16_at(entry, 8));
                let behind = match entries.get(index + 1) {
                    Some(next) if index + 1 < count => usize::from(u16_at(next, 8)),
                    _ => block.len(),
                };
                let name = block.get(name..behind).unwrap_or_default();
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                if name != b"." && name != b".." {
                    children.push((name, u64_at(entry, 0)));
                }
            }
            if children.len() > MAX_PREFETCH_FILES {
                break;
            }
        }
        Ok(children)
    }
}
