//! From what the owner asked for to what the builder may take: every field checked, every descriptor in its place.
//!
//! `vmm_api::VmConfig` is what came in; [`ValidConfig`] is what was checked. Only this module makes one.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use imagefs::image::BlobFile;

use vmm_api::config::{
    MAX_CMDLINE, MAX_DISKS, MAX_IMAGE_WAIT_MS, MAX_MEMORY_MIB, MAX_NET_PAIRS, MAX_NETS, MAX_VCPUS,
    MIN_MEMORY_MIB, MIN_MTU,
};
use vmm_api::image::MAX_BLOBS;
use vmm_api::{
    BlobConfig, DeviceName, DiskConfig, FdIndex, GuestMemoryBacking, ImageConfig, MemoryConfig, NetConfig,
    PROTOCOL_VERSION, VmConfig, VsockConfig,
};

const MAX_NAME: usize = 128;
const MAX_DISK_QUEUES: u8 = 8;
/// virtio 1.2, 5.2.6: `VIRTIO_BLK_T_GET_ID`.
const MAX_DISK_ID: usize = 20;
const MAX_VSOCK_PORTS: usize = 16;
/// virtio 1.2, 5.10.4: 0, 1, 2 and 2^32 - 1 are taken.
const CIDS: std::ops::Range<u32> = 3..u32::MAX;
/// virtio 1.2, 5.11.4.
const MAX_TAG: usize = 36;
const MAX_FS_THREADS: u8 = 4;
/// Where the kernel looks for the words that are for PID 1 alone.
const INIT_WORDS: &str = "--";

/// A configuration is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Another protocol.
    #[error("the configuration is of protocol version {0}, this VMM speaks {PROTOCOL_VERSION}")]
    Version(u32),
    /// A number is out of its range.
    #[error("{what} is {value}, must be {min} to {max}")]
    Range {
        /// Field, with unit.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Memory comes in huge pages.
    #[error("{what} is {value}, must be a multiple of 2")]
    OddMemory {
        /// Field.
        what: &'static str,
        /// Its value.
        value: u32,
    },
    /// Pages of a pool cannot come and go.
    #[error("{what} needs anonymous memory: pages of hugetlbfs are set aside when they are mapped")]
    PooledMemory {
        /// Field.
        what: &'static str,
    },
    /// A text is too short, too long or has bytes it must not have.
    #[error("{what} has {len} bytes{flaw}, must have {min} to {max}")]
    Text {
        /// Field.
        what: &'static str,
        /// Its length.
        len: usize,
        /// What else is wrong.
        flaw: &'static str,
        /// Least.
        min: usize,
        /// Most.
        max: usize,
    },
    /// The command line does not fit.
    #[error(
        "the kernel command line has {len} bytes with the words for {devices} devices and its NUL, must have at most {MAX_CMDLINE}"
    )]
    Cmdline {
        /// Its length.
        len: usize,
        /// Devices it names.
        devices: usize,
    },
    /// A list has an entry twice.
    #[error("{what} names {value} twice")]
    Twice {
        /// List.
        what: &'static str,
        /// Entry.
        value: u64,
    },
    /// What the guest may write is in no image.
    #[error("disk {id:?} is an image and not read-only")]
    WritableImage {
        /// Its serial number.
        id: String,
    },
    /// A hardware address that no device can have.
    #[error("net.mac is {}, must be unicast and not all zeros", Mac(*.0))]
    Mac([u8; 6]),
    /// A descriptor did not come.
    #[error("{what} is descriptor {index} of the packet, which has {count}")]
    NoFd {
        /// Field.
        what: &'static str,
        /// What it says.
        index: u8,
        /// How many came.
        count: usize,
    },
    /// A descriptor has two uses.
    #[error("{what} is descriptor {index} of the packet, which is something else already")]
    FdTaken {
        /// Field.
        what: &'static str,
        /// What it says.
        index: u8,
    },
    /// A descriptor has no use.
    #[error("the packet has {count} descriptors, of which {unused} are not named in it")]
    FdsUnused {
        /// How many came.
        count: usize,
        /// How many are left over.
        unused: usize,
    },
}

/// A hardware address as people write it.
struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The descriptors of one packet, each to be taken once.
#[derive(Debug)]
pub struct Fds {
    fds: Vec<Option<OwnedFd>>,
}

