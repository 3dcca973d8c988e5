//! What is saved of a file system device.

use serde::{Deserialize, Serialize};

/// A file system device in a snapshot.
///
/// The server's session is not part of it: inodes and open files are descriptors of the process that was. If the guest
/// had one (`session_lost`), then after a restore every inode it knows but the root answers `ESTALE` and every open
/// file `EBADF`, until its agent unmounts the file system (`umount -l` will do) and mounts it again by the same tag,
/// which begins a session. Therefore take a snapshot that is to be cloned before the guest mounts anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsState {
    /// Tag that the guest mounts by.
    pub tag: String,
    /// Number of request queues.
    pub request_queues: u16,
    /// The guest had begun to use the server, and what it holds will be void after a restore.
    pub session_lost: bool,
}
