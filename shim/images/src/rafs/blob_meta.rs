//! The index over a plain gzip layer (zran): for each chunk, from which point of the gzip stream it is decompressed.
//!
//! ```text
//! table     24 bytes a chunk, then at the offsets that the header names: contexts, 40 bytes each, and their dictionaries
//! header    4096 bytes: magic 0, features 4, compressor 8, entries 12, …, contexts 40 (offset) 48 (bytes) 56 (count), magic 4092
//! ```

use super::bytes::{u32_at, u64_at};
use super::{BlobTable, Bytes, MAX_BLOB, RafsError};
use crate::codec::{CodecError, Digester, decompress};

/// Bytes of the header behind the table.
pub const HEADER: u64 = 4096;

const MAGIC: u32 = 0xb10b_b10b;

/// Most bytes that a context may decompress from or to. Nydus makes them of 4 and 8 MiB at most.
const MAX_CONTEXT: u32 = 64 << 20;

/// Why an index cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The blob that holds it is another.
    #[error("its digest is wrong: tampered or broken")]
    Digest,
    /// It does not decompress.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// What it says cannot be.
    #[error(transparent)]
    Rafs(#[from] RafsError),
}

/// A point in the gzip stream where decompression can begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Offset in the layer.
    pub offset: u64,
    /// Bytes of the layer that are needed.
    pub stored_size: u32,
    /// How many come out.
    pub size: u32,
    /// The byte before `offset`, and how many of its highest bits belong to the context: 0 to 7.
    pub bits: (u8, u8),
    /// Where its dictionary is in [`Index::dictionaries`].
    dictionary: std::ops::Range<usize>,
}

#[cfg(test)]
impl Context {
    /// A context of `size` bytes without a dictionary.
    pub fn new(size: u32, bits: (u8, u8)) -> Self {
        Self { offset: 0, stored_size: 0, size, bits, dictionary: 0..0 }
    }
}

/// Where a chunk comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which context.
    pub context: u32,
    /// Offset in what the context decompresses to.
    pub offset: u32,
}

/// A blob's index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The contexts, in the order of the stream.
    pub contexts: Vec<Context>,
    dictionaries: Vec<u8>,
    /// For each chunk of the blob's table.
    pub places: Vec<Place>,
}

impl Index {
    /// Reads the index of `blob` from its table (decompressed) and header.
    pub fn parse(blob: &BlobTable, table: &[u8], header: &[u8]) -> Result<Self, RafsError> {
        let value = |what, value, limit| RafsError::Value { what, value, limit };
        if u32_at(header, 0) != MAGIC || u32_at(header, 4092) != MAGIC {
            return Err(value("a zran index's magic", u64::from(u32_at(header, 0)), "another"));
        }
        let bytes = Bytes::new(table);
        let (offset, size) = (u64_at(header, 40), u64_at(header, 48));
        let count = u64::from(u32_at(header, 56));
        let records = bytes.records::<40>("zran contexts", offset, count * 40)?;
        let rest = size.checked_sub(count * 40);
        let rest = rest.ok_or_else(|| value("a zran index's size", size, "less than its contexts"))?;
        let dictionaries = bytes.get("zran dictionaries", offset + count * 40, rest)?;
        let contexts: Vec<Context> =
            records.iter().map(|record| context(record, dictionaries.len())).collect::<Result<_, _>>()?;

        let entries = u64::from(blob.zran.as_ref().map_or(0, |zran| zran.chunks));
        let chunks = bytes.records::<24>("zran chunks", 0, entries * 24)?;
        let mut places = vec![None; blob.chunks.len()];
        for record in chunks {
            let (info, data) = (u64_at(record, 0), u64_at(record, 16));
            let at = (info & 0xffff_ffff) << 12;
            // What the image does not use is in the index all the same.
            let Ok(index) = blob.chunks.binary_search_by_key(&at, |chunk| chunk.offset) else { continue };
            let (context, offset) = (u32_at(record, 20), u32_at(record, 16));
            let chunk = &blob.chunks[index];
            let fits = contexts
                .get(context as usize)
                .is_some_and(|c| offset.checked_add(chunk.size).is_some_and(|end| end <= c.size));
            if !fits {
                return Err(value("a chunk's place in the zran index", data, "outside of its context"));
            }
            places[index] = Some(Place { context, offset });
        }
        if let Some(lost) = places.iter().position(Option::is_none) {
            return Err(value("the offset of a chunk", blob.chunks[lost].offset, "not in the zran index"));
        }
        let places = places.into_iter().flatten().collect();
        Ok(Self { contexts, dictionaries: dictionaries.to_vec(), places })
    }

    /// Reads the index of `blob` out of the blob that holds it, which its digest proves.
    pub fn open(blob: &BlobTable, holder: &[u8]) -> Result<Self, IndexError> {
        let zran = blob.zran.as_ref().ok_or(IndexError::Digest)?;
        let digest: String =
            Digester::Sha256.digest(holder).iter().map(|byte| format!("{byte:02x}")).collect();
        if digest != zran.blob {
            return Err(IndexError::Digest);
        }
        let bytes = Bytes::new(holder);
        let stored = bytes.get("zran index", zran.offset, zran.stored_size)?;
        let header = bytes.get("zran index's header", zran.offset + zran.stored_size, HEADER)?;
        let size = usize::try_from(zran.size).map_err(|_| IndexError::Digest)?;
        let table = decompress(zran.compressor, stored, size)?;
        Ok(Self::parse(blob, &table, header)?)
    }

    /// The bytes before a context that it refers back to.
    pub fn dictionary(&self, context: &Context) -> &[u8] {
        &self.dictionaries[context.dictionary.clone()]
    }
}

fn context(record: &[u8; 40], dictionaries: usize) -> Result<Context, RafsError> {
    let value = |what, value, limit| RafsError::Value { what, value, limit };
    let (at, len) = (u64_at(record, 16), u64::from(u32_at(record, 32)));
    let dictionary =
        at.checked_add(len).and_then(|end| Some(usize::try_from(at).ok()?..usize::try_from(end).ok()?));
    let dictionary = dictionary.filter(|range| range.end <= dictionaries && len <= 32 << 10);
    let context = Context {
        offset: u64_at(record, 0),
        stored_size: u32_at(record, 24),
        size: u32_at(record, 28),
        bits: (record[36], record[37] & 7),
        dictionary: dictionary
            .ok_or_else(|| value("a zran dictionary", at, "outside, or more than 32 KiB"))?,
    };
    if context.stored_size > MAX_CONTEXT || context.size > MAX_CONTEXT {
        return Err(value("a zran context's size", u64::from(context.size), "more than 64 MiB"));
    }
    if context.offset > MAX_BLOB {
        return Err(value("a zran context's offset", context.offset, "more than a blob can have"));
    }
    Ok(context)
}