impl Fds {
    /// All that came.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Fds { fds: fds.into_iter().map(Some).collect() }
    }

    /// The one at `index`, named by the field `what`.
    pub fn take(&mut self, what: &'static str, index: FdIndex) -> Result<OwnedFd, ConfigError> {
        let count = self.fds.len();
        match self.fds.get_mut(usize::from(index.0)) {
            None => Err(ConfigError::NoFd { what, index: index.0, count }),
            Some(slot) => slot.take().ok_or(ConfigError::FdTaken { what, index: index.0 }),
        }
    }

    /// All that were not taken.
    pub fn into_all(self) -> Vec<OwnedFd> {
        self.fds.into_iter().flatten().collect()
    }

    /// Checks that none is left.
    pub fn done(self) -> Result<(), ConfigError> {
        let count = self.fds.len();
        match self.fds.iter().flatten().count() {
            0 => Ok(()),
            unused => Err(ConfigError::FdsUnused { count, unused }),
        }
    }
}

/// A whole VM, checked.
#[derive(Debug)]
pub struct ValidConfig {
    /// Name for logs.
    pub name: String,
    /// vCPUs at boot.
    pub vcpus: u8,
    /// Most vCPUs.
    pub max_vcpus: u8,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Bytes by which it can be grown, a multiple of 2 MiB.
    pub hotplug_bytes: u64,
    /// Where its pages come from.
    pub backing: GuestMemoryBacking,
    /// Populate it first.
    pub prefault: bool,
    /// Kernel image.
    pub kernel: OwnedFd,
    /// Initial RAM disk.
    pub initrd: Option<OwnedFd>,
    /// Command line without the words for devices.
    pub cmdline: String,
    /// Enter at the PVH note.
    pub pvh: bool,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network devices.
    pub nets: Vec<Net>,
    /// Sockets.
    pub vsock: Option<VsockConfig>,
    /// Entropy.
    pub rng: bool,
    /// Balloon.
    pub balloon: bool,
    /// File share.
    pub fs: Option<vmm_api::FsConfig>,
    /// There are, or may be, disks that are images.
    pub images: bool,
    /// Console.
    pub console: Option<Console>,
    /// Where the serial port's bytes go.
    pub serial: Option<OwnedFd>,
}

/// A disk, checked.
#[derive(Debug)]
pub struct Disk {
    /// The image or device.
    pub file: OwnedFd,
    /// The guest may not write.
    pub read_only: bool,
    /// Serial number.
    pub id: String,
    /// Request queues.
    pub queues: u8,
    /// What comes behind a bootstrap.
    pub image: Option<Image>,
}

/// The rest of an image, checked.
#[derive(Debug)]
pub struct Image {
    /// The connection to the image service.
    pub channel: OwnedFd,
    /// Cache files.
    pub blobs: Vec<BlobFile>,
    /// How long a read may wait.
    pub wait: Duration,
    /// It is memory, and no disk.
    pub dax: bool,
}

/// A network device, checked.
#[derive(Debug)]
pub struct Net {
    /// The tap's queues.
    pub taps: Vec<OwnedFd>,
    /// The guest's address.
    pub mac: [u8; 6],
    /// Longest payload of a frame, in bytes.
    pub mtu: u16,
}

/// The console, checked.
#[derive(Debug)]
pub struct Console {
    /// Where output goes.
    pub output: Option<OwnedFd>,
    /// Where input comes from.
    pub input: Option<OwnedFd>,
}

