//! Trees whose files' owners are shifted, as a user namespace has them.
//!
//! An overlay shows its upper directory as it is, so only the lower ones are shifted, each in a mount of its own that has to
//! be in the mount table when the overlay is made (the kernel clones it then, and takes no detached one before Linux 6.15).

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use agent_api::users::IdMaps;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};

use super::{MountPoint, RootfsError, clone_tree, errno, os};

/// Shifts the owners of what `tree`, a detached mount of `path`, shows.
pub(super) fn shift(tree: &OwnedFd, path: &Path, maps: &IdMaps, recursive: bool) -> Result<(), RootfsError> {
    let failed = |source| RootfsError::IdMap { path: path.to_owned(), source };
    idmap::set(tree.as_fd(), namespace(maps, path)?.as_fd(), recursive).map_err(failed)
}

fn namespace(maps: &IdMaps, path: &Path) -> Result<OwnedFd, RootfsError> {
    let made = idmap::user_namespace(&maps.uids.to_file(), &maps.gids.to_file());
    made.map_err(os("making a user namespace for", path))
}

/// Mounts `tree` at `path`.
pub(super) fn attach(tree: &OwnedFd, path: &Path) -> Result<(), RootfsError> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree, "", CWD, path, flags).map_err(errno("mounting a tree at", path))
}

/// Lower directories of an overlay, shifted, until this is dropped.
pub(super) struct Layers {
    stage: PathBuf,
    paths: Vec<PathBuf>,
}

impl Layers {
    /// Mounts each of `lower` below `stage`.
    pub(super) fn mount(lower: &[PathBuf], maps: &IdMaps, stage: &Path) -> Result<Self, RootfsError> {
        let users = namespace(maps, stage)?;
        let mut layers = Layers { stage: stage.to_owned(), paths: Vec::new() };
        for (number, dir) in lower.iter().enumerate() {
            let tree = clone_tree(dir, false)?;
            idmap::set(tree.as_fd(), users.as_fd(), false)
                .map_err(|source| RootfsError::IdMap { path: dir.clone(), source })?;
            let at = stage.join(number.to_string());
            std::fs::create_dir_all(&at).map_err(os("making directory", &at))?;
            attach(&tree, &at)?;
            layers.paths.push(at);
        }
        Ok(layers)
    }

    /// Where they are, in their order.
    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        for path in &self.paths {
            drop(MountPoint { path, count: 1 });
        }
        // Only directories of ours, each empty: should one still be a mount, nothing of it is removed.
        for dir in self.paths.iter().chain([&self.stage]) {
            if let Err(e) = std::fs::remove_dir(dir) {
                log::warn!("removing {}: {e}", dir.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use agent_api::users::{IdMap, IdRange};

    use super::super::{Layer, assemble};
    use super::*;

    fn maps() -> IdMaps {
        let map = |outside| IdMap::new([IdRange { inside: 0, outside, count: 65_536 }]).unwrap();
        IdMaps { uids: map(100_000), gids: map(200_000) }
    }

    fn owner(tree: &OwnedFd, name: &str) -> (u32, u32) {
        let stat = rustix::fs::statat(tree, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
        (stat.st_uid, stat.st_gid)
    }

    /// Root's rights, and a file system that can: says so where one is missing.
    fn may(dir: &Path) -> bool {
        let may = clone_tree(dir, false).and_then(|tree| shift(&tree, dir, &maps(), false));
        if let Err(e) = &may {
            eprintln!("not run: {}", crate::error::chain(e));
        }
        may.is_ok()
    }

    #[test]
    fn lower_layers_are_shifted_and_the_upper_one_is_as_it_is() {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        if !may(tmp.path()) {
            return;
        }
        let dir = |name: &str| {
            let path = tmp.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let (one, two, upper, work) = (dir("one"), dir("two"), dir("upper"), dir("work"));
        for (file, uid) in [(one.join("roots"), 0), (two.join("webs"), 33)] {
            std::fs::write(&file, "x").unwrap();
            chown(&file, Some(uid), Some(uid)).unwrap();
        }
        chown(&upper, Some(100_000), Some(200_000)).unwrap();
        let rest = vec![format!("upperdir={}", upper.display()), format!("workdir={}", work.display())];
        let lower = vec![one.clone(), two];
        let layers = [Layer::Overlay { lower, rest, read_only: false, maps: Some(maps()) }];
        let stage = tmp.path().join("stage");
        let root = assemble(&layers, &dir("at"), &stage).unwrap();
        assert_eq!((owner(&root, "roots"), owner(&root, "webs")), ((100_000, 200_000), (100_033, 200_033)));
        assert_eq!(owner(&root, "."), (100_000, 200_000));
        let kept = std::fs::metadata(one.join("roots")).unwrap();
        assert_eq!((kept.uid(), stage.exists()), (0, false));
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(tmp.path().to_str().unwrap()), "{table}");
        // A directory alone.
        let layers = [Layer::Bind { source: one, recursive: true, read_only: true, maps: Some(maps()) }];
        let root = assemble(&layers, &dir("unused"), &stage).unwrap();
        assert_eq!(owner(&root, "roots"), (100_000, 200_000));
    }

    #[test]
    fn what_cannot_be_shifted_is_named() {
        let proc = Path::new("/proc");
        let Ok(tree) = clone_tree(proc, false) else {
            eprintln!("not run: this takes root");
            return;
        };
        let error = shift(&tree, proc, &maps(), false).unwrap_err();
        assert!(error.to_string().starts_with("id-mapped mount of /proc:"), "{error}");
    }
}
