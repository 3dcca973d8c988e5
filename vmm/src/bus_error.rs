//! What is said, and done, when the host cannot give a page of guest memory that one of our threads touches: the VMM ends, with a status
//! of its own ([`vmm_api::exit::NO_PAGE`]).
//!
//! A vCPU that touches such a page is told by `KVM_RUN`, and what the kernel copies for us by an errno. What is left are
//! devices that copy out of a buffer themselves.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

const LINE: &[u8] =
    b"ctvm-vmm: error: a page of the guest's memory cannot be had (SIGBUS): a file of an image was cut \
    short or cannot be read, or memory is broken\n";

extern "C" fn on_bus_error(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: write(2) is async-signal-safe, and the line is a constant.
    unsafe { libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len()) };
    // SAFETY: _exit(2) is async-signal-safe, and does not return.
    unsafe { libc::_exit(vmm_api::exit::NO_PAGE.into()) }
}

/// Makes it be said. Once, before there are other threads.
pub fn report() -> io::Result<()> {
    register_signal_handler(libc::SIGBUS, on_bus_error).map_err(Into::into)
}
