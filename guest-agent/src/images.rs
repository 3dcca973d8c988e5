//! Images: disks of the VM, or its memory, that hold an EROFS and, behind it, the blobs that it takes its data from.
//!
//! The kernel wants each blob as a device of its own (it learned of EROFS images in one device in 6.4), so each part of the
//! disk becomes a partition. That needs no table on the disk: the kernel is told where they are (`BLKPG`).
//!
//! Memory is a block device, too (`/dev/pmemN`), and is mounted with DAX: its files are read and mapped where they are, and nothing of them
//! is in the page cache.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use agent_api::image::{MAX_PARTS, OWN_USERS, parse_memory, parse_part};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::users::{Users, UsersError};
use crate::{devices, mounts, sys};

/// An image cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The disk is not there.
    #[error("this VM has no disk with serial number {serial:?}")]
    NoDisk {
        /// What was looked for.
        serial: String,
    },
    /// The memory is not there.
    #[error("this VM has no memory of an image at {start:#x}")]
    NoMemory {
        /// Where it should begin.
        start: u64,
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

/// Files are the device's memory (fs/erofs, `dax=always`).
const DAX: &str = "dax=always";

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

/// Mounts the image on the disk with that serial number, or in the memory that the first option names, at `target`, read-only, and
/// with the option for it as `users` see it.
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
    let memory = options.first().and_then(|first| parse_memory(first));
    let parts: Vec<(u64, u64)> = options[usize::from(memory.is_some())..]
        .iter()
        .filter(|option| *option != OWN_USERS)
        .map(|option| parse_part(option).ok_or_else(|| ImageError::Part { option: option.clone() }))
        .collect::<Result<_, _>>()?;
    if !(1..=MAX_PARTS).contains(&parts.len()) {
        return Err(ImageError::Parts { count: parts.len() });
    }
    let sys = Path::new("/sys");
    let name = memory
        .map_or_else(|| devices::disk_with_serial(sys, serial), |start| devices::memory_at(sys, start))
        .map_err(os("looking for disks in", Path::new("/sys/block")))?;
    let name = name.ok_or_else(|| match memory {
        Some(start) => ImageError::NoMemory { start },
        None => ImageError::NoDisk { serial: serial.to_owned() },
    })?;
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
    std::fs::create_dir_all(target).map_err(os("making directory", target))?;
    let first = made.node(1);
    let mounted = match memory {
        Some(_) => mount_with_dax(&first, target, &blobs),
        None => mount_erofs(&first, target, &blobs),
    };
    mounted.map_err(os("mounting the image at", target))?;
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

fn mount_erofs(node: &Path, target: &Path, options: &[String]) -> io::Result<()> {
    let data = options.join(",");
    let data = Some(data.as_str()).filter(|data| !data.is_empty());
    Ok(mount(Some(node), target, Some("erofs"), MsFlags::MS_RDONLY | MsFlags::MS_NODEV, data)?)
}

/// With DAX, or without where the kernel cannot: an image is the same either way, but for the memory it takes.
fn mount_with_dax(node: &Path, target: &Path, blobs: &[String]) -> io::Result<()> {
    let options: Vec<String> = std::iter::once(DAX.to_owned()).chain(blobs.iter().cloned()).collect();
    if let Err(error) = mount_erofs(node, target, &options) {
        log::warn!("{}: mounted without DAX: {error}", target.display());
        return mount_erofs(node, target, blobs);
    }
    // It may also have turned it off.
    if !mounts::has_option(target, DAX) {
        log::warn!("{}: the kernel has turned DAX off", target.display());
    }
    Ok(())
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
        assert_eq!(refused(&["memory=0x10000"]), "an image of 0 parts, must be 1 to 129");
        let nowhere = refused(&["memory=0x10000", "part=0:4096"]);
        assert_eq!(nowhere, "this VM has no memory of an image at 0x10000");
        assert_eq!(refused(&["part=0:4096", "memory=0x10000"]), "\"memory=0x10000\" is not a part of a disk");
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
        assert_eq!(of("/dev/pmem0"), Path::new("/dev/pmem0p12"));
        assert_eq!(of("/dev/nvme0n1"), Path::new("/dev/nvme0n1p12"));
    }
}
