//! Work in another network namespace: on a thread of its own, since a thread that went there does not come back.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_named() {
        let error = within(Path::new("/nonexistent/ns"), async |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "network namespace /nonexistent/ns");
        let error = within(Path::new("/proc/self/status"), async |_| Ok(())).unwrap_err();
        assert!(matches!(error, NetError::Namespace { .. }), "{error:?}");
    }
}
