//! The system calls that have no safe face elsewhere.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::c_int;

use libc::iovec;
use rustix::io::Errno;

/// The error number of `error`; `EIO` if it has none.
pub fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// Reads from `file` at `offset` into the iovecs of [`virtio::queue::Writer::with_iovecs`].
pub fn preadv(file: BorrowedFd<'_>, iovecs: &[iovec], offset: i64) -> io::Result<usize> {
    // SAFETY: `with_iovecs` made the iovecs from slices of mapped guest memory which outlive the call; guest memory
    // is never made a Rust reference, so the kernel's writes alias nothing.
    retry(|| unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), offset) })
}

/// Writes the iovecs of [`virtio::queue::Reader::with_iovecs`] to `file`, at `offset` or behind its end.
pub fn pwritev(file: BorrowedFd<'_>, iovecs: &[iovec], offset: i64, append: bool) -> io::Result<usize> {
    let flags = if append { libc::RWF_APPEND } else { 0 };
    // SAFETY: `with_iovecs` made the iovecs from slices of mapped guest memory which outlive the call; the kernel
    // only reads them.
    retry(|| unsafe { libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), offset, flags) })
}

/// Gives this thread its own working directory and umask.
pub fn unshare_fs() -> io::Result<()> {
    // SAFETY: CLONE_FS touches no memory and no descriptor; what other threads see stays as it was.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the user that this thread's file accesses are made as. The kernel tells no error (setfsuid(2)).
pub fn set_fs_uid(uid: u32) {
    // SAFETY: changes this thread's credentials only.
    unsafe { libc::setfsuid(uid) };
}

/// Sets the group that this thread's file accesses are made as. The kernel tells no error (setfsgid(2)).
pub fn set_fs_gid(gid: u32) {
    // SAFETY: changes this thread's credentials only.
    unsafe { libc::setfsgid(gid) };
}

fn count(iovecs: &[iovec]) -> c_int {
    c_int::try_from(iovecs.len()).expect("`with_iovecs` makes at most 1,024")
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
