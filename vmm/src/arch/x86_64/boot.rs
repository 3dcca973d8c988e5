//! What a kernel finds in memory when it starts: command line, memory map, initial RAM disk, by the protocol of its
//! entry.
//!
//! - PVH: `hvm_start_info` version 1 (Xen, public/arch-x86/hvm/start_info.h), its address in EBX.
//! - 64-bit: `boot_params`, "the zero page" (Documentation/arch/x86/{boot,zero-page}.rst), its address in RSI.

use std::os::fd::AsFd;

use rustix::fs::fstat;
use vm_memory::{Bytes, GuestAddress};

use super::bzimage::SETUP_HEADER;
use super::kernel::{Entry, Kernel};
use super::layout::{self, CMDLINE, PVH_MEMMAP, PVH_MODULES, PVH_START_INFO, ZERO_PAGE};
use super::regs;
use crate::memory::{GuestRam, MemoryError};

const PAGE: u64 = 4096;
/// Kernels take an initial RAM disk below 2 GiB, all of them.
const INITRD_LIMIT: u64 = 0x8000_0000;
/// Type of a memory map entry for memory, in both protocols.
const E820_RAM: u32 = 1;
const XEN_HVM_START_MAGIC: u32 = 0x336e_c578;
/// "Undefined" boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: &[u8; 4] = b"HdrS";
/// What an ELF kernel, which has no setup header of its own, is told: enough for it to use the rest.
const HEADER_VERSION: u16 = 0x020f;

/// The initial RAM disk in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// First address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Puts the initial RAM disk in `file` at the top of low memory.
pub fn load_initrd(ram: &GuestRam, kernel: &Kernel, file: impl AsFd) -> Result<Initrd, MemoryError> {
    const WHAT: &str = "the initial RAM disk";
    let stat = fstat(&file).map_err(|e| MemoryError::Read { what: WHAT, source: e.into() })?;
    let size = u64::try_from(stat.st_size).expect("a file's size is not negative");
    let top = ram.ranges()[0].len.min(INITRD_LIMIT);
    let gpa = top.saturating_sub(size) / PAGE * PAGE;
    match u32::try_from(size) {
        Ok(len) if gpa >= kernel.end => {
            ram.read_file(WHAT, file, 0, gpa, len as usize)?;
            Ok(Initrd { gpa, len })
        }
        _ => {
            let gpa = kernel.end;
            Err(MemoryError::NoMemory { what: WHAT, gpa, end: gpa.saturating_add(size) })
        }
    }
}

/// Writes command line and tables for `kernel`'s entry. `cmdline` is at most `MAX_CMDLINE` - 1 bytes long and has no
/// NUL: `config` checked it.
pub fn write_tables(ram: &GuestRam, kernel: &Kernel, cmdline: &str, initrd: Option<Initrd>) {
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    put(ram, CMDLINE, &line);
    match &kernel.entry {
        Entry::Pvh { .. } => write_pvh(ram, initrd),
        Entry::Linux64 { setup_header, .. } => {
            let page = zero_page(ram, setup_header.as_deref(), cmdline.len(), initrd);
            put(ram, ZERO_PAGE, &page);
            put(ram, layout::GDT, &regs::gdt());
            for (index, table) in (0u64..).zip(regs::page_tables()) {
                put(ram, layout::PAGE_TABLES + index * PAGE, &table);
            }
        }
    }
}

/// Writes the table that [`super::mptable::build`] made.
pub fn write_mp_table(ram: &GuestRam, table: &[u8]) {
    put(ram, layout::MP_TABLE, table);
}

fn put(ram: &GuestRam, gpa: u64, bytes: &[u8]) {
    let written = ram.memory().write_slice(bytes, GuestAddress(gpa));
    written.expect("every guest has the memory below 1 MiB, where all tables are");
}

fn write_pvh(ram: &GuestRam, initrd: Option<Initrd>) {
    let usable = layout::usable_ranges(ram.ranges());
    let mut memmap = Vec::new();
    for &(gpa, len) in &usable {
        memmap.extend(gpa.to_le_bytes());
        memmap.extend(len.to_le_bytes());
        memmap.extend(E820_RAM.to_le_bytes());
        memmap.extend(0u32.to_le_bytes());
    }
    put(ram, PVH_MEMMAP, &memmap);

    let mut modules = 0u32;
    if let Some(Initrd { gpa, len }) = initrd {
        modules = 1;
        let mut module = Vec::new();
        for field in [gpa, len.into(), 0, 0] {
            module.extend(field.to_le_bytes());
        }
        put(ram, PVH_MODULES, &module);
    }

    let mut info = Vec::new();
    for field in [XEN_HVM_START_MAGIC, 1, 0, modules] {
        info.extend(field.to_le_bytes());
    }
    let rsdp = 0;
    for address in [PVH_MODULES, CMDLINE, rsdp, PVH_MEMMAP] {
        info.extend(address.to_le_bytes());
    }
    info.extend(u32::try_from(usable.len()).expect("at most three").to_le_bytes());
    info.extend(0u32.to_le_bytes());
    put(ram, PVH_START_INFO, &info);
}

