//! Every guest physical address that this VMM gives a meaning, in one table.
//!
//! ```text
//! 0x0000_0500  global descriptor table              64-bit entry only
//! 0x0000_6000  PVH start info and its module list   PVH entry only
//! 0x0000_7000  zero page (boot_params), or PVH memory map
//! 0x0000_9000  page tables, 6 pages                 64-bit entry only
//! 0x0002_0000  kernel command line, 2 KiB
//! 0x0009_fc00  MP table, to the end of base memory
//! 0x000a_0000  (video and ROM of a PC: not memory in the memory map)
//! 0x0010_0000  kernel, and everything else the guest owns
//!      …       initial RAM disk, at the top of low memory
//! 0xc000_0000  hole for devices
//! 0xd000_0000  virtio-mmio registers, 4 KiB a slot
//! 0xfec0_0000  IOAPIC      0xfee0_0000  local APIC
//! 0xfffb_d000  task state segment KVM wants on Intel, 3 pages
//! 1_0000_0000  memory above 4 GiB
//!      …       what comes and goes in blocks (virtio-mem), at the next multiple of 2 GiB: in no memory map
//!      …       files of the host (virtio-pmem), at the next multiple of 2 GiB, 16 GiB at most: in no memory map
//! ```

/// Descriptor table for the 64-bit entry.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list (one entry: the initial RAM disk).
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x7000;
/// `boot_params` for the 64-bit entry.
pub const ZERO_PAGE: u64 = 0x7000;
/// First of the page tables for the 64-bit entry: PML4, PDPT, four PDs.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// MP floating pointer and configuration table: the last KiB of base memory is the second place where a kernel looks
/// (MultiProcessor Specification 1.4, 4).
pub const MP_TABLE: u64 = 0x9_fc00;
/// End of base memory; from here to [`HIGH_MEMORY`] a PC has no memory.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// Memory above the first megabyte.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Start of the hole for devices.
pub const HOLE: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio slot.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of a virtio-mmio slot.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for KVM on Intel hosts.
pub const TSS: u32 = 0xfffb_d000;

/// First interrupt for devices: below are timer, keyboard, cascade and serial ports of a PC.
pub const FIRST_IRQ: u32 = 5;
/// Pins of the in-kernel IOAPIC.
pub const IOAPIC_PINS: u8 = 24;
/// Slots for virtio-mmio devices: one interrupt each.
pub const VIRTIO_SLOTS: u32 = IOAPIC_PINS as u32 - FIRST_IRQ;

/// First I/O port of the serial port, and its interrupt.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// The keyboard controller, whose command port resets a PC.
pub const I8042_PORT: u16 = 0x60;

/// Ranges of guest memory for `bytes` of it: below the hole, and the rest above 4 GiB.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

/// Largest memory block of Linux on x86-64, the unit in which it takes and gives memory (`arch/x86/mm/init_64.c`).
const MAX_MEMORY_BLOCK: u64 = 2 << 30;
/// Its memory blocks while boot memory ends below [`LARGE_MEMORY`].
const MEMORY_BLOCK: u64 = 128 << 20;
/// From here on they are as large as divides the end of boot memory.
const LARGE_MEMORY: u64 = 64 << 30;

/// Where memory comes and goes in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotplugRange {
    /// First guest physical address, a multiple of 2 GiB.
    pub gpa: u64,
    /// Length in bytes, a multiple of `step`.
    pub len: u64,
    /// Most of it that may be there at a time, in bytes.
    pub most: u64,
    /// Bytes of the guest's own memory blocks, or a multiple of that.
    pub step: u64,
}

/// Room for `most` bytes, not zero, beside `boot` bytes of memory: above all of it, in whole memory blocks of the guest, as it has
/// no use for a part of one.
pub fn hotplug_range(boot: u64, most: u64) -> HotplugRange {
    let end = ram_ranges(boot).last().map_or(0, |(gpa, len)| gpa + len);
    let gpa = end.max(HOLE_END).next_multiple_of(MAX_MEMORY_BLOCK);
    let step = if end < LARGE_MEMORY { MEMORY_BLOCK } else { MAX_MEMORY_BLOCK };
    HotplugRange { gpa, len: most.next_multiple_of(step), most, step }
}

/// Most bytes of files that are shown to a guest. A kernel's own account of them is a 64th, so nobody wants more.
const MAX_FILES: u64 = 16 << 30;

/// Where files of the host can be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilesRange {
    /// First guest physical address, a multiple of 2 GiB.
    pub gpa: u64,
    /// Length in bytes, a multiple of 2 MiB.
    pub len: u64,
}

