//! Devices that come and go while the VM runs.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{DiskConfig, FsConfig, NetConfig};

/// Longest time an attach or a detach may take, in milliseconds.
pub const MAX_PLUG_MS: u32 = 300_000;

/// What is added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NewDevice {
    /// A disk. On a running VM its id is not empty, and no other disk's.
    Disk(DiskConfig),
    /// A network device. On a running VM its hardware address is no other's.
    Net(NetConfig),
    /// A further share of host directories, with nothing mounted. Its tag is no other's.
    Fs(FsConfig),
}

/// Names a device, for the owner and for the guest, where it is to be looked for by this name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceName {
    /// A disk by its serial number ([`DiskConfig::id`]); Linux has it in `/sys/block/vdX/serial`. An image that is memory has none
    /// there, and is looked for by [`Attached::memory`].
    Disk(String),
    /// A network device by its hardware address; Linux has it in `/sys/class/net/ethX/address`.
    Net([u8; 6]),
    /// A share by its tag, which is what `mount -t virtiofs` takes.
    Fs(String),
}

/// Guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRange {
    /// The first.
    pub start: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// A device has been added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attached {
    /// What to look for in the guest.
    pub name: DeviceName,
    /// The slot it takes, of [`crate::config::DEVICE_SLOTS`].
    pub slot: u8,
    /// Guest physical address of its virtio-mmio registers.
    pub registers: u64,
    /// Its interrupt: a pin of the IOAPIC.
    pub irq: u32,
    /// Where an image is that is memory ([`crate::ImageConfig::dax`]): Linux has the address in
    /// `/sys/block/pmemN/device/../resource`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryRange>,
    /// How long it took from the request on, in microseconds; 0 on a VM that does not run yet.
    pub took_us: u64,
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Disk(id) => write!(f, "disk {id:?}"),
            DeviceName::Net([a, b, c, d, e, g]) => {
                write!(f, "network device {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
            }
            DeviceName::Fs(tag) => write!(f, "share {tag:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FdIndex, Op, Reply};

    #[test]
    fn operations_read_as_they_are_written() {
        let disk = DiskConfig { file: FdIndex(0), read_only: true, id: "a".into(), queues: 1, image: None };
        let attach = Op::Attach { device: NewDevice::Disk(disk), timeout_ms: 5 };
        let json = r#"{"attach":{"device":{"disk":{"file":0,"read_only":true,"id":"a","queues":1}},"timeout_ms":5}}"#;
        assert_eq!(serde_json::to_string(&attach).unwrap(), json);
        let detach = Op::Detach { device: DeviceName::Net([2, 0, 0, 0, 0, 1]), timeout_ms: 7 };
        assert_eq!(
            serde_json::from_str::<Op>(r#"{"detach":{"device":{"net":[2,0,0,0,0,1]},"timeout_ms":7}}"#)
                .unwrap(),
            detach
        );
        let attached = Attached {
            name: DeviceName::Fs("t".into()),
            slot: 9,
            registers: 0xd000_9000,
            irq: 14,
            memory: Some(MemoryRange { start: 1 << 32, bytes: 2 << 20 }),
            took_us: 1,
        };
        let reply = Reply::Attached(attached);
        let json = serde_json::to_string(&reply).unwrap();
        assert_eq!(serde_json::from_str::<Reply>(&json).unwrap(), reply);
    }

    #[test]
    fn names_say_what_they_name() {
        assert_eq!(DeviceName::Disk("x".into()).to_string(), "disk \"x\"");
        assert_eq!(DeviceName::Net([2, 0, 0, 0, 0, 255]).to_string(), "network device 02:00:00:00:00:ff");
        assert_eq!(DeviceName::Fs("t".into()).to_string(), "share \"t\"");
    }
}
