//! Host directories for the guest: a container's root file system put together from containerd's mounts, and single
//! files and directories for bind mounts.
//!
//! What comes out is a descriptor of a *detached* mount (`open_tree(2)` with `OPEN_TREE_CLONE`): it is in no mount
//! table, so there is nothing to unmount, it costs the host's other processes nothing, and the kernel takes it apart
//! when its last holder (the VMM) ends, however it ends. An overlay has to be mounted at the bundle's `rootfs` for a
//! moment to be cloned: `fsconfig(2)` takes strings of 255 bytes at most, which a handful of layers exceeds.

use std::ffi::{CString, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use agent_api::users::IdMaps;

use crate::container::image::{self, ImageError, ImageRoot};
use crate::container::spec::IdMapped;
use crate::container::users::{MountMaps, NotAMap};
use containerd_shim_protos::api::Mount;
use rustix::fs::{CWD, Mode, OFlags, open, statfs};
use rustix::mount::{
    MountFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, open_tree, unmount,
};

mod id_map;

/// A root file system or bind that cannot be shown to the guest.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A file system we do not mount.
    #[error(
        "mount of type {kind:?} for the root file system is not supported; supported are overlay, bind and fuse.nydus-overlayfs"
    )]
    Kind {
        /// Its type.
        kind: String,
    },
    /// An image whose bytes come as they are read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An image among others.
    #[error("{count} mounts for the root file system, of which one is an image: it must be the only one")]
    NotAlone {
        /// How many.
        count: usize,
    },
    /// An option that asks for something we do not do.
    #[error("option {option:?} of the {kind} mount for the root file system is not supported")]
    Option {
        /// Type of the mount.
        kind: String,
        /// The option.
        option: String,
    },
    /// A mount below the root.
    #[error("mount at {target:?} below the root file system is not supported")]
    Target {
        /// Where it should go.
        target: String,
    },
    /// A mount without a source, an overlay without lower directories.
    #[error("the {kind} mount for the root file system has no {what}")]
    Incomplete {
        /// Type of the mount.
        kind: String,
        /// What is missing.
        what: &'static str,
    },
    /// Options longer than a page, even with short names for the layers.
    #[error("the overlay's options are {length} bytes long, at most {MAX_DATA} fit")]
    TooLong {
        /// How long they are.
        length: usize,
    },
    /// Owners cannot be shifted there.
    #[error(
        "id-mapped mount of {path}: its file system, or this kernel, may have none (overlay, NFS; tmpfs before Linux 6.3)"
    )]
    IdMap {
        /// Of what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused.
    #[error("{what} {path}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A bind of something that has no meaning on the other side of a file share.
    #[error("bind mount of {path}: a {kind} of the host cannot be used from the guest{}", instead(.kind))]
    Special {
        /// On the host.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
}

/// What can be used.
fn instead(kind: &str) -> &'static str {
    if kind == BLOCK_DEVICE { "; give it to the container as a device (volumeDevices, --device)" } else { "" }
}

const BLOCK_DEVICE: &str = "block device";

/// Longest option string of `mount(2)`: a page with its final NUL.
const MAX_DATA: usize = 4095;

/// A root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// Put together on the host.
    Tree(Vec<Layer>),
    /// Put together in the guest.
    Image(Box<ImageRoot>),
}

/// One mount, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layer {
    /// An overlay of local directories.
    Overlay {
        /// `lowerdir`, topmost first.
        lower: Vec<PathBuf>,
        /// The other options, joined.
        rest: Vec<String>,
        /// Nothing may be written.
        read_only: bool,
        /// Owners of files in `lowerdir` are shifted; those in the upper directory are as they should be.
        maps: Option<IdMaps>,
    },
    /// A directory as it is.
    Bind {
        /// The directory.
        source: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
        /// Nothing may be written.
        read_only: bool,
        /// Owners of its files are shifted.
        maps: Option<IdMaps>,
    },
}

impl Layer {
    /// Whether the guest may not write to it.
    pub fn read_only(&self) -> bool {
        match self {
            Layer::Overlay { read_only, .. } | Layer::Bind { read_only, .. } => *read_only,
        }
    }
}

/// Checks the mounts of a create request.
///
/// # Errors
/// See [`RootfsError`].
pub fn parse(mounts: &[Mount]) -> Result<Root, RootfsError> {
    match mounts {
        [mount] if image::is_image(mount) => {
            check_target(mount)?;
            Ok(Root::Image(Box::new(image::parse(mount)?)))
        }
        _ if mounts.iter().any(image::is_image) => Err(RootfsError::NotAlone { count: mounts.len() }),
        _ => mounts.iter().map(parse_one).collect::<Result<_, _>>().map(Root::Tree),
    }
}