/// Room for files beside `boot` bytes of memory and what can come to it, above all of it, on a processor with so many bits of physical
/// address. `None` if it has no more addresses.
pub fn files_range(boot: u64, hotplug: Option<HotplugRange>, address_bits: u32) -> Option<FilesRange> {
    let end = ram_ranges(boot).last().map_or(0, |(gpa, len)| gpa + len);
    let end = hotplug.map_or(end, |range| range.gpa + range.len);
    let gpa = end.max(HOLE_END).next_multiple_of(MAX_MEMORY_BLOCK);
    let limit = 1_u64.checked_shl(address_bits)?;
    let len = limit.checked_sub(gpa).filter(|left| *left > 0)?.min(MAX_FILES);
    Some(FilesRange { gpa, len })
}

/// What the memory map tells a kernel it may use: `(first address, length)`, ascending.
pub fn usable_ranges(ram: &[crate::memory::RamRange]) -> Vec<(u64, u64)> {
    let low = ram[0].len;
    let mut usable = vec![(0, MP_TABLE), (HIGH_MEMORY, low - HIGH_MEMORY)];
    usable.extend(ram[1..].iter().map(|r| (r.gpa, r.len)));
    usable
}

/// Registers and interrupt of a virtio-mmio slot below [`VIRTIO_SLOTS`].
pub fn virtio_slot(slot: u32) -> (u64, u32) {
    debug_assert!(slot < VIRTIO_SLOTS);
    (VIRTIO_MMIO + u64::from(slot) * VIRTIO_MMIO_SIZE, FIRST_IRQ + slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamRange;

    #[test]
    fn nothing_overlaps() {
        let places = [
            (GDT, 0x100),
            (PVH_START_INFO, 0x40),
            (PVH_MODULES, 0x20),
            (ZERO_PAGE, 0x1000),
            (PAGE_TABLES, 6 * 0x1000),
            (CMDLINE, vmm_api::config::MAX_CMDLINE as u64),
            (MP_TABLE, BASE_MEMORY_END - MP_TABLE),
            (HIGH_MEMORY, HOLE - HIGH_MEMORY),
            (VIRTIO_MMIO, u64::from(VIRTIO_SLOTS) * VIRTIO_MMIO_SIZE),
            (IOAPIC.into(), 0x1000),
            (LOCAL_APIC.into(), 0x1000),
            (TSS.into(), 0x3000),
            (HOLE_END, 1),
        ];
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ram_ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ram_ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ram_ranges((3 << 30) + (2 << 20)), [(0, 3 << 30), (4 << 30, 2 << 20)]);
        let ram =
            [RamRange { gpa: 0, len: HOLE, host: 0 }, RamRange { gpa: HOLE_END, len: 5 << 30, host: 0 }];
        assert_eq!(
            usable_ranges(&ram),
            [(0, MP_TABLE), (HIGH_MEMORY, HOLE - HIGH_MEMORY), (HOLE_END, 5 << 30)]
        );
    }

    #[test]
    fn what_comes_and_goes_lies_above_all_memory_in_whole_blocks_of_the_guest() {
        const GIB: u64 = 1 << 30;
        let range = |gpa, len, most, step| HotplugRange { gpa, len, most, step };
        assert_eq!(hotplug_range(256 << 20, 300 << 20), range(4 * GIB, 384 << 20, 300 << 20, 128 << 20));
        assert_eq!(hotplug_range(3 * GIB, GIB), range(4 * GIB, GIB, GIB, 128 << 20));
        assert_eq!(hotplug_range(4 * GIB, GIB), range(6 * GIB, GIB, GIB, 128 << 20));
        assert_eq!(hotplug_range(63 * GIB - 1, GIB).step, 128 << 20);
        assert_eq!(hotplug_range(63 * GIB, GIB), range(64 * GIB, 2 * GIB, GIB, 2 * GIB));
    }

    #[test]
    fn files_lie_above_all_memory_as_far_as_there_are_addresses() {
        const GIB: u64 = 1 << 30;
        let range = |gpa, len| Some(FilesRange { gpa: gpa * GIB, len: len * GIB });
        assert_eq!(files_range(256 << 20, None, 40), range(4, 16));
        assert_eq!(files_range(256 << 20, Some(hotplug_range(256 << 20, 3 * GIB)), 40), range(8, 16));
        assert_eq!(files_range(5 * GIB, None, 36), range(6, 16));
        // A processor of 36 bits has 64 GiB.
        assert_eq!(files_range(55 * GIB, None, 36), range(56, 8));
        assert_eq!(files_range(63 * GIB, None, 36), None);
        assert_eq!(files_range(64 * GIB, None, 36), None);
        assert_eq!(files_range(GIB, None, 64), None);
    }

    #[test]
    fn each_slot_has_registers_and_a_pin_of_its_own() {
        assert_eq!(virtio_slot(0), (0xd000_0000, 5));
        assert_eq!(virtio_slot(VIRTIO_SLOTS - 1), (0xd001_2000, u32::from(IOAPIC_PINS) - 1));
    }
}
