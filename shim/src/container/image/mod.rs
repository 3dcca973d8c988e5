//! Root file systems that are images whose bytes come as they are read, as snapshotters hand them over.
//!
//! ```text
//! type     fuse.nydus-overlayfs          (also with something behind, or with a path: the name of a mount helper)
//! source   overlay
//! options  lowerdir=LAYERS:IMAGE  upperdir=…  workdir=…  uidmap=…  gidmap=…
//!          extraoption=BASE64            {source, config, snapshotdir, fs_version}
//!          io.katacontainers.volume=BASE64   {volume_type, source, …, nydus_image: {config, snapshot_dir}, …}
//! ```
//!
//! The last of `lowerdir` is where the host has the image mounted, which a guest has no use for: it mounts the image itself.
//! What is before it are layers of the host that lie over the image. Our snapshotter hands them over for what was committed on top of
//! an image. nydus-snapshotter never does (`mountRemote` in its snapshot/snapshot.go, 0.13.4): a container's mount has one `lowerdir`, the image;
//! a view has two, the image first and the view's own folder, which is empty, last. A mount of this type that says nothing of an image
//! is an ordinary overlay, as it is to the mount helper.
//!
//! The configuration is the image service's to understand, in its old and its new form. It may hold a registry's
//! credentials, so nothing here puts it into a log or an error.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use agent_api::users::IdMaps;
use containerd_shim_protos::api::Mount;

use super::users::{MountMaps, NotAMap};

mod decode;

use decode::{Fields, Volume};

/// What an option with the snapshotter's own description begins with.
const EXTRA: &str = "extraoption=";
/// What an option with Kata's description begins with.
const VOLUME: &str = "io.katacontainers.volume=";

/// An image that cannot be a root file system.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A description that cannot be read.
    #[error("option {option} of the image mount: {reason}")]
    Unreadable {
        /// Its name.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A description that says too little.
    #[error("option {option} of the image mount has no {field:?}")]
    Missing {
        /// Its name.
        option: &'static str,
        /// What is missing.
        field: &'static str,
    },
    /// A kind of volume that we do not mount.
    #[error(
        "image volumes of type {kind:?} are not supported; supported are image_nydus_block, layer_nydus_block, image_nydus_fs and layer_nydus_fs"
    )]
    Volume {
        /// Its type.
        kind: String,
    },
    /// Several images.
    #[error(
        "{count} image volumes for one root file system, one is supported: merge the layers into one image"
    )]
    Several {
        /// How many.
        count: usize,
    },
    /// An image of the wrong version.
    #[error("the image is RAFS {version:?}; supported are v5 and v6: convert it anew")]
    Version {
        /// What it is said to be.
        version: String,
    },
    /// A path that leads nowhere for sure.
    #[error("{what} of the image mount is {path:?}, must be an absolute path without \"..\"")]
    Path {
        /// Which one.
        what: &'static str,
        /// It.
        path: PathBuf,
    },
    /// The writable layer is not in one place.
    #[error("upperdir {upper} and workdir {work} of the image mount are not beside each other")]
    Apart {
        /// The one.
        upper: PathBuf,
        /// The other.
        work: PathBuf,
    },
    /// Only one of the two.
    #[error("the image mount has {has} and no {lacks}")]
    Half {
        /// What there is.
        has: &'static str,
        /// What there is not.
        lacks: &'static str,
    },
    /// The container would own nothing of its image.
    #[error(
        "the sandbox has users of its own, and the image mount does not shift owners to them (uidmap, gidmap): if the snapshotter \
         can, tell containerd (2.0 and later) so by `capabilities = [\"remap-ids\"]` in its table of proxy_plugins; if it cannot, use \
         ctvm-snapshotter, or hostUsers"
    )]
    Unshifted,
    /// The image's owners are shifted to users whom the container does not have.
    #[error("uidmap and gidmap of the image mount are not the maps of the sandbox's user namespace")]
    OtherUsers,
    /// An option that asks for something we do not do.
    #[error("option {option:?} of the image mount is not supported")]
    Option {
        /// It, without what is behind `=`.
        option: String,
    },
}

