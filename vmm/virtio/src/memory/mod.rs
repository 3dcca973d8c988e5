//! Guest memory as devices see it: regions of memory, of which one may be there in blocks only.
//!
//! ```text
//! boot memory           [################]            always there: nothing is looked up
//! region of blocks      [##..####....#...]            an address is memory while its block is plugged (virtio-mem)
//! ```
//!
//! A block that is not plugged is no memory to any device, as any hole is none: [`Region`] asks [`Blocks`] each time it
//! gives out a slice, and all that `vm-memory` and `virtio-queue` do begins with a slice. So a descriptor, a ring or an
//! indirect table in such a block is a guest's error like any other, and never a fault of the VMM.
//!
//! # When a block goes away
//!
//! A slice is checked once and used later, and the host takes a block away by making it inaccessible. What may hold a
//! slice at that moment?
//!
//! - **Other devices on the main loop**: nothing. They hold slices within one call, and the block goes away within a call
//!   of the memory device on the same thread.
//! - **The memory device itself**: the buffers of the very request. It looks them up again before it answers.
//! - **vCPU threads**: they reach a device under its transport's lock, to set it up or to reset it.
//! - **Threads of a device** (the file server's): between the pop of a request and its answer.
//!
//! So whoever takes blocks away clears their bits first, then takes the lock of every other transport, then has threads of
//! devices wait between two requests ([`VirtioDevice::while_still`](crate::device::VirtioDevice::while_still)), and only
//! then changes the mapping. Slices made before are gone by then; none can be made of the blocks any more.
//!
//! A block that comes is made accessible first and gets its bits then.
//!
//! # What nobody writes
//!
//! A region may be read-only (files of the host that the guest has mapped). Devices read it as any memory, since a driver
//! may hand out a page of such a file as a buffer; a buffer to be written, or a used ring, is looked at by [`is_writable`]
//! before the first slice of it is taken: in [`queue`](crate::queue), the only place that makes either.

mod blocks;
mod region;

pub use blocks::{BLOCK, Blocks};
pub use region::Region;
use vm_memory::GuestMemory as _;

/// Guest memory as every device sees it. Clones share the mappings.
pub type GuestMemory = vm_memory::GuestRegionCollection<Region>;

/// Whether devices may write all of the `len` bytes at `address`, as far as they are memory.
#[inline]
pub fn is_writable(memory: &GuestMemory, address: u64, len: u64) -> bool {
    // Three or four of them.
    !memory.iter().any(|region| region.forbids_writing(address, len))
}

/// Memory of its own for each `(first address, length)`, for tests.
#[cfg(any(test, feature = "testing"))]
pub fn anonymous(ranges: &[(u64, usize)]) -> GuestMemory {
    let regions = ranges.iter().map(|&(gpa, len)| {
        let mapping = vm_memory::GuestRegionMmap::from_range(vm_memory::GuestAddress(gpa), len, None);
        Region::ram(mapping.expect("a few MiB can be mapped"))
    });
    GuestMemory::from_regions(regions.collect()).expect("ranges ascend and do not overlap")
}
