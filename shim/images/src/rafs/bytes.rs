//! Reading little-endian numbers out of a bootstrap, with every bound checked.

use super::RafsError;

/// A bootstrap's bytes. Every access names what it is for, so that an error says what is wrong with the image.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a> {
    all: &'a [u8],
}

impl<'a> Bytes<'a> {
    pub fn new(all: &'a [u8]) -> Self {
        Self { all }
    }

    pub fn total(self) -> u64 {
        self.all.len() as u64
    }

    /// The `len` bytes at `offset`.
    pub fn get(self, what: &'static str, offset: u64, len: u64) -> Result<&'a [u8], RafsError> {
        let outside = || RafsError::Outside { what, offset, len, bytes: self.total() };
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let len = usize::try_from(len).map_err(|_| outside())?;
        let end = start.checked_add(len).ok_or_else(outside)?;
        self.all.get(start..end).ok_or_else(outside)
    }

    /// The records of `size` bytes each that fill `len` bytes at `offset`.
    pub fn records<const SIZE: usize>(
        self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<&'a [[u8; SIZE]], RafsError> {
        let (records, rest) = self.get(what, offset, len)?.as_chunks::<SIZE>();
        if rest.is_empty() { Ok(records) } else { Err(RafsError::Ragged { what, len, record: SIZE }) }
    }

    pub fn u16(self, what: &'static str, offset: u64) -> Result<u16, RafsError> {
        Ok(u16_at(self.get(what, offset, 2)?, 0))
    }

    pub fn u32(self, what: &'static str, offset: u64) -> Result<u32, RafsError> {
        Ok(u32_at(self.get(what, offset, 4)?, 0))
    }

    pub fn u64(self, what: &'static str, offset: u64) -> Result<u64, RafsError> {
        Ok(u64_at(self.get(what, offset, 8)?, 0))
    }
}

/// The number at `at` of a record; zero behind its end, which no caller asks for.
pub fn u16_at(record: &[u8], at: usize) -> u16 {
    record.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u16::from_le_bytes(*b))
}

/// See [`u16_at`].
pub fn u32_at(record: &[u8], at: usize) -> u32 {
    record.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_le_bytes(*b))
}

/// See [`u16_at`].
pub fn u64_at(record: &[u8], at: usize) -> u64 {
    record.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_outside() {
        let bytes = Bytes::new(&[1, 2, 3, 4]);
        assert_eq!(bytes.u32("x", 0).expect("inside"), 0x0403_0201);
        for (offset, len) in [(1, 4), (5, 0), (u64::MAX, 1), (0, u64::MAX), (4, 1)] {
            assert!(bytes.get("x", offset, len).is_err(), "{len} bytes at {offset}");
        }
        assert_eq!(bytes.get("x", 4, 0).expect("nothing at the end"), &[] as &[u8]);
        assert!(bytes.records::<3>("x", 0, 4).is_err());
    }
}