/// An image as a root file system.
#[derive(Clone, PartialEq, Eq)]
pub struct ImageRoot {
    /// Its bootstrap, on the host.
    pub bootstrap: PathBuf,
    /// What the snapshotter says of where its blobs are: for the image service alone.
    pub config: String,
    /// Directories of the host that lie over it, topmost first.
    pub layers: Vec<PathBuf>,
    /// Where what is written goes; nowhere, for a view.
    pub upper: Option<Upper>,
    /// Owners of files of the image and of `layers` are shifted; those in `upper` are as they should be.
    pub maps: Option<IdMaps>,
    /// Nothing is synced, as nothing has to survive.
    pub volatile: bool,
    /// What it said that we do not know.
    pub warnings: Vec<String>,
}

/// A writable layer: two directories beside each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upper {
    /// What they are in.
    pub parent: PathBuf,
    /// Name of the one that is written to.
    pub upper: OsString,
    /// Name of the overlay's own.
    pub work: OsString,
}

/// Without the configuration.
impl std::fmt::Debug for ImageRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ImageRoot { bootstrap, layers, upper, maps, .. } = self;
        f.debug_struct("ImageRoot")
            .field("bootstrap", bootstrap)
            .field("layers", layers)
            .field("upper", upper)
            .field("maps", maps)
            .finish()
    }
}

impl ImageRoot {
    /// Checks that the owners of its files are those that a container with these `users` expects.
    ///
    /// # Errors
    /// [`ImageError::Unshifted`], [`ImageError::OtherUsers`].
    pub fn is_for(&self, users: Option<&IdMaps>) -> Result<(), ImageError> {
        match &self.maps {
            maps if maps.as_ref() == users => Ok(()),
            None => Err(ImageError::Unshifted),
            Some(_) => Err(ImageError::OtherUsers),
        }
    }
}

/// Whether a mount is to be read as one of an image.
pub fn is_image(mount: &Mount) -> bool {
    mount.options.iter().any(|option| option.starts_with(EXTRA) || option.starts_with(VOLUME))
}

/// Whether a type of mount names the helper that runc's hosts have for images.
pub fn is_helper(kind: &str) -> bool {
    let program = kind.strip_prefix("fuse.").map(|name| name.rsplit('/').next().unwrap_or_default());
    program.is_some_and(|name| name.starts_with("nydus-overlayfs"))
}

/// Reads a mount for which [`is_image`] holds.
///
/// # Errors
/// [`ImageError`].
pub fn parse(mount: &Mount) -> Result<ImageRoot, ImageError> {
    let mut described = Vec::new();
    let mut warnings = Vec::new();
    let (mut lower, mut upper, mut work, mut volatile) = (Vec::new(), None, None, false);
    let mut maps = MountMaps::default();
    for option in &mount.options {
        if maps.take(option).map_err(|NotAMap| ImageError::Option { option: named(option) })? {
            continue;
        }
        if let Some(text) = option.strip_prefix(EXTRA) {
            described.push(Description::extra(text, &mut warnings)?);
        } else if let Some(text) = option.strip_prefix(VOLUME) {
            described.push(Description::volume(text, &mut warnings)?);
        } else if let Some(dirs) = option.strip_prefix("lowerdir=") {
            lower.extend(dirs.split(':').map(PathBuf::from));
        } else if let Some(dir) = option.strip_prefix("upperdir=") {
            upper = Some(PathBuf::from(dir));
        } else if let Some(dir) = option.strip_prefix("workdir=") {
            work = Some(PathBuf::from(dir));
        } else {
            match option.as_str() {
                "volatile" => volatile = true,
                // Said of an overlay that the host would mount. The guest's has its own.
                "ro" | "rw" | "" | "index=off" | "xino=off" | "metacopy=off" | "userxattr" => {}
                other => return Err(ImageError::Option { option: named(other) }),
            }
        }
    }
    let Description { bootstrap, config, folder } = one_of(described)?;
    let own = folder.map(|folder| folder.join("fs"));
    if upper.is_none() && lower.len() == 2 && lower.last() == own.as_ref() {
        // A view of nydus-snapshotter.
        lower.clear();
    }
    // Where the host has the image.
    lower.pop();
    for layer in &lower {
        check_path("lowerdir", layer)?;
    }
    let upper = match (upper, work) {
        (Some(upper), Some(work)) => Some(Upper::of(&upper, &work)?),
        (None, None) => None,
        (Some(_), None) => return Err(ImageError::Half { has: "upperdir", lacks: "workdir" }),
        (None, Some(_)) => return Err(ImageError::Half { has: "workdir", lacks: "upperdir" }),
    };
    let maps = maps.both().map_err(|(has, lacks)| ImageError::Half { has, lacks })?;
    Ok(ImageRoot { bootstrap, config, layers: lower, upper, maps, volatile, warnings })
}

