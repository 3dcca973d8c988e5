//! Bootstrap and cache files, as the one disk that they make.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, pread};
use virtio::blk::SECTOR;
use virtio::queue::Writer;
use vmm_api::image::{BLOCK, DiskPart, MAX_BLOBS, disk_parts, ready_map_bytes, ready_map_offset};

/// The files do not make a disk.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file cannot be looked at.
    #[error("{what} cannot be examined")]
    Examine {
        /// Which one.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, …
    #[error("{what} is not a regular file but {kind:?}")]
    Kind {
        /// Which one.
        what: String,
        /// What it is.
        kind: FileType,
    },
    /// The descriptor does not allow it to be read.
    #[error("{what} is not open for reading")]
    Access {
        /// Which one.
        what: String,
    },
    /// Nothing in it.
    #[error("{what} is empty")]
    Empty {
        /// Which one.
        what: String,
    },
    /// No room for bytes and ready map.
    #[error("{what} has {has} bytes; a blob of {bytes} bytes and its ready map take {needs}")]
    Short {
        /// Which one.
        what: String,
        /// Its size.
        has: u64,
        /// The blob's.
        bytes: u64,
        /// What they take.
        needs: u64,
    },
    /// Too many of them.
    #[error("an image of {count} blobs, at most {MAX_BLOBS} are possible")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// Too large together.
    #[error("bootstrap and blobs are larger than a disk can be")]
    TooLarge,
    /// Not what they were.
    #[error("blob {index} is said to have {bytes} bytes now, not {before}")]
    Changed {
        /// Which one.
        index: usize,
        /// What is said.
        bytes: u64,
        /// What was said.
        before: u64,
    },
    /// Not what they were.
    #[error("{count} blobs, the image has {before}")]
    Count {
        /// How many came.
        count: usize,
        /// How many there are.
        before: usize,
    },
}

/// A blob's cache file.
#[derive(Debug)]
pub struct BlobFile {
    /// Bytes and ready map.
    pub file: OwnedFd,
    /// Uncompressed size of the blob in bytes.
    pub bytes: u64,
}

/// Consecutive blocks of one blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// Index of the blob.
    pub blob: u32,
    /// The first block.
    pub first: u64,
    /// The first one behind.
    pub end: u64,
}

impl Span {
    /// Whether a block is in both.
    pub fn overlaps(&self, other: &Span) -> bool {
        self.blob == other.blob && self.first < other.end && other.first < self.end
    }

    /// Whether every block of `other` is in this one.
    pub fn contains(&self, other: &Span) -> bool {
        self.blob == other.blob && self.first <= other.first && other.end <= self.end
    }
}

/// The files of one image, checked.
#[derive(Debug)]
pub struct Files {
    bootstrap: OwnedFd,
    bootstrap_bytes: u64,
    blobs: Vec<BlobFile>,
    parts: Vec<DiskPart>,
    /// Blocks that belong to no chunk of the image, as far as they have been asked for. They are zeros.
    nobodys: BTreeMap<u32, Nobodys>,
}

/// Blocks of a blob that belong to no chunk: runs, by their first block, with the first block behind.
type Nobodys = BTreeMap<u64, u64>;

/// Bytes of the disk that lie together in one file.
struct Piece {
    /// `None`: the bootstrap.
    blob: Option<usize>,
    /// Place in the part.
    at: u64,
    len: u64,
}

impl Files {
    /// Takes the files as they are; their sizes must not change any more.
    pub fn new(bootstrap: OwnedFd, blobs: Vec<BlobFile>) -> Result<Self, FilesError> {
        if blobs.len() > MAX_BLOBS {
            return Err(FilesError::TooMany { count: blobs.len() });
        }
        let bootstrap_bytes = size(&bootstrap, "the bootstrap")?;
        if bootstrap_bytes == 0 {
            return Err(FilesError::Empty { what: "the bootstrap".to_owned() });
        }
        let parts = disk_parts(bootstrap_bytes, blobs.iter().map(|blob| blob.bytes));
        let parts = parts.ok_or(FilesError::TooLarge)?;
        blobs.iter().enumerate().try_for_each(|(index, blob)| check_blob(index, blob))?;
        Ok(Files { bootstrap, bootstrap_bytes, blobs, parts, nobodys: BTreeMap::new() })
    }

    /// Size of the disk in [`SECTOR`]s.
    pub fn sectors(&self) -> u64 {
        self.parts.last().map_or(0, |last| last.end()) / SECTOR
    }

    /// Each file, and where its beginning lies on the disk: the bootstrap, then the blobs.
    pub fn parts(&self) -> impl Iterator<Item = (BorrowedFd<'_>, DiskPart)> {
        let files = std::iter::once(&self.bootstrap).chain(self.blobs.iter().map(|blob| &blob.file));
        files.map(AsFd::as_fd).zip(self.parts.iter().copied())
    }

