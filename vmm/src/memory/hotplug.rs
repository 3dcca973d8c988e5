//! The part of guest memory that comes and goes: one mapping, of which blocks are made accessible and taken away.
//!
//! ```text
//! VMAs   [ no access         | read, write | no access | rw | no access      ]   a block that goes is emptied, too
//! ```
//!
//! KVM has one slot for all of it, from before the guest starts (a slot set later waits for a grace period of the host).
//! A vCPU that touches a block without access ends its guest; what keeps devices from it is told in `virtio::memory`.
//!
//! Not done: blocks of hugetlbfs, which the host would have to reserve when it maps them.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use virtio::memory::{BLOCK, Blocks};

use super::{MemoryError, checked, map_aligned, to_usize};
use crate::arch::x86_64::layout::HotplugRange;

/// Most runs of blocks that a guest may cut the region into. Each takes two of the host's memory mappings, of which a
/// process has 65,530 (`vm.max_map_count`).
const MAX_FRAGMENTS: u64 = 16_384;
const PAGE: usize = 4096;
const NONE: libc::c_int = libc::PROT_NONE;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// A region of guest memory of which only plugged blocks are there. The mapping is never taken down.
#[derive(Debug)]
pub struct Hotplug {
    range: HotplugRange,
    host: NonNull<u8>,
    blocks: Arc<Blocks>,
}

// SAFETY: the pointer is only handed to system calls that change the mapping as a whole, from any thread.
unsafe impl Send for Hotplug {}
// SAFETY: see above; `Blocks` is atomic, and everything else is only read.
unsafe impl Sync for Hotplug {}

impl Hotplug {
    /// Maps addresses for `range`, none of them accessible.
    pub(super) fn map(range: HotplugRange) -> Result<Self, MemoryError> {
        let mib = range.len >> 20;
        let failed = |what| move |source| MemoryError::Advise { what, mib, source };
        let host =
            map_aligned(to_usize(range.len), NONE).map_err(|source| MemoryError::Map { mib, source })?;
        let hotplug = Hotplug { range, host, blocks: Arc::new(Blocks::new(range.len / BLOCK)) };
        hotplug.share_one_anon_vma().map_err(failed("prepare"))?;
        let all = 0..hotplug.blocks.count();
        hotplug.advise(&all, libc::MADV_DONTDUMP).map_err(failed("exclude from core dumps"))?;
        match hotplug.advise(&all, libc::MADV_HUGEPAGE) {
            // A host kernel without transparent huge pages.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            advised => advised.map_err(failed("advise huge pages for"))?,
        }
        Ok(hotplug)
    }

    /// Neighbouring mappings become one again only if their pages are filed in the same place (the kernel's `anon_vma`),
    /// which a mapping gets with its first page, and parts inherit. So it gets one while it is whole.
    fn share_one_anon_vma(&self) -> io::Result<()> {
        self.mprotect(0, PAGE, READ_WRITE)?;
        // SAFETY: the first byte of our own mapping, accessible since the line above; no guest knows it yet.
        unsafe { self.host.as_ptr().write_volatile(0) };
        self.mprotect(0, PAGE, NONE)?;
        self.madvise(0, PAGE, libc::MADV_DONTNEED)
    }

    /// Where it lies and how much of it may be asked for.
    pub fn range(&self) -> HotplugRange {
        self.range
    }

    /// Address of its first byte in this process.
    pub fn host(&self) -> usize {
        self.host.as_ptr().expose_provenance()
    }

    /// Which blocks are there.
    pub fn blocks(&self) -> &Arc<Blocks> {
        &self.blocks
    }

    /// Makes `blocks` accessible. Their pages come at the first touch.
    ///
    /// # Errors
    /// The host has no room for more mappings, or accounts for memory strictly and has none. Nothing is accessible then
    /// that was not before.
    pub fn plug(&self, blocks: &Range<u64>) -> io::Result<()> {
        // One run more at most.
        bounded(self.blocks.fragments() + 1)?;
        self.protect(blocks, READ_WRITE).inspect_err(|_| {
            // Whatever of it is accessible now is on no bitmap: no device's, and empty.
            let _ = self.protect(blocks, NONE);
        })
    }

