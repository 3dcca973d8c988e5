//! From page numbers to as few calls as there can be.

use std::ops::Range;

use vm_memory::VolatileSlice;

/// Bytes of a page, whatever the guest's own (virtio 1.2, 5.5.6).
pub const PAGE: u64 = 4096;

/// Runs of guest physical addresses that `numbers` name, ascending, each page once. Sorts them.
pub fn runs(numbers: &mut Vec<u32>) -> Vec<Range<u64>> {
    numbers.sort_unstable();
    numbers.dedup();
    let mut runs: Vec<Range<u64>> = Vec::new();
    for gpa in numbers.iter().map(|number| u64::from(*number) * PAGE) {
        match runs.last_mut() {
            Some(run) if run.end == gpa => run.end += PAGE,
            _ => runs.push(gpa..gpa + PAGE),
        }
    }
    runs
}

/// The whole pages in `slice`, if there is one.
pub fn whole_pages<'m>(slice: &VolatileSlice<'m>) -> Option<VolatileSlice<'m>> {
    let page = usize::try_from(PAGE).expect("4096");
    let start = slice.ptr_guard().as_ptr().addr();
    let head = start.next_multiple_of(page) - start;
    let len = slice.len().checked_sub(head)? / page * page;
    (len > 0).then(|| slice.subslice(head, len).expect("inside the slice"))
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemory as _};

    use super::*;

    #[test]
    fn neighbours_become_one_run() {
        assert_eq!(runs(&mut vec![]), []);
        assert_eq!(runs(&mut vec![5, 3, 4, 4, 9, 7, 8]), [0x3000..0x6000, 0x7000..0xa000]);
        assert_eq!(runs(&mut vec![u32::MAX, 0]), [0..0x1000, 0xfff_ffff_f000..0x1000_0000_0000]);
    }

    #[test]
    fn only_whole_pages_count() {
        let memory = crate::testing::memory();
        let pages = |gpa, len| {
            let slice = memory.get_slice(GuestAddress(gpa), len).unwrap();
            whole_pages(&slice).map(|pages| {
                let from = memory.get_host_address(GuestAddress(0)).unwrap().addr();
                (pages.ptr_guard().as_ptr().addr() - from, pages.len())
            })
        };
        assert_eq!(pages(0x1000, 0x2000), Some((0x1000, 0x2000)));
        assert_eq!(pages(0x1001, 0x2000), Some((0x2000, 0x1000)));
        assert_eq!(pages(0x1fff, 0x1001), Some((0x2000, 0x1000)));
        for (gpa, len) in [(0x1001, 0x1fff - 1), (0x1001, 1), (0x1000, 0xfff), (0x1000, 0)] {
            assert_eq!(pages(gpa, len), None, "{gpa:#x} {len:#x}");
        }
    }
}
