//! Block devices of the host as disks of the VM.
//!
//! The first container's are known when the VM boots and are part of its configuration. A later container's can only be
//! added to a VM that runs, which the VMM refuses as long as the guest has no channel for it: so a pod's containers, which
//! come after its VM has booted, get none, and are told why.
//!
//! A disk stays until the VM ends. The guest finds it by its serial number ([`disk_serial`]).

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use agent_api::disk_serial;
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use vmm_api::config::MAX_DISKS;
use vmm_api::hotplug::MAX_PLUG_MS;
use vmm_api::{DiskConfig, FdIndex, NewDevice, Op};

use crate::container::devices::HostDisk;
use crate::error::TaskError;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::vmm::VmmError;

/// Disks of a VM beside the guest's image.
const LIMIT: usize = MAX_DISKS - 1;

/// A block device that does not become a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The kernel does not know it.
    #[error("device {path} is block device {major}:{minor}, which this host does not have")]
    Missing {
        /// In the container.
        path: String,
        /// Its number.
        major: u32,
        /// Its number.
        minor: u32,
    },
    /// It cannot be opened.
    #[error("device {path}: opening {node}")]
    Open {
        /// In the container.
        path: String,
        /// On the host.
        node: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// More than a VM can have.
    #[error("{count} block devices, at most {LIMIT} become disks of a VM")]
    TooMany {
        /// How many there would be.
        count: usize,
    },
    /// The VM has it, for reading.
    #[error(
        "device {path} was given to this VM read-only, for another container, and cannot become writable"
    )]
    ReadOnly {
        /// In the container.
        path: String,
    },
    /// The VM runs.
    #[error(
        "device {path}: a block device can be added only before the VM boots, for the one container that has the VM to itself; a pod's containers come after that"
    )]
    Late {
        /// In the container.
        path: String,
        /// What the VMM says of it.
        #[source]
        source: VmmError,
    },
}

/// One that is open.
#[derive(Debug)]
pub struct Disk {
    /// On the host: major and minor.
    number: (u32, u32),
    asked_read_only: bool,
    read_only: bool,
    file: OwnedFd,
}

/// What is known of a disk that the VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    number: (u32, u32),
    /// As a container asked for it. One that the host itself cannot write is read-only to all.
    asked_read_only: bool,
}

impl Disk {
    /// Opens a block device: for reading alone where that is all the container may do, or the host.
    ///
    /// # Errors
    /// [`DiskError::Missing`] and [`DiskError::Open`].
    pub fn open(wanted: &HostDisk) -> Result<Self, DiskError> {
        let HostDisk { path, major: of, minor: at, read_only: asked_read_only } = wanted.clone();
        let missing = || DiskError::Missing { path: path.clone(), major: of, minor: at };
        // The configuration has the path in the container, and the number.
        let event = std::fs::read_to_string(format!("/sys/dev/block/{of}:{at}/uevent"));
        let event = event.map_err(|_| missing())?;
        let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or_else(missing)?;
        let node = PathBuf::from("/dev").join(name);
        // The kernel lets it be opened for writing, and fails the writes.
        let ro = std::fs::read_to_string(format!("/sys/dev/block/{of}:{at}/ro"));
        let is_hosts_read_only = ro.is_ok_and(|ro| ro.trim_end() == "1");
        let read_only = asked_read_only || is_hosts_read_only;
        let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let file = open(&node, access | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|e| DiskError::Open { path: path.clone(), node, source: e.into() })?;
        let is_it = fstat(&file).is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice
                && (major(found.st_rdev), minor(found.st_rdev)) == (of, at)
        });
        if is_it { Ok(Disk { number: (of, at), asked_read_only, read_only, file }) } else { Err(missing()) }
    }

    /// Opens all that a VM is to boot with.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open_all(wanted: &[HostDisk]) -> Result<Vec<Self>, DiskError> {
        let mut disks: Vec<Disk> = Vec::new();
        for wanted in wanted {
            match find(disks.iter().map(Disk::held), wanted)? {
                Some(_) => {}
                None if disks.len() == LIMIT => return Err(DiskError::TooMany { count: LIMIT + 1 }),
                None => disks.push(Disk::open(wanted)?),
            }
        }
        Ok(disks)
    }

    /// What the VMM makes of it; its descriptor is number `file` of the packet.
    pub fn config(&self, number: u32, file: FdIndex) -> DiskConfig {
        DiskConfig { file, read_only: self.read_only, id: disk_serial(number), queues: 1 }
    }

    /// What to remember of it.
    pub fn held(&self) -> Held {
        Held { number: self.number, asked_read_only: self.asked_read_only }
    }

    /// For the VMM.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }
}

/// Its position among those that the VM has.
fn find(held: impl Iterator<Item = Held>, wanted: &HostDisk) -> Result<Option<u32>, DiskError> {
    for (position, disk) in (0..).zip(held) {
        if disk.number == (wanted.major, wanted.minor) {
            return match disk.asked_read_only && !wanted.read_only {
                true => Err(DiskError::ReadOnly { path: wanted.path.clone() }),
                false => Ok(Some(position)),
            };
        }
    }
    Ok(None)
}

impl Sandbox {
    /// The number of the VM's disk that is this block device; added if it is not there.
    ///
    /// # Errors
    /// [`TaskError::Disk`].
    pub(super) async fn disk(&self, vm: &Vm, wanted: &HostDisk) -> Result<u32, TaskError> {
        let mut held = vm.disks.lock().await;
        if let Some(number) = find(held.iter().copied(), wanted)? {
            return Ok(number);
        }
        if held.len() == LIMIT {
            return Err(DiskError::TooMany { count: LIMIT + 1 }.into());
        }
        let disk = Disk::open(wanted)?;
        let number = u32::try_from(held.len()).expect("a VM has few disks");
        let limit = self.config.timeouts.vmm();
        // The VMM's own limit is the lower one: its answer has the numbers.
        let timeout_ms = u32::try_from((limit / 2).as_millis()).unwrap_or(u32::MAX).clamp(1, MAX_PLUG_MS);
        let device = NewDevice::Disk(disk.config(number, FdIndex(0)));
        let attach = Op::Attach { device, timeout_ms };
        let attached = vm.vmm.call(attach, &[disk.file().as_fd()], limit).await;
        attached.map_err(|source| DiskError::Late { path: wanted.path.clone(), source })?;
        held.push(disk.held());
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(major: u32, minor: u32, read_only: bool) -> HostDisk {
        HostDisk { path: "/dev/xvda".into(), major, minor, read_only }
    }

    #[test]
    fn a_disk_that_is_there_is_not_added_again() {
        let held =
            [Held { number: (7, 0), asked_read_only: false }, Held { number: (7, 1), asked_read_only: true }];
        let found = |wanted: &HostDisk| find(held.iter().copied(), wanted);
        assert_eq!(found(&wanted(7, 0, true)).unwrap(), Some(0));
        assert_eq!(found(&wanted(7, 1, true)).unwrap(), Some(1));
        assert_eq!(found(&wanted(8, 1, true)).unwrap(), None);
        let error = found(&wanted(7, 1, false)).unwrap_err().to_string();
        assert!(error.contains("/dev/xvda") && error.contains("read-only"), "{error}");
    }

    #[test]
    fn what_the_host_does_not_have_is_said_with_its_number() {
        let error = Disk::open(&wanted(4095, 77, false)).unwrap_err().to_string();
        assert_eq!(error, "device /dev/xvda is block device 4095:77, which this host does not have");
    }
}
