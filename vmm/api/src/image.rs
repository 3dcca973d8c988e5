//! Images whose bytes come as they are read: what the node's image service, the shim and the VMM say to each other.
//!
//! The image service keeps one *cache file* a blob, shared by all VMs of the node. One connection to its socket
//! (`AF_UNIX`, `SOCK_SEQPACKET`) is one open image: the shim connects and opens, then hands the connection to the VMM, which
//! asks for what is not there yet. The end of the connection is the end of the lease that keeps the image's chunks in the
//! cache.
//!
//! ```text
//! shim ── OpenRequest (JSON) ──────────────> image service
//!      <─ OpenReply (JSON) + bootstrap, cache files ─
//! VMM  ── Fetch (24 bytes) ────────────────> image service    as often as it likes, any number at once
//!      <─ Fetched (16 bytes) ─                                in any order, one a Fetch
//! ```
//!
//! A cache file holds the blob's bytes, uncompressed, from its start, and behind them, from the next multiple of [`BLOCK`], the
//! *ready map*: a bit a block, the lowest bit of a byte first. The service sets a block's bit after the block's bytes are in
//! the file and their chunk's digest is verified, and never takes back a bit of a blob that an open image names. So a reader
//! that sees the bit may read the block from the file, without asking. A block whose bit is not set reads as zeros or worse.
//!
//! An image of which everything is ready needs no connection: its cache files can be mapped, as long as one cares for no block that
//! is nobody's. The lock on them, which comes with the descriptors, lasts as long as the mappings.
//!
//! Not every block of a blob belongs to a chunk of the image (a layer's file that a later layer removed). Such a block is never
//! made ready, since another image that shares the file may have a chunk there; a wish for it ends well, and it is nobody's: a
//! reader takes zeros for it and does not ask again.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Bytes of a block of the ready map, and the alignment of chunks in uncompressed blobs (RAFS v6, EROFS's block).
pub const BLOCK: u64 = 4096;

/// Most blobs of one image.
pub const MAX_BLOBS: usize = 128;

/// Most blocks that one [`Fetch`] may ask for: 4 MiB.
pub const MAX_FETCH_BLOCKS: u32 = 1024;

/// The shim's first and only message on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenRequest {
    /// Open an image.
    Open {
        /// The bootstrap: RAFS metadata of version 5 or 6.
        bootstrap: PathBuf,
        /// The daemon configuration that the snapshotter handed over, JSON, in its old or its new form; it may hold a
        /// registry's credentials. The service's own configuration when empty.
        #[serde(default)]
        config: String,
        /// Look whether all of it is in the cache, and say so ([`OpenedImage::ready`]).
        #[serde(default)]
        look: bool,
    },
}

/// The service's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpenReply {
    /// The image is open. Descriptors: the bootstrap, read-only; then a cache file for each blob, read-only, in this order.
    Opened(OpenedImage),
    /// It is not; the connection is at its end.
    Refused {
        /// Why, with what to do about it.
        reason: String,
    },
}

/// An open image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedImage {
    /// RAFS version of the bootstrap that comes with this: 6, an EROFS. The service makes one of what is of version 5.
    pub version: u8,
    /// Its blobs, in the order of the bootstrap's device table. At most [`MAX_BLOBS`].
    pub blobs: Vec<Blob>,
    /// Every block of every blob that belongs to a chunk of the image is ready, and stays so while somebody has its cache file open or
    /// mapped. Said only if it was asked.
    #[serde(default)]
    pub ready: bool,
}

/// One blob of an open image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its digest, hexadecimal.
    pub id: String,
    /// Its uncompressed size in bytes.
    pub bytes: u64,
}

/// Where something lies on an image's disk. In bytes, multiples of [`BLOCK`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskPart {
    /// Its first byte.
    pub start: u64,
    /// Its length; what goes beyond the bytes there are reads as zeros.
    pub bytes: u64,
}

impl DiskPart {
    /// The first byte behind it.
    pub fn end(self) -> u64 {
        self.start + self.bytes
    }
}

/// What the disk of an image is made of: its bootstrap, and behind it, each in its place, its blobs. `None` if that were more
/// than a file can have (2^63 bytes).
///
/// The guest mounts the bootstrap, an EROFS, with the blobs as its further devices. Its kernel gets each part as a partition,
/// which needs no table on the disk (`BLKPG`, blkpg.h); kernels before 6.4 know no EROFS that has it all in one device.
pub fn disk_parts(bootstrap: u64, blobs: impl IntoIterator<Item = u64>) -> Option<Vec<DiskPart>> {
    let mut start = 0_u64;
    let mut parts = Vec::new();
    for bytes in std::iter::once(bootstrap).chain(blobs) {
        let bytes = bytes.checked_next_multiple_of(BLOCK)?;
        parts.push(DiskPart { start, bytes });
        start = start.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok())?;
    }
    Some(parts)
}

