//! Single files and directories of the host, for bind mounts.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open, statfs};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};

use super::{BLOCK_DEVICE, MountPoint, RootfsError, clone_tree, errno, id_map, os};
use crate::container::spec::IdMapped;

/// Size of the tmpfs that `path` is on, in bytes; none for another kind of file system.
pub fn tmpfs_size(path: &Path) -> Option<u64> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let found = statfs(path).ok().filter(|found| found.f_type == TMPFS_MAGIC)?;
    found.f_blocks.checked_mul(u64::try_from(found.f_bsize).ok()?)
}

/// A directory of huge pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugePages {
    /// Its name, the same for the same directory.
    pub volume: String,
    /// Size of its pages, in bytes.
    pub page: u64,
}

/// The huge pages at `path`, if it is on a hugetlbfs. Their files cannot be read or written, only mapped, so they cannot
/// be shown to a guest either.
pub fn huge_pages(path: &Path) -> Option<HugePages> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    let found = statfs(path).ok().filter(|found| found.f_type == HUGETLBFS_MAGIC)?;
    let stat = std::fs::metadata(path).ok()?;
    let volume = format!("{:x}-{:x}", stat.dev(), stat.ino());
    Some(HugePages { volume, page: u64::try_from(found.f_bsize).ok()? })
}

/// A directory of the host for a bind mount, and the name in it when the bind is of a file.
#[derive(Debug)]
pub struct HostTree {
    /// A detached mount.
    pub dir: OwnedFd,
    /// Name of the file; `None` for a directory, which is `dir` itself.
    pub file: Option<OsString>,
}

/// Makes `source` available as a directory. A single file is put into an otherwise empty directory made at `stage`,
/// so that its neighbours stay out of the guest's sight. With `live`, what the host mounts below a directory later is
/// seen as well; with `map`, the owners of files are shifted.
///
/// # Errors
/// [`RootfsError::Os`], [`RootfsError::Special`] and [`RootfsError::IdMap`].
pub fn host_tree(
    source: &Path,
    stage: &Path,
    live: bool,
    map: Option<&IdMapped>,
) -> Result<HostTree, RootfsError> {
    let kind = std::fs::metadata(source).map_err(os("bind mount of", source))?.file_type();
    if kind.is_dir() {
        // Mounts do not propagate into a detached tree (before Linux 6.15), but a walk from a directory of the host's
        // own tree crosses into them.
        let dir = if live { open_directory(source)? } else { clone_tree(source, true)? };
        if let Some(IdMapped { maps, recursive }) = map {
            id_map::shift(&dir, source, maps, *recursive)?;
        }
        return Ok(HostTree { dir, file: None });
    }
    for (is, name) in [
        (kind.is_socket(), "socket"),
        (kind.is_fifo(), "fifo"),
        (kind.is_char_device(), "character device"),
        (kind.is_block_device(), BLOCK_DEVICE),
    ] {
        if is {
            return Err(RootfsError::Special { path: source.to_owned(), kind: name });
        }
    }
    let name = source.file_name().unwrap_or("file".as_ref()).to_owned();
    std::fs::create_dir_all(stage).map_err(os("making directory", stage))?;
    // A mount of its own below the stage, and the stage one too, so that a clone holds both and nothing else.
    mount_bind(stage, stage).map_err(errno("binding", stage))?;
    let _stage = MountPoint { path: stage, count: 1 };
    mount_change(stage, MountPropagationFlags::PRIVATE).map_err(errno("making private", stage))?;
    let file = stage.join(&name);
    std::fs::write(&file, []).map_err(os("making file", &file))?;
    match map {
        None => mount_bind(source, &file).map_err(errno("binding", source))?,
        Some(IdMapped { maps, .. }) => {
            let tree = clone_tree(source, false)?;
            id_map::shift(&tree, source, maps, false)?;
            id_map::attach(&tree, &file)?;
        }
    }
    let _file = MountPoint { path: &file, count: 1 };
    Ok(HostTree { dir: clone_tree(stage, true)?, file: Some(name) })
}

fn open_directory(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(errno("opening", path))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{may_mount, mounts_below, read_below};
    use super::*;

    #[test]
    fn a_file_comes_without_its_neighbours_and_alive() {
        if !may_mount() {
            return;
        }
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let (secret, hosts, stage) =
            (tmp.path().join("secret"), tmp.path().join("hosts"), tmp.path().join("stage"));
        std::fs::write(&secret, "s").unwrap();
        std::fs::write(&hosts, "one").unwrap();
        let tree = host_tree(&hosts, &stage, false, None).unwrap();
        assert_eq!(tree.file.as_deref(), Some("hosts".as_ref()));
        assert_eq!(mounts_below(tmp.path()), 0);
        assert_eq!(read_below(&tree.dir, "hosts").unwrap(), "one");
        assert!(read_below(&tree.dir, "secret").is_err());
        std::fs::write(&hosts, "two").unwrap();
        assert_eq!(read_below(&tree.dir, "hosts").unwrap(), "two");
        let flags = rustix::fs::OFlags::RDONLY;
        let dir = rustix::fs::openat(&tree.dir, ".", flags, rustix::fs::Mode::empty()).unwrap();
        let listed = rustix::fs::Dir::read_from(dir).unwrap();
        let names: Vec<_> = listed.map(|e| e.unwrap().file_name().to_owned()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
    }

    #[test]
    fn a_directory_is_taken_as_it_is_and_specials_are_refused() {
        if !may_mount() {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        std::fs::write(tmp.path().join("x"), "y").unwrap();
        let tree = host_tree(tmp.path(), Path::new("/unused"), false, None).unwrap();
        assert_eq!((tree.file, read_below(&tree.dir, "x").unwrap().as_str()), (None, "y"));
        let _listener = std::os::unix::net::UnixListener::bind(tmp.path().join("s")).unwrap();
        let e = host_tree(&tmp.path().join("s"), Path::new("/unused"), false, None).unwrap_err();
        assert!(e.to_string().contains("a socket of the host"), "{e}");
        let e = host_tree("/dev/null".as_ref(), Path::new("/unused"), false, None).unwrap_err();
        assert!(e.to_string().contains("a character device"), "{e}");
        let e = host_tree("/nonexistent".as_ref(), Path::new("/unused"), false, None).unwrap_err();
        assert!(e.to_string().contains("/nonexistent"), "{e}");
    }
}
