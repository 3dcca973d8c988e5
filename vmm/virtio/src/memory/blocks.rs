//! Which blocks of a region are there.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a block, and its alignment: a huge page of the host, so that giving one back splits none.
pub const BLOCK: u64 = 2 << 20;

const BITS: u64 = u64::BITS as u64;

/// One bit a block: set while it is plugged. Read by every thread that touches guest memory, written by the memory
/// device alone.
#[derive(Debug)]
pub struct Blocks {
    words: Box<[AtomicU64]>,
    count: u64,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn new(count: u64) -> Self {
        let words = (0..count.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Blocks { words, count }
    }

    /// Number of blocks, plugged or not.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Length of the region in bytes.
    pub fn bytes(&self) -> u64 {
        self.count * BLOCK
    }

    /// Whether the `len` bytes at `offset` of the region lie in plugged blocks, all of them.
    #[inline]
    pub fn hold(&self, offset: u64, len: u64) -> bool {
        let Some(last) = len.checked_sub(1) else { return true };
        match offset.checked_add(last) {
            Some(last) if last < self.bytes() => self.are(offset / BLOCK..last / BLOCK + 1, true),
            _ => false,
        }
    }

    /// Whether all of `blocks` are `plugged`, or all are not. Blocks beyond the region are neither.
    pub fn are(&self, blocks: Range<u64>, plugged: bool) -> bool {
        if blocks.end > self.count {
            return false;
        }
        masks(blocks).all(|(word, mask)| {
            let set = self.words[word].load(Ordering::SeqCst) & mask;
            if plugged { set == mask } else { set == 0 }
        })
    }

    /// Says that `blocks`, which lie in the region, are plugged, or are not any more.
    pub fn set(&self, blocks: Range<u64>, plugged: bool) {
        debug_assert!(blocks.end <= self.count);
        for (word, mask) in masks(blocks) {
            if plugged {
                self.words[word].fetch_or(mask, Ordering::SeqCst);
            } else {
                self.words[word].fetch_and(!mask, Ordering::SeqCst);
            }
        }
    }

    /// Number of plugged blocks.
    pub fn plugged(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::SeqCst).count_ones())).sum()
    }

    /// Plugged blocks as the longest runs there are, ascending.
    pub fn runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in (0..self.count).filter(|block| self.are(*block..block + 1, true)) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    /// Number of [`Blocks::runs`], without making them.
    pub fn fragments(&self) -> u64 {
        let mut carry = 0;
        let mut starts = 0;
        for word in &self.words {
            let word = word.load(Ordering::SeqCst);
            starts += u64::from((word & !(word << 1 | carry)).count_ones());
            carry = word >> (BITS - 1);
        }
        starts
    }
}

/// The words that `blocks` lie in, each with the bits in question.
fn masks(blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = blocks.start / BITS..blocks.end.div_ceil(BITS);
    words.map(move |word| {
        let base = word * BITS;
        let from = blocks.start.saturating_sub(base);
        let to = (blocks.end - base).min(BITS);
        let mask = if to <= from { 0 } else { u64::MAX >> (BITS - (to - from)) << from };
        (usize::try_from(word).expect("x86-64 addresses fit usize"), mask)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const COUNT: u64 = 200;

    proptest! {
        /// Whatever is set and cleared: every question is answered as a set of numbers would.
        #[test]
        fn blocks_are_a_set(steps in prop::collection::vec((0..COUNT, 0..COUNT, any::<bool>()), 0..40)) {
            let blocks = Blocks::new(COUNT);
            let mut model = BTreeSet::new();
            for (a, b, plugged) in steps {
                let range = a.min(b)..a.max(b);
                blocks.set(range.clone(), plugged);
                for block in range.clone() {
                    if plugged { model.insert(block); } else { model.remove(&block); }
                }
                let has = |block| model.contains(&block);
                prop_assert!(blocks.are(range.clone(), plugged));
                let wider = range.start.saturating_sub(1)..(range.end + 1).min(COUNT);
                prop_assert_eq!(blocks.are(wider.clone(), true), wider.clone().all(has));
                prop_assert_eq!(blocks.are(wider.clone(), false), !wider.clone().any(has));
                prop_assert_eq!(blocks.hold(wider.start * BLOCK + 1, BLOCK),
                    has(wider.start) && has(wider.start + 1));
                prop_assert_eq!(blocks.plugged(), model.len() as u64);
                let runs = blocks.runs();
                prop_assert_eq!(runs.len() as u64, blocks.fragments());
                prop_assert!(runs.iter().cloned().flatten().eq(model.iter().copied()));
                prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }

    #[test]
    fn the_edges_of_a_region() {
        let blocks = Blocks::new(3);
        blocks.set(0..3, true);
        assert!(blocks.hold(0, 3 * BLOCK) && blocks.hold(3 * BLOCK - 1, 1) && blocks.hold(3 * BLOCK, 0));
        assert!(!blocks.hold(3 * BLOCK - 1, 2) && !blocks.hold(3 * BLOCK, 1));
        assert!(!blocks.hold(u64::MAX, 1) && !blocks.hold(u64::MAX, 2) && !blocks.hold(1, u64::MAX));
        assert!(!blocks.are(2..4, true) && !blocks.are(2..4, false));
        blocks.set(1..2, false);
        assert!(blocks.hold(0, BLOCK) && !blocks.hold(BLOCK - 1, 2) && !blocks.hold(0, 3 * BLOCK));
    }
}