impl ValidConfig {
    /// Checks `config` and takes its descriptors out of `fds`.
    pub fn check(config: VmConfig, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        if config.version != PROTOCOL_VERSION {
            return Err(ConfigError::Version(config.version));
        }
        let mut fds = Fds::new(fds);
        text("name", &config.name, 0, MAX_NAME)?;
        range("vcpus", config.vcpus, 1, MAX_VCPUS)?;
        let max_vcpus = config.max_vcpus.unwrap_or(config.vcpus);
        range("max_vcpus", max_vcpus, config.vcpus, MAX_VCPUS)?;
        let memory = config.memory;
        let hotplug_mib = check_memory(&memory)?;
        if config.balloon && memory.backing == GuestMemoryBacking::Hugetlbfs {
            return Err(ConfigError::PooledMemory { what: "balloon" });
        }
        text("kernel.cmdline", &config.kernel.cmdline, 0, MAX_CMDLINE - 1)?;
        range("number of disks", config.disks.len() as u64, 0, MAX_DISKS as u64)?;
        range("number of nets", config.nets.len() as u64, 0, MAX_NETS as u64)?;
        if let Some(vsock) = &config.vsock {
            check_vsock(vsock)?;
        }
        if let Some(fs) = &config.fs {
            check_fs(fs)?;
        }
        let mut optional = |what, index: Option<FdIndex>| index.map(|i| fds.take(what, i)).transpose();
        let initrd = optional("kernel.initrd", config.kernel.initrd)?;
        let serial = optional("serial", config.serial)?;
        let console = match config.console {
            None => None,
            Some(console) => Some(Console {
                output: optional("console.output", console.output)?,
                input: optional("console.input", console.input)?,
            }),
        };
        let images = config.images || config.disks.iter().any(|disk| disk.image.is_some());
        let valid = ValidConfig {
            name: config.name,
            vcpus: config.vcpus,
            max_vcpus,
            memory_bytes: u64::from(memory.size_mib) << 20,
            hotplug_bytes: u64::from(hotplug_mib) << 20,
            backing: memory.backing,
            prefault: memory.prefault,
            kernel: fds.take("kernel.image", config.kernel.image)?,
            initrd,
            cmdline: config.kernel.cmdline,
            pvh: config.kernel.pvh,
            disks: config.disks.into_iter().map(|d| Disk::take(d, &mut fds)).collect::<Result<_, _>>()?,
            nets: config.nets.into_iter().map(|n| Net::take(n, &mut fds)).collect::<Result<_, _>>()?,
            vsock: config.vsock,
            rng: config.rng,
            balloon: config.balloon,
            fs: config.fs,
            images,
            console,
            serial,
        };
        fds.done()?;
        Ok(valid)
    }
}

/// A device that comes later than the configuration, checked.
#[derive(Debug)]
pub enum NewDevice {
    /// A disk.
    Disk(Disk),
    /// A network device.
    Net(Net),
    /// A file share.
    Fs(vmm_api::FsConfig),
}

impl NewDevice {
    /// Checks one device and takes its descriptors out of `fds`.
    pub fn take(device: vmm_api::NewDevice, fds: &mut Fds) -> Result<Self, ConfigError> {
        Ok(match device {
            vmm_api::NewDevice::Disk(disk) => NewDevice::Disk(Disk::take(disk, fds)?),
            vmm_api::NewDevice::Net(net) => NewDevice::Net(Net::take(net, fds)?),
            vmm_api::NewDevice::Fs(fs) => {
                check_fs(&fs)?;
                NewDevice::Fs(fs)
            }
        })
    }

    /// What guest and owner call it.
    pub fn name(&self) -> DeviceName {
        match self {
            NewDevice::Disk(disk) => DeviceName::Disk(disk.id.clone()),
            NewDevice::Net(net) => DeviceName::Net(net.mac),
            NewDevice::Fs(fs) => DeviceName::Fs(fs.tag.clone()),
        }
    }
}

impl Disk {
    /// Checks one disk and takes its descriptor out of `fds`.
    pub fn take(config: DiskConfig, fds: &mut Fds) -> Result<Self, ConfigError> {
        range("disk.queues", config.queues, 1, MAX_DISK_QUEUES)?;
        text("disk.id", &config.id, 0, MAX_DISK_ID)?;
        if let Some(image) = &config.image {
            range("number of image blobs", image.blobs.len() as u64, 0, MAX_BLOBS as u64)?;
            range("disk.queues of an image", config.queues, 1, 1)?;
            text("disk.id of an image", &config.id, 1, MAX_DISK_ID)?;
            if !config.read_only {
                return Err(ConfigError::WritableImage { id: config.id });
            }
        }
        let file = fds.take("disk.file", config.file)?;
        let image = config.image.map(|image| Image::take(image, fds)).transpose()?;
        Ok(Disk { file, read_only: config.read_only, id: config.id, queues: config.queues, image })
    }
}

impl Image {
    fn take(config: ImageConfig, fds: &mut Fds) -> Result<Self, ConfigError> {
        let ImageConfig { channel, blobs, wait_ms, dax } = config;
        range("disk.image.wait_ms", wait_ms, 1, MAX_IMAGE_WAIT_MS)?;
        let blobs = take_blobs(blobs, fds)?;
        let channel = fds.take("disk.image.channel", channel)?;
        Ok(Image { channel, blobs, wait: Duration::from_millis(wait_ms.into()), dax })
    }
}

