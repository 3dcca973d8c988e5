//! Guest memory: one mapping of the host, shown to the guest as one or two ranges, one more for what comes and goes, and one for
//! files of the host.
//!
//! ```text
//! guest   0 ........ 3 GiB | hole for devices | 4 GiB ........     ... 2 GiB aligned         ... 2 GiB aligned
//! host    [ low range      ][ high range                     ]     [ blocks (hotplug)  ]     [ files, read-only ]
//!         three mappings, 2 MiB aligned
//! ```
//!
//! Guest and host addresses agree modulo 2 MiB in both ranges. Without that the host's huge pages cannot become the
//! guest's, and a boot takes thousands of nested faults instead of a few dozen.
//!
//! All `unsafe` on guest memory that `vm-memory` does not have is here. A mapping is never taken down: KVM, the
//! devices and their threads refer to it until the process ends.

mod files;
mod hotplug;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

pub use files::{FilePart, FileWindow, ShowError, Shown};
pub use hotplug::Hotplug;
use virtio::GuestMemory;
use virtio::balloon::BalloonBackend;
use virtio::memory::Region;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory as _, GuestRegionMmap, VolatileSlice};
use vmm_api::GuestMemoryBacking;

use crate::arch::x86_64::layout::{FilesRange, HotplugRange};

/// Size of a huge page on x86-64, to which ranges are aligned.
const HUGE_PAGE: usize = 2 << 20;

