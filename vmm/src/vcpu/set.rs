//! A set of vCPUs.

use std::fmt;

use vmm_api::config::MAX_VCPUS;

/// Some of a VM's vCPUs, by index, which is their APIC id.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CpuSet(u32);

const _: () = assert!(MAX_VCPUS as u32 <= u32::BITS);

impl CpuSet {
    /// vCPUs 0 to `count - 1`.
    pub fn first(count: u8) -> Self {
        (0..count).collect()
    }

    /// From the words of an upcall frame: bit n % 64 of word n / 64. `None` if a vCPU is named that no VM has.
    pub fn from_words(words: [u64; 4]) -> Option<Self> {
        let [first, rest @ ..] = words;
        let low = u32::try_from(first).ok()?;
        (rest == [0; 3]).then_some(CpuSet(low))
    }

    /// For an upcall frame.
    pub fn to_words(self) -> [u64; 4] {
        [self.0.into(), 0, 0, 0]
    }

    /// How many there are.
    pub fn len(self) -> u8 {
        u8::try_from(self.0.count_ones()).expect("at most 32")
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `index` is one of them.
    pub fn has(self, index: u8) -> bool {
        u32::from(index) < u32::BITS && self.0 & 1 << index != 0
    }

    /// These and those.
    pub fn and(self, other: Self) -> Self {
        CpuSet(self.0 | other.0)
    }

    /// Those that are in both.
    pub fn common(self, other: Self) -> Self {
        CpuSet(self.0 & other.0)
    }

    /// These without those.
    pub fn without(self, other: Self) -> Self {
        CpuSet(self.0 & !other.0)
    }

    /// Ascending.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = u8> {
        (0..MAX_VCPUS).filter(move |index| self.has(*index))
    }

    /// `count` of `all`, those here as far as they do: the lowest come, the highest go.
    pub fn resized(self, count: u8, all: Self) -> Self {
        let count = usize::from(count);
        let kept: CpuSet = self.iter().take(count).collect();
        let missing = count - usize::from(kept.len());
        kept.and(all.without(kept).iter().take(missing).collect())
    }
}

impl FromIterator<u8> for CpuSet {
    /// Indices above the highest a VM can have are left out.
    fn from_iter<T: IntoIterator<Item = u8>>(indices: T) -> Self {
        CpuSet(
            indices.into_iter().filter(|index| *index < MAX_VCPUS).fold(0, |bits, index| bits | 1 << index),
        )
    }
}

/// As Linux writes it: `0-2,5`.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut indices, mut comma) = (self.iter().peekable(), "");
        while let Some(from) = indices.next() {
            let mut to = from;
            while let Some(next) = indices.next_if_eq(&(to + 1)) {
                to = next;
            }
            write!(f, "{comma}{from}")?;
            if to > from {
                write!(f, "-{to}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(indices: &[u8]) -> CpuSet {
        indices.iter().copied().collect()
    }

    #[test]
    fn the_lowest_come_and_the_highest_go() {
        let all = CpuSet::first(8);
        assert_eq!(set(&[0, 2]).resized(4, all), set(&[0, 1, 2, 3]));
        assert_eq!(set(&[0, 2, 5]).resized(2, all), set(&[0, 2]));
        assert_eq!(set(&[0, 7]).resized(2, all), set(&[0, 7]));
        assert_eq!(set(&[0]).resized(8, all), all);
    }

    #[test]
    fn a_frame_may_name_only_what_a_vm_can_have() {
        assert_eq!(CpuSet::from_words([0b101, 0, 0, 0]), Some(set(&[0, 2])));
        assert_eq!(CpuSet::from_words([1 << 32, 0, 0, 0]), None);
        assert_eq!(CpuSet::from_words([1, 0, 0, 1]), None);
        let all = CpuSet::first(MAX_VCPUS);
        assert_eq!(CpuSet::from_words(all.to_words()), Some(all));
        assert_eq!(all.len(), MAX_VCPUS);
    }

    #[test]
    fn it_reads_as_in_sysfs() {
        assert_eq!(set(&[0, 1, 2, 5, 7, 8]).to_string(), "0-2,5,7-8");
        assert_eq!(set(&[]).to_string(), "");
    }
}
