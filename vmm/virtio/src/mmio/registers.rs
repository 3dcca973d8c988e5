//! Register offsets (virtio 1.2, 4.2.2, table 4.1). R and W as seen by the driver.

/// R: "virt".
pub const MAGIC_VALUE: u64 = 0x000;
/// R: 2, as this is not a legacy device.
pub const VERSION: u64 = 0x004;
/// R: device id (section 5).
pub const DEVICE_ID: u64 = 0x008;
/// R: ours.
pub const VENDOR_ID: u64 = 0x00c;
/// R: 32 of the bits offered.
pub const DEVICE_FEATURES: u64 = 0x010;
/// W: which 32.
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// W: 32 of the bits accepted.
pub const DRIVER_FEATURES: u64 = 0x020;
/// W: which 32.
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// W: the queue that the registers up to `QUEUE_DEVICE_HIGH` are about.
pub const QUEUE_SEL: u64 = 0x030;
/// R: its largest size, 0 if there is no such queue.
pub const QUEUE_SIZE_MAX: u64 = 0x034;
/// W: its size.
pub const QUEUE_SIZE: u64 = 0x038;
/// RW: the driver uses it.
pub const QUEUE_READY: u64 = 0x044;
/// W: the queue with this index has something new.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// R: reasons of the interrupt.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// W: reasons seen.
pub const INTERRUPT_ACK: u64 = 0x064;
/// RW: see [`super::status`].
pub const STATUS: u64 = 0x070;
/// W: descriptor table, lower half of the address.
pub const QUEUE_DESC_LOW: u64 = 0x080;
/// W: upper half.
pub const QUEUE_DESC_HIGH: u64 = 0x084;
/// W: available ring, lower half.
pub const QUEUE_DRIVER_LOW: u64 = 0x090;
/// W: upper half.
pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
/// W: used ring, lower half.
pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
/// W: upper half.
pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// W: shared memory region that the next four are about. No device has one.
pub const SHM_SEL: u64 = 0x0ac;
/// R: its length, lower half; all ones: there is none.
pub const SHM_LEN_LOW: u64 = 0x0b0;
/// R: upper half.
pub const SHM_LEN_HIGH: u64 = 0x0b4;
/// R: its address, lower half.
pub const SHM_BASE_LOW: u64 = 0x0b8;
/// R: upper half.
pub const SHM_BASE_HIGH: u64 = 0x0bc;
/// R: changes with the configuration space.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// The device's configuration space begins here.
pub const CONFIG: u64 = 0x100;

/// Bytes of the register file: the control registers, and more configuration space than any device has.
pub const SIZE: u64 = 0x1000;

/// Value of [`MAGIC_VALUE`].
pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Value of [`VENDOR_ID`].
pub const VENDOR: u32 = u32::from_le_bytes(*b"ctvm");