    /// Sizes of the blobs.
    pub fn blob_sizes(&self) -> Vec<u64> {
        self.blobs.iter().map(|blob| blob.bytes).collect()
    }

    /// Other cache files for the same blobs.
    pub fn replace(&mut self, blobs: Vec<BlobFile>) {
        self.blobs = blobs;
    }

    /// Blocks of `len` bytes from `offset` on that are not ready: for each blob that the bytes touch, from the first such
    /// block to the last.
    pub fn missing(&self, offset: u64, len: u64) -> io::Result<Vec<Span>> {
        let mut missing = Vec::new();
        for piece in self.pieces(offset, len) {
            let Some(index) = piece.blob else { continue };
            let blob = u32::try_from(index).expect("blobs are few");
            let blocks = self.blobs[index].bytes.div_ceil(BLOCK);
            let span = Span {
                blob,
                first: piece.at / BLOCK,
                end: (piece.at + piece.len).div_ceil(BLOCK).min(blocks),
            };
            missing.extend(self.missing_in(span)?);
        }
        Ok(missing)
    }

    /// From the first to the last block of `span` that is neither ready nor nobody's, if there is one.
    fn missing_in(&self, span: Span) -> io::Result<Option<Span>> {
        let ready = self.ready_map(span)?;
        let is_missing = |block: &u64| !ready.has(*block) && !self.is_nobodys(span.blob, *block);
        let first = (span.first..span.end).find(is_missing);
        let last = first.and_then(|_| (span.first..span.end).rev().find(is_missing));
        Ok(first.zip(last).map(|(first, last)| Span { first, end: last + 1, ..span }))
    }

    /// A wish for `span` has been fulfilled: what is not ready of it belongs to no chunk of the image.
    pub fn leave_out(&mut self, span: Span) -> io::Result<()> {
        let ready = self.ready_map(span)?;
        let mut block = span.first;
        while let Some(first) = (block..span.end).find(|block| !ready.has(*block)) {
            block = (first..span.end).find(|block| ready.has(*block)).unwrap_or(span.end);
            self.add_nobodys(span.blob, first, block);
        }
        Ok(())
    }

    fn is_nobodys(&self, blob: u32, block: u64) -> bool {
        let run = self.nobodys.get(&blob).and_then(|runs| runs.range(..=block).next_back());
        run.is_some_and(|(_, end)| block < *end)
    }

    fn add_nobodys(&mut self, blob: u32, mut first: u64, mut end: u64) {
        let runs = self.nobodys.entry(blob).or_default();
        // Those that it meets become one with it.
        while let Some((start, behind)) = runs.range(..=end).next_back().map(|(start, end)| (*start, *end)) {
            if behind < first {
                break;
            }
            runs.remove(&start);
            (first, end) = (first.min(start), end.max(behind));
        }
        runs.insert(first, end);
    }

    fn ready_map(&self, span: Span) -> io::Result<ReadyMap> {
        let blob = self.blobs.get(span.blob as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let Range { start, end } = span.first / 8..span.end.div_ceil(8);
        let mut bits = vec![0; usize::try_from(end - start).map_err(|_| io::ErrorKind::InvalidInput)?];
        read_exact(&blob.file, &mut bits, ready_map_offset(blob.bytes) + start)?;
        Ok(ReadyMap { start, bits })
    }

    /// Fills `data` from `offset` on, ready or not. What is behind the end of bootstrap or blob is zeros, and so is what is
    /// nobody's.
    pub fn read(&self, data: &mut Writer<'_>, offset: u64) -> io::Result<()> {
        for piece in self.pieces(offset, data.left() as u64) {
            let (file, bytes) = match piece.blob {
                None => (&self.bootstrap, self.bootstrap_bytes),
                Some(index) => (&self.blobs[index].file, self.blobs[index].bytes),
            };
            let there = bytes.saturating_sub(piece.at).min(piece.len);
            let end = piece.at + there;
            let mut at = piece.at;
            for run in self.nobodys_in(&piece, end) {
                fill(data, run.start - at, |data| data.read_exact_at(file.as_fd(), at))?;
                fill(data, run.end - run.start, zeros)?;
                at = run.end;
            }
            fill(data, end - at, |data| data.read_exact_at(file.as_fd(), at))?;
            fill(data, piece.len - there, zeros)?;
        }
        Ok(())
    }

    /// Bytes of `piece` before `end` that are nobody's, in order.
    fn nobodys_in(&self, piece: &Piece, end: u64) -> Vec<Range<u64>> {
        let blob = piece.blob.and_then(|index| u32::try_from(index).ok());
        let Some(runs) = blob.and_then(|blob| self.nobodys.get(&blob)) else { return Vec::new() };
        let clipped = runs.iter().map(|(first, behind)| {
            (first * BLOCK).clamp(piece.at, end.max(piece.at))
                ..(behind * BLOCK).clamp(piece.at, end.max(piece.at))
        });
        clipped.filter(|run| !run.is_empty()).collect()
    }

    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let end = offset.saturating_add(len);
        let first = self.parts.partition_point(|part| part.end() <= offset);
        let touched = self.parts[first..].iter().take_while(move |part| part.start < end);
        (first..).zip(touched).map(move |(index, part)| {
            let from = offset.max(part.start);
            Piece { blob: index.checked_sub(1), at: from - part.start, len: end.min(part.end()) - from }
        })
    }
}

