//! Block devices of the host as disks of the VM.
//!
//! The first container's are known when the VM boots and are part of its configuration; they stay until it ends. A pod's
//! containers come after their VM has booted: theirs are added while it runs ([`Op::Attach`]), and taken away again
//! ([`Op::Detach`]) when the last container that has them is deleted. The guest finds a disk by its serial number
//! ([`disk_serial`]), and no number is used twice in a VM's life.
//!
//! A disk that the guest does not give up stays with the VM, *leaving*; whoever wants the block device again has the guest
//! asked once more. Images (`images`) are disks too, and count with them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use agent_api::disk_serial;
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use vmm_api::config::{DEVICE_SLOTS, MAX_DISKS};
use vmm_api::hotplug::MAX_PLUG_MS;
use vmm_api::{DeviceName, DiskConfig, ErrorCode, FdIndex, NewDevice, Op};

use crate::container::devices::HostDisk;
use crate::error::TaskError;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::vmm::VmmError;

/// Slots that a VM's other devices take: image, file share, sockets, console, entropy, memory that comes and goes, balloon, and
/// one network device.
const OTHERS: usize = 8;
/// Disks of a VM beside the guest's image.
const LIMIT: usize = DEVICE_SLOTS - OTHERS;
const _: () = assert!(LIMIT < MAX_DISKS);

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
    /// It cannot be added to the VM, which runs.
    #[error("device {path}: adding it to the running VM")]
    Attach {
        /// In the container.
        path: String,
        /// What the VMM says of it.
        #[source]
        source: VmmError,
    },
    /// The guest has it still, for a container that is gone.
    #[error(
        "device {path}: the VM still has it for a container that is gone, and the guest does not give it up"
    )]
    Leaving {
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
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    number: (u32, u32),
    /// As a container asked for it. One that the host itself cannot write is read-only to all.
    asked_read_only: bool,
    /// The containers that have it; `None` for a disk of the boot, which stays.
    users: Option<BTreeSet<String>>,
    /// It was to go.
    leaving: bool,
}

/// A VM's disks beside the guest's image, by the numbers that make their serial numbers.
#[derive(Debug, Default)]
pub struct Disks {
    held: BTreeMap<u32, Held>,
    images: BTreeSet<u32>,
    /// The next number.
    next: u32,
}

impl Disks {
    /// Those that the VM boots with, in this order.
    pub fn of_boot(disks: &[Disk]) -> Self {
        let held: BTreeMap<u32, Held> = (0..).zip(disks.iter().map(|disk| disk.held(None))).collect();
        let next = u32::try_from(held.len()).expect("a VM has few disks");
        Disks { held, next, ..Disks::default() }
    }

    /// Number of the next disk. Not given again, whatever comes of it: the guest may have a disk of this number that it was slow to
    /// take.
    ///
    /// # Errors
    /// The VM has as many as it can have: so many.
    pub fn next_number(&mut self) -> Result<u32, usize> {
        if self.held.len() + self.images.len() >= LIMIT {
            return Err(LIMIT);
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    /// The disk of this number is there, and is an image.
    pub fn add_image(&mut self, number: u32) {
        self.images.insert(number);
    }

    /// The image with this serial number is gone.
    pub fn remove_image(&mut self, serial: &str) {
        self.images.retain(|number| disk_serial(*number) != serial);
    }

    /// One that is asked for, if the VM has it.
    fn find(&self, wanted: &HostDisk) -> Result<Option<u32>, DiskError> {
        let found = self.held.iter().find(|(_, held)| held.number == (wanted.major, wanted.minor));
        match found {
            // One that leaves is nobody's any more.
            Some((_, held)) if held.asked_read_only && !wanted.read_only && !held.leaving => {
                Err(DiskError::ReadOnly { path: wanted.path.clone() })
            }
            found => Ok(found.map(|(number, _)| *number)),
        }
    }

    /// Takes a container off all lists; the disks that nobody has then.
    fn release(&mut self, container: &str) -> Vec<u32> {
        let mut free = vec![];
        for (number, held) in &mut self.held {
            if let Some(users) = &mut held.users
                && users.remove(container)
                && users.is_empty()
            {
                held.leaving = true;
                free.push(*number);
            }
        }
        free
    }
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
            match Disks::of_boot(&disks).find(wanted)? {
                Some(_) => {}
                None if disks.len() == LIMIT => return Err(DiskError::TooMany { count: LIMIT + 1 }),
                None => disks.push(Disk::open(wanted)?),
            }
        }
        Ok(disks)
    }

    /// What the VMM makes of it; its descriptor is number `file` of the packet.
    pub fn config(&self, number: u32, file: FdIndex) -> DiskConfig {
        DiskConfig { file, read_only: self.read_only, id: disk_serial(number), queues: 1, image: None }
    }

    /// What to remember of it.
    fn held(&self, user: Option<&str>) -> Held {
        Held {
            number: self.number,
            asked_read_only: self.asked_read_only,
            users: user.map(|user| BTreeSet::from([user.to_owned()])),
            leaving: false,
        }
    }

    /// For the VMM.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }
}