/// Where the ready map of a blob of `bytes` begins in its cache file.
pub const fn ready_map_offset(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK)
}

/// How many bytes it has.
pub const fn ready_map_bytes(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK).div_ceil(8)
}

/// The VMM's wish for blocks: all of them shall be ready. Little-endian, in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Chosen by the VMM, given back in the answer.
    pub tag: u64,
    /// Index of the blob in [`OpenedImage::blobs`].
    pub blob: u32,
    /// How many blocks, 1 to [`MAX_FETCH_BLOCKS`].
    pub blocks: u32,
    /// The first of them.
    pub first: u64,
}

impl Fetch {
    /// Length of the message in bytes.
    pub const LEN: usize = 24;

    /// The message.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.blob.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[16..].copy_from_slice(&self.first.to_le_bytes());
        bytes
    }

    /// The message in `bytes`, or nothing where they have another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first_chunk()?;
        let (blob, rest) = rest.split_first_chunk()?;
        let (blocks, rest) = rest.split_first_chunk()?;
        Some(Fetch {
            tag: u64::from_le_bytes(*tag),
            blob: u32::from_le_bytes(*blob),
            blocks: u32::from_le_bytes(*blocks),
            first: u64::from_le_bytes(rest.try_into().ok()?),
        })
    }
}

/// The end of a [`Fetch`]. Little-endian, in the order of the fields, then four bytes of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// The tag of the wish.
    pub tag: u64,
    /// 0 if all the blocks are ready that belong to a chunk of the image, else why not, for the guest: `EIO` (broken, missing, tampered or forbidden),
    /// `ENOSPC` (no room in the cache), `EINVAL` (no such blob or blocks).
    pub errno: u32,
}

impl Fetched {
    /// Length of the message in bytes.
    pub const LEN: usize = 16;

    /// The message.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.tag.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.errno.to_le_bytes());
        bytes
    }

    /// The message in `bytes`, or nothing where they have another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let (tag, rest) = bytes.split_first_chunk()?;
        let (errno, _) = rest.split_first_chunk()?;
        Some(Fetched { tag: u64::from_le_bytes(*tag), errno: u32::from_le_bytes(*errno) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_from_their_bytes() {
        let fetch = Fetch { tag: 1 << 40, blob: 3, blocks: 256, first: 1 << 33 };
        assert_eq!(Fetch::from_bytes(&fetch.to_bytes()), Some(fetch));
        let fetched = Fetched { tag: 1 << 40, errno: 5 };
        assert_eq!(Fetched::from_bytes(&fetched.to_bytes()), Some(fetched));
    }

    #[test]
    fn other_lengths_are_no_messages() {
        let bytes = [0; 25];
        for len in (0..=bytes.len()).filter(|len| *len != Fetch::LEN) {
            assert_eq!(Fetch::from_bytes(&bytes[..len]), None);
        }
        for len in (0..=bytes.len()).filter(|len| *len != Fetched::LEN) {
            assert_eq!(Fetched::from_bytes(&bytes[..len]), None);
        }
    }

    #[test]
    fn parts_follow_each_other_in_whole_blocks() {
        let parts = disk_parts(5000, [1, 4096, 0]).unwrap();
        let places: Vec<_> = parts.iter().map(|part| (part.start, part.bytes)).collect();
        assert_eq!(places, [(0, 8192), (8192, 4096), (12288, 4096), (16384, 0)]);
        let most = i64::MAX.cast_unsigned() / BLOCK * BLOCK;
        assert!(disk_parts(0, [most]).is_some());
        for blobs in [vec![most + 1], vec![most, 1], vec![u64::MAX], vec![u64::MAX / 2; 3]] {
            assert_eq!(disk_parts(0, blobs.clone()), None, "{blobs:?}");
        }
    }

    #[test]
    fn the_ready_map_follows_the_last_block() {
        assert_eq!((ready_map_offset(1), ready_map_bytes(1)), (4096, 1));
        assert_eq!((ready_map_offset(8 * 4096), ready_map_bytes(8 * 4096)), (8 * 4096, 1));
        assert_eq!((ready_map_offset(8 * 4096 + 1), ready_map_bytes(8 * 4096 + 1)), (9 * 4096, 2));
    }
}
