//! What the guest's kernel says of its memory (virtio 1.2, 5.5.6.3).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::queue::Reader;

/// Names of the tags from 0 on (5.5.6.4), for counters.
const TAGS: [&str; 10] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
];
/// Most entries looked at: more than there are tags, as later drivers may have more.
const MAX_ENTRIES: usize = 64;

#[derive(Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed)]
struct Entry {
    tag: U16,
    value: U64,
}

/// What the guest said last, by tag. It may say anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; TAGS.len()]);

impl Statistics {
    /// Takes what a buffer of the driver says. Unknown tags are passed over.
    pub(super) fn take(&mut self, mut buffer: Reader<'_>) {
        for _ in 0..MAX_ENTRIES {
            let Ok(Entry { tag, value }) = buffer.read_obj() else { return };
            if let Some(place) = self.0.get_mut(usize::from(tag.get())) {
                // Linux says all ones for what it does not count.
                *place = (value.get() != u64::MAX).then_some(value.get());
            }
        }
    }

    /// Memory that is used for nothing, in bytes.
    pub fn free(&self) -> Option<u64> {
        self.0[4]
    }

    /// Memory that programs could have without swapping, in bytes.
    pub fn available(&self) -> Option<u64> {
        self.0[6]
    }

    /// By name, what there is.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, u64)> {
        TAGS.into_iter().zip(self.0).filter_map(|(name, value)| Some((name, value?)))
    }
}
