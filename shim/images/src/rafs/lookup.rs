//! Single files of an EROFS, as the service hands it out, by their path, and where their bytes are: what a reader needs who mounts nothing.

use super::erofs::Erofs;
use super::{RafsError, v6};
use crate::rafs::Bytes;

/// Most bytes of a file that is looked up: what lists users and groups has some thousand lines.
pub const MAX_FILE: u64 = 4 << 20;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of a blob; none for zeros.
    pub blob: Option<u32>,
    /// Where it begins in the uncompressed blob.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The pieces of the regular file at `path` (names with slashes between them), in order. None where there is no such file, or where it is
/// something else.
///
/// # Errors
/// The bootstrap is broken there, or the file is longer than [`MAX_FILE`].
pub fn extents_of(bootstrap: &[u8], path: &str) -> Result<Option<Vec<Extent>>, RafsError> {
    let bytes = Bytes::new(bootstrap);
    if !v6::detect(bytes) {
        return Err(RafsError::NotRafs);
    }
    let (inodes, root) = v6::roots(bytes)?;
    let erofs = Erofs::new(bytes, inodes, &[]);
    let mut nid = root;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        match erofs.child(nid, name.as_bytes())? {
            Some(child) => nid = child,
            None => return Ok(None),
        }
    }
    erofs.extents(nid, MAX_FILE)
}
