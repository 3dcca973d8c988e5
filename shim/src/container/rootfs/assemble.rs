//! A container's root file system, put together from its layers.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount, mount_bind, mount_bind_recursive};

use super::{Layer, MountPoint, RootfsError, clone_tree, errno, id_map, os};

/// Longest option string of `mount(2)`: a page with its final NUL.
pub(super) const MAX_DATA: usize = 4095;

/// Puts `layers` together, each over the one before, and returns a descriptor of the result. `at` is an empty
/// directory of ours, and `stage` one that is not there yet, both in use for a moment.
///
/// # Errors
/// [`RootfsError::Os`], [`RootfsError::TooLong`] and [`RootfsError::IdMap`]; nothing stays mounted then.
pub fn assemble(layers: &[Layer], at: &Path, stage: &Path) -> Result<OwnedFd, RootfsError> {
    if let [Layer::Bind { source, recursive, maps, .. }] = layers {
        let tree = clone_tree(source, *recursive)?;
        if let Some(maps) = maps {
            id_map::shift(&tree, source, maps, *recursive)?;
        }
        return Ok(tree);
    }
    std::fs::create_dir_all(at).map_err(os("making directory", at))?;
    let mut made = MountPoint { path: at, count: 0 };
    for layer in layers {
        match layer {
            Layer::Overlay { lower, rest, maps: None, .. } => mount_overlay(lower, rest, at)?,
            Layer::Overlay { lower, rest, maps: Some(maps), .. } => {
                let shifted = id_map::Layers::mount(lower, maps, stage)?;
                mount_overlay(shifted.paths(), rest, at)?;
            }
            Layer::Bind { source, recursive, maps: Some(maps), .. } => {
                let tree = clone_tree(source, *recursive)?;
                id_map::shift(&tree, source, maps, *recursive)?;
                id_map::attach(&tree, at)?;
            }
            Layer::Bind { source, recursive: true, .. } => {
                mount_bind_recursive(source, at).map_err(errno("binding", source))?;
            }
            Layer::Bind { source, .. } => mount_bind(source, at).map_err(errno("binding", source))?,
        }
        made.count += 1;
    }
    clone_tree(at, true)
}

fn mount_overlay(lower: &[PathBuf], rest: &[String], at: &Path) -> Result<(), RootfsError> {
    let data = overlay_data(lower, rest);
    if data.len() <= MAX_DATA {
        return mount_data(&data, at);
    }
    // Many layers: name them from their common directory. The working directory is the process's, which has one
    // thread and does nothing else until it is back.
    let Some(common) = common_directory(lower) else {
        return Err(RootfsError::TooLong { length: data.len() });
    };
    let short: Vec<PathBuf> =
        lower.iter().map(|dir| dir.strip_prefix(&common).unwrap_or(dir).to_owned()).collect();
    let data = overlay_data(&short, rest);
    if data.len() > MAX_DATA {
        return Err(RootfsError::TooLong { length: data.len() });
    }
    let at = std::path::absolute(at).map_err(os("resolving", at))?;
    let before = std::env::current_dir().map_err(os("reading", ".".as_ref()))?;
    std::env::set_current_dir(&common).map_err(os("entering", &common))?;
    let mounted = mount_data(&data, &at);
    std::env::set_current_dir(&before).map_err(os("entering", &before))?;
    mounted
}

fn mount_data(data: &[u8], at: &Path) -> Result<(), RootfsError> {
    let data = CString::new(data).map_err(|e| RootfsError::Os {
        what: "mounting an overlay at",
        path: at.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, e),
    })?;
    mount("overlay", at, "overlay", MountFlags::empty(), data.as_c_str())
        .map_err(errno("mounting an overlay at", at))
}

fn overlay_data(lower: &[PathBuf], rest: &[String]) -> Vec<u8> {
    let mut data = b"lowerdir=".to_vec();
    for (n, dir) in lower.iter().enumerate() {
        if n > 0 {
            data.push(b':');
        }
        data.extend(dir.as_os_str().as_bytes());
    }
    for option in rest {
        data.push(b',');
        data.extend(option.as_bytes());
    }
    data
}

/// The longest directory that all of `paths` are below.
fn common_directory(paths: &[PathBuf]) -> Option<PathBuf> {
    let mut common = paths.first()?.parent()?.to_owned();
    while !paths.iter().all(|p| p.starts_with(&common)) {
        common = common.parent()?.to_owned();
    }
    Some(common).filter(|c| c.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{may_mount, mounts_below, read_below};
    use super::*;

    #[test]
    fn an_overlay_is_mounted_by_names_and_options() {
        let lower = ["/snapshots/2/fs".into(), "/snapshots/1/fs".into()];
        let rest = ["index=off".to_owned(), "workdir=/snapshots/3/work".to_owned()];
        let data = String::from_utf8(overlay_data(&lower, &rest)).unwrap();
        assert_eq!(data, "lowerdir=/snapshots/2/fs:/snapshots/1/fs,index=off,workdir=/snapshots/3/work");
        assert_eq!(common_directory(&lower).unwrap(), Path::new("/snapshots"));
    }

    #[test]
    fn layers_far_apart_have_no_common_directory_but_the_root() {
        let dirs = ["/a/x/fs".into(), "/b/y/fs".into()];
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/"));
        assert_eq!(common_directory(&["relative".into()]), None);
    }

    #[test]
    fn a_detached_overlay_works_and_leaves_nothing_mounted() {
        if !may_mount() {
            return;
        }
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let dir = |name: &str| {
            let path = tmp.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        // More layers than fit into one page by their full names.
        let far = "x".repeat(100);
        dir(&far);
        let lower: Vec<PathBuf> = (0..60).map(|n| dir(&format!("{far}/{n}"))).collect();
        std::fs::write(lower[0].join("file"), "top").unwrap();
        std::fs::write(lower[59].join("file"), "bottom").unwrap();
        std::fs::write(lower[59].join("base"), "bottom").unwrap();
        let (upper, work, at) = (dir("upper"), dir("work"), dir("rootfs"));
        let rest = vec![format!("upperdir={}", upper.display()), format!("workdir={}", work.display())];
        let layers = [Layer::Overlay { lower: lower.clone(), rest, read_only: false, maps: None }];
        assert!(overlay_data(&lower, &[]).len() > MAX_DATA);
        let cwd = std::env::current_dir().unwrap();
        let root = assemble(&layers, &at, Path::new("/unused")).unwrap();
        assert_eq!(std::env::current_dir().unwrap(), cwd);
        assert_eq!(mounts_below(tmp.path()), 0);
        assert_eq!(read_below(&root, "file").unwrap(), "top");
        assert_eq!(read_below(&root, "base").unwrap(), "bottom");
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CREATE;
        drop(rustix::fs::openat(&root, "new", flags, rustix::fs::Mode::RUSR).unwrap());
        assert!(upper.join("new").exists());
        drop(root);
        assert!(!at.join("file").exists());
    }
}
