//! Decompression from the middle of a gzip stream, without zlib.
//!
//! zlib begins in the middle with `inflatePrime` (bits of the byte before) and `inflateSetDictionary` (the 32 KiB before). The same
//! is reached with any inflate by a stream of our own making: the dictionary as a stored block, which ends at a byte, and then the
//! real stream, shifted so that it begins there. What the dictionary decompresses to, itself, is thrown away.

use std::io::Read;

use crate::codec::{CodecError, Compressor};
use crate::rafs::blob_meta::Context;

/// Decompresses a context's bytes of the layer, `stored`, into its `size` bytes.
pub fn inflate(context: &Context, dictionary: &[u8], stored: &[u8]) -> Result<Vec<u8>, CodecError> {
    let broken =
        |cause: String| CodecError::Broken { compressor: Compressor::Gzip, stored: stored.len(), cause };
    let size = context.size as usize;
    let mut out = Vec::with_capacity(size);
    let mut input = primed(context, dictionary, stored);
    let mut skip = dictionary.len();
    loop {
        let wanted = skip + size - out.len();
        let mut deflate = flate2::bufread::DeflateDecoder::new(input.as_slice());
        let mut part = Vec::with_capacity(wanted);
        // A context ends in the middle of a block: what was decompressed before that counts.
        let ended = match deflate.by_ref().take(wanted as u64).read_to_end(&mut part) {
            Ok(_) => part.len() < wanted,
            Err(error) => return Err(broken(error.to_string())),
        };
        out.extend_from_slice(part.get(skip..).unwrap_or_default());
        if !ended {
            return Ok(out);
        }
        // The end of a gzip member: a trailer of 8 bytes, and the next member's header.
        skip = 0;
        let used = usize::try_from(deflate.total_in()).unwrap_or(usize::MAX);
        let rest = input.get(used.saturating_add(8)..).unwrap_or_default();
        let header = gzip_header(rest).ok_or_else(|| {
            let (compressor, stored) = (Compressor::Gzip, stored.len());
            CodecError::Size { compressor, stored, got: out.len(), size }
        })?;
        input = rest[header..].to_vec();
    }
}

/// A deflate stream that begins with the dictionary.
fn primed(context: &Context, dictionary: &[u8], stored: &[u8]) -> Vec<u8> {
    let mut stream = Vec::with_capacity(dictionary.len() + stored.len() + 6);
    // A stored block, not the last: 3 bits of zeros and padding to the byte, its length twice, its bytes. 32 KiB fit into 16 bits.
    if let Ok(len @ 1..) = u16::try_from(dictionary.len()) {
        stream.push(0);
        stream.extend_from_slice(&len.to_le_bytes());
        stream.extend_from_slice(&(!len).to_le_bytes());
        stream.extend_from_slice(dictionary);
    }
    match context.bits {
        (_, 0) => stream.extend_from_slice(stored),
        // The lowest bit of a byte is the first: `count` bits come before the stream.
        (bits, count) => {
            let mut carry = u16::from(bits) & ((1 << count) - 1);
            for byte in stored {
                let window = carry | (u16::from(*byte) << count);
                stream.push(window.to_le_bytes()[0]);
                carry = window >> 8;
            }
            stream.push(carry.to_le_bytes()[0]);
        }
    }
    stream
}

/// Length of the gzip header at the start of `bytes` (RFC 1952, 2.3).
fn gzip_header(bytes: &[u8]) -> Option<usize> {
    let (head, flags) = (bytes.first_chunk::<10>()?, *bytes.get(3)?);
    if head[..3] != [0x1f, 0x8b, 8] {
        return None;
    }
    let mut at = 10;
    if flags & 4 != 0 {
        at += 2 + usize::from(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    }
    for text in [8, 16] {
        if flags & text != 0 {
            at += bytes.get(at..)?.iter().position(|byte| *byte == 0)? + 1;
        }
    }
    if flags & 2 != 0 {
        at += 2;
    }
    (at <= bytes.len()).then_some(at)
}
