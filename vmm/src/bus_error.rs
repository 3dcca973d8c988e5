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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const CHILD: &str = "CTVM_TEST_BUS_ERROR";

    /// What the process of the test below does; nothing in any other.
    #[test]
    fn touches_a_page_that_is_gone() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        report().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (prot, fd) = (libc::PROT_READ, std::os::fd::AsRawFd::as_raw_fd(&file));
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_PRIVATE, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        // SAFETY: inside the mapping; that there is no page is what is tested.
        unsafe { at.cast::<u8>().read_volatile() };
    }

    #[test]
    fn a_page_that_cannot_be_had_ends_the_process_with_a_status_and_a_line() {
        let own = "bus_error::tests::touches_a_page_that_is_gone";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", own, "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert_eq!(ended.status.code(), Some(vmm_api::exit::NO_PAGE.into()), "{ended:?}");
        assert!(ended.stderr.ends_with(LINE), "{ended:?}");
    }
}
