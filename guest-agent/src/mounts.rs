//! Mounts: the guest's own, and those that a Create request wants made under its container's root.

use std::io;
use std::path::{Path, PathBuf};

use agent_api::image;
use agent_api::task::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::images::{self, ImageError, Partitions};
use crate::users::Users;

/// What could not be mounted.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {source_name:?} of type {kind:?} on {target} with options {options:?}")]
pub struct MountError {
    source_name: String,
    kind: String,
    target: String,
    options: String,
    #[source]
    cause: Cause,
}

/// Why not.
#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error(transparent)]
    Os(#[from] io::Error),
    #[error(transparent)]
    Image(Box<ImageError>),
}

/// Mounts that go when this does, last first.
#[derive(Debug, Default)]
pub struct Mounted(Vec<Made>);

/// One mount.
#[derive(Debug)]
struct Made {
    target: PathBuf,
    /// Directories that are not needed without it: those made for it.
    ours: bool,
    partitions: Option<Partitions>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while let Some(Made { target, ours, partitions }) = self.0.pop() {
            // Lazily: the last user may be about to leave.
            if let Err(error) = umount2(&target, MntFlags::MNT_DETACH) {
                log::warn!("{} stays mounted: {error}", target.display());
            } else if ours && let Err(error) = std::fs::remove_dir(&target) {
                log::warn!("{} stays: {error}", target.display());
            }
            // A disk's come after the mount of which they are.
            drop(partitions);
        }
    }
}

/// Makes the mounts of a request, in order. One without a target is for `root`; an image may be for the sandbox's `users`.
pub fn make_all(mounts: &[Mount], root: &Path, users: &Users) -> Result<Mounted, MountError> {
    let mut made = Mounted::default();
    for wanted in mounts {
        let target = match wanted.target.as_str() {
            "" => root.to_owned(),
            target if target.starts_with('/') => PathBuf::from(target),
            target => root.join(target),
        };
        let ours = !target.exists();
        let partitions = if wanted.type_ == image::MOUNT_TYPE {
            let made = images::make(&wanted.source, &target, &wanted.options, users);
            Some(made.map_err(|cause| {
                error(&wanted.source, &target, &wanted.type_, &[], Cause::Image(cause.into()))
            })?)
        } else {
            make(&wanted.source, &target, &wanted.type_, &wanted.options)?;
            None
        };
        made.0.push(Made { target, ours, partitions });
    }
    Ok(made)
}

/// Whether something is mounted at `path`.
pub fn is_mount_point(path: &Path) -> bool {
    let wanted = path.to_string_lossy();
    std::fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|mounts| mounts.lines().any(|line| line.split(' ').nth(1) == Some(&*wanted)))
}

/// Whether what is mounted last at `path` has this option.
pub fn has_option(path: &Path, option: &str) -> bool {
    let wanted = path.to_string_lossy();
    let all = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let found = all.lines().rfind(|line| line.split(' ').nth(1) == Some(&*wanted));
    found.and_then(|line| line.split(' ').nth(3)).is_some_and(|all| all.split(',').any(|o| o == option))
}

/// Mounts with options as fstab(5) has them, making the mount point if needed. Without `kind`, a bind mount.
pub fn make(source: &str, target: &Path, kind: &str, options: &[String]) -> Result<(), MountError> {
    let (flags, data) = parse(options);
    let kind = if kind == "bind" { "" } else { kind };
    let attempt = || -> io::Result<()> {
        std::fs::create_dir_all(target)?;
        let bind = kind.is_empty() || flags.contains(MsFlags::MS_BIND);
        let flags = if bind { flags | MsFlags::MS_BIND } else { flags };
        let kind = Some(kind).filter(|kind| !kind.is_empty());
        mount(Some(source), target, kind, flags, Some(data.as_str()).filter(|data| !data.is_empty()))?;
        // The kernel takes a bind's other flags only in a second step (mount(2), "Creating a bind mount").
        if bind && flags.intersects(!(MsFlags::MS_BIND | MsFlags::MS_REC)) {
            let flags = flags | MsFlags::MS_REMOUNT;
            mount(None::<&str>, target, None::<&str>, flags, None::<&str>)?;
        }
        Ok(())
    };
    attempt().map_err(|cause| error(source, target, kind, options, cause.into()))
}

fn error(source: &str, target: &Path, kind: &str, options: &[String], cause: Cause) -> MountError {
    MountError {
        source_name: source.to_owned(),
        kind: kind.to_owned(),
        target: target.display().to_string(),
        options: options.join(","),
        cause,
    }
}

fn parse(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags &= !MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => flags |= MsFlags::MS_DIRSYNC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "defaults" | "suid" | "dev" | "exec" | "async" | "atime" | "" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let (flags, data) = parse(&options("ro,nosuid,lowerdir=/a:/b,index=off,defaults"));
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
        let (flags, data) = parse(&options("rbind,ro,rw"));
        assert_eq!((flags, data.as_str()), (MsFlags::MS_BIND | MsFlags::MS_REC, ""));
    }

    #[test]
    fn options_of_a_mount_are_read() {
        // Every Linux has it, with one of the two.
        let proc = Path::new("/proc");
        assert_ne!(has_option(proc, "rw"), has_option(proc, "ro"));
        assert!(!has_option(proc, "dax=always") && !has_option(Path::new("/proc/none"), "rw"));
    }

    #[test]
    fn error_says_what_was_tried() {
        let error = make("ctvm", Path::new("/dev/null/x"), "virtiofs", &options("ro")).unwrap_err();
        let text = crate::launch::chain(&error);
        for part in ["\"ctvm\"", "\"virtiofs\"", "/dev/null/x", "\"ro\"", "Not a directory"] {
            assert!(text.contains(part), "{part} not in {text}");
        }
    }
}
