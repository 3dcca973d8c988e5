//! What a VM is made of, as its owner asks for it. The VMM checks it before it uses any of it.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Least guest memory, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Most guest memory, in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// Most vCPUs.
pub const MAX_VCPUS: u8 = 32;
/// Places for devices, of all kinds together: each has an interrupt of its own.
pub const DEVICE_SLOTS: usize = 19;
/// Most disks.
pub const MAX_DISKS: usize = 16;
/// Most network devices.
pub const MAX_NETS: usize = 8;
/// Most shares of host directories: that of the boot, and those that come later.
pub const MAX_SHARES: usize = 4;
/// Most attaches and detaches that wait for their turn.
pub const MAX_WAITING: usize = 32;
/// Most queue pairs of a network device.
pub const MAX_NET_PAIRS: usize = 4;
/// Least MTU of a network device, in bytes (virtio 1.2, 5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// Longest kernel command line, in bytes, with what the VMM appends and its final NUL (x86 `COMMAND_LINE_SIZE`).
pub const MAX_CMDLINE: usize = 2048;

/// A whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`crate::PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// Name of the sandbox, for logs only; at most 128 bytes.
    #[serde(default)]
    pub name: String,
    /// vCPUs at boot, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Most vCPUs it can be grown to, `vcpus` to [`MAX_VCPUS`]; `vcpus` when absent. Each costs the guest memory from the
    /// start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u8>,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What to boot.
    pub kernel: KernelConfig,
    /// Disks in the order the guest sees them (`vda`, `vdb`, …), at most [`MAX_DISKS`].
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices in the order the guest sees them (`eth0`, `eth1`, …), at most [`MAX_NETS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// Sockets between guest and host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// A source of entropy for the guest.
    #[serde(default)]
    pub rng: bool,
    /// A balloon: the guest gives free pages back by itself (free page reporting). Anonymous memory only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// Host directories in the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<FsConfig>,
    /// A thread for disks that are images, so that one can be attached to a VM that runs. A VM that boots with one has it anyway.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub images: bool,
    /// A virtio console, `hvc0`. Its last bytes are kept as the guest's last words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// An 8250 serial port, `ttyS0`, output only: two exits a byte, for debugging. Bytes go to this descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<FdIndex>,
}

impl VmConfig {
    /// One vCPU, `memory_mib` of memory, a kernel, and no device. What else a VM has is said with `..VmConfig::new(…)`.
    pub fn new(memory_mib: u32, kernel: KernelConfig) -> Self {
        VmConfig {
            version: crate::PROTOCOL_VERSION,
            name: String::new(),
            vcpus: 1,
            max_vcpus: None,
            memory: MemoryConfig::new(memory_mib),
            kernel,
            disks: vec![],
            nets: vec![],
            vsock: None,
            rng: false,
            balloon: false,
            fs: None,
            images: false,
            console: None,
            serial: None,
        }
    }
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`], a multiple of 2.
    pub size_mib: u32,
    /// Where its pages come from.
    #[serde(default)]
    pub backing: GuestMemoryBacking,
    /// Populate all pages before the guest starts. What is plugged later comes at first touch all the same.
    #[serde(default)]
    pub prefault: bool,
    /// Most memory that the VM can be grown to, in MiB: a multiple of 2, `size_mib` to [`MAX_MEMORY_MIB`]. What is above `size_mib`
    /// can be plugged and unplugged in blocks of 2 MiB (virtio-mem) while the guest runs; the guest's kernel needs 1.6 % of what it
    /// is grown by out of what it has. Anonymous memory only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_mib: Option<u32>,
}

impl MemoryConfig {
    /// `size_mib` of ordinary memory.
    pub fn new(size_mib: u32) -> Self {
        MemoryConfig { size_mib, backing: GuestMemoryBacking::default(), prefault: false, max_mib: None }
    }
}