/// Checks blobs and takes their descriptors out of `fds`.
pub fn take_blobs(blobs: Vec<BlobConfig>, fds: &mut Fds) -> Result<Vec<BlobFile>, ConfigError> {
    range("number of image blobs", blobs.len() as u64, 0, MAX_BLOBS as u64)?;
    let take = |BlobConfig { file, bytes }| Ok(BlobFile { file: fds.take("blob.file", file)?, bytes });
    blobs.into_iter().map(take).collect()
}

impl Net {
    fn take(config: NetConfig, fds: &mut Fds) -> Result<Self, ConfigError> {
        let NetConfig { taps, mac, mtu } = config;
        range("number of net.taps", taps.len() as u64, 1, MAX_NET_PAIRS as u64)?;
        range("net.mtu", mtu, MIN_MTU, u16::MAX)?;
        // The lowest bit of the first byte makes a group of it (IEEE 802, 8.2).
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return Err(ConfigError::Mac(mac));
        }
        let taps = taps.into_iter().map(|tap| fds.take("net.taps", tap)).collect::<Result<_, _>>()?;
        Ok(Net { taps, mac, mtu })
    }
}

/// How much can be plugged, in MiB.
fn check_memory(memory: &MemoryConfig) -> Result<u32, ConfigError> {
    range("memory.size_mib", memory.size_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)?;
    let max_mib = memory.max_mib.unwrap_or(memory.size_mib);
    range("memory.max_mib", max_mib, memory.size_mib, MAX_MEMORY_MIB)?;
    for (what, value) in [("memory.size_mib", memory.size_mib), ("memory.max_mib", max_mib)] {
        if !value.is_multiple_of(2) {
            return Err(ConfigError::OddMemory { what, value });
        }
    }
    let grows = max_mib - memory.size_mib;
    if grows > 0 && memory.backing == GuestMemoryBacking::Hugetlbfs {
        return Err(ConfigError::PooledMemory { what: "memory.max_mib" });
    }
    Ok(grows)
}

fn check_fs(fs: &vmm_api::FsConfig) -> Result<(), ConfigError> {
    text("fs.tag", &fs.tag, 1, MAX_TAG)?;
    range("fs.threads", fs.threads, 1, MAX_FS_THREADS)
}

fn check_vsock(vsock: &VsockConfig) -> Result<(), ConfigError> {
    range("vsock.cid", vsock.cid, CIDS.start, CIDS.end - 1)?;
    range("number of vsock.ports", vsock.ports.len() as u64, 0, MAX_VSOCK_PORTS as u64)?;
    for (i, port) in vsock.ports.iter().enumerate() {
        if vsock.ports[..i].contains(port) {
            return Err(ConfigError::Twice { what: "vsock.ports", value: (*port).into() });
        }
    }
    Ok(())
}

/// `base` with the words that name `devices` (registers of `size` bytes at an address, interrupt), in order: they go
/// before a `--`, behind which all words are PID 1's.
pub fn cmdline_with_devices(base: &str, devices: &[(u64, u32)], size: u64) -> Result<String, ConfigError> {
    let words: String = devices
        .iter()
        .map(|(gpa, irq)| format!(" virtio_mmio.device={}K@{gpa:#x}:{irq}", size >> 10))
        .collect();
    let split = base.split(' ').scan(0, |at, word| {
        let start = *at;
        *at += word.len() + 1;
        Some((start, word))
    });
    let init = split.into_iter().find(|(_, word)| *word == INIT_WORDS).map_or(base.len(), |(start, _)| start);
    let (kernel, rest) = base.split_at(init);
    let mut line = format!("{}{words}", kernel.trim_end());
    if !rest.is_empty() {
        line.push(' ');
        line.push_str(rest);
    }
    match line.len() + 1 {
        len if len > MAX_CMDLINE => Err(ConfigError::Cmdline { len, devices: devices.len() }),
        _ => Ok(line.trim_start().to_owned()),
    }
}

fn range<T: Into<u64>>(what: &'static str, value: T, min: T, max: T) -> Result<(), ConfigError> {
    let (value, min, max) = (value.into(), min.into(), max.into());
    match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(ConfigError::Range { what, value, min, max }),
    }
}

fn text(what: &'static str, value: &str, min: usize, max: usize) -> Result<(), ConfigError> {
    let len = value.len();
    let flaw = if value.contains('\0') { " and a NUL among them" } else { "" };
    match (min..=max).contains(&len) && flaw.is_empty() {
        true => Ok(()),
        false => Err(ConfigError::Text { what, len, flaw, min, max }),
    }
}

#[cfg(test)]
mod tests;
