//! What a thread must be before it may serve requests, and how it creates files in a caller's name.
//!
//! New files must belong to the guest process that made them. A server thread takes over the caller's user and group
//! for the one call that creates the file (`setfsuid`, `setfsgid`), so a file never exists under another owner. It
//! keeps its capabilities meanwhile (`SECBIT_NO_SETUID_FIXUP`): whether the caller may create a file there is the
//! guest kernel's decision, which knows the caller's supplementary groups and capabilities as we do not.
//!
//! All three settings are the thread's own; the rest of the process is not touched.

use std::cell::Cell;
use std::io;

use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits};

use crate::sys;

/// The guest process that a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entered {
    us: Caller,
    /// Whether we can take over another's name at all.
    privileged: bool,
}

thread_local! {
    static ENTERED: Cell<Option<Entered>> = const { Cell::new(None) };
}

/// Prepares this thread for serving requests. To be called once on each, before its system calls are filtered.
///
/// Without `CAP_SETPCAP` and `CAP_SETUID`, requests are served all the same, and every new file is ours.
pub fn enter() -> io::Result<()> {
    sys::unshare_fs()?;
    // The guest's kernel has applied the caller's mask already.
    rustix::process::umask(rustix::fs::Mode::empty());
    let keep = capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    let privileged = match set_capabilities_secure_bits(keep) {
        Ok(()) => true,
        Err(Errno::PERM) => false,
        Err(e) => return Err(e.into()),
    };
    let us = Caller { uid: geteuid().as_raw(), gid: getegid().as_raw() };
    ENTERED.set(Some(Entered { us, privileged }));
    Ok(())
}

/// Calls `create` in the name of `caller`.
pub fn as_caller<T>(caller: Caller, create: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let Some(Entered { us, privileged }) = ENTERED.get() else {
        log::error!("a thread serves files without having been prepared for it");
        return Err(Errno::IO);
    };
    // `(uid_t) -1` names nobody, and `setfsuid` would silently ignore it.
    if caller.uid == u32::MAX || caller.gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    if !privileged || caller == us {
        return create();
    }
    let _back = Back(us);
    sys::set_fs_gid(caller.gid);
    sys::set_fs_uid(caller.uid);
    create()
}

/// Makes the thread itself again.
struct Back(Caller);

impl Drop for Back {
    fn drop(&mut self) {
        sys::set_fs_uid(self.0.uid);
        sys::set_fs_gid(self.0.gid);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_is_made_in_the_callers_name_even_where_the_caller_may_not_write() {
        std::thread::spawn(|| {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(
                as_caller(Caller { uid: 1000, gid: 1001 }, || Ok(())),
                Err(Errno::IO),
                "not entered yet"
            );

            enter().unwrap();
            let ours = std::fs::metadata(dir.path()).unwrap();
            let path = dir.path().join("file");
            as_caller(Caller { uid: 1000, gid: 1001 }, || {
                std::fs::write(&path, "x").map_err(|e| sys::errno(&e))?;
                Ok(())
            })
            .unwrap();
            let made = std::fs::metadata(&path).unwrap();
            if ours.uid() == 0 {
                assert_eq!((made.uid(), made.gid()), (1000, 1001));
            }
            // Back to ourselves, and no mask hides a bit.
            std::fs::write(dir.path().join("ours"), "x").unwrap();
            let made = std::fs::metadata(dir.path().join("ours")).unwrap();
            assert_eq!((made.uid(), made.mode() & 0o777), (ours.uid(), 0o666));

            assert_eq!(as_caller(Caller { uid: u32::MAX, gid: 0 }, || Ok(())), Err(Errno::INVAL));
        })
        .join()
        .unwrap();
    }
}
