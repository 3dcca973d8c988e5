//! What is said, and done, when a thread makes a call that is not on its list.

use std::cell::Cell;
use std::io;

use vmm_sys_util::signal::register_signal_handler;

thread_local! {
    /// Read in a signal handler: no allocation, no lazy set-up, no destructor.
    static LIST: Cell<&'static str> = const { Cell::new("main") };
}

/// Which list this thread is held to, for the message.
pub(super) fn name_list(list: &'static str) {
    LIST.set(list);
}

/// The part of `siginfo_t` that SIGSYS fills (sigaction(2), "The siginfo_t argument to a SA_SIGINFO handler").
#[repr(C)]
struct Sigsys {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    padding: libc::c_int,
    call_address: *const libc::c_void,
    syscall: libc::c_int,
    arch: libc::c_uint,
}

extern "C" fn on_breach(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a SIGSYS handler a valid `siginfo_t`, which is larger than `Sigsys`, and fills the
    // fields of SIGSYS in it, laid out as above on x86-64.
    let syscall = unsafe { info.cast::<Sigsys>().read() }.syscall;
    let mut line = [0; 128];
    let len = compose(&mut line, LIST.get(), syscall.unsigned_abs());
    // SAFETY: write(2) is async-signal-safe; `len` bytes of `line` were written.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len) };
    // SAFETY: _exit(2) is async-signal-safe, and does not return.
    unsafe { libc::_exit(vmm_api::exit::SECCOMP.into()) }
}

/// The message, without the allocator, which the call may have come from.
fn compose(line: &mut [u8; 128], list: &str, syscall: u32) -> usize {
    let mut digits = [b'0'; 10];
    let mut first = digits.len() - 1;
    let mut rest = syscall;
    while rest > 0 {
        digits[first] = b'0' + u8::try_from(rest % 10).expect("a digit");
        rest /= 10;
        if rest > 0 {
            first -= 1;
        }
    }
    let mut len = 0;
    for part in [
        b"ctvm-vmm: error: system call ",
        &digits[first..],
        b" is not in the filter ",
        list.as_bytes(),
        b".json\n",
    ] {
        let room = part.len().min(line.len() - len);
        line[len..len + room].copy_from_slice(&part[..room]);
        len += room;
    }
    len
}

/// Makes breaches speak. Once, before any thread is confined.
pub fn report_breaches() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_breach).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_names_call_and_list() {
        let mut line = [0; 128];
        for (syscall, text) in [(0, "0"), (59, "59"), (u32::MAX, "4294967295")] {
            let len = compose(&mut line, "vcpu", syscall);
            let wanted = format!("ctvm-vmm: error: system call {text} is not in the filter vcpu.json\n");
            assert_eq!(std::str::from_utf8(&line[..len]).unwrap(), wanted);
        }
        assert_eq!(compose(&mut line, &"x".repeat(200), 1), 128);
    }
}
