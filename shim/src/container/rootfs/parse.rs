//! The mounts of a create request, checked.

use std::path::PathBuf;

use agent_api::users::IdMaps;
use containerd_shim_protos::api::Mount;

use super::RootfsError;
use crate::container::image::{self, ImageRoot};
use crate::container::users::{MountMaps, NotAMap};

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
        assert_eq!(lower[0], Path::new(snapshots).join("2/fs"));
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
}