/// Guest memory could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gave no address space or memory.
    #[error("map {mib} MiB of guest memory")]
    Map {
        /// How much was asked for.
        mib: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Too few huge pages in the host's pool.
    #[error(
        "guest memory of {mib} MiB needs {needed} free huge pages of 2 MiB, the host has {free} (vm.nr_hugepages)"
    )]
    HugePages {
        /// How much was asked for.
        mib: u64,
        /// Pages that takes.
        needed: u64,
        /// Pages there are.
        free: String,
    },
    /// The host did not advise or populate it.
    #[error("{what} {mib} MiB of guest memory")]
    Advise {
        /// What was tried.
        what: &'static str,
        /// On how much.
        mib: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Something does not fit where it belongs.
    #[error("{what} needs guest memory from {gpa:#x} to {end:#x}, where there is none")]
    NoMemory {
        /// What was to be put there.
        what: &'static str,
        /// First address.
        gpa: u64,
        /// One past the last.
        end: u64,
    },
    /// A file ends too soon.
    #[error("{what} ends after {got} bytes at offset {offset}, where {len} were expected")]
    ShortFile {
        /// What the file is.
        what: &'static str,
        /// Where reading began.
        offset: u64,
        /// Bytes wanted.
        len: usize,
        /// Bytes there were.
        got: usize,
    },
    /// A file could not be read.
    #[error("read {what}")]
    Read {
        /// What the file is.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A range of guest memory and where the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address in this process.
    pub host: usize,
}

/// The guest's memory. Dropped, it is empty, but stays mapped: other threads may still hold [`GuestRam::memory`].
#[derive(Debug)]
pub struct GuestRam {
    ranges: Vec<RamRange>,
    hotplug: Option<Arc<Hotplug>>,
    files: Option<Arc<FileWindow>>,
    memory: GuestMemory,
}

impl GuestRam {
    /// Maps zeroed memory for `ranges` of guest physical addresses: `(first address, length)`, ascending, multiples
    /// of 2 MiB.
    pub fn map(
        ranges: &[(u64, u64)],
        backing: GuestMemoryBacking,
        prefault: bool,
    ) -> Result<Self, MemoryError> {
        let total: u64 = ranges.iter().map(|(_, len)| len).sum();
        let mib = total >> 20;
        let len = usize::try_from(total).expect("x86-64 addresses fit usize");
        let host = match backing {
            GuestMemoryBacking::Anonymous => map_aligned(len, libc::PROT_READ | libc::PROT_WRITE),
            GuestMemoryBacking::Hugetlbfs => map_huge(len),
        }
        .map_err(|source| match (backing, source.raw_os_error()) {
            (GuestMemoryBacking::Hugetlbfs, Some(libc::ENOMEM)) => {
                MemoryError::HugePages { mib, needed: mib / 2, free: free_huge_pages() }
            }
            _ => MemoryError::Map { mib, source },
        })?;
        let mapping = Mapping { host, len };
        // A core dump is for our own state, not for the tenant's data.
        mapping.advise(libc::MADV_DONTDUMP, "exclude from core dumps")?;
        if backing == GuestMemoryBacking::Anonymous {
            match mapping.advise(libc::MADV_HUGEPAGE, "advise huge pages for") {
                // EINVAL: a host kernel without transparent huge pages. The guest runs all the same.
                Err(MemoryError::Advise { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    log::info!("this host has no transparent huge pages");
                }
                other => other?,
            }
        }
        if prefault {
            mapping.advise(libc::MADV_POPULATE_WRITE, "populate (Linux 5.14 or later)")?;
        }
        Ok(Self::split(ranges, host))
    }

    fn split(ranges: &[(u64, u64)], host: NonNull<u8>) -> Self {
        let mut at = host.as_ptr();
        let mut placed = Vec::with_capacity(ranges.len());
        let mut regions = Vec::with_capacity(ranges.len());
        for &(gpa, len) in ranges {
            let size = usize::try_from(len).expect("x86-64 addresses fit usize");
            placed.push(RamRange { gpa, len, host: at.expose_provenance() });
            // SAFETY: `at` and the `size` bytes after it lie in the mapping `host`, whose length is the sum of all
            // ranges, and which is never unmapped.
            regions.push(Region::ram(unsafe { region_at(at, size, gpa) }));
            at = at.wrapping_add(size);
        }
        let memory = GuestMemory::from_regions(regions).expect("ranges ascend and do not overlap");
        GuestRam { ranges: placed, hotplug: None, files: None, memory }
    }

    /// Adds a region that comes and goes in blocks, above all ranges. None of it is there.
    pub fn with_hotplug(mut self, range: HotplugRange) -> Result<Self, MemoryError> {
        let hotplug = Hotplug::map(range)?;
        let len = usize::try_from(range.len).expect("x86-64 addresses fit usize");
        let at = std::ptr::with_exposed_provenance_mut(hotplug.host());
        // SAFETY: all of a mapping that is never unmapped. What of it may be accessed is what `Region` asks its blocks for.
        let region =
            Region::in_blocks(unsafe { region_at(at, len, range.gpa) }, Arc::clone(hotplug.blocks()));
        self.memory =
            self.memory.insert_region(Arc::new(region)).expect("the layout puts it above all ranges");
        self.hotplug = Some(Arc::new(hotplug));
        Ok(self)
    }

    /// Adds addresses at which files of the host can be shown, above all else. None of them is memory yet.
    pub fn with_files(mut self, range: FilesRange) -> Result<Self, MemoryError> {
        let files = FileWindow::reserve(range)?;
        let len = usize::try_from(range.len).expect("x86-64 addresses fit usize");
        let at = std::ptr::with_exposed_provenance_mut(files.host());
        // SAFETY: all of a reservation that is never unmapped. What of it may be read is what `Region` asks its blocks for.
        let mapping = unsafe { region_at(at, len, range.gpa) };
        let region = Region::read_only(mapping, Arc::clone(files.blocks()));
        self.memory =
            self.memory.insert_region(Arc::new(region)).expect("the layout puts it above everything");
        self.files = Some(Arc::new(files));
        Ok(self)
    }

    /// Where files of the host can be shown.
    pub fn files(&self) -> Option<&Arc<FileWindow>> {
        self.files.as_ref()
    }

    /// What comes and goes in blocks.
    pub fn hotplug(&self) -> Option<&Arc<Hotplug>> {
        self.hotplug.as_ref()
    }

    /// Bytes that are always there.
    pub fn boot_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// The ranges that are always there, ascending.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// What devices work on.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether all of `[gpa, gpa + len)` is memory that is always there.
    pub fn has(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else { return false };
        self.ranges.iter().any(|r| r.gpa <= gpa && end <= r.gpa + r.len)
    }

    /// Reads `len` bytes at `offset` of `file` (`what`, for messages) straight into guest memory at `gpa`. The
    /// file's own position is left alone: the owner may share it with other VMMs.
    pub fn read_file(
        &self,
        what: &'static str,
        file: impl AsFd,
        offset: u64,
        gpa: u64,
        len: usize,
    ) -> Result<(), MemoryError> {
        let end = gpa.saturating_add(len as u64);
        if !self.has(gpa, len as u64) {
            return Err(MemoryError::NoMemory { what, gpa, end });
        }
        let slice = self.memory.get_slice(GuestAddress(gpa), len).expect("`has` checked the range");
        let guard = slice.ptr_guard_mut();
        let mut done = 0;
        while done < len {
            let at = i64::try_from(offset.saturating_add(done as u64)).unwrap_or(i64::MAX);
            let to = guard.as_ptr().wrapping_add(done).cast();
            // SAFETY: `done < len`, and the guard covers `len` bytes of guest memory, which is never unmapped. The
            // kernel writes there as the guest might: nobody holds a reference into it.
            let got = unsafe { libc::pread(file.as_fd().as_raw_fd(), to, len - done, at) };
            match usize::try_from(got) {
                Ok(0) => return Err(MemoryError::ShortFile { what, offset, len, got: done }),
                Ok(n) => done += n,
                Err(_) => {
                    let source = io::Error::last_os_error();
                    if source.kind() != io::ErrorKind::Interrupted {
                        return Err(MemoryError::Read { what, source });
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        for range in &self.ranges {
            let len = usize::try_from(range.len).expect("x86-64 addresses fit usize");
            // SAFETY: a range of our own mapping, which stays mapped; whoever still reads there reads zeros. An error
            // leaves the pages to the end of the process.
            unsafe {
                libc::madvise(std::ptr::with_exposed_provenance_mut(range.host), len, libc::MADV_DONTNEED)
            };
        }
        if let Some(hotplug) = &self.hotplug {
            hotplug.empty();
        }
    }
}

/// The `len` bytes at `at` as guest memory at `gpa`.
///
/// # Safety
/// They are mapped, and stay so until the process ends.
unsafe fn region_at(at: *mut u8, len: usize, gpa: u64) -> GuestRegionMmap {
    let builder = MmapRegionBuilder::new(len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    // SAFETY: as the caller promises.
    let builder = unsafe { builder.with_raw_mmap_pointer(at) };
    let region = builder.build().expect("the pointer is page aligned");
    GuestRegionMmap::new(region, GuestAddress(gpa)).expect("guest addresses do not wrap around")
}

/// What the balloon does with pages that a guest does without.
#[derive(Debug)]
pub struct GivesBack;

impl BalloonBackend for GivesBack {
    fn give_back(&mut self, pages: &VolatileSlice<'_>) -> io::Result<()> {
        let guard = pages.ptr_guard_mut();
        // SAFETY: a slice of guest memory, which is mapped: the device took it just now, and blocks go only between two
        // calls of devices. The pages read as zeros afterwards, as the guest might have written: nobody holds a
        // reference into them.
        let result = unsafe { libc::madvise(guard.as_ptr().cast(), pages.len(), libc::MADV_DONTNEED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

struct Mapping {
    host: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn advise(&self, advice: libc::c_int, what: &'static str) -> Result<(), MemoryError> {
        // SAFETY: the range is a mapping of our own, of which nothing but the guest's (still zero) bytes depends.
        // None of the advices used drops pages.
        let result = unsafe { libc::madvise(self.host.as_ptr().cast(), self.len, advice) };
        if result == 0 {
            return Ok(());
        }
        let mib = (self.len >> 20) as u64;
        Err(MemoryError::Advise { what, mib, source: io::Error::last_os_error() })
    }
}

fn mmap(len: usize, prot: libc::c_int, flags: libc::c_int) -> io::Result<NonNull<u8>> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let host = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    if host == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(NonNull::new(host.cast()).expect("mmap does not return null"))
}

/// Anonymous memory aligned to a huge page: maps one huge page more than needed and gives back what sticks out.
fn map_aligned(len: usize, prot: libc::c_int) -> io::Result<NonNull<u8>> {
    let start = mmap(len + HUGE_PAGE, prot, libc::MAP_NORESERVE)?.as_ptr();
    let head = start.align_offset(HUGE_PAGE);
    let host = start.wrapping_add(head);
    for (from, len) in [(start, head), (host.wrapping_add(len), HUGE_PAGE - head)] {
        if len > 0 {
            // SAFETY: the part before, or behind, what is kept of the mapping just made; nobody knows it yet.
            unsafe { libc::munmap(from.cast(), len) };
        }
    }
    Ok(NonNull::new(host).expect("inside a mapping"))
}

/// Memory of the host's pool of huge pages, reserved at once: too few is an error here, not a signal later.
fn map_huge(len: usize) -> io::Result<NonNull<u8>> {
    mmap(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)
}

fn free_huge_pages() -> String {
    fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
        .map_or_else(|_| "no such pool".to_owned(), |s| s.trim().to_owned())
}

/// What a system call answered that says 0 or -1.
fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("x86-64 addresses fit usize")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Bytes;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram() -> GuestRam {
        let ranges = [(0, 64 * MIB), (4096 * MIB, 6 * MIB)];
        GuestRam::map(&ranges, GuestMemoryBacking::Anonymous, false).unwrap()
    }

    #[test]
    fn guest_and_host_addresses_agree_modulo_a_huge_page() {
        let ram = ram();
        assert_eq!(ram.ranges().len(), 2);
        for range in ram.ranges() {
            assert_eq!(range.host % HUGE_PAGE, 0);
            assert_eq!(range.gpa % HUGE_PAGE as u64, 0);
        }
        assert!(ram.has(0, 64 * MIB));
        assert!(!ram.has(0, 64 * MIB + 1));
        assert!(ram.has(4096 * MIB, 1));
        assert!(!ram.has(u64::MAX, 2));
    }

    #[test]
    fn a_file_lands_where_it_is_told() {
        let ram = ram();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        ram.read_file("test file", &file, 2, 4096 * MIB + 5, 8).unwrap();
        let mut bytes = [0; 10];
        ram.memory().read_slice(&mut bytes, GuestAddress(4096 * MIB + 4)).unwrap();
        assert_eq!(&bytes, b"\x0023456789\0");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let ram = ram();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let short = ram.read_file("test file", &file, 4, 0, 100).unwrap_err();
        assert_eq!(short.to_string(), "test file ends after 6 bytes at offset 4, where 100 were expected");
        let outside = ram.read_file("test file", &file, 0, 64 * MIB - 4, 10).unwrap_err();
        assert_eq!(
            outside.to_string(),
            "test file needs guest memory from 0x3fffffc to 0x4000006, where there is none"
        );
    }

    #[test]
    fn pages_that_are_given_back_are_the_hosts_and_read_as_zeros() {
        let ram = GuestRam::map(&[(0, 4 * MIB)], GuestMemoryBacking::Anonymous, true).unwrap();
        let resident = || {
            let host = std::ptr::with_exposed_provenance_mut(ram.ranges()[0].host);
            let mut pages = [0_u8; 1024];
            // SAFETY: one byte for each page of a mapping of 1,024.
            assert_eq!(unsafe { libc::mincore(host, 4 << 20, pages.as_mut_ptr()) }, 0);
            pages.iter().filter(|page| **page & 1 == 1).count()
        };
        ram.memory().write_slice(&[7; 4096 * 3], GuestAddress(0x20_0000)).unwrap();
        assert_eq!(resident(), 1024);
        GivesBack.give_back(&ram.memory().get_slice(GuestAddress(0x20_1000), 2 << 20 >> 1).unwrap()).unwrap();
        assert_eq!(resident(), 768);
        let byte = |gpa| ram.memory().read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!((byte(0x20_0fff), byte(0x20_1000), byte(0x20_2000)), (7, 0, 0));
    }

    #[test]
    fn prefault_populates() {
        let ram = GuestRam::map(&[(0, 2 * MIB)], GuestMemoryBacking::Anonymous, true).unwrap();
        assert!(ram.has(0, 2 * MIB));
    }

    #[test]
    fn a_dry_pool_of_huge_pages_is_said_with_numbers() {
        // No test machine sets 16 TiB aside.
        let ranges = [(0, 16 << 40)];
        match GuestRam::map(&ranges, GuestMemoryBacking::Hugetlbfs, false) {
            Err(MemoryError::HugePages { needed, .. }) => assert_eq!(needed, 8 << 20),
            // A kernel built without hugetlbfs.
            Err(MemoryError::Map { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::EINVAL)),
            other => panic!("{other:?}"),
        }
    }
}