    /// Makes `runs` inaccessible and gives their pages back. Their bits are cleared already, and nobody holds a slice of
    /// them: see `virtio::memory`.
    ///
    /// # Errors
    /// The host has no room for more mappings. All is accessible then, as it was.
    pub fn unplug(&self, runs: &[Range<u64>]) -> io::Result<()> {
        bounded(self.blocks.fragments())?;
        for (index, run) in runs.iter().enumerate() {
            if let Err(e) = self.protect(run, NONE) {
                let begun = &runs[..=index];
                if begun.iter().all(|run| self.protect(run, READ_WRITE).is_ok()) {
                    return Err(e);
                }
                // A part is gone and does not come back, so all of it goes: empty, if not everywhere inaccessible.
                log::error!("blocks {run:?} stay accessible to the guest: {e}");
            }
        }
        for run in runs {
            if let Err(e) = self.advise(run, libc::MADV_DONTNEED) {
                log::error!("the pages of blocks {run:?} are not given back: {e}");
            }
        }
        Ok(())
    }

    fn protect(&self, blocks: &Range<u64>, prot: libc::c_int) -> io::Result<()> {
        let (offset, len) = bytes_of(blocks);
        self.mprotect(offset, len, prot)
    }

    fn advise(&self, blocks: &Range<u64>, advice: libc::c_int) -> io::Result<()> {
        let (offset, len) = bytes_of(blocks);
        self.madvise(offset, len, advice)
    }

    fn mprotect(&self, offset: usize, len: usize, prot: libc::c_int) -> io::Result<()> {
        let at = self.part(offset, len);
        // SAFETY: a part of our own mapping. Access is taken only from what nobody holds a slice of (see `unplug`), so
        // that no access of this process faults; the guest's own are KVM's to answer.
        checked(unsafe { libc::mprotect(at.cast(), len, prot) })
    }

    fn madvise(&self, offset: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        let at = self.part(offset, len);
        // SAFETY: a part of our own mapping. Pages are dropped only of what is the guest's no more.
        checked(unsafe { libc::madvise(at.cast(), len, advice) })
    }

    fn part(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= to_usize(self.range.len), "{offset} and {len} are beyond the mapping");
        self.host.as_ptr().wrapping_add(offset)
    }

    /// Gives all pages back, whatever is plugged.
    pub(super) fn empty(&self) {
        // An error leaves them to the end of the process.
        let _ = self.advise(&(0..self.blocks.count()), libc::MADV_DONTNEED);
    }
}

fn bounded(fragments: u64) -> io::Result<()> {
    if fragments <= MAX_FRAGMENTS {
        return Ok(());
    }
    Err(io::Error::other(format!("more than {MAX_FRAGMENTS} runs of blocks would be plugged")))
}

