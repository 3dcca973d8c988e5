//! The end of what the guest wrote, and whether it was a panic.

use std::collections::VecDeque;

/// Bytes kept.
pub const CAPACITY: usize = 4096;
/// What a Linux kernel says last (`kernel/panic.c`).
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// Bytes added at once, so that the kept ones always span the border before them.
const STEP: usize = CAPACITY - PANIC.len();

/// The last bytes of a stream.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Tail {
    bytes: VecDeque<u8>,
    panicked: bool,
}

impl Tail {
    /// A tail as it was saved.
    pub fn restore(bytes: &[u8], panicked: bool) -> Self {
        let kept = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        Tail { bytes: kept.iter().copied().collect(), panicked }
    }

    /// Adds what came.
    pub fn push(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(STEP) {
            let excess = (self.bytes.len() + part.len()).saturating_sub(CAPACITY);
            self.bytes.drain(..excess);
            self.bytes.extend(part);
            if !self.panicked {
                let new = self.bytes.len().saturating_sub(part.len() + PANIC.len() - 1);
                self.panicked = self.bytes.make_contiguous()[new..].windows(PANIC.len()).any(|w| w == PANIC);
            }
        }
    }

    /// The last [`CAPACITY`] bytes, or all if there were fewer.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// The guest said that it panics, however long ago.
    pub fn panicked(&self) -> bool {
        self.panicked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end() {
        let mut tail = Tail::default();
        let stream: Vec<u8> = (0..20_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let mut at = 0;
        for len in (1..).take_while(|len| len * (len + 1) / 2 <= stream.len()) {
            tail.push(&stream[at..at + len]);
            at += len;
            assert_eq!(tail.bytes(), stream[at.saturating_sub(CAPACITY)..at]);
        }
        tail.push(&stream);
        assert_eq!(tail.bytes(), stream[stream.len() - CAPACITY..]);
        assert!(!tail.panicked());
    }

    #[test]
    fn notices_a_panic_however_it_is_cut() {
        let text = [&[b'x'; 5000][..], b"[    1.0] Kernel panic - not syncing: VFS", &[b'y'; 9000]].concat();
        for cut in 4990..5060 {
            let mut tail = Tail::default();
            tail.push(&text[..cut]);
            tail.push(&text[cut..]);
            assert!(tail.panicked(), "cut at {cut}");
        }
        let mut tail = Tail::default();
        for byte in &text {
            tail.push(&[*byte]);
        }
        assert!(tail.panicked());

        let mut tail = Tail::default();
        tail.push(b"Kernel panic - not ");
        tail.push(b"today. syncing");
        assert!(!tail.panicked());
    }

    #[test]
    fn is_restored() {
        let mut tail = Tail::default();
        tail.push(b"Kernel panic - not syncing");
        assert_eq!(Tail::restore(&tail.bytes(), tail.panicked()), tail);
        assert_eq!(Tail::restore(&[1; 9000], false).bytes().len(), CAPACITY);
    }
}
