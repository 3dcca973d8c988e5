//! Id-mapped mounts: a tree of files that shows their owners shifted, as a user namespace has them.
//!
//! A package of its own since it takes `clone(2)` and `mount_setattr(2)`, and everything else of the shim forbids
//! `unsafe`. The guest's agent uses it, too.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// A user namespace with these maps, as `/proc/PID/uid_map` and `gid_map` take them. Nobody is in it.
///
/// # Errors
/// `EINVAL` for maps that the kernel does not take, `EPERM` without the rights, `ENOSPC` for more namespaces than
/// `user.max_user_namespaces`.
pub fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let child = Child::start()?;
    let file = |name: &str| format!("/proc/{}/{name}", child.0);
    std::fs::write(file("uid_map"), uid_map)?;
    std::fs::write(file("gid_map"), gid_map)?;
    Ok(File::open(file("ns/user"))?.into())
}

/// Shows the files of `tree`, a detached mount that nobody else has yet, with the owners that the user namespace `users`
/// makes of theirs. With `recursive`, so are the mounts below it.
///
/// # Errors
/// `EINVAL` where a file system cannot, or has been told already.
pub fn set(tree: BorrowedFd<'_>, users: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(users.as_raw_fd()).expect("a descriptor is not negative"),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string that ends with a NUL; the kernel reads `size_of_val(&attributes)` bytes of
    // `attributes`, which is that long and lives beyond the call, and keeps neither. Both descriptors are borrowed, so open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A process in a user namespace of its own, which waits to be killed; it is when this is dropped.
struct Child(libc::pid_t);

impl Child {
    fn start() -> io::Result<Self> {
        let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        // SAFETY: without CLONE_VM and without a stack this is fork(2): the child has a copy of all memory, on which nobody
        // else works. Threads of this process may hold locks in that copy, so the child takes none: it makes two system
        // calls that touch no memory, and never returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
        match libc::pid_t::try_from(pid).expect("process numbers are ints") {
            0 => loop {
                // SAFETY: see above; this one reads its two integers.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                // SAFETY: see above; this one has no arguments.
                unsafe { libc::pause() };
            },
            ..0 => Err(io::Error::last_os_error()),
            pid => Ok(Child(pid)),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: two integers; the number is that of our child, whom nobody else waits for, so it is nobody else's.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: a null pointer asks waitpid(2) for no status.
        let wait = || unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
        while wait() < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_namespace_is_had_without_anybody_in_it() {
        let made = match user_namespace("0 100000 65536\n", "0 200000 10\n") {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!("not run: this takes root");
                return;
            }
            made => made.unwrap(),
        };
        assert!(made.as_raw_fd() > 2);
        let error = user_namespace("0 100000 0\n", "0 200000 10\n").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        // What is no mount of its own, and what cannot be mapped, is left as it is.
        let root = File::open("/proc").unwrap();
        assert!(set(root.as_fd(), made.as_fd(), false).is_err());
    }
}
