//! A file that an overlay of the guest copies into its writable layer keeps its set-id bits and capabilities.
//!
//! The guest's overlay sets a copy's capabilities, then its size, its mode and its owner, and relies on each to leave what was before alone
//! (Linux 6.1, `ovl_copy_up_metadata` in fs/overlayfs/copy_up.c). But what comes by FUSE is an ftruncate(2) and a chown(2) here, for which
//! the host's kernel clears capabilities and set-id bits; and where a process of the guest calls them, it has to
//! (`FUSE_HANDLE_KILLPRIV_V2`). What tells the two apart is where the file is: an overlay makes copies in `work` of its work directory,
//! under names of its own, and no process gets there.

use rustix::fs::{OFlags, XattrFlags};
use rustix::io::Errno;

use super::attr::{Number, PERMISSIONS, stat};
use super::node::Node;
use super::{Result, Share};

const CAPABILITY: &std::ffi::CStr = c"security.capability";
/// Larger than any of its versions (`struct vfs_ns_cap_data` has 24 bytes).
const MAX: usize = 64;

/// What a copy shall have when it has its size and its owner.
#[derive(Debug)]
pub struct Kept {
    mode: u32,
    capability: Option<Vec<u8>>,
}

impl Share {
    /// What is to be kept of a node whose size or owner is about to change; nothing, unless it is being copied up.
    pub(super) fn kept_of_copy(&self, node: &Node) -> Result<Option<Kept>> {
        if !node.mount.options.layer || node.kind != rustix::fs::FileType::RegularFile {
            return Ok(None);
        }
        let place = rustix::fs::readlinkat(&self.descriptors, Number::of(node).as_str(), Vec::new())?;
        if !is_copy(place.as_bytes()) {
            return Ok(None);
        }
        let mut capability = [0; MAX];
        let file = self.reopen(node, OFlags::RDONLY)?;
        let capability = match rustix::fs::fgetxattr(&file, CAPABILITY, &mut capability) {
            Ok(len) => Some(capability[..len].to_vec()),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
            Err(error) => return Err(error),
        };
        Ok(Some(Kept { mode: u32::from(stat(node)?.stx_mode) & PERMISSIONS, capability }))
    }

    /// Gives it back.
    pub(super) fn give_back(&self, node: &Node, kept: &Kept) -> Result<()> {
        self.set_mode(node, kept.mode)?;
        let Some(capability) = &kept.capability else { return Ok(()) };
        let file = self.reopen(node, OFlags::RDONLY)?;
        rustix::fs::fsetxattr(&file, CAPABILITY, capability, XattrFlags::empty())
    }
}

/// Whether a path is one of an overlay's own: a file `#HEX` of a folder `work`.
fn is_copy(path: &[u8]) -> bool {
    let mut parts = path.rsplit(|byte| *byte == b'/');
    let number = parts.next().and_then(|name| name.strip_prefix(b"#"));
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_hexdigit))
        && parts.next() == Some(b"work")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_known_by_their_place() {
        let kept = |name: &str| is_copy(format!("/upper/{}/{name}", "work").as_bytes());
        for name in ["#1", "#a0f"] {
            assert!(kept(name), "{name}");
        }
        for name in ["#", "1", "#1/x", "#x", "#1 (deleted)"] {
            assert!(!kept(name), "{name}");
        }
        for path in ["/fs/#1", "#1", ""] {
            assert!(!is_copy(path.as_bytes()), "{path}");
        }
    }
}
