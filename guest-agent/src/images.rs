//! Images: disks of the VM that hold an EROFS and, behind it, the blobs that it takes its data from.
//!
//! The kernel wants each blob as a device of its own (it learned of EROFS images in one device in 6.4), so each part of the
//! disk becomes a partition. That needs no table on the disk: the kernel is told where they are (`BLKPG`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use agent_api::image::{MAX_PARTS, OWN_USERS, parse_part};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::users::{Users, UsersError};
use crate::{devices, sys};

/// An image cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The disk is not there.
    #[error("this VM has no disk with serial number {serial:?}")]
    NoDisk {
        /// What was looked for.
        serial: String,
    },
    /// An option that is no part.
    #[error("{option:?} is not a part of a disk")]
    Part {
        /// It.
        option: String,
    },
    /// None, or too many.
    #[error("an image of {count} parts, must be 1 to {MAX_PARTS}")]
    Parts {
        /// How many.
        count: usize,
    },
    /// Its owners are to be shifted to users that are not there.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// The kernel refused.
    #[error("{what} {path}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

/// The partitions of a disk. They go when this does.
#[derive(Debug)]
pub struct Partitions {
    disk: File,
    node: PathBuf,
    count: u16,
}

impl Partitions {
    fn node(&self, number: u16) -> PathBuf {
        let mut name = self.node.clone().into_os_string();
        // As the kernel names them: `vdb1`, but `nvme0n1p1`.
        if name.to_string_lossy().ends_with(|last: char| last.is_ascii_digit()) {
            name.push("p");
        }
        name.push(number.to_string());
        name.into()
    }
}

impl Drop for Partitions {
    fn drop(&mut self) {
        for number in 1..=self.count {
            if let Err(error) = sys::delete_partition(self.disk.as_fd(), number) {
                log::warn!("{} stays: {error}", self.node(number).display());
            }
        }
    }
}

/// Mounts the image on the disk with that serial number at `target`, read-only, and with the option for it as `users` see
/// it.
///
/// # Errors
/// [`ImageError`]; nothing is left then.
pub fn make(
    serial: &str,
    target: &Path,
    options: &[String],
    users: &Users,
) -> Result<Partitions, ImageError> {
    let own_users = options.iter().any(|option| option == OWN_USERS);
    let users = own_users.then(|| users.open()).transpose()?;
    let parts: Vec<(u64, u64)> = options
        .iter()
        .filter(|option| *option != OWN_USERS)
        .map(|option| parse_part(option).ok_or_else(|| ImageError::Part { option: option.clone() }))
        .collect::<Result<_, _>>()?;
    if !(1..=MAX_PARTS).contains(&parts.len()) {
        return Err(ImageError::Parts { count: parts.len() });
    }
    let name = devices::disk_with_serial(Path::new("/sys"), serial);
    let name = name.map_err(os("looking for disks in", Path::new("/sys/block")))?;
    let name = name.ok_or_else(|| ImageError::NoDisk { serial: serial.to_owned() })?;
    let node = Path::new("/dev").join(name);
    let disk = File::open(&node).map_err(os("opening", &node))?;
    let mut made = Partitions { disk, node, count: 0 };
    for (start, bytes) in parts {
        let number = made.count + 1;
        sys::add_partition(made.disk.as_fd(), number, start, bytes)
            .map_err(os("making partition", &made.node(number)))?;
        made.count = number;
    }
    let blobs: Vec<String> =
        (2..=made.count).map(|number| format!("device={}", made.node(number).display())).collect();
    let data = blobs.join(",");
    std::fs::create_dir_all(target).map_err(os("making directory", target))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    let data = Some(data.as_str()).filter(|data| !data.is_empty());
    mount(Some(&made.node(1)), target, Some("erofs"), flags, data)
        .map_err(|errno| os("mounting the image at", target)(errno.into()))?;
    if let Some(users) = users {
        shift(target, users.as_fd())?;
    }
    Ok(made)
}

/// Puts a mount that shows the owners of files as `users` have them in the place of the one at `target`. Only one that nobody
/// has seen yet can be made such (`mount_setattr(2)`), so it is a clone. If this fails, nothing is mounted any more.
fn shift(target: &Path, users: BorrowedFd<'_>) -> Result<(), ImageError> {
    let clone = open_tree(CWD, target, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC);
    umount2(target, MntFlags::MNT_DETACH)
        .map_err(|errno| os("unmounting the image at", target)(errno.into()))?;
    let clone = clone.map_err(|errno| os("cloning the image at", target)(errno.into()))?;
    idmap::set(clone.as_fd(), users, false).map_err(os("shifting the owners of the image at", target))?;
    move_mount(&clone, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| os("mounting the image at", target)(errno.into()))
}

fn os(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError + use<> {
    let path = path.to_owned();
    move |cause| ImageError::Os { what, path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_said() {
        let refused = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
            let made = make("no-such-disk", Path::new("/nowhere"), &options, &Users::default());
            made.unwrap_err().to_string()
        };
        assert_eq!(refused(&[]), "an image of 0 parts, must be 1 to 129");
        assert_eq!(refused(&["part=0:4096", "ro"]), "\"ro\" is not a part of a disk");
        assert_eq!(refused(&["part=0:4096"]), "this VM has no disk with serial number \"no-such-disk\"");
        assert!(refused(&["part=0:4096", "own-users"]).contains("the sandbox has none"));
        let many = vec!["part=0:4096"; MAX_PARTS + 1];
        assert_eq!(refused(&many), "an image of 130 parts, must be 1 to 129");
    }

    #[test]
    fn partitions_are_named_as_the_kernel_names_them() {
        let of = |node: &str| {
            let made = Partitions { disk: File::open("/dev/null").unwrap(), node: node.into(), count: 0 };
            made.node(12)
        };
        assert_eq!(of("/dev/vdb"), Path::new("/dev/vdb12"));
        assert_eq!(of("/dev/nvme0n1"), Path::new("/dev/nvme0n1p12"));
    }
}
