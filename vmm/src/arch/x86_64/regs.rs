//! Registers of the boot CPU at its first instruction. The other CPUs wait for INIT and SIPI as on hardware.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::kernel::Entry;
use super::layout::{GDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads as one.
const RFLAGS: u64 = 2;

/// Page table entry: present and writable.
const PRESENT: u64 = 3;
/// Page directory entry for 2 MiB.
const HUGE: u64 = 1 << 7;

/// Selectors of the 64-bit boot protocol: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Descriptor types (Intel SDM vol. 3A, "Code- and Data-Segment Descriptor Types", "System Descriptor Types").
const EXEC_READ_ACCESSED: u8 = 0xb;
const READ_WRITE_ACCESSED: u8 = 0x3;
const TASK_BUSY: u8 = 0xb;

/// Sets what differs from the reset state for `entry`.
pub fn enter(entry: &Entry, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
    regs.rflags = RFLAGS;
    match *entry {
        Entry::Pvh { eip } => {
            // Flat 32-bit segments, no paging (Xen, docs/misc/pvh: "PVH boot").
            flat(sregs, false);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            regs.rip = eip.into();
            regs.rbx = PVH_START_INFO;
        }
        Entry::Linux64 { rip, .. } => {
            flat(sregs, true);
            sregs.gdt.base = GDT;
            sregs.gdt.limit = u16::try_from(gdt().len() - 1).expect("five descriptors");
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer |= EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = ZERO_PAGE;
        }
    }
}

fn flat(sregs: &mut kvm_sregs, long: bool) {
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    sregs.cs = segment(CODE, EXEC_READ_ACCESSED);
    if long {
        sregs.cs.l = 1;
        sregs.cs.db = 0;
    }
    let data = segment(DATA, READ_WRITE_ACCESSED);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(TASK, TASK_BUSY) };
}

/// The descriptors that [`enter`] says are loaded, for a kernel that loads them again.
pub fn gdt() -> Vec<u8> {
    let descriptors: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
    descriptors.iter().flat_map(|d| d.to_le_bytes()).collect()
}

/// Page tables that map the first 4 GiB onto themselves with 2 MiB pages, in the order they lie at [`PAGE_TABLES`]:
/// PML4, PDPT, four PDs.
pub fn page_tables() -> Vec<Vec<u8>> {
    let table = |entries: &mut dyn Iterator<Item = u64>| {
        let mut bytes: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        bytes.resize(4096, 0);
        bytes
    };
    let pml4 = table(&mut std::iter::once((PAGE_TABLES + 0x1000) | PRESENT));
    let pdpt = table(&mut (2..6).map(|n| (PAGE_TABLES + n * 0x1000) | PRESENT));
    let directories =
        (0..4u64).map(|gib| table(&mut (0..512).map(|n| ((gib << 30) + (n << 21)) | PRESENT | HUGE)));
    [pml4, pdpt].into_iter().chain(directories).collect()
}

#[cfg(test)]
mod tests {
    use super::super::kernel::le;
    use super::*;

    #[test]
    fn pvh_is_entered_flat_and_unpaged() {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        enter(&Entry::Pvh { eip: 0x100_0040 }, &mut sregs, &mut regs);
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0040, PVH_START_INFO, 2));
        assert_eq!(sregs.cr0 & CR0_PG, 0);
        assert_eq!((sregs.cs.db, sregs.cs.l, sregs.cs.limit), (1, 0, 0xffff_ffff));
    }

    #[test]
    fn linux64_is_entered_in_long_mode() {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        enter(&Entry::Linux64 { rip: 0x100_0200, setup_header: None }, &mut sregs, &mut regs);
        assert_eq!((regs.rip, regs.rsi), (0x100_0200, ZERO_PAGE));
        assert_eq!(sregs.efer & EFER_LMA, EFER_LMA);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_eq!(usize::from(sregs.gdt.limit) + 1, gdt().len());
    }

    #[test]
    fn descriptors_say_what_the_registers_say() {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        enter(&Entry::Linux64 { rip: 0x100_0200, setup_header: None }, &mut sregs, &mut regs);
        for segment in [sregs.cs, sregs.ds, sregs.tr] {
            let descriptor = le::<8>(&gdt(), segment.selector.into());
            assert_eq!(descriptor >> 40 & 0xf, u64::from(segment.type_));
            assert_eq!(descriptor >> 53 & 1, u64::from(segment.l));
            assert_eq!(descriptor >> 54 & 1, u64::from(segment.db));
        }
    }

    #[test]
    fn four_gib_map_onto_themselves() {
        let tables = page_tables();
        assert_eq!(tables.len(), 6);
        for gpa in [0u64, 0x1234_5678, 0xfee0_0000] {
            let directory = usize::try_from(gpa >> 30).unwrap();
            assert_eq!(
                le::<8>(&tables[1], directory * 8) & !0xfff,
                PAGE_TABLES + (directory as u64 + 2) * 0x1000
            );
            let entry = le::<8>(&tables[2 + directory], usize::try_from(gpa >> 21 & 0x1ff).unwrap() * 8);
            assert_eq!(entry & !0x1f_ffff, gpa & !0x1f_ffff);
            assert_eq!(entry & 0x83, 0x83);
        }
    }
}
