//! Devices of a container by this guest's numbers: disks of the VM are found by their serial numbers, and what the kernel
//! does not have is said before a container is made that could not open it.
//!
//! A container in a user namespace may make no device, so its own are made here, for the runtime library to bind.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use agent_api::{DISK_MAJOR, disk_serial};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount, Spec};

use crate::errors::TaskError;

/// Where devices are made that are bound. `/run` takes none (`nodev`).
const NODES: &str = "/dev/.ctvm";

/// A device's mode where its container does not say (the runtime library's default).
const MODE: u32 = 0o666;

/// A device that this guest does not have.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk.
    #[error("device {path}: this VM has no disk with serial number {serial:?}")]
    NoDisk {
        /// In the container.
        path: PathBuf,
        /// What was looked for.
        serial: String,
    },
    /// Another device.
    #[error("device {path}: the guest's kernel has no {kind} device {major}:{minor}")]
    NotThere {
        /// In the container.
        path: PathBuf,
        /// `character` or `block`.
        kind: &'static str,
        /// Its number.
        major: i64,
        /// Its number.
        minor: i64,
    },
    /// What the kernel knows cannot be read.
    #[error("device {path}: reading {file}")]
    Read {
        /// In the container.
        path: PathBuf,
        /// Which file.
        file: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A node of it cannot be made.
    #[error("device {path}: making {file}")]
    Make {
        /// In the container.
        path: PathBuf,
        /// Which file.
        file: PathBuf,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

/// The nodes of a container's devices. They go when this does.
#[derive(Debug, Default)]
pub struct Nodes(Option<PathBuf>);

impl Drop for Nodes {
    fn drop(&mut self) {
        if let Some(dir) = &self.0
            && let Err(error) = std::fs::remove_dir_all(dir)
        {
            log::warn!("{} stays: {error}", dir.display());
        }
    }
}

/// Makes the devices of container `id`, and has them bound in place of being made in it. `outside` tells what a user and a
/// group of the container are here.
pub fn bind(
    spec: &mut Spec,
    id: &str,
    outside: impl Fn(u32, u32) -> Result<(u32, u32), TaskError>,
) -> Result<Nodes, TaskError> {
    let mut nodes = Nodes::default();
    let Some(mut linux) = spec.linux().clone() else { return Ok(nodes) };
    let devices = linux.devices().clone().unwrap_or_default();
    if devices.is_empty() {
        return Ok(nodes);
    }
    let dir = Path::new(NODES).join(id);
    nodes.0 = Some(dir.clone());
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (number, device) in devices.iter().enumerate() {
        let file = dir.join(number.to_string());
        let owner = outside(device.uid().unwrap_or(0), device.gid().unwrap_or(0))?;
        make(device, &file, owner).map_err(|cause| DeviceError::Make {
            path: device.path().clone(),
            file: file.clone(),
            cause,
        })?;
        let mut mount = Mount::default();
        mount.set_destination(device.path().clone()).set_typ(Some("bind".to_owned())).set_source(Some(file));
        mount.set_options(Some(["bind", "nosuid", "noexec"].map(str::to_owned).to_vec()));
        mounts.push(mount);
    }
    linux.set_devices(None);
    spec.set_linux(Some(linux)).set_mounts(Some(mounts));
    Ok(nodes)
}

fn make(device: &LinuxDevice, file: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let number = |part: i64| u64::try_from(part).map_err(io::Error::other);
    let number = match kind {
        SFlag::S_IFIFO => 0,
        _ => makedev(number(device.major())?, number(device.minor())?),
    };
    std::fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
    mknod(file, kind, Mode::empty(), number)?;
    // Not with the call, of whose mode the umask takes some away.
    let mode = device.file_mode().unwrap_or(MODE) & 0o7777;
    std::os::unix::fs::chown(file, Some(uid), Some(gid))?;
    std::fs::set_permissions(file, PermissionsExt::from_mode(mode))
}

/// Gives the devices of `spec` the numbers that they have here.
pub fn resolve(spec: &mut Spec) -> Result<(), DeviceError> {
    resolve_in(Path::new("/sys"), spec)
}

fn resolve_in(sys: &Path, spec: &mut Spec) -> Result<(), DeviceError> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
    let Some(mut devices) = linux.devices().clone() else { return Ok(()) };
    // `ctr run --privileged --device` lists a device twice, which runc makes once.
    let mut paths = std::collections::HashSet::new();
    devices.retain(|device| paths.insert(device.path().clone()));
    for device in &mut devices {
        match (device.typ(), device.major()) {
            (LinuxDeviceType::B, DISK_MAJOR) => {
                let (major, minor) = disk(sys, device)?;
                device.set_major(major).set_minor(minor);
            }
            (LinuxDeviceType::B, _) => must_exist(sys, "block", device)?,
            (LinuxDeviceType::C | LinuxDeviceType::U, _) => must_exist(sys, "char", device)?,
            _ => {}
        }
    }
    linux.set_devices(Some(devices));
    spec.set_linux(Some(linux));
    Ok(())
}

/// Numbers of the disk that `device` means.
fn disk(sys: &Path, device: &LinuxDevice) -> Result<(i64, i64), DeviceError> {
    let path = device.path();
    let unread = |file: &Path, cause| DeviceError::Read { path: path.clone(), file: file.to_owned(), cause };
    let none = |serial| DeviceError::NoDisk { path: path.clone(), serial };
    let number = u32::try_from(device.minor()).map_err(|_| none(device.minor().to_string()))?;
    let serial = disk_serial(number);
    let all = sys.join("block");
    let name = disk_with_serial(sys, &serial).map_err(|cause| unread(&all, cause))?;
    let file = all.join(name.ok_or_else(|| none(serial))?).join("dev");
    let text = std::fs::read_to_string(&file).map_err(|cause| unread(&file, cause))?;
    let numbers = text.trim_end().split_once(':');
    let numbers = numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| unread(&file, io::ErrorKind::InvalidData.into()))
}

