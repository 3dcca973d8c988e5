//! Files of the host in guest memory, read-only: images of which every byte is there (`docs/pmem.md`).
//!
//! ```text
//! guest   [ window, 16 GiB, in no memory map                                              ]
//!         [ bootstrap | blob | blob |0] . . . . . . . . . [ another image ] . . . . . . . .
//! host    MAP_PRIVATE, PROT_READ, over a reservation without access             0: zeros up to 2 MiB
//! ```
//!
//! One reservation for all images of a VM, made with the VM, so that devices know the region from the start: which parts of it are
//! memory changes as for memory that comes and goes ([`virtio::memory`]). KVM has a read-only slot for each image; a guest that
//! writes there all the same leaves the guest for it (`KVM_EXIT_MMIO`), and the write is dropped and counted.
//!
//! A file that is cut short while it is mapped, or that the host cannot read, is no error that a guest could be told. A vCPU
//! that touches such a page ends its VM (`KVM_RUN` fails), a device that reads it ends the process ([`crate::bus_error`]).

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio::memory::{BLOCK, Blocks};
use virtio::rate::GUEST_ERRORS;

use super::{MemoryError, RamRange, checked, map_aligned, to_usize};
use crate::arch::x86_64::layout::FilesRange;
use crate::bus::BusDevice;

/// Bytes for whose pages Linux allocates at a time (`SECTION_SIZE_BITS` on x86-64): an image begins at a multiple, so that it
/// touches as few as it can.
const SECTION: u64 = 128 << 20;
const PAGE: u64 = 4096;

/// Files cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// Larger than what is left of the window.
    #[error(
        "an image of {mib} MiB has no room among guest addresses: of {of_mib} MiB, {taken_mib} are taken"
    )]
    NoRoom {
        /// Its size, rounded up.
        mib: u64,
        /// The window's.
        of_mib: u64,
        /// What other images have of it.
        taken_mib: u64,
    },
    /// The host does not map it.
    #[error("map {len} bytes of a file of an image")]
    Map {
        /// How many.
        len: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The beginning of a file, and where it is to lie: bytes from the beginning of what is shown, in whole pages.
#[derive(Debug, Clone, Copy)]
pub struct FilePart<'a> {
    /// The file; it has these bytes, save for the rest of its last page.
    pub file: BorrowedFd<'a>,
    /// Where.
    pub at: u64,
    /// How many.
    pub len: u64,
}

/// Guest addresses at which files can be shown. The reservation is never taken down.
#[derive(Debug)]
pub struct FileWindow {
    range: FilesRange,
    host: NonNull<u8>,
    blocks: Arc<Blocks>,
    places: Mutex<Vec<Place>>,
}

// SAFETY: the pointer is only handed to system calls that change the mapping as a whole, from any thread.
unsafe impl Send for FileWindow {}
// SAFETY: see above; `Blocks` is atomic, `places` is locked, and everything else is only read.
unsafe impl Sync for FileWindow {}

/// Blocks that are somebody's.
#[derive(Debug)]
struct Place {
    blocks: Range<u64>,
    writes: Arc<AtomicU64>,
}

/// Files that are shown. Dropped, they are not, and their addresses are free: [`Shown::withdraw`] comes before that, and whoever
/// may hold a slice of them is waited for.
#[derive(Debug)]
pub struct Shown {
    window: Arc<FileWindow>,
    blocks: Range<u64>,
    writes: Arc<AtomicU64>,
    stays: AtomicBool,
}

impl FileWindow {
    /// Reserves addresses for `range`, none of them accessible.
    pub(super) fn reserve(range: FilesRange) -> Result<Self, MemoryError> {
        let mapped = map_aligned(to_usize(range.len), libc::PROT_NONE);
        let host = mapped.map_err(|source| MemoryError::Map { mib: range.len >> 20, source })?;
        let blocks = Arc::new(Blocks::new(range.len / BLOCK));
        Ok(FileWindow { range, host, blocks, places: Mutex::default() })
    }

