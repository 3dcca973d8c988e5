//! Work in another network namespace, or in a new one: on a thread of its own, since a thread that went there does not
//! come back.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use rtnetlink::Handle;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::NetError;

/// Does `work` with an rtnetlink socket of the namespace at `path`, and waits for it: some milliseconds.
///
/// # Errors
/// [`NetError::Namespace`] when it cannot be entered, else what `work` says.
pub fn within<T: Send>(
    path: &Path,
    work: impl AsyncFnOnce(Handle) -> Result<T, NetError> + Send,
) -> Result<T, NetError> {
    let failed = |source| NetError::Namespace { path: path.to_owned(), source };
    let namespace = File::open(path).map_err(failed)?;
    let thread = || {
        let enter = || -> io::Result<_> {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            tokio::runtime::Builder::new_current_thread().enable_io().build()
        };
        let runtime = enter().map_err(failed)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
            tokio::spawn(connection);
            work(handle).await
        })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, thread).map_err(failed)?;
        thread.join().expect("work in a namespace does not panic")
    })
}

/// Does `work` in a new network namespace, which nobody has then but the processes that it starts.
///
/// # Errors
/// Without a thread, and what the kernel says of the namespace (`EPERM`, `ENOSPC`).
pub fn in_new<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = || -> io::Result<T> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        let thread = std::thread::Builder::new().spawn_scoped(scope, thread)?;
        thread.join().expect("work in a namespace does not panic")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_namespace_is_that_of_a_child_and_not_of_this_process() {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net"));
        let start = || std::process::Command::new("sleep").arg("1000").spawn();
        let mut child = match in_new(start) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                return eprintln!("not run: this takes root");
            }
            child => child.unwrap().unwrap(),
        };
        let (theirs, ours) = (of(child.id()).unwrap(), of(std::process::id()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(theirs, ours);
    }

    #[test]
    fn what_is_no_namespace_is_named() {
        let error = within(Path::new("/nonexistent/ns"), async |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "network namespace /nonexistent/ns");
        let error = within(Path::new("/proc/self/status"), async |_| Ok(())).unwrap_err();
        assert!(matches!(error, NetError::Namespace { .. }), "{error:?}");
    }
}