/// The kernel's name of the disk with that serial number, in the sysfs at `sys`.
///
/// # Errors
/// The list of disks cannot be read.
pub fn disk_with_serial(sys: &Path, serial: &str) -> io::Result<Option<OsString>> {
    for entry in std::fs::read_dir(sys.join("block"))? {
        let entry = entry?;
        // Not every block device has one.
        if std::fs::read_to_string(entry.path().join("serial")).is_ok_and(|found| found.trim_end() == serial)
        {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

/// The kernel's name of the block device that is the memory at `start`, in the sysfs at `sys`. Waits for the kernel to have made it:
/// it does that on its own time, after the device's driver has answered.
///
/// # Errors
/// The list of block devices cannot be read.
pub fn memory_at(sys: &Path, start: u64) -> io::Result<Option<OsString>> {
    // A kernel without such memory has no such class. Reading the file takes until all of a bus is there.
    for bus in std::fs::read_dir(sys.join("class/nd")).into_iter().flatten() {
        let _ = std::fs::read_to_string(bus?.path().join("device/wait_probe")); // one that goes just now is not ours
    }
    for entry in std::fs::read_dir(sys.join("block"))? {
        let entry = entry?;
        // `device` is a link to a namespace; the region that it is of has the address.
        let found = std::fs::read_to_string(entry.path().join("device/../resource"));
        let found =
            found.ok().and_then(|text| u64::from_str_radix(text.trim_end().strip_prefix("0x")?, 16).ok());
        if found == Some(start) {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

fn must_exist(sys: &Path, folder: &'static str, device: &LinuxDevice) -> Result<(), DeviceError> {
    let (major, minor) = (device.major(), device.minor());
    if sys.join("dev").join(folder).join(format!("{major}:{minor}")).exists() {
        return Ok(());
    }
    let kind = if folder == "char" { "character" } else { folder };
    Err(DeviceError::NotThere { path: device.path().clone(), kind, major, minor })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two disks, of which one has a serial number of ours, and one character device.
    fn sys() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = sys.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        write("block/vda/serial", "ctvm-root");
        write("block/vda/dev", "254:0\n");
        write("block/vdb/dev", "254:16\n");
        write("block/vdb/serial", "ctvm-disk-0\n");
        write("block/ram0/dev", "1:0\n");
        write("dev/char/1:3/uevent", "");
        sys
    }

    fn numbers(device: &str) -> Result<(i64, i64), DeviceError> {
        let text = format!(r#"{{"ociVersion":"1.1.0","linux":{{"devices":[{device}]}}}}"#);
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        resolve_in(sys().path(), &mut spec)?;
        let devices = spec.linux().as_ref().unwrap().devices().clone().unwrap();
        Ok((devices[0].major(), devices[0].minor()))
    }

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let disk = |number: i64| {
            numbers(&format!(r#"{{"path":"/dev/xvda","type":"b","major":-1,"minor":{number}}}"#))
        };
        assert_eq!(disk(0).unwrap(), (254, 16));
        let error = disk(1).unwrap_err().to_string();
        assert_eq!(error, "device /dev/xvda: this VM has no disk with serial number \"ctvm-disk-1\"");
        assert!(matches!(disk(-5), Err(DeviceError::NoDisk { .. })));
    }

    #[test]
    fn memory_is_found_by_its_address() {
        let sys = sys();
        for (name, address) in [("pmem0", "0x180000000\n"), ("pmem1", "0x188000000\n"), ("pmem2", "nonsense")]
        {
            let region = sys.path().join("devices").join(format!("region-{name}"));
            std::fs::create_dir_all(region.join("namespace")).unwrap();
            std::fs::write(region.join("resource"), address).unwrap();
            let block = sys.path().join("block").join(name);
            std::fs::create_dir_all(&block).unwrap();
            std::os::unix::fs::symlink(region.join("namespace"), block.join("device")).unwrap();
        }
        let found = |start| memory_at(sys.path(), start).unwrap();
        assert_eq!(found(0x1_8800_0000).unwrap(), "pmem1");
        assert_eq!(found(0x1_8000_0000).unwrap(), "pmem0");
        assert_eq!(found(0x2_0000_0000), None);
        assert!(memory_at(Path::new("/nowhere"), 0).is_err());
    }

    #[test]
    fn of_two_devices_with_one_path_the_first_counts() {
        let (first, second) = (3, 200);
        let device = |minor| format!(r#"{{"path":"/dev/null","type":"c","major":1,"minor":{minor}}}"#);
        let both = format!("{},{}", device(first), device(second));
        assert_eq!(numbers(&both).unwrap(), (1, 3), "the second is not even looked for");
    }

    #[test]
    fn what_the_kernel_has_not_is_said_by_path_and_number() {
        assert_eq!(numbers(r#"{"path":"/dev/null","type":"c","major":1,"minor":3}"#).unwrap(), (1, 3));
        let error = numbers(r#"{"path":"/dev/net/tun","type":"c","major":10,"minor":200}"#).unwrap_err();
        let text = "device /dev/net/tun: the guest's kernel has no character device 10:200";
        assert_eq!(error.to_string(), text);
        assert!(numbers(r#"{"path":"/dev/x","type":"b","major":254,"minor":0}"#).is_err());
    }
}