    /// Where it lies.
    pub fn range(&self) -> FilesRange {
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

    /// Maps `parts`, which ascend and do not overlap, somewhere in the window. Behind them are zeros up to a multiple of 2 MiB. Not yet
    /// memory to devices ([`Shown::publish`]).
    ///
    /// # Errors
    /// No room, or the host's answer. Nothing is mapped then.
    pub fn show(self: &Arc<Self>, parts: &[FilePart<'_>]) -> Result<Shown, ShowError> {
        let bytes = parts.last().map_or(0, |last| last.at + last.len);
        let writes = Arc::new(AtomicU64::new(0));
        let blocks = self.take_place(bytes, &writes)?;
        // From here on what is dropped gives the place back.
        let shown = Shown { window: Arc::clone(self), blocks, writes, stays: AtomicBool::new(false) };
        let base = shown.blocks.start * BLOCK;
        for part in parts.iter().filter(|part| part.len > 0) {
            self.map(base + part.at, part.len, Some(part.file))?;
        }
        self.map(base + bytes, shown.len() - bytes, None)?;
        Ok(shown)
    }

    fn take_place(&self, bytes: u64, writes: &Arc<AtomicU64>) -> Result<Range<u64>, ShowError> {
        let wanted = bytes.div_ceil(BLOCK).max(1);
        let mut places = self.places();
        let step = SECTION / BLOCK;
        let mut start = 0;
        let mut at = 0;
        // Ascending: the first gap that is large enough.
        for place in places.iter() {
            if start + wanted <= place.blocks.start {
                break;
            }
            start = place.blocks.end.next_multiple_of(step);
            at += 1;
        }
        if start.checked_add(wanted).is_none_or(|end| end > self.blocks.count()) {
            let taken: u64 = places.iter().map(|place| place.blocks.end - place.blocks.start).sum();
            let mib = |blocks: u64| blocks * (BLOCK >> 20);
            return Err(ShowError::NoRoom {
                mib: mib(wanted),
                of_mib: mib(self.blocks.count()),
                taken_mib: mib(taken),
            });
        }
        let blocks = start..start + wanted;
        places.insert(at, Place { blocks: blocks.clone(), writes: Arc::clone(writes) });
        Ok(blocks)
    }

    /// Maps a file's beginning, or zeros, over `len` bytes of the reservation.
    fn map(&self, offset: u64, len: u64, file: Option<BorrowedFd<'_>>) -> Result<(), ShowError> {
        if len == 0 {
            return Ok(());
        }
        // Private: what is only read is the page cache's page either way, and a file in memory that is sealed against writing
        // (an image of version 5) is refused as a shared one (Linux before 6.7).
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let (flags, fd) = match file {
            Some(file) => (flags, file.as_raw_fd()),
            None => (flags | libc::MAP_ANONYMOUS, -1),
        };
        self.remap(offset, len, libc::PROT_READ, flags, fd)
            .and_then(|()| self.keep_from_dumps(offset, len))
            .map_err(|source| ShowError::Map { len, source })
    }

    /// Takes access to a place, and frees it.
    fn clear(&self, blocks: &Range<u64>) {
        let (offset, len) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        match self.remap(offset, len, libc::PROT_NONE, flags, -1) {
            Ok(()) => self.places().retain(|place| place.blocks != *blocks),
            // It is nobody's, and is not given to anybody.
            Err(e) => log::error!("files stay mapped at {:#x}: {e}", self.range.gpa + offset),
        }
    }

    fn remap(
        &self,
        offset: u64,
        len: u64,
        prot: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
    ) -> io::Result<()> {
        assert!(
            offset.is_multiple_of(PAGE) && offset + len <= self.range.len,
            "{len} bytes at {offset:#x} are not in the window"
        );
        let at = self.host.as_ptr().wrapping_add(to_usize(offset));
        // SAFETY: whole pages of our own reservation, as just checked, of a place that the caller took (or whose slices are
        // gone: see `Shown`): no access of this process is under way there. The guest's are KVM's to answer.
        let mapped = unsafe { libc::mmap(at.cast(), to_usize(len), prot, flags | libc::MAP_FIXED, fd, 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// A core dump is for our own state; and who counts our memory tells by it what is the guest's.
    fn keep_from_dumps(&self, offset: u64, len: u64) -> io::Result<()> {
        let at = self.host.as_ptr().wrapping_add(to_usize(offset));
        // SAFETY: a part of our own reservation. The advice changes no page.
        checked(unsafe { libc::madvise(at.cast(), to_usize(len), libc::MADV_DONTDUMP) })
    }

    fn places(&self) -> MutexGuard<'_, Vec<Place>> {
        self.places.lock().expect("no code panics while it holds this lock")
    }
}

/// What comes here is what KVM has no slot for, or may not write.
impl BusDevice for FileWindow {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let block = offset / BLOCK;
        if let Some(place) = self.places().iter().find(|place| place.blocks.contains(&block)) {
            place.writes.fetch_add(1, Ordering::Relaxed);
        }
        let (len, at) = (data.len(), self.range.gpa + offset);
        GUEST_ERRORS.warn(format_args!("pmem: {len} bytes that the guest wrote at {at:#x} are dropped"));
    }
}

impl Shown {
    /// Where guest and process have it.
    pub fn place(&self) -> RamRange {
        let offset = self.blocks.start * BLOCK;
        RamRange {
            gpa: self.window.range.gpa + offset,
            len: self.len(),
            host: self.window.host() + to_usize(offset),
        }
    }

    fn len(&self) -> u64 {
        (self.blocks.end - self.blocks.start) * BLOCK
    }

    /// How often the guest tried to write there.
    pub fn writes(&self) -> &Arc<AtomicU64> {
        &self.writes
    }

    /// From now on it is memory to devices.
    pub fn publish(&self) {
        self.window.blocks.set(self.blocks.clone(), true);
    }

    /// From now on it is none: no further slice of it is made.
    pub fn withdraw(&self) {
        self.window.blocks.set(self.blocks.clone(), false);
    }

    /// Leaves it mapped for as long as the VM is, since somebody may still hold a slice of it.
    pub fn stay(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.withdraw();
        if !*self.stays.get_mut() {
            self.window.clear(&self.blocks);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use virtio::memory::is_writable;
    use vm_memory::{Bytes as _, GuestAddress};
    use vmm_api::GuestMemoryBacking;

    use super::super::GuestRam;
    use super::*;
    use crate::arch::x86_64::layout;

    const MIB: u64 = 1 << 20;

    fn ram(len: u64) -> (GuestRam, Arc<FileWindow>) {
        let ram = GuestRam::map(&layout::ram_ranges(64 * MIB), GuestMemoryBacking::Anonymous, false).unwrap();
        let range = layout::files_range(64 * MIB, None, 40).unwrap();
        let ram = ram.with_files(FilesRange { len, ..range }).unwrap();
        let window = Arc::clone(ram.files().unwrap());
        (ram, window)
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The kernel's mappings in the window: permissions and lengths.
    fn mappings(window: &FileWindow) -> Vec<(String, u64)> {
        let all = window.host() as u64..window.host() as u64 + window.range.len;
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let found = maps.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            all.contains(&start).then(|| (words.next().unwrap().to_owned(), end.min(all.end) - start))
        });
        found.collect()
    }

    #[test]
    fn files_are_shown_where_they_are_said_to_be_and_go_without_a_trace() {
        let (ram, window) = ram(256 * MIB);
        let (first, second) = (file(&[0x11; 5000]), file(&[0x22; 12_288]));
        let parts = [
            FilePart { file: first.as_fd(), at: 0, len: 8192 },
            FilePart { file: second.as_fd(), at: 8192, len: 8192 },
        ];
        let shown = window.show(&parts).unwrap();
        let place = shown.place();
        assert_eq!((place.gpa, place.len), (window.range().gpa, BLOCK));
        let read = |offset: u64| ram.memory().read_obj::<u8>(GuestAddress(place.gpa + offset));
        assert!(read(0).is_err(), "not published");
        shown.publish();
        let at = [0, 4999, 5000, 8191, 8192, 16_383, 16_384, BLOCK - 1].map(|at| read(at).unwrap());
        assert_eq!(at, [0x11, 0x11, 0, 0, 0x22, 0x22, 0, 0]);
        assert!(read(BLOCK).is_err());
        assert!(!ram.has(place.gpa, 1) && !is_writable(ram.memory(), place.gpa, 1));
        let permissions: Vec<_> = mappings(&window).into_iter().map(|(p, _)| p).collect();
        assert_eq!(permissions, ["r--p", "r--p", "r--p", "---p"]);

        let other = window.show(&parts[..1]).unwrap();
        assert_eq!(other.place().gpa - place.gpa, SECTION);
        shown.withdraw();
        assert!(read(0).is_err());
        drop(shown);
        let again = window.show(&parts[..1]).unwrap();
        assert_eq!(again.place().gpa, place.gpa, "the first gap");
        drop((again, other));
        assert_eq!(mappings(&window), [("---p".to_owned(), 256 * MIB)]);
        assert!(ram.memory().read_obj::<u8>(GuestAddress(place.gpa)).is_err());
    }

    #[test]
    fn what_has_no_room_is_refused_with_numbers_and_takes_none() {
        let (_ram, window) = ram(256 * MIB);
        let file = file(&[1]);
        let part = |len| [FilePart { file: file.as_fd(), at: 0, len }];
        let small = window.show(&part(4096)).unwrap();
        let refused = window.show(&part(128 * MIB + 4096)).unwrap_err().to_string();
        assert!(refused.ends_with("of 256 MiB, 2 are taken"), "{refused}");
        assert!(refused.starts_with("an image of 130 MiB"), "{refused}");
        let rest = window.show(&part(128 * MIB)).unwrap();
        assert!(window.show(&part(4096)).is_err());
        drop((small, rest));
        drop(window.show(&part(256 * MIB)).unwrap());
        // One that the host does not map.
        let dir = File::open("/").unwrap();
        let broken = [FilePart { file: dir.as_fd(), at: 0, len: 4096 }];
        assert!(matches!(window.show(&broken), Err(ShowError::Map { len: 4096, .. })));
        assert!(window.places().is_empty());
    }

    #[test]
    fn one_that_may_be_in_use_stays_and_its_place_with_it() {
        let (_ram, window) = ram(256 * MIB);
        let file = file(&[7; 4096]);
        let part = [FilePart { file: file.as_fd(), at: 0, len: 4096 }];
        let shown = window.show(&part).unwrap();
        let host = shown.place().host;
        shown.stay();
        drop(shown);
        // SAFETY: that it is still mapped is what is tested.
        assert_eq!(unsafe { std::ptr::with_exposed_provenance::<u8>(host).read_volatile() }, 7);
        assert_eq!(window.show(&part).unwrap().place().gpa, window.range().gpa + SECTION);
    }

    #[test]
    fn a_guests_write_is_dropped_and_counted_where_it_was_meant_for() {
        let (_ram, window) = ram(256 * MIB);
        let file = file(&[7; 4096]);
        let part = [FilePart { file: file.as_fd(), at: 0, len: 4096 }];
        let (first, second) = (window.show(&part).unwrap(), window.show(&part).unwrap());
        window.write(8, &[1; 8]);
        window.write(SECTION, &[1]);
        window.write(SECTION + BLOCK - 1, &[1]);
        // Nobody's.
        window.write(SECTION + BLOCK, &[1]);
        let counts = [&first, &second].map(|shown| shown.writes().load(Ordering::Relaxed));
        assert_eq!(counts, [1, 2]);
        let mut data = [0; 4];
        window.read(BLOCK, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
