//! Decompression and digests of chunks, as RAFS has them.

use std::io::Read;

use sha2::{Digest, Sha256};

/// How chunks are compressed. Numbers are RAFS's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compressor {
    /// 0: not at all.
    None,
    /// 1: an LZ4 block, without a size before it.
    Lz4,
    /// 2: a gzip member.
    Gzip,
    /// 3: a zstd frame.
    Zstd,
}

impl Compressor {
    /// The compressor of RAFS's number.
    pub fn from_rafs(number: u32) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Gzip, Self::Zstd].get(number as usize).copied()
    }
}

/// How chunks are digested. Numbers are RAFS's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digester {
    /// 0.
    Blake3,
    /// 1.
    Sha256,
}

impl Digester {
    /// The digester of RAFS's number.
    pub fn from_rafs(number: u32) -> Option<Self> {
        [Self::Blake3, Self::Sha256].get(number as usize).copied()
    }

    /// RAFS's number.
    pub fn number(self) -> u8 {
        match self {
            Self::Blake3 => 0,
            Self::Sha256 => 1,
        }
    }

    /// The digest of `bytes`.
    pub fn digest(self, bytes: &[u8]) -> [u8; 32] {
        match self {
            Self::Blake3 => *blake3::hash(bytes).as_bytes(),
            Self::Sha256 => Sha256::digest(bytes).into(),
        }
    }
}

/// Why bytes do not decompress to what was promised.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not the compressor's format.
    #[error("{compressor:?} data of {stored} bytes is broken: {cause}")]
    Broken {
        /// By which.
        compressor: Compressor,
        /// Length of the compressed bytes.
        stored: usize,
        /// What the decompressor says.
        cause: String,
    },
    /// Another length.
    #[error("{compressor:?} data of {stored} bytes decompresses to {got} bytes, not {size}")]
    Size {
        /// By which.
        compressor: Compressor,
        /// Length of the compressed bytes.
        stored: usize,
        /// What came out, cut off one byte behind `size`.
        got: usize,
        /// What shall come out.
        size: usize,
    },
}

/// Decompresses `stored` into exactly `size` bytes.
pub fn decompress(compressor: Compressor, stored: &[u8], size: usize) -> Result<Vec<u8>, CodecError> {
    let broken = |cause: String| CodecError::Broken { compressor, stored: stored.len(), cause };
    let out = match compressor {
        Compressor::None => stored.to_vec(),
        Compressor::Lz4 => {
            let mut out = vec![0; size];
            let got =
                lz4_flex::block::decompress_into(stored, &mut out).map_err(|e| broken(e.to_string()))?;
            out.truncate(got);
            out
        }
        Compressor::Gzip => {
            let mut out = Vec::with_capacity(size);
            let gzip = flate2::bufread::GzDecoder::new(stored);
            gzip.take(size as u64 + 1).read_to_end(&mut out).map_err(|e| broken(e.to_string()))?;
            out
        }
        Compressor::Zstd => zstd::bulk::decompress(stored, size).map_err(|e| broken(e.to_string()))?,
    };
    if out.len() == size {
        Ok(out)
    } else {
        Err(CodecError::Size { compressor, stored: stored.len(), got: out.len(), size })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn compressed(compressor: Compressor, bytes: &[u8]) -> Vec<u8> {
        match compressor {
            Compressor::None => bytes.to_vec(),
            Compressor::Lz4 => lz4_flex::block::compress(bytes),
            Compressor::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(bytes).expect("to memory");
                gzip.finish().expect("to memory")
            }
            Compressor::Zstd => zstd::bulk::compress(bytes, 1).expect("to memory"),
        }
    }

    #[test]
    fn every_compressor_gives_back_what_went_in() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i / 7 % 251).to_le_bytes()[0]).collect();
        for number in 0..4 {
            let compressor = Compressor::from_rafs(number).expect("known");
            let stored = compressed(compressor, &bytes);
            assert_eq!(decompress(compressor, &stored, bytes.len()).expect("whole"), bytes);
            for size in [bytes.len() - 1, bytes.len() + 1] {
                assert!(decompress(compressor, &stored, size).is_err(), "{compressor:?} as {size}");
            }
            assert!(decompress(compressor, &stored[..stored.len() / 2], bytes.len()).is_err(), "half");
        }
        assert!(Compressor::from_rafs(4).is_none());
    }

    #[test]
    fn digests_are_the_published_ones() {
        let hex = |d: [u8; 32]| d.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert!(hex(Digester::Sha256.digest(b"abc")).starts_with("ba7816bf8f01cfea"));
        assert!(hex(Digester::Blake3.digest(b"abc")).starts_with("6437b3ac38465133"));
    }
}
