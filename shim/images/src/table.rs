//! What is known of a blob's chunks, and which of them are in the cache file.
//!
//! A cache file is shared by all images that name its blob, so it matters that they mean the same: an image can call anything by a
//! blob's name. The table holds, for each chunk of the file, the digest it was verified with. An image whose chunks agree with it
//! may read the file (its own chunks are exactly what its bootstrap demands); one that contradicts it gets a file of its own.

use std::collections::BTreeMap;

use vmm_api::image::{BLOCK, ready_map_bytes};

use crate::codec::Digester;
use crate::rafs::{BlobTable, Chunk};

/// A chunk of a cache file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    size: u32,
    digester: u8,
    digest: [u8; 32],
    done: bool,
}

/// The chunks of a cache file by their offset, and its ready map.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    bytes: u64,
    chunks: BTreeMap<u64, Entry>,
    ready: Vec<u8>,
}

/// Why an image cannot share a cache file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contradiction {
    /// Offset of the chunk.
    pub offset: u64,
}

const MAGIC: &[u8; 8] = b"ctvmchk1";
const RECORD: usize = 48;

impl Table {
    /// A table of nothing.
    pub fn new(bytes: u64) -> Self {
        let map = usize::try_from(ready_map_bytes(bytes)).unwrap_or(usize::MAX);
        Self { bytes, chunks: BTreeMap::new(), ready: vec![0; map] }
    }

    /// Size of the blob.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the chunk at `offset` is in the file, verified.
    pub fn is_done(&self, offset: u64) -> bool {
        self.chunks.get(&offset).is_some_and(|entry| entry.done)
    }

    /// Bytes of chunks in the file, and how many chunks there are, done and in all.
    pub fn filled(&self) -> (u64, usize, usize) {
        let done = self.chunks.values().filter(|entry| entry.done);
        let (bytes, count) = done.fold((0, 0), |(b, n), entry| (b + u64::from(entry.size), n + 1));
        (bytes, count, self.chunks.len())
    }

    /// Adds an image's chunks, all or none. Whether there were new ones.
    pub fn merge(&mut self, blob: &BlobTable) -> Result<bool, Contradiction> {
        if blob.bytes != self.bytes {
            return Err(Contradiction { offset: 0 });
        }
        let digester = blob.digester.number();
        let mut fresh = Vec::new();
        for chunk in &blob.chunks {
            let wanted = Entry { size: chunk.size, digester, digest: chunk.digest, done: false };
            match self.chunks.get(&chunk.offset) {
                Some(known) if Entry { done: false, ..*known } == wanted => {}
                Some(_) => return Err(Contradiction { offset: chunk.offset }),
                // A block's bit is never taken back, so no chunk can come into a block that is ready.
                None if self.overlaps(chunk) || blocks(chunk).any(|block| self.is_ready(block)) => {
                    return Err(Contradiction { offset: chunk.offset });
                }
                None => fresh.push((chunk.offset, wanted)),
            }
        }
        let any = !fresh.is_empty();
        self.chunks.extend(fresh);
        Ok(any)
    }

    fn overlaps(&self, chunk: &Chunk) -> bool {
        let before = self.chunks.range(..chunk.end()).next_back();
        before.is_some_and(|(offset, entry)| offset + u64::from(entry.size) > chunk.offset)
    }

    /// Notes that the chunk at `offset` is in the file. The bytes of the ready map that this changes: the first's index, and them.
    pub fn set_done(&mut self, offset: u64) -> (u64, Vec<u8>) {
        let Some(entry) = self.chunks.get_mut(&offset) else { return (0, Vec::new()) };
        entry.done = true;
        let end = offset + u64::from(entry.size);
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        for block in first..=last {
            // Only the outermost blocks can have a part of another chunk.
            if (block != first && block != last) || self.is_complete(block) {
                self.ready[at(block / 8)] |= 1 << (block % 8);
            }
        }
        (first / 8, self.ready[at(first / 8)..=at(last / 8)].to_vec())
    }

    /// Whether all chunks that have a part in a block are done.
    fn is_complete(&self, block: u64) -> bool {
        let (start, end) = (block * BLOCK, (block + 1) * BLOCK);
        let touching = self.chunks.range(..end).rev();
        touching
            .take_while(|(offset, entry)| *offset + u64::from(entry.size) > start)
            .all(|(_, entry)| entry.done)
    }

    fn is_ready(&self, block: u64) -> bool {
        self.ready.get(at(block / 8)).is_some_and(|byte| byte & (1 << (block % 8)) != 0)
    }

    /// Takes the ready map over from the file: a chunk is done whose blocks are all ready. What is ready without a chunk is dropped.
    pub fn load_ready(&mut self, map: &[u8]) {
        let found = |block: u64| map.get(at(block / 8)).is_some_and(|byte| byte & (1 << (block % 8)) != 0);
        let done: Vec<u64> = self
            .chunks
            .iter()
            .filter(|(offset, entry)| {
                let end = *offset + u64::from(entry.size);
                (*offset / BLOCK..=(end - 1) / BLOCK).all(found)
            })
            .map(|(offset, _)| *offset)
            .collect();
        self.ready.fill(0);
        for offset in done {
            self.set_done(offset);
        }
    }

    /// Forgets that these chunks are in the file. Only for a file that nobody reads.
    pub fn drop_chunks(&mut self, offsets: &[u64]) {
        for offset in offsets {
            if let Some(entry) = self.chunks.get_mut(offset) {
                entry.done = false;
            }
        }
        let done: Vec<u64> = self.chunks.iter().filter(|(_, e)| e.done).map(|(offset, _)| *offset).collect();
        self.ready.fill(0);
        for offset in done {
            self.set_done(offset);
        }
    }