fn check_target(mount: &Mount) -> Result<(), RootfsError> {
    match mount.target.as_str() {
        "" | "/" => Ok(()),
        target => Err(RootfsError::Target { target: target.to_owned() }),
    }
}

fn parse_one(mount: &Mount) -> Result<Layer, RootfsError> {
    // The helper makes an ordinary overlay of what says nothing of an image.
    let kind = if image::is_helper(&mount.type_) { "overlay" } else { mount.type_.as_str() };
    check_target(mount)?;
    let is_bind =
        matches!(kind, "bind" | "rbind") || mount.options.iter().any(|o| o == "bind" || o == "rbind");
    if !is_bind && kind != "overlay" {
        return Err(RootfsError::Kind { kind: kind.to_owned() });
    }
    let mut read_only = false;
    let mut recursive = kind == "rbind";
    let mut lower = Vec::new();
    let mut rest = Vec::new();
    let mut maps = MountMaps::default();
    for option in &mount.options {
        let refused = || RootfsError::Option { kind: kind.to_owned(), option: option.clone() };
        if maps.take(option).map_err(|NotAMap| refused())? {
            continue;
        }
        match option.as_str() {
            "ro" => read_only = true,
            "rw" | "bind" | "private" | "rprivate" | "" => {}
            "rbind" => recursive = true,
            // Instructions for containerd's mount manager, which should have carried them out.
            o if o.starts_with("X-containerd.") || o == "loop" || o.starts_with("loop=") => {
                return Err(refused());
            }
            o if is_bind && matches!(o, "nosuid" | "nodev" | "noexec" | "noatime" | "relatime") => {}
            _ if is_bind => return Err(refused()),
            o => match o.strip_prefix("lowerdir=") {
                Some(dirs) => lower.extend(dirs.split(':').map(PathBuf::from)),
                None => rest.push(o.to_owned()),
            },
        }
    }
    let incomplete = |what| RootfsError::Incomplete { kind: kind.to_owned(), what };
    let maps = maps.both().map_err(|(_, lacks)| {
        incomplete(if lacks == "gidmap" { "gidmap beside its uidmap" } else { "uidmap beside its gidmap" })
    })?;
    if is_bind {
        if mount.source.is_empty() {
            return Err(incomplete("source"));
        }
        return Ok(Layer::Bind { source: mount.source.clone().into(), recursive, read_only, maps });
    }
    if lower.is_empty() {
        return Err(incomplete("lowerdir"));
    }
    Ok(Layer::Overlay { lower, rest, read_only, maps })
}

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

/// Unmounts what was mounted at `path`, when the clone is taken and when it was not to be.
struct MountPoint<'a> {
    path: &'a Path,
    count: usize,
}

impl Drop for MountPoint<'_> {
    fn drop(&mut self) {
        for _ in 0..self.count {
            if let Err(e) = unmount(self.path, UnmountFlags::DETACH) {
                log::warn!("unmounting {}: {e}", self.path.display());
            }
        }
    }
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

/// A detached mount of `path`, with what is mounted below it or without.
///
/// # Errors
/// [`RootfsError::Os`].
pub fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, RootfsError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags).map_err(errno("cloning the tree at", path))
}

/// A detached mount of `path`, the owners of its files shifted where there are `maps`.
///
/// # Errors
/// [`RootfsError::Os`] and [`RootfsError::IdMap`].
pub fn layer(path: &Path, maps: Option<&IdMaps>) -> Result<OwnedFd, RootfsError> {
    let tree = clone_tree(path, false)?;
    if let Some(maps) = maps {
        id_map::shift(&tree, path, maps, false)?;
    }
    Ok(tree)
}

fn open_directory(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(errno("opening", path))
}

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

fn os<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> RootfsError + use<'a> {
    move |source| RootfsError::Os { what, path: path.to_owned(), source }
}