/// An option without its value.
fn named(option: &str) -> String {
    option.split('=').next().unwrap_or_default().to_owned()
}

/// The one description. The same image may be described in both ways.
fn one_of(described: Vec<Description>) -> Result<Description, ImageError> {
    let count = described.len();
    let mut all = described.into_iter();
    let first = all.next().expect("a mount that is an image's describes one");
    if all.any(|other| other.bootstrap != first.bootstrap) {
        return Err(ImageError::Several { count });
    }
    Ok(first)
}

struct Description {
    bootstrap: PathBuf,
    config: String,
    /// The snapshot's, with `fs` in it.
    folder: Option<PathBuf>,
}

impl Description {
    fn extra(text: &str, warnings: &mut Vec<String>) -> Result<Self, ImageError> {
        const OPTION: &str = "extraoption";
        let mut fields = Fields::decode(OPTION, text)?;
        let bootstrap =
            fields.path("source")?.ok_or(ImageError::Missing { option: OPTION, field: "source" })?;
        let config = fields.config("config")?;
        let version = fields.text("fs_version")?.unwrap_or_default();
        let folder = fields.text("snapshotdir")?.map(PathBuf::from);
        warnings.extend(fields.rest());
        match version.as_str() {
            // The image service looks for itself.
            "" | "v5" | "5" | "v6" | "6" => {}
            _ => return Err(ImageError::Version { version }),
        }
        Ok(Description { bootstrap, config, folder })
    }

    fn volume(text: &str, warnings: &mut Vec<String>) -> Result<Self, ImageError> {
        const OPTION: &str = "io.katacontainers.volume";
        let mut fields = Fields::decode(OPTION, text)?;
        let missing = |field| ImageError::Missing { option: OPTION, field };
        let kind = fields.text("volume_type")?.ok_or_else(|| missing("volume_type"))?;
        match Volume::of(&kind) {
            Volume::Nydus => {}
            Volume::Other => return Err(ImageError::Volume { kind }),
        }
        let bootstrap = fields.path("source")?.ok_or_else(|| missing("source"))?;
        let mut image = fields.object("nydus_image")?.ok_or_else(|| missing("nydus_image"))?;
        let config = image.config("config")?;
        let folder = image.text("snapshot_dir")?.map(PathBuf::from);
        warnings.extend(image.rest());
        // Said of mounts that are not ours to make, or of other kinds of volumes.
        for field in ["fs_type", "options", "direct_volume", "image_pull"] {
            fields.take(field);
        }
        if fields.take("dm_verity").is_some_and(|verity| !verity.is_null()) {
            return Err(ImageError::Option { option: "dm_verity".to_owned() });
        }
        warnings.extend(fields.rest());
        Ok(Description { bootstrap, config, folder })
    }
}

impl Upper {
    fn of(upper: &Path, work: &Path) -> Result<Self, ImageError> {
        check_path("upperdir", upper)?;
        check_path("workdir", work)?;
        let apart = || ImageError::Apart { upper: upper.to_owned(), work: work.to_owned() };
        match (upper.parent(), upper.file_name(), work.parent(), work.file_name()) {
            (Some(parent), Some(name), Some(other), Some(work)) if parent == other && name != work => {
                Ok(Upper { parent: parent.to_owned(), upper: name.to_owned(), work: work.to_owned() })
            }
            _ => Err(apart()),
        }
    }
}

/// A path whose meaning does not depend on anything.
fn check_path(what: &'static str, path: &Path) -> Result<(), ImageError> {
    let is_plain = path.is_absolute() && !path.components().any(|part| part.as_os_str() == "..");
    // Names that the guest's overlay would take for something else.
    let is_quiet =
        !path.as_os_str().as_encoded_bytes().iter().any(|byte| matches!(byte, b',' | b':' | b'\\' | 0));
    if is_plain && is_quiet { Ok(()) } else { Err(ImageError::Path { what, path: path.to_owned() }) }
}

#[cfg(test)]
mod tests;