impl Sandbox {
    /// The number of the VM's disk that is this block device, for this container; added if it is not there.
    ///
    /// # Errors
    /// [`TaskError::Disk`].
    pub(super) async fn disk(&self, vm: &Vm, container: &str, wanted: &HostDisk) -> Result<u32, TaskError> {
        // Held to the end: one is added or taken away at a time, as the VMM does it.
        let mut disks = vm.disks.lock().await;
        if let Some(number) = disks.find(wanted)? {
            let held = disks.held.get_mut(&number).expect("just found");
            if !held.leaving {
                if let Some(users) = &mut held.users {
                    users.insert(container.to_owned());
                }
                return Ok(number);
            }
            let left = self.detach(vm, number).await;
            left.map_err(|source| DiskError::Leaving { path: wanted.path.clone(), source })?;
            disks.held.remove(&number);
        }
        let disk = Disk::open(wanted)?;
        let number = disks.next_number().map_err(|limit| DiskError::TooMany { count: limit + 1 })?;
        let device = NewDevice::Disk(disk.config(number, FdIndex(0)));
        let attach = Op::Attach { device, timeout_ms: self.plug_ms() };
        let limit = self.plug_limit();
        let attached = vm.vmm.call(attach, &[disk.file().as_fd()], limit).await;
        attached.map_err(|source| DiskError::Attach { path: wanted.path.clone(), source })?;
        disks.held.insert(number, disk.held(Some(container)));
        Ok(number)
    }

    /// Takes away the disks that only this container had. What fails is logged, and tried again by who wants the block
    /// device next.
    pub(super) async fn give_back_disks(&self, container: &str) {
        let Some(vm) = self.running_vm() else { return };
        let mut disks = vm.disks.lock().await;
        for number in disks.release(container) {
            match self.detach(&vm, number).await {
                Ok(()) => {
                    disks.held.remove(&number);
                }
                Err(e) => log::warn!(container:%; "{}", crate::error::chain(&e)),
            }
        }
    }

    async fn detach(&self, vm: &Vm, number: u32) -> Result<(), VmmError> {
        let device = DeviceName::Disk(disk_serial(number));
        let detach = Op::Detach { device, timeout_ms: self.plug_ms() };
        match vm.vmm.call(detach, &[], self.plug_limit()).await {
            // It went by itself.
            Err(VmmError::Refused { source, .. }) if source.code == ErrorCode::NotFound => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// How long guest and VMM may take over a disk, in milliseconds.
    pub(super) fn plug_ms(&self) -> u32 {
        let ms = self.config.timeouts.vmm().as_millis();
        u32::try_from(ms).unwrap_or(u32::MAX).clamp(1, MAX_PLUG_MS)
    }

    /// How long the VMM's answer may take, which has the numbers: longer than that.
    pub(super) fn plug_limit(&self) -> Duration {
        Duration::from_millis(self.plug_ms().into()) + self.config.timeouts.vmm()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(major: u32, minor: u32, read_only: bool) -> HostDisk {
        HostDisk { path: "/dev/xvda".into(), major, minor, read_only }
    }

    fn held(minor: u32, asked_read_only: bool, users: Option<&[&str]>) -> Held {
        let users = users.map(|users| users.iter().map(|&user| user.to_owned()).collect());
        Held { number: (7, minor), asked_read_only, users, leaving: false }
    }

    fn disks(held: impl IntoIterator<Item = Held>) -> Disks {
        Disks { held: (0..).zip(held).collect(), next: 9, ..Disks::default() }
    }

    #[test]
    fn a_disk_that_is_there_is_not_added_again() {
        let disks = disks([held(0, false, None), held(1, true, None)]);
        assert_eq!(disks.find(&wanted(7, 0, true)).unwrap(), Some(0));
        assert_eq!(disks.find(&wanted(7, 1, true)).unwrap(), Some(1));
        assert_eq!(disks.find(&wanted(8, 1, true)).unwrap(), None);
        let error = disks.find(&wanted(7, 1, false)).unwrap_err().to_string();
        assert!(error.contains("/dev/xvda") && error.contains("read-only"), "{error}");
    }

    #[test]
    fn a_disk_goes_with_the_last_container_that_has_it() {
        let mut disks =
            disks([held(0, false, None), held(1, true, Some(&["a", "b"])), held(2, false, Some(&["a"]))]);
        assert_eq!(disks.release("c"), [0; 0]);
        assert_eq!(disks.release("a"), [2]);
        assert_eq!(disks.release("a"), [0; 0], "once");
        assert_eq!(disks.release("b"), [1]);
        // One that leaves can become another's, and writable.
        assert_eq!(disks.find(&wanted(7, 1, false)).unwrap(), Some(1));
    }

    #[test]
    fn images_and_block_devices_count_together_and_numbers_are_not_given_twice() {
        let mut disks = disks([held(0, false, None)]);
        let behind = 8 + u32::try_from(LIMIT).unwrap();
        for number in 9..behind {
            assert_eq!(disks.next_number(), Ok(number));
            disks.add_image(number);
        }
        assert_eq!(disks.next_number(), Err(LIMIT));
        disks.remove_image("somebody else's");
        assert_eq!(disks.next_number(), Err(LIMIT));
        disks.remove_image(&disk_serial(9));
        assert_eq!(disks.next_number(), Ok(behind));
    }

    #[test]
    fn what_the_host_does_not_have_is_said_with_its_number() {
        let error = Disk::open(&wanted(4095, 77, false)).unwrap_err().to_string();
        assert_eq!(error, "device /dev/xvda is block device 4095:77, which this host does not have");
    }
}
