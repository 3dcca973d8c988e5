//! Reading and writing the two parts of a chain, by value or straight from and to files.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::c_int;

use libc::iovec;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Most buffers in one system call (`UIO_MAXIOV`).
pub(super) const MAX_IOVECS: usize = 1024;

/// The driver's buffers are too small for what the device must read or write.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("chain has {left} bytes left where {wanted} are needed")]
pub struct ShortChain {
    /// Bytes needed.
    pub wanted: usize,
    /// Bytes there.
    pub left: usize,
}

impl From<ShortChain> for io::Error {
    fn from(e: ShortChain) -> Self {
        io::Error::new(io::ErrorKind::UnexpectedEof, e)
    }
}

/// A position in a list of slices. Slices before `first` and bytes before `offset` in it are done.
#[derive(Debug, Clone)]
struct Cursor<'m> {
    slices: Vec<VolatileSlice<'m>>,
    first: usize,
    offset: usize,
    done: usize,
    left: usize,
}

impl<'m> Cursor<'m> {
    fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        let left = slices.iter().map(VolatileSlice::len).sum();
        Cursor { slices, first: 0, offset: 0, done: 0, left }
    }

    fn need(&self, wanted: usize) -> Result<(), ShortChain> {
        if wanted <= self.left { Ok(()) } else { Err(ShortChain { wanted, left: self.left }) }
    }

    /// What is left of the first slice that has something left.
    fn front(&self) -> Option<VolatileSlice<'m>> {
        let slice = self.slices.get(self.first)?;
        Some(slice.offset(self.offset).expect("`advance` keeps the offset within the slice"))
    }

    fn advance(&mut self, mut count: usize) {
        debug_assert!(count <= self.left);
        self.done += count;
        self.left -= count;
        while count > 0 {
            let here = self.slices[self.first].len() - self.offset;
            if count < here {
                self.offset += count;
                return;
            }
            count -= here;
            self.first += 1;
            self.offset = 0;
        }
    }

    /// Applies `step` to slices from here on, until `limit` bytes are done or none is left. `step` gets the slice
    /// and the number of bytes done before it.
    fn each(&mut self, limit: usize, mut step: impl FnMut(VolatileSlice<'m>, usize)) -> usize {
        let mut count = 0;
        while count < limit {
            let Some(front) = self.front() else { break };
            let len = front.len().min(limit - count);
            step(front.subslice(0, len).expect("`len` is at most the slice's length"), count);
            self.advance(len);
            count += len;
        }
        count
    }

    fn split_off(&mut self, at: usize) -> Result<Self, ShortChain> {
        self.need(at)?;
        let mut tail = self.clone();
        tail.advance(at);
        tail.done = 0;
        self.left = at;
        // Cut the slices, so that neither half can reach the other's bytes.
        let (last, cut) = (tail.first, tail.offset);
        self.slices.truncate(last + usize::from(cut > 0));
        if cut > 0 {
            self.slices[last] = self.slices[last].subslice(0, cut).expect("`cut` is within the slice");
        }
        Ok(tail)
    }

    fn append(&mut self, tail: Self) {
        self.left += tail.left;
        self.slices.extend(tail.front());
        self.slices.extend(tail.slices.into_iter().skip(tail.first + 1));
    }

    /// Calls `io` with the next at most `limit` bytes as iovecs and advances by what it says it did.
    fn with_iovecs(
        &mut self,
        limit: usize,
        io: impl FnOnce(&[iovec]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut iovecs: Vec<iovec> = Vec::with_capacity((self.slices.len() - self.first).min(MAX_IOVECS));
        let mut offset = self.offset;
        let mut room = limit.min(self.left);
        let total = room;
        for slice in self.slices[self.first..].iter().take(MAX_IOVECS) {
            if room == 0 {
                break;
            }
            let len = (slice.len() - offset).min(room);
            // The guard matters for memory that is mapped on demand only (Xen).
            let base = slice.ptr_guard_mut().as_ptr().wrapping_add(offset);
            iovecs.push(iovec { iov_base: base.cast(), iov_len: len });
            room -= len;
            offset = 0;
        }
        let done = io(&iovecs)?;
        assert!(done <= total - room, "a system call cannot transfer more than it was given room for");
        self.advance(done);
        Ok(done)
    }
}

/// The part of a chain that the device reads: what the driver wrote.
#[derive(Debug)]
pub struct Reader<'m>(Cursor<'m>);

/// The part of a chain that the device writes: where the driver wants its answer.
#[derive(Debug)]
pub struct Writer<'m>(Cursor<'m>);

impl<'m> Reader<'m> {
    /// A reader of these slices, in order.
    pub fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        Reader(Cursor::new(slices))
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Reads as much of `buffer` as there is.
    pub fn read(&mut self, buffer: &mut [u8]) -> usize {
        self.0.each(buffer.len(), |slice, at| {
            slice.copy_to(&mut buffer[at..at + slice.len()]);
        })
    }

