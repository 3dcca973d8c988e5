//! The memory device (virtio 1.2, 5.15): a region of guest physical addresses that is memory in blocks of 2 MiB, as many of
//! them as the owner asks for and the guest agrees to.
//!
//! ```text
//! owner ── set_requested ──> Mem ── config change ──> driver
//!                             ^ <── PLUG, UNPLUG ──────┘
//!                             └──> MemBackend: make accessible, give back
//!
//! addr            + usable_region_size      + region_size
//!  [##..####.......|.........................]        # plugged: plugged_size in all; requested_size is the aim
//! ```
//!
//! The driver chooses the blocks. The device sees to it that no more than what was asked for is plugged, and that what is
//! not plugged is gone: its bytes are the host's again, no vCPU and no device can touch it.
//!
//! **A reset** of the device (a driver that was unbound, or a guest's kernel that was replaced) changes no block, no
//! content and no size (5.15.5.2): the driver that comes next finds `plugged_size` and has to unplug all, or to ask for
//! the state. A reset of the machine ends this VMM's guest, and its memory with it.
//!
//! **`usable_region_size`** is what was ever asked for, in steps of the guest's own memory blocks (a part of one would be of
//! no use to Linux), and shrinks only when the driver unplugs all (5.15.4.2). So memory comes from the bottom up.
//!
//! **`VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`** is demanded: a driver without it (Linux before 5.16) may read what is not
//! plugged, which would end the guest. It gets no device.
//!
//! Not offered: `VIRTIO_MEM_F_ACPI_PXM`; there are no nodes.

mod backend;
mod device;
mod metrics;
mod request;
mod state;

pub use backend::MemBackend;
pub use device::{Mem, MemConfig, MemError};
pub use metrics::MemMetrics;
pub use state::MemState;