    /// The whole ready map.
    pub fn ready(&self) -> &[u8] {
        &self.ready
    }

    /// The chunks that are done: offset, size, how to verify them.
    pub fn done(&self) -> impl Iterator<Item = (u64, u32, Digester, [u8; 32])> {
        self.chunks.iter().filter(|(_, entry)| entry.done).filter_map(|(offset, entry)| {
            Some((*offset, entry.size, Digester::from_rafs(entry.digester.into())?, entry.digest))
        })
    }

    /// The table without its ready map, for a file. A digest of it all comes last.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + self.chunks.len() * RECORD + 32);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.bytes.to_le_bytes());
        for (offset, entry) in &self.chunks {
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&entry.size.to_le_bytes());
            bytes.extend_from_slice(&[entry.digester, 0, 0, 0]);
            bytes.extend_from_slice(&entry.digest);
        }
        let digest = Digester::Blake3.digest(&bytes);
        bytes.extend_from_slice(&digest);
        bytes
    }

    /// The table in `bytes`, or nothing where they are not one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, digest) = bytes.split_last_chunk::<32>()?;
        if Digester::Blake3.digest(body) != *digest {
            return None;
        }
        let (magic, rest) = body.split_first_chunk::<8>()?;
        let (size, records) = rest.split_first_chunk::<8>()?;
        if magic != MAGIC {
            return None;
        }
        let mut table = Self::new(u64::from_le_bytes(*size));
        let (records, []) = records.as_chunks::<RECORD>() else { return None };
        for record in records {
            let mut digest = [0; 32];
            digest.copy_from_slice(&record[16..]);
            let offset = u64::from_le_bytes(*record.first_chunk()?);
            let size = u32::from_le_bytes(*record[8..].first_chunk()?);
            table.chunks.insert(offset, Entry { size, digester: record[12], digest, done: false });
        }
        Some(table)
    }
}

fn blocks(chunk: &Chunk) -> impl Iterator<Item = u64> + use<> {
    chunk.offset / BLOCK..=(chunk.end() - 1) / BLOCK
}

fn at(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Compressor;
    use crate::rafs::Stored;

    fn blob(chunks: &[(u64, u32, u8)]) -> BlobTable {
        let chunk = |(offset, size, mark): &(u64, u32, u8)| Chunk {
            offset: *offset,
            size: *size,
            stored_offset: *offset,
            stored_size: *size,
            stored: Stored::Plain,
            digest: [*mark; 32],
        };
        BlobTable {
            id: "0".repeat(64),
            bytes: 100_000,
            compressor: Compressor::None,
            digester: Digester::Sha256,
            zran: None,
            chunks: chunks.iter().map(chunk).collect(),
        }
    }

    #[test]
    fn a_block_of_two_chunks_is_ready_with_the_second() {
        let mut table = Table::new(100_000);
        table.merge(&blob(&[(0, 5000, 1), (5000, 5000, 2)])).expect("fresh");
        assert_eq!(table.set_done(0), (0, vec![0b001]));
        assert_eq!(table.set_done(5000), (0, vec![0b111]));
        assert!(table.is_done(0) && table.is_done(5000) && !table.is_done(1));
    }

    #[test]
    fn images_that_agree_share_and_others_do_not() {
        let mut table = Table::new(100_000);
        assert_eq!(table.merge(&blob(&[(0, 4096, 1)])), Ok(true));
        assert_eq!(table.merge(&blob(&[(0, 4096, 1)])), Ok(false));
        assert_eq!(table.merge(&blob(&[(0, 4096, 1), (8192, 4096, 3)])), Ok(true));
        for other in [(0, 4096, 9), (0, 4000, 1), (4000, 200, 1), (4095, 1, 5), (8000, 20_000, 4)] {
            assert!(table.merge(&blob(&[other])).is_err(), "{other:?}");
        }
        // All or none.
        assert!(table.merge(&blob(&[(20_480, 10, 1), (0, 1, 1)])).is_err());
        assert_eq!(table.merge(&blob(&[(20_480, 10, 2)])), Ok(true));
    }

    #[test]
    fn no_chunk_comes_into_a_ready_block() {
        let mut table = Table::new(100_000);
        table.merge(&blob(&[(0, 100, 1)])).expect("fresh");
        table.set_done(0);
        assert_eq!(table.merge(&blob(&[(100, 100, 2)])), Err(Contradiction { offset: 100 }));
    }

    #[test]
    fn a_table_comes_back_from_its_bytes_and_its_map() {
        let mut table = Table::new(100_000);
        table.merge(&blob(&[(0, 5000, 1), (5000, 5000, 2), (40_960, 9000, 3)])).expect("fresh");
        table.set_done(0);
        table.set_done(40_960);
        let bytes = table.to_bytes();
        let mut again = Table::from_bytes(&bytes).expect("whole");
        assert!(!again.is_done(40_960));
        // A bit that no chunk accounts for, as a power loss may leave it.
        let mut map = table.ready().to_vec();
        map[2] |= 1;
        again.load_ready(&map);
        // The first chunk's last block waits for the second, so it is not known to be there.
        assert!(!again.is_done(0) && again.is_done(40_960));
        assert_eq!(again.ready()[2], 0);
        for broken in [&bytes[1..], &bytes[..bytes.len() - 1], &[]] {
            assert!(Table::from_bytes(broken).is_none());
        }
    }

    #[test]
    fn dropped_chunks_lose_their_blocks() {
        let mut table = Table::new(100_000);
        table.merge(&blob(&[(0, 4096, 1), (4096, 4096, 2)])).expect("fresh");
        table.set_done(0);
        table.set_done(4096);
        table.drop_chunks(&[0]);
        assert_eq!(table.ready()[0], 0b10);
        assert_eq!(table.done().count(), 1);
    }
}
