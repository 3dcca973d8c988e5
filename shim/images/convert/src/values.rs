//! Attributes' values with line ends in them.
//!
//! A record of an archive's extended header says how long it is, and its value may be any bytes: a file's capabilities have a line end for
//! every eleventh capability of a set. The builder's reader of archives takes each line end for a record's. So a value with line ends is
//! exchanged for others of the same length before it is built, and put back where they are in the bootstrap.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

/// Shorter stand-ins might be found in a bootstrap by chance.
const SHORTEST: usize = 8;
const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// Values by what stands for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Values(BTreeMap<Vec<u8>, Vec<u8>>);

impl Values {
    /// Exchanges the values with line ends among the records ("LENGTH KEY=VALUE\n") of an extended header.
    ///
    /// # Errors
    /// A value with a line end is too short, or is a name's.
    pub fn exchange(&mut self, records: &mut [u8]) -> Result<()> {
        let mut at = 0;
        // What is no record is the builder's to complain of.
        while let Some(len) = record_length(&records[at..]) {
            let record = &mut records[at..at + len - 1];
            at += len;
            if !record.contains(&b'\n') {
                continue;
            }
            let Some(equals) = record.iter().position(|byte| *byte == b'=') else { continue };
            let (key, value) = record.split_at_mut(equals + 1);
            let key = key.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
            let named = String::from_utf8_lossy(key.strip_suffix(b"=").unwrap_or(key)).into_owned();
            ensure!(
                key.starts_with(ATTRIBUTE) && value.len() >= SHORTEST,
                "an archive with a line end in {named:?} of {} bytes; only attributes of {SHORTEST} and more may have one",
                value.len()
            );
            let stand_in = stand_in(value);
            self.0.insert(stand_in.clone(), value.to_vec());
            value.copy_from_slice(&stand_in);
        }
        Ok(())
    }

    /// Puts the values back into a bootstrap.
    pub fn put_back(&self, bootstrap: &mut [u8]) {
        for (stand_in, value) in &self.0 {
            let places: Vec<usize> = memchr::memmem::find_iter(bootstrap, stand_in).collect();
            for place in places {
                bootstrap[place..place + value.len()].copy_from_slice(value);
            }
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Length of the record at the beginning; none where there is none.
fn record_length(records: &[u8]) -> Option<usize> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let len: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    let whole = len > space + 1 && records.get(len - 1) == Some(&b'\n');
    whole.then_some(len)
}

/// As many bytes as the value has, the same for the same value, and no line end among them.
fn stand_in(value: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::digest(value);
    let mut bytes = Vec::with_capacity(value.len() + hash.len());
    while bytes.len() < value.len() {
        bytes.extend(hash.iter().map(|byte| if *byte == b'\n' { 0xff } else { *byte }));
        hash = Sha256::digest(hash);
    }
    bytes.truncate(value.len());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        archive.append_pax_extensions([(key, value)]).expect("to memory");
        let blocks = archive.get_ref();
        let len = record_length(&blocks[512..]).expect("a record");
        blocks[512..512 + len].to_vec()
    }

    #[test]
    fn values_are_exchanged_and_come_back() {
        let (one, two) = (b"with\na line end\n", [b'\n'; 300]);
        let mut records = [
            record("SCHILY.xattr.user.none", b"none"),
            record("SCHILY.xattr.user.one", one),
            record("mtime", b"1.5"),
            record("SCHILY.xattr.user.two", &two),
        ]
        .concat();
        let (before, mut values) = (records.clone(), Values::default());
        values.exchange(&mut records).expect("fine");
        assert_eq!(values.0.len(), 2);
        assert_eq!(records.iter().filter(|byte| **byte == b'\n').count(), 4, "the records' own");
        assert_eq!(records.len(), before.len());
        values.put_back(&mut records);
        assert_eq!(records, before);
    }

    #[test]
    fn what_cannot_be_exchanged_is_said() {
        let mut values = Values::default();
        let error = values.exchange(&mut record("SCHILY.xattr.user.x", b"a\n")).expect_err("too short");
        assert!(error.to_string().contains("\"SCHILY.xattr.user.x\" of 2 bytes"), "{error}");
        assert!(values.exchange(&mut record("path", b"a long\nname")).is_err());
        for nonsense in
            [&b""[..], b"x", b"5 a=b", b"99 a=b\n", b"0 a=b\n", b"2 \n", b"18446744073709551615 a=\n"]
        {
            values.exchange(&mut nonsense.to_vec()).expect("nothing to exchange");
        }
        assert!(values.is_empty());
    }
}