/// Where guest pages come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestMemoryBacking {
    /// Private anonymous memory, 2 MiB aligned, transparent huge pages advised.
    #[default]
    Anonymous,
    /// 2 MiB pages of hugetlbfs; configuring fails when the host has not enough of them free.
    Hugetlbfs,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// ELF `vmlinux` or bzImage, read-only.
    pub image: FdIndex,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FdIndex>,
    /// Command line. The VMM appends the words that name its devices.
    pub cmdline: String,
    /// Enter an ELF kernel at its PVH note where it has one (else, and otherwise, at its 64-bit entry).
    #[serde(default = "yes")]
    pub pvh: bool,
}

fn yes() -> bool {
    true
}

/// A raw disk image or block device, or an image whose bytes come as they are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The file, or the image's bootstrap. Opened for writing unless `read_only`.
    pub file: FdIndex,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number the guest sees, at most 20 bytes (virtio 1.2, 5.2.6).
    #[serde(default)]
    pub id: String,
    /// Request queues, 1 to 8.
    #[serde(default = "one")]
    pub queues: u8,
    /// The rest of an image. The disk is read-only then, and has an `id` and one queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageConfig>,
}

impl DiskConfig {
    /// A file for the guest to read.
    pub fn read_only(file: FdIndex, id: &str) -> Self {
        DiskConfig { file, read_only: true, id: id.to_owned(), queues: 1, image: None }
    }
}

/// What comes behind an image's bootstrap, and where it comes from: what the image service answered
/// ([`crate::image`]). [`crate::image::disk_parts`] says where each part lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// The connection to the image service on which the image was opened.
    pub channel: FdIndex,
    /// Its blobs, in the bootstrap's order, at most [`crate::image::MAX_BLOBS`].
    pub blobs: Vec<BlobConfig>,
    /// How long a read of the guest waits for bytes, and for an image service that is away, in milliseconds, 1 to
    /// [`MAX_IMAGE_WAIT_MS`]. It fails then.
    #[serde(default = "image_wait")]
    pub wait_ms: u32,
    /// All of it is in the cache files ([`crate::image::OpenedImage::ready`]), and the guest shall have them as memory, not as a disk: a
    /// virtio-pmem device of the same parts at the same places. It is read-only, and nothing is ever fetched.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dax: bool,
}

/// One blob of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobConfig {
    /// Its cache file: bytes and ready map.
    pub file: FdIndex,
    /// Its uncompressed size in bytes, 1 at least.
    pub bytes: u64,
}

/// Longest [`ImageConfig::wait_ms`]: ten minutes.
pub const MAX_IMAGE_WAIT_MS: u32 = 600_000;

fn image_wait() -> u32 {
    60_000
}

fn one() -> u8 {
    1
}

/// A network device (virtio 1.2, 5.1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The queues of one tap, 1 to [`MAX_NET_PAIRS`]: each becomes a pair of queues of the guest. Attached with
    /// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` if there are several. The VMM sets size of the header
    /// and offloads; address, routes and state of the interface are its owner's.
    pub taps: Vec<FdIndex>,
    /// The guest's hardware address: unicast, not all zeros.
    pub mac: [u8; 6],
    /// Longest payload of a frame in bytes, [`MIN_MTU`] or more. The tap's own should be the same.
    #[serde(default = "ethernet")]
    pub mtu: u16,
}

fn ethernet() -> u16 {
    1500
}

/// Sockets between guest and host (virtio 1.2, 5.10).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 2^32 - 2. It has no meaning outside this VM.
    pub cid: u32,
    /// Host ports the guest may dial; each connection becomes [`crate::Event::VsockAccepted`]. At most 16.
    #[serde(default)]
    pub ports: Vec<u32>,
}

/// Host directories in the guest (virtio 1.2, 5.11).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Tag the guest mounts by, 1 to 36 bytes.
    pub tag: String,
    /// File server threads, 1 to 4.
    #[serde(default = "one")]
    pub threads: u8,
}

/// The virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where the guest's output goes; nowhere but the kept tail when absent. Never blocks the guest: what the
    /// descriptor does not take at once is dropped and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<FdIndex>,
    /// What the guest reads, for an interactive console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<FdIndex>,
}