/// A part of a ready map.
struct ReadyMap {
    /// The first byte of it.
    start: u64,
    bits: Vec<u8>,
}

impl ReadyMap {
    /// # Panics
    /// If the block is not in this part.
    fn has(&self, block: u64) -> bool {
        let byte = usize::try_from(block / 8 - self.start).expect("in the part of the map that was read");
        self.bits[byte] & 1 << (block % 8) != 0
    }
}

fn zeros(data: &mut Writer<'_>) -> io::Result<()> {
    while data.left() > 0 {
        data.write(&[0; 512]);
    }
    Ok(())
}

/// Calls `with` with the next `len` bytes of `data` alone.
fn fill<'m>(
    data: &mut Writer<'m>,
    len: u64,
    with: impl FnOnce(&mut Writer<'m>) -> io::Result<()>,
) -> io::Result<()> {
    let len = usize::try_from(len).expect("no more than the room there is");
    if len == 0 {
        return Ok(());
    }
    if len == data.left() {
        return with(data);
    }
    let rest = data.split_off(len).expect("no more than the room there is");
    with(data)?;
    data.append(rest);
    Ok(())
}

/// Checks the cache files of an image that has blobs of these sizes.
pub fn check_blobs(blobs: &[BlobFile], sizes: &[u64]) -> Result<(), FilesError> {
    if blobs.len() != sizes.len() {
        return Err(FilesError::Count { count: blobs.len(), before: sizes.len() });
    }
    for (index, (blob, before)) in blobs.iter().zip(sizes).enumerate() {
        if blob.bytes != *before {
            return Err(FilesError::Changed { index, bytes: blob.bytes, before: *before });
        }
        check_blob(index, blob)?;
    }
    Ok(())
}

fn check_blob(index: usize, blob: &BlobFile) -> Result<(), FilesError> {
    let what = format!("the cache file of blob {index}");
    let has = size(&blob.file, &what)?;
    if blob.bytes == 0 {
        return Err(FilesError::Empty { what: format!("blob {index}") });
    }
    let map = ready_map_bytes(blob.bytes);
    // All sums fit: the parts of a disk end below 2^63.
    let needs = ready_map_offset(blob.bytes).checked_add(map).ok_or(FilesError::TooLarge)?;
    if has < needs {
        return Err(FilesError::Short { what, has, bytes: blob.bytes, needs });
    }
    Ok(())
}