fn bytes_of(blocks: &Range<u64>) -> (usize, usize) {
    (to_usize(blocks.start * BLOCK), to_usize((blocks.end - blocks.start) * BLOCK))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_api::GuestMemoryBacking;

    use super::super::GuestRam;
    use super::*;
    use crate::arch::x86_64::layout;

    const MIB: u64 = 1 << 20;

    fn ram(hotplug: u64) -> (GuestRam, Arc<Hotplug>) {
        let ranges = layout::ram_ranges(64 * MIB);
        let ram = GuestRam::map(&ranges, GuestMemoryBacking::Anonymous, false).unwrap();
        let ram = ram.with_hotplug(layout::hotplug_range(64 * MIB, hotplug)).unwrap();
        let hotplug = Arc::clone(ram.hotplug().unwrap());
        (ram, hotplug)
    }

    /// What the device does.
    fn plug(hotplug: &Hotplug, blocks: Range<u64>) {
        hotplug.plug(&blocks).unwrap();
        hotplug.blocks.set(blocks, true);
    }

    fn unplug(hotplug: &Hotplug, blocks: Range<u64>) {
        hotplug.blocks.set(blocks.clone(), false);
        hotplug.unplug(&[blocks]).unwrap();
    }

    /// The kernel's mappings in the region: permissions, resident KiB.
    fn mappings(hotplug: &Hotplug) -> Vec<(String, u64)> {
        let all = hotplug.host()..hotplug.host() + to_usize(hotplug.range.len);
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut found = vec![];
        let mut inside = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                let start = usize::from_str_radix(start, 16).unwrap();
                inside = all.contains(&start);
                if inside {
                    assert!(usize::from_str_radix(end, 16).unwrap() <= all.end);
                    found.push((words.next().unwrap().to_owned(), 0));
                }
            } else if inside && first == "Rss:" {
                found.last_mut().unwrap().1 = words.next().unwrap().parse().unwrap();
            }
        }
        found
    }

    #[test]
    fn blocks_come_empty_and_go_whole() {
        let (ram, hotplug) = ram(64 * MIB);
        let gpa = hotplug.range().gpa;
        let at = |block: u64| GuestAddress(gpa + block * BLOCK);
        assert!(ram.memory().write_obj(1_u8, at(0)).is_err());
        plug(&hotplug, 3..6);
        let bytes = vec![0x5a; to_usize(3 * BLOCK)];
        ram.memory().write_slice(&bytes, at(3)).unwrap();
        assert!(ram.memory().write_obj(1_u8, at(6)).is_err());
        let resident = |hotplug: &Hotplug| mappings(hotplug).iter().map(|(_, kib)| kib).sum::<u64>();
        assert_eq!(resident(&hotplug), 6 * 1024);

        unplug(&hotplug, 4..5);
        assert!(ram.memory().read_obj::<u8>(at(4)).is_err());
        assert_eq!(resident(&hotplug), 4 * 1024, "given back at once");
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(gpa + 4 * BLOCK - 1)).unwrap(), 0x5a);
        assert_eq!(ram.memory().read_obj::<u8>(at(5)).unwrap(), 0x5a);
        plug(&hotplug, 4..5);
        assert_eq!(ram.memory().read_obj::<u8>(at(4)).unwrap(), 0);
        assert!(ram.has(0, 64 * MIB) && !ram.has(gpa, 1), "no kernel is put there");
        unplug(&hotplug, 3..6);
        assert_eq!(mappings(&hotplug), [("---p".to_owned(), 0)]);
    }

    #[test]
    fn mappings_that_were_cut_become_one_again() {
        let (ram, hotplug) = ram(128 * MIB);
        assert_eq!(mappings(&hotplug), [("---p".to_owned(), 0)]);
        for block in (0..64).step_by(2) {
            plug(&hotplug, block..block + 1);
            ram.memory().write_obj(1_u8, GuestAddress(hotplug.range().gpa + block * BLOCK)).unwrap();
        }
        assert_eq!(mappings(&hotplug).len(), 64);
        for block in (1..64).step_by(2) {
            plug(&hotplug, block..block + 1);
        }
        assert_eq!(mappings(&hotplug).len(), 1);
    }

    #[test]
    fn a_region_is_not_cut_into_more_than_the_host_can_map() {
        let (_ram, hotplug) = ram((MAX_FRAGMENTS + 8) * 2 * BLOCK);
        for run in 0..MAX_FRAGMENTS {
            hotplug.blocks.set(2 * run..2 * run + 1, true);
        }
        let next = 2 * MAX_FRAGMENTS;
        assert!(hotplug.plug(&(next..next + 1)).unwrap_err().to_string().contains("16384 runs"));
        // One that would be cut in two.
        hotplug.blocks.set(next..next + 1, true);
        let run = 4..5;
        assert!(hotplug.unplug(std::slice::from_ref(&run)).is_err());
    }
}