fn errno<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(rustix::io::Errno) -> RootfsError + use<'a> {
    move |e| os(what, path)(e.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    fn mount_of(kind: &str, source: &str, options: &[&str]) -> Mount {
        let mut mount = Mount::new();
        mount.type_ = kind.into();
        mount.source = source.into();
        mount.options = options.iter().map(|o| (*o).to_owned()).collect();
        mount
    }

    fn layers(mounts: &[Mount]) -> Vec<Layer> {
        match parse(mounts).unwrap() {
            Root::Tree(layers) => layers,
            Root::Image(image) => panic!("{image:?}"),
        }
    }

    #[test]
    fn an_image_is_the_only_mount() {
        // {"source":"/b","config":"{}"}
        let option = "extraoption=eyJzb3VyY2UiOiIvYiIsImNvbmZpZyI6Int9In0=";
        let image = mount_of("fuse.nydus-overlayfs", "overlay", &["lowerdir=/m", option]);
        assert!(matches!(parse(std::slice::from_ref(&image)), Ok(Root::Image(root)) if root.config == "{}"));
        let two = [image.clone(), mount_of("bind", "/x", &["rbind"])];
        assert!(parse(&two).unwrap_err().to_string().starts_with("2 mounts for the root file system"));
        let below = Mount { target: "/data".into(), ..image };
        assert!(parse(&[below]).unwrap_err().to_string().contains("/data"));
        // To the helper it is an overlay.
        let plain = [mount_of("fuse.nydus-overlayfs", "overlay", &["lowerdir=/a:/b"])];
        assert!(matches!(&layers(&plain)[..], [Layer::Overlay { lower, .. }] if lower.len() == 2));
    }

    #[test]
    fn an_overlay_as_containerd_hands_it_over() {
        let snapshots = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";
        let lower = format!("lowerdir={snapshots}/2/fs:{snapshots}/1/fs");
        let upper = format!("upperdir={snapshots}/3/fs");
        let work = format!("workdir={snapshots}/3/work");
        let layers = layers(&[mount_of("overlay", "overlay", &["index=off", &work, &upper, &lower])]);
        let [Layer::Overlay { lower, rest, read_only: false, maps: None }] = layers.as_slice() else {
            panic!("{layers:?}")
        };
        assert_eq!(lower.len(), 2);
        assert_eq!(*rest, ["index=off".to_owned(), work, upper]);
        let data = String::from_utf8(overlay_data(lower, rest)).unwrap();
        assert!(data.starts_with("lowerdir=/var/lib/containerd/"), "{data}");
        assert!(data.contains("/2/fs:/var/lib") && data.contains(",index=off,workdir="), "{data}");
        assert_eq!(common_directory(lower).unwrap(), Path::new(snapshots));
    }

    #[test]
    fn binds_of_a_view_are_read_only() {
        let layers = layers(&[mount_of("bind", "/srv/rootfs", &["ro", "rbind"])]);
        assert_eq!(
            layers,
            [Layer::Bind { source: "/srv/rootfs".into(), recursive: true, read_only: true, maps: None }]
        );
        assert!(layers[0].read_only());
    }

    #[test]
    fn both_maps_of_a_mount_are_read() {
        let options = ["lowerdir=/a:/b", "uidmap=0:100000:65536", "gidmap=0:200000:65536"];
        let layers = layers(&[mount_of("overlay", "overlay", &options)]);
        let [Layer::Overlay { maps: Some(maps), rest, .. }] = layers.as_slice() else { panic!("{layers:?}") };
        assert_eq!((maps.uids.outside(1), maps.gids.outside(1)), (Some(100_001), Some(200_001)));
        assert!(rest.is_empty());
        let error = |options: &[&str]| parse(&[mount_of("overlay", "o", options)]).unwrap_err().to_string();
        assert!(error(&options[..2]).contains("has no gidmap beside its uidmap"));
        assert!(error(&[options[0], options[2]]).contains("has no uidmap"));
        assert!(error(&[options[0], "uidmap=0:1"]).contains("option \"uidmap=0:1\" of the overlay mount"));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let error = |mount: Mount| parse(&[mount]).unwrap_err().to_string();
        assert!(error(mount_of("erofs", "/x", &[])).contains("type \"erofs\""));
        assert!(error(mount_of("fuse.sshfs", "overlay", &[])).contains("sshfs"));
        let e = error(mount_of("overlay", "o", &["lowerdir=/a:/b", "X-containerd.mkdir.path=/c"]));
        assert!(e.contains("\"X-containerd.mkdir.path=/c\" of the overlay mount"), "{e}");
        assert!(error(mount_of("bind", "/x", &["loop", "rbind"])).contains("\"loop\""));
        assert!(error(mount_of("bind", "", &["rbind"])).contains("has no source"));
        assert!(error(mount_of("overlay", "o", &["upperdir=/a"])).contains("has no lowerdir"));
        let mut below = mount_of("bind", "/x", &["rbind"]);
        below.target = "/data".into();
        assert!(error(below).contains("mount at \"/data\" below"));
    }

    #[test]
    fn layers_far_apart_have_no_common_directory_but_the_root() {
        let dirs = ["/a/x/fs".into(), "/b/y/fs".into()];
        assert_eq!(common_directory(&dirs).unwrap(), Path::new("/"));
        assert_eq!(common_directory(&["relative".into()]), None);
    }

    /// Runs with root's rights only; says so when it did not.
    fn may_mount() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            eprintln!("not run: mounting needs root");
        }
        root
    }

    fn mounts_below(path: &Path) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|l| l.contains(path.to_str().unwrap())).count()
    }

    fn read_below(dir: &OwnedFd, name: &str) -> std::io::Result<String> {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, rustix::fs::Mode::empty())?;
        let mut text = String::new();
        std::fs::File::from(file).read_to_string(&mut text)?;
        Ok(text)
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
