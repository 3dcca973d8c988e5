//! `nydus-overlayfs SOURCE TARGET -o OPTIONS`: what `mount.fuse` runs for mounts of type `fuse.nydus-overlayfs`.
//!
//! The mount is for a VM. But before containerd starts a container it mounts the container's root on the host, to look users and
//! groups up, and unmounts it. It gets a read-only tmpfs with these two files, those of the container's own layer if it has any.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use images::users::{FILES, Reader};
use rustix::mount::{MountFlags, mount, mount_remount};
use serde::Deserialize;

/// Where the image service is looked for.
const SOCKET: &str = "/run/ctvm/images.sock";
/// Names another place.
const SOCKET_VARIABLE: &str = "CTVM_IMAGE_SERVICE";

/// Mounts the lists of users and groups of a Nydus image, for containerd to look into
#[derive(Debug, Parser)]
#[command(name = "nydus-overlayfs", version)]
struct Arguments {
    /// `overlay`, as the snapshotter says
    source: String,
    /// Where to mount
    target: PathBuf,
    /// The snapshotter's options, with commas between them; may be given several times
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
}

/// As much of `extraoption=` as is needed here.
#[derive(Debug, Deserialize)]
struct Extra {
    source: PathBuf,
    #[serde(default)]
    config: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-overlayfs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let value = |name: &str| {
        let options = arguments.options.iter().flat_map(|options| options.split(','));
        options.filter_map(|option| option.strip_prefix(name)?.strip_prefix('=')).next_back()
    };
    let extra = value("extraoption").context("no extraoption= with the image's place")?;
    let extra = STANDARD.decode(extra).context("extraoption is not base64")?;
    let extra: Extra = serde_json::from_slice(&extra).context("extraoption is not the JSON it should be")?;
    // Above the image: the container's own layer, then ordinary ones.
    let layers: Vec<PathBuf> = value("upperdir")
        .into_iter()
        .chain(value("lowerdir").unwrap_or_default().split(':'))
        .filter(|layer| !layer.is_empty())
        .map(PathBuf::from)
        .collect();
    let found = lists(&extra, &layers)?;
    let target = &arguments.target;
    let at = || format!("mounting at {}", target.display());
    mount("nydus", target, "tmpfs", MountFlags::NOEXEC | MountFlags::NOSUID, Some(c"size=16m,mode=755"))
        .with_context(at)?;
    for (path, bytes) in found {
        let path = target.join(path);
        fs::create_dir_all(path.parent().unwrap_or(target)).and_then(|()| fs::write(&path, bytes))?;
    }
    let flags = MountFlags::RDONLY | MountFlags::NOEXEC | MountFlags::NOSUID;
    mount_remount(target, flags, c"").with_context(at)
}

fn lists(extra: &Extra, layers: &[PathBuf]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut image = None;
    let mut found = Vec::new();
    for path in FILES {
        let above = layers.iter().find_map(|layer| fs::read(layer.join(path)).ok());
        let bytes = match above {
            Some(bytes) => Some(bytes),
            None => {
                if image.is_none() {
                    let socket = std::env::var(SOCKET_VARIABLE).unwrap_or_else(|_| SOCKET.to_owned());
                    image = Some(Reader::open(Path::new(&socket), &extra.source, &extra.config)?);
                }
                image.as_ref().expect("opened above").read(path).with_context(|| format!("reading {path}"))?
            }
        };
        found.extend(bytes.map(|bytes| (path, bytes)));
    }
    Ok(found)
}