fn zero_page(ram: &GuestRam, setup_header: Option<&[u8]>, cmdline: usize, initrd: Option<Initrd>) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let mut set = |offset: usize, bytes: &[u8]| page[offset..offset + bytes.len()].copy_from_slice(bytes);
    match setup_header {
        Some(header) => set(SETUP_HEADER, header),
        None => {
            set(0x1fe, &BOOT_FLAG.to_le_bytes());
            set(0x202, HEADER_MAGIC);
            set(0x206, &HEADER_VERSION.to_le_bytes());
            set(0x230, &0x20_0000u32.to_le_bytes());
        }
    }
    set(0x210, &[LOADER_UNDEFINED]);
    set(0x228, &low32(CMDLINE));
    set(0x238, &u32::try_from(cmdline).expect("a command line is short").to_le_bytes());
    if let Some(Initrd { gpa, len }) = initrd {
        set(0x218, &low32(gpa));
        set(0x21c, &len.to_le_bytes());
    }
    let usable = layout::usable_ranges(ram.ranges());
    set(0x1e8, &[u8::try_from(usable.len()).expect("at most three")]);
    for (index, (gpa, len)) in usable.into_iter().enumerate() {
        let at = 0x2d0 + index * 20;
        set(at, &gpa.to_le_bytes());
        set(at + 8, &len.to_le_bytes());
        set(at + 16, &E820_RAM.to_le_bytes());
    }
    page
}

fn low32(gpa: u64) -> [u8; 4] {
    u32::try_from(gpa).expect("below 4 GiB").to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::kernel::le;
    use super::super::kernel::tests::{file, ram};
    use super::*;

    fn get<const N: usize>(ram: &GuestRam, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn pvh_kernel() -> Kernel {
        Kernel { entry: Entry::Pvh { eip: 0x100_0000 }, end: 32 << 20 }
    }

    #[test]
    fn pvh_tables_lead_to_everything() {
        let ram = ram();
        let initrd = load_initrd(&ram, &pvh_kernel(), file(&[7; 5000])).unwrap();
        assert_eq!(initrd, Initrd { gpa: (64 << 20) - 8192, len: 5000 });
        write_tables(&ram, &pvh_kernel(), "quiet", Some(initrd));
        let info = get::<56>(&ram, PVH_START_INFO);
        assert_eq!(le::<4>(&info, 0), 0x336e_c578);
        assert_eq!(le::<4>(&info, 12), 1);
        assert_eq!(&get::<6>(&ram, le::<8>(&info, 24)), b"quiet\0");
        let module = get::<16>(&ram, le::<8>(&info, 16));
        assert_eq!((le::<8>(&module, 0), le::<8>(&module, 8)), (initrd.gpa, 5000));
        assert_eq!(le::<4>(&info, 48), 2);
        let map = get::<48>(&ram, le::<8>(&info, 40));
        assert_eq!((le::<8>(&map, 24), le::<8>(&map, 32), le::<4>(&map, 40)), (1 << 20, 63 << 20, 1));
    }

    #[test]
    fn the_zero_page_keeps_a_bzimage_header() {
        let ram = ram();
        let mut header = vec![0; 0x7b];
        header[0x258 - SETUP_HEADER] = 0x55;
        let kernel =
            Kernel { entry: Entry::Linux64 { rip: 0x100_0200, setup_header: Some(header) }, end: 32 << 20 };
        write_tables(&ram, &kernel, "a=b", None);
        let page = get::<4096>(&ram, ZERO_PAGE);
        assert_eq!(page[0x258], 0x55);
        assert_eq!(page[0x210], 0xff);
        assert_eq!(le::<4>(&page, 0x228), CMDLINE);
        assert_eq!(le::<4>(&page, 0x238), 3);
        assert_eq!(page[0x1e8], 2);
        assert_eq!(le::<8>(&page, 0x2d0 + 20), 1 << 20);
    }

    #[test]
    fn an_elf_kernel_gets_a_header_it_can_read() {
        let ram = ram();
        let kernel = Kernel { entry: Entry::Linux64 { rip: 0x100_0000, setup_header: None }, end: 32 << 20 };
        write_tables(&ram, &kernel, "", None);
        let page = get::<4096>(&ram, ZERO_PAGE);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(le::<2>(&page, 0x1fe), 0xaa55);
    }

    #[test]
    fn a_ram_disk_that_reaches_into_the_kernel_is_refused() {
        let error = load_initrd(&ram(), &pvh_kernel(), file(&vec![0; 33 << 20])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the initial RAM disk needs guest memory from 0x2000000 to 0x4100000, where there is none"
        );
    }
}