    /// Fills `buffer`, or takes nothing.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), ShortChain> {
        self.0.need(buffer.len())?;
        self.read(buffer);
        Ok(())
    }

    /// Reads a value as it lies in memory; virtio's fields are little endian.
    pub fn read_obj<T: FromBytes + IntoBytes>(&mut self) -> Result<T, ShortChain> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, count: usize) -> Result<(), ShortChain> {
        self.0.need(count)?;
        self.0.advance(count);
        Ok(())
    }

    /// Keeps the next `at` bytes and gives a reader of what follows.
    pub fn split_off(&mut self, at: usize) -> Result<Self, ShortChain> {
        self.0.split_off(at).map(Reader)
    }

    /// Writes what is left to `file` at `offset`, whole. On an error, some of it may be written.
    pub fn write_all_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        transfer_all(&mut self.0, file, offset, pwritev)
    }

    /// Writes at most `limit` bytes of what is left to a stream, with one call. Tells how many were taken.
    pub fn write_to(&mut self, stream: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.0.with_iovecs(limit, |iovecs| retry(|| writev(stream, iovecs)))
    }

    /// Calls `io` with the next at most `limit` bytes as iovecs (1,024 at most; none if nothing is left) and advances
    /// by the count that it answers. The pointers are valid during the call only, for reading.
    pub fn with_iovecs(
        &mut self,
        limit: usize,
        io: impl FnOnce(&[iovec]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.0.with_iovecs(limit, io)
    }
}

impl<'m> Writer<'m> {
    /// A writer to these slices, in order.
    pub fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        Writer(Cursor::new(slices))
    }

    /// Bytes of room left.
    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Bytes written so far: what `push_used` wants to know, less what writers split off from this one wrote.
    pub fn written(&self) -> usize {
        self.0.done
    }

    /// Writes as much of `bytes` as there is room for.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.each(bytes.len(), |slice, at| slice.copy_from(&bytes[at..at + slice.len()]))
    }

    /// Writes all of `bytes`, or nothing.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), ShortChain> {
        self.0.need(bytes.len())?;
        self.write(bytes);
        Ok(())
    }

    /// Writes a value as it lies in memory; virtio's fields are little endian.
    pub fn write_obj<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), ShortChain> {
        self.write_all(value.as_bytes())
    }

    /// Keeps the next `at` bytes of room and gives a writer to what follows.
    pub fn split_off(&mut self, at: usize) -> Result<Self, ShortChain> {
        self.0.split_off(at).map(Writer)
    }

    /// Adds the room of `tail` behind this one's, to fill both with one call.
    pub fn append(&mut self, tail: Self) {
        self.0.append(tail.0);
    }

    /// Fills what is left from `file` at `offset`, whole: a file that ends before is an error.
    pub fn read_exact_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        transfer_all(&mut self.0, file, offset, preadv)
    }

    /// Reads at most `limit` bytes from a stream, with one call. Tells how many came; 0 is the stream's end (or
    /// that there was no room).
    pub fn read_from(&mut self, stream: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.0.with_iovecs(limit, |iovecs| retry(|| readv(stream, iovecs)))
    }

    /// Calls `io` with at most `limit` bytes of room as iovecs (1,024 at most; none if there is no room) and advances
    /// by the count that it answers, which must have been written. The pointers are valid during the call only.
    pub fn with_iovecs(
        &mut self,
        limit: usize,
        io: impl FnOnce(&[iovec]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.0.with_iovecs(limit, io)
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(Reader::read(self, buffer))
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(Writer::write(self, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn transfer_all(
    cursor: &mut Cursor<'_>,
    file: BorrowedFd<'_>,
    offset: u64,
    call: fn(BorrowedFd<'_>, &[iovec], i64) -> io::Result<usize>,
) -> io::Result<()> {
    let start = cursor.done;
    while cursor.left > 0 {
        let at = offset
            .checked_add((cursor.done - start) as u64)
            .and_then(|at| i64::try_from(at).ok())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        match cursor.with_iovecs(usize::MAX, |iovecs| retry(|| call(file, iovecs, at)))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ => continue,
        }
    }
    Ok(())
}

pub(super) fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn count(iovecs: &[iovec]) -> c_int {
    c_int::try_from(iovecs.len()).expect("`with_iovecs` makes at most MAX_IOVECS")
}

fn answer(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

// The four calls below are why this module needs `unsafe`: the kernel reads and writes guest memory itself, without a
// copy through ours. What all four rely on: each iovec was made by `Cursor::with_iovecs` or `Room::receive` from a
// `VolatileSlice` which lives as long as the mapping it was checked against when the chain was popped (the byte behind a
// `Room` is its caller's own). Guest memory is never made a Rust reference, so the kernel's writes alias nothing.

fn preadv(file: BorrowedFd<'_>, iovecs: &[iovec], offset: i64) -> io::Result<usize> {
    // SAFETY: `iovecs` point into mapped guest memory (see above), and their number is the slice's own.
    answer(unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), offset) })
}

fn pwritev(file: BorrowedFd<'_>, iovecs: &[iovec], offset: i64) -> io::Result<usize> {
    // SAFETY: `iovecs` point into mapped guest memory (see above), and their number is the slice's own.
    answer(unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), offset) })
}

pub(super) fn readv(stream: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<usize> {
    // SAFETY: `iovecs` point into mapped guest memory (see above), and their number is the slice's own.
    answer(unsafe { libc::readv(stream.as_raw_fd(), iovecs.as_ptr(), count(iovecs)) })
}

fn writev(stream: BorrowedFd<'_>, iovecs: &[iovec]) -> io::Result<usize> {
    // SAFETY: `iovecs` point into mapped guest memory (see above), and their number is the slice's own.
    answer(unsafe { libc::writev(stream.as_raw_fd(), iovecs.as_ptr(), count(iovecs)) })
}