fn size(file: &OwnedFd, what: &str) -> Result<u64, FilesError> {
    let examine = |e: Errno| FilesError::Examine { what: what.to_owned(), source: e.into() };
    let stat = fstat(file).map_err(examine)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        return Err(FilesError::Kind { what: what.to_owned(), kind });
    }
    let flags = fcntl_getfl(file).map_err(examine)?;
    if flags & OFlags::ACCMODE == OFlags::WRONLY || flags.contains(OFlags::PATH) {
        return Err(FilesError::Access { what: what.to_owned() });
    }
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn read_exact(file: &OwnedFd, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match pread(file, &mut *buffer, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buffer = &mut buffer[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn bootstrap() -> OwnedFd {
        let mut file = file(0);
        file.write_all(&[7; 5000]).unwrap();
        file.into()
    }

    fn blob(file: File, bytes: u64) -> BlobFile {
        BlobFile { file: file.into(), bytes }
    }

    #[test]
    fn what_makes_no_disk_is_refused_with_its_value() {
        let message = |blobs: Vec<BlobFile>| Files::new(bootstrap(), blobs).unwrap_err().to_string();
        assert_eq!(
            message(vec![blob(file(4096), 4095)]),
            "the cache file of blob 0 has 4096 bytes; a blob of 4095 bytes and its ready map take 4097"
        );
        assert_eq!(message(vec![blob(file(4096), 0)]), "blob 0 is empty");
        assert_eq!(
            message(vec![blob(file(1), u64::MAX)]),
            "bootstrap and blobs are larger than a disk can be"
        );
        let folder = File::open(std::env::temp_dir()).unwrap();
        assert_eq!(
            message(vec![blob(folder, 4096)]),
            "the cache file of blob 0 is not a regular file but Directory"
        );
        let many = (0..=MAX_BLOBS).map(|_| blob(file(4097), 4096)).collect();
        assert_eq!(message(many), "an image of 129 blobs, at most 128 are possible");
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(4097).unwrap();
        let write_only = File::options().write(true).open(named.path()).unwrap();
        assert_eq!(message(vec![blob(write_only, 1)]), "the cache file of blob 0 is not open for reading");
        let empty = Files::new(file(0).into(), vec![]).unwrap_err().to_string();
        assert_eq!(empty, "the bootstrap is empty");
    }

    #[test]
    fn what_belongs_to_no_chunk_is_zeros_and_not_asked_for_again() {
        let cache = file(0);
        cache.write_all_at(&vec![9; 20 * 4096], 0).unwrap();
        // Blocks 3, 8 and 9 are ready.
        cache.write_all_at(&[0b0000_1000, 0b11, 0], 20 * BLOCK).unwrap();
        let mut files = Files::new(bootstrap(), vec![blob(cache.try_clone().unwrap(), 20 * BLOCK)]).unwrap();
        let span = |first, end| Span { blob: 0, first, end };
        for (first, end) in [(4, 6), (2, 3), (0, 2), (6, 7), (5, 12)] {
            files.leave_out(span(first, end)).unwrap();
        }
        let runs: Vec<_> = files.nobodys[&0].iter().map(|(first, end)| (*first, *end)).collect();
        assert_eq!(runs, [(0, 3), (4, 8), (10, 12)]);
        assert_eq!(files.missing(2 * BLOCK, 20 * BLOCK).unwrap(), [span(12, 20)]);
        let memory = virtio::memory::anonymous(&[(0, 1 << 20)]);
        let slices = || memory.get_slices(GuestAddress(0), 12 * 4096).map(Result::unwrap).collect();
        let mut data = Writer::new(slices());
        files.read(&mut data, 2 * BLOCK).unwrap();
        assert_eq!((data.left(), data.written()), (0, 12 * 4096));
        let mut bytes = vec![0; 12 * 4096];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        for block in 0..12 {
            let wanted = if [3, 8, 9].contains(&block) { 9 } else { 0 };
            assert_eq!(bytes[block * 4096..][..4096], [wanted; 4096], "block {block}");
        }
    }

    #[test]
    fn new_cache_files_must_be_those_of_the_same_blobs() {
        let message = |blobs: &[BlobFile]| check_blobs(blobs, &[4096, 9]).unwrap_err().to_string();
        assert_eq!(message(&[blob(file(4097), 4096)]), "1 blobs, the image has 2");
        assert_eq!(
            message(&[blob(file(4097), 4096), blob(file(4097), 10)]),
            "blob 1 is said to have 10 bytes now, not 9"
        );
        assert!(message(&[blob(file(4096), 4096), blob(file(4097), 9)]).contains("take 4097"));
        check_blobs(&[blob(file(4097), 4096), blob(file(4097), 9)], &[4096, 9]).unwrap();
    }

    #[test]
    fn what_is_missing_is_told_by_blob_from_the_first_to_the_last() {
        // Blob 0 has 20 blocks, blob 1 has 2 and a part of one.
        let (first, second) = (file(20 * BLOCK + 3), file(3 * BLOCK + 1));
        first.write_all_at(&[0b1111_1011, 0xff, 0b0111], 20 * BLOCK).unwrap();
        second.write_all_at(&[0b010], 3 * BLOCK).unwrap();
        let files = Files::new(
            bootstrap(),
            vec![blob(first, 20 * BLOCK), blob(second.try_clone().unwrap(), 2 * BLOCK + 5)],
        );
        let files = files.unwrap();
        assert_eq!(files.sectors(), (2 + 20 + 3) * 8);
        let at = |block: u64| (2 + block) * BLOCK;
        let span = |blob, first, end| Span { blob, first, end };
        // The bootstrap is always there.
        assert_eq!(files.missing(0, 2 * BLOCK).unwrap(), []);
        assert_eq!(files.missing(0, 4 * BLOCK).unwrap(), []);
        assert_eq!(files.missing(0, 4 * BLOCK + 512).unwrap(), [span(0, 2, 3)]);
        assert_eq!(files.missing(at(3), 16 * BLOCK).unwrap(), []);
        assert_eq!(files.missing(at(0), 20 * BLOCK).unwrap(), [span(0, 2, 20)]);
        assert_eq!(files.missing(at(19) + 512, 8 * BLOCK).unwrap(), [span(0, 19, 20), span(1, 0, 3)]);
        assert_eq!(files.missing(at(21), 1).unwrap(), []);
        second.set_len(BLOCK).unwrap();
        assert!(files.missing(at(21), 1).is_err(), "a map that has gone is an error");
    }
}
