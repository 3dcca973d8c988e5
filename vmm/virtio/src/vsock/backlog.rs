//! Bytes of the guest that the host's end of a connection did not take at once.
//!
//! One contiguous piece, so that it goes out with one system call. It has memory only while it holds something:
//! most connections never need it.

use crate::queue::{Reader, ShortChain};

/// A first-in-first-out buffer of bytes. The owner bounds what it holds.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// What is held, oldest first.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Adds the next `len` bytes of `payload`. Memory is taken for `limit` bytes, which must never be exceeded, at
    /// the first time, to grow no more (untouched pages of it cost nothing).
    pub fn append(&mut self, payload: &mut Reader<'_>, len: usize, limit: usize) -> Result<(), ShortChain> {
        debug_assert!(self.len() + len <= limit);
        if self.bytes.len() + len > limit {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.reserve_exact(limit.saturating_sub(end));
        self.bytes.resize(end + len, 0);
        payload.read_exact(&mut self.bytes[end..]).inspect_err(|_| self.bytes.truncate(end))
    }

    /// The oldest `count` bytes are gone.
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.bytes.len(), "more consumed than was there");
        if self.is_empty() {
            *self = Backlog::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;

    fn append(backlog: &mut Backlog, bytes: &mut [u8], limit: usize) -> Result<(), ShortChain> {
        let len = bytes.len();
        backlog.append(&mut Reader::new(vec![VolatileSlice::from(bytes)]), len, limit)
    }

    #[test]
    fn bytes_come_out_in_the_order_they_went_in_and_memory_stays_within_the_limit() {
        const LIMIT: usize = 1000;
        let mut backlog = Backlog::default();
        let (mut next_in, mut next_out) = (0_usize, 0_usize);
        for round in 1..500 {
            let len = (round * 37 % 300).min(LIMIT - backlog.len());
            let mut bytes: Vec<u8> = (next_in..next_in + len).map(|i| i.to_le_bytes()[0]).collect();
            append(&mut backlog, &mut bytes, LIMIT).unwrap();
            next_in += len;
            let out = (round * 53 % 280).min(backlog.len());
            for (i, byte) in backlog.bytes()[..out].iter().enumerate() {
                assert_eq!(*byte, (next_out + i).to_le_bytes()[0]);
            }
            backlog.consume(out);
            next_out += out;
            assert!(backlog.bytes.capacity() <= LIMIT);
        }
        assert!(next_out > 50 * LIMIT);
        assert_eq!(backlog.len(), next_in - next_out);
    }

    #[test]
    fn an_empty_backlog_has_no_memory() {
        let mut backlog = Backlog::default();
        append(&mut backlog, &mut [1, 2, 3], 64).unwrap();
        backlog.consume(2);
        assert_eq!(backlog.bytes(), [3]);
        backlog.consume(1);
        assert_eq!(backlog.bytes.capacity(), 0);
    }

    #[test]
    fn a_payload_that_is_too_short_adds_nothing() {
        let mut backlog = Backlog::default();
        append(&mut backlog, &mut [1, 2], 64).unwrap();
        let short = backlog.append(&mut Reader::new(vec![]), 3, 64);
        assert_eq!(short, Err(ShortChain { wanted: 3, left: 0 }));
        assert_eq!(backlog.bytes(), [1, 2]);
    }
}
