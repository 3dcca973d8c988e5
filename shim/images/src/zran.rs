//! Decompression from the middle of a gzip stream, without zlib.
//!
//! zlib begins in the middle with `inflatePrime` (bits of the byte before) and `inflateSetDictionary` (the 32 KiB before). The same
//! is reached with any inflate by a stream of our own making before the real one: the dictionary as a stored block, which ends at a
//! byte, and then empty blocks whose bits end where the real stream's begin. (Shifting the real stream instead would not do: its
//! stored blocks begin at its bytes.) What the dictionary decompresses to, itself, is thrown away.

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
    if let (byte, count @ 1..8) = context.bits {
        let mut bits = Bits { bytes: stream, used: 8 };
        bits.empty_blocks(8 - count);
        stream = bits.bytes;
        if let Some(last) = stream.last_mut() {
            *last |= byte & (0xff << (8 - count));
        }
    }
    stream.extend_from_slice(stored);
    stream
}

/// Bits into bytes, the lowest first (RFC 1951, 3.1.1).
struct Bits {
    bytes: Vec<u8>,
    /// Bits of the last byte that are used.
    used: u8,
}

impl Bits {
    fn put(&mut self, value: u8, count: u8) {
        for bit in 0..count {
            if self.used == 8 {
                self.bytes.push(0);
                self.used = 0;
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= (value >> bit & 1) << self.used;
            }
            self.used += 1;
        }
    }

    /// Blocks of nothing that end `at` bits into a byte, 1 to 7, if they begin at one.
    fn empty_blocks(&mut self, at: u8) {
        if at % 2 == 1 {
            self.dynamic();
        }
        while self.used != at {
            // Fixed codes: not the last, type 1; the end is seven zeros. 10 bits.
            self.put(0b010, 3);
            self.put(0, 7);
        }
    }

    /// A block of nothing with codes of its own, 97 bits: an odd number.
    fn dynamic(&mut self) {
        // Not the last, type 2; 257 literals and lengths, 1 distance, 19 lengths of the code that codes lengths.
        self.put(0b100, 3);
        self.put(0, 5);
        self.put(0, 5);
        self.put(15, 4);
        // In their order 16, 17, 18, 0, 8, …, 1, 15 (RFC 1951, 3.2.7): "11 zeros or more" has 1 bit, 0 and 1 have 2.
        for length in [0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0] {
            self.put(length, 3);
        }
        // So that literal 0 and the end have a bit each: 1, 138 zeros, 117 zeros, 1; and no distance: 0. Codes: 0, 01, 11 from
        // the lowest bit.
        self.put(0b11, 2);
        for zeros in [138, 117] {
            self.put(0, 1);
            self.put(zeros - 11, 7);
        }
        self.put(0b11, 2);
        self.put(0b01, 2);
        // The end.
        self.put(1, 1);
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn empty_blocks_end_at_every_bit() {
        for at in 1..8 {
            let mut bits = Bits { bytes: Vec::new(), used: 8 };
            bits.empty_blocks(at);
            assert_eq!(bits.used, at);
            // Then a stored block, the last: "ok".
            bits.put(1, 3);
            let mut stream = bits.bytes;
            stream.extend_from_slice(&[2, 0, 0xfd, 0xff]);
            stream.extend_from_slice(b"ok");
            let mut out = Vec::new();
            let got = flate2::bufread::DeflateDecoder::new(stream.as_slice()).read_to_end(&mut out);
            assert!(got.is_ok() && out == b"ok", "{at}: {got:?}");
        }
    }

    #[test]
    fn members_of_a_gzip_file_follow_each_other() {
        let member = |text: &[u8]| {
            let mut gzip =
                flate2::GzBuilder::new().filename("name").write(Vec::new(), flate2::Compression::fast());
            gzip.write_all(text).expect("to memory");
            gzip.finish().expect("to memory")
        };
        let stored =
            [&member(b"first")[gzip_header(&member(b"first")).expect("a header")..], &member(b"second")]
                .concat();
        let context = Context::new(11, (0, 0));
        assert_eq!(inflate(&context, &[], &stored).expect("both"), b"firstsecond");
        assert!(inflate(&context, &[], &stored[..stored.len() - 12]).is_err());
        assert!(inflate(&Context::new(12, (0, 0)), &[], &stored).is_err(), "no third");
    }

    #[test]
    fn headers_of_gzip() {
        for (header, len) in [
            (&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], Some(10)),
            (&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 3, 2, 0, 7, 7], Some(14)),
            (&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3, b'a', 0], Some(12)),
            (&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3, b'a'], None),
            (&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 3, 200, 0], None),
            (&[0x1f, 0x8b, 9, 0, 0, 0, 0, 0, 0, 3], None),
            (&[0x1f, 0x8b, 8], None),
        ] {
            assert_eq!(gzip_header(header), len, "{header:?}");
        }
    }
}
