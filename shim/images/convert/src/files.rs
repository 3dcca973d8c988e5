//! What files an image has and where their bytes are, by the field's own reader: independent of how the service reads RAFS, but for where
//! the service puts chunks of version 5.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use images::rafs::moved;
use nydus_builder::Tree;
use nydus_rafs::metadata::RafsSuper;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Index of the blob.
    pub blob: u32,
    /// Offset in the uncompressed blob, in version 5 as the service lays it out.
    pub offset: u64,
    /// Bytes of it that are the file's.
    pub len: u64,
    /// Offset in the file.
    pub file_offset: u64,
}

/// A regular file of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMap {
    /// Its path, from the root.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Its bytes.
    pub pieces: Vec<Piece>,
}

/// The regular files of a bootstrap, and its blobs' names.
pub fn of_bootstrap(bootstrap: &Path) -> Result<(Vec<FileMap>, Vec<String>)> {
    let read = RafsSuper::load_from_file(bootstrap, crate::rafs::quiet_config(), false);
    let (rafs, _) = read.with_context(|| format!("read {}", bootstrap.display()))?;
    let blobs = rafs.superblock.get_blob_infos().iter().map(|blob| blob.blob_id()).collect();
    let tree =
        Tree::from_bootstrap(&rafs, &mut ()).with_context(|| format!("read {}", bootstrap.display()))?;
    let is_v5 = rafs.meta.is_v5();
    let mut files = Vec::new();
    tree.walk_bfs(true, &mut |tree| {
        let node = tree.borrow_mut_node();
        if node.is_reg() {
            let size = node.inode.size();
            let mut at = 0;
            let mut pieces = Vec::with_capacity(node.chunks.len());
            for chunk in &node.chunks {
                let len = u64::from(chunk.inner.uncompressed_size()).min(size - at);
                let (blob, offset) = (chunk.inner.blob_index(), chunk.inner.uncompressed_offset());
                let offset = if is_v5 { moved(offset, chunk.inner.index()) } else { offset };
                pieces.push(Piece { blob, offset, len, file_offset: at });
                at += len;
            }
            files.push(FileMap { path: node.target().clone(), size, pieces });
        }
        Ok(())
    })?;
    Ok((files, blobs))
}
