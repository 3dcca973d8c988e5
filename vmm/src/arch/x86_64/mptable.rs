//! The MP table: CPUs, IOAPIC and interrupts for a kernel without ACPI (Intel MultiProcessor Specification 1.4).

use super::layout::{IOAPIC, IOAPIC_PINS, LOCAL_APIC, MP_TABLE};

/// Entry types (4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Processor flags (4.3.1).
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Interrupt types (4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Version of the specification, 1.4.
const SPEC: u8 = 4;
/// Version register of the local APIC and IOAPIC in KVM.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const ISA_BUS: u8 = 0;
const FLOATING_POINTER: usize = 16;

/// The floating pointer and the configuration table, for [`MP_TABLE`]. `cpu_signature` and `cpu_features` are EAX and
/// EDX of CPUID leaf 1.
pub fn build(vcpus: u8, cpu_signature: u32, cpu_features: u32) -> Vec<u8> {
    let (count, entries) = entries(vcpus, cpu_signature, cpu_features);
    let table = configuration(count, &entries);
    let mut bytes = floating_pointer();
    bytes.extend(table);
    bytes
}

fn floating_pointer() -> Vec<u8> {
    let table = u32::try_from(MP_TABLE).expect("below 1 MiB") + 16;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table.to_le_bytes());
    // Length in paragraphs, version, checksum; then five feature bytes: a configuration table is present (0), no PIC
    // mode (0).
    pointer.extend([1, SPEC, 0, 0, 0, 0, 0, 0]);
    debug_assert_eq!(pointer.len(), FLOATING_POINTER);
    pointer[10] = checksum(&pointer);
    pointer
}

fn configuration(count: u16, entries: &[u8]) -> Vec<u8> {
    const HEADER: usize = 44;
    let mut table = b"PCMP".to_vec();
    table.extend(u16::try_from(HEADER + entries.len()).expect("less than 1 KiB").to_le_bytes());
    table.extend([SPEC, 0]);
    table.extend(b"CTVM    ");
    table.extend(b"MICROVM     ");
    // No OEM table.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    // No extended table.
    table.extend([0; 4]);
    debug_assert_eq!(table.len(), HEADER);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

fn entries(vcpus: u8, signature: u32, features: u32) -> (u16, Vec<u8>) {
    let io_apic = vcpus;
    let mut count = 0;
    let mut bytes = Vec::new();
    let mut push = |entry: &[u8]| {
        count += 1;
        bytes.extend(entry);
    };
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        let mut entry = vec![PROCESSOR, id, LOCAL_APIC_VERSION, flags];
        entry.extend(signature.to_le_bytes());
        entry.extend(features.to_le_bytes());
        entry.extend([0; 8]);
        push(&entry);
    }
    push(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut entry = vec![IO_APIC, io_apic, IO_APIC_VERSION, ENABLED];
    entry.extend(IOAPIC.to_le_bytes());
    push(&entry);
    // An ISA interrupt for each pin, of the same number: edge triggered, active high, which suits an irqfd.
    for pin in 0..IOAPIC_PINS {
        push(&[IO_INTERRUPT, INT, 0, 0, ISA_BUS, pin, io_apic, pin]);
    }
    push(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    push(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);
    (count, bytes)
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::kernel::le;
    use super::super::layout::BASE_MEMORY_END;
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_largest_vm_fits_base_memory() {
        let table = build(vmm_api::config::MAX_VCPUS, 0, 0);
        assert!(table.len() as u64 <= BASE_MEMORY_END - MP_TABLE, "{} bytes", table.len());
    }

    #[test]
    fn a_kernel_can_walk_it() {
        let bytes = build(4, 0x1234, 0x5678);
        assert_eq!(&bytes[..4], b"_MP_");
        assert_eq!(sum(&bytes[..16]), 0);
        assert_eq!(le::<4>(&bytes, 4), MP_TABLE + 16);
        let table = &bytes[16..];
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(le::<2>(table, 4), table.len() as u64);
        assert_eq!(sum(table), 0);

        let (mut at, mut seen) = (44, Vec::new());
        while at < table.len() {
            seen.push(table[at]);
            if table[at] == PROCESSOR {
                assert_eq!(usize::from(table[at + 1]), seen.len() - 1);
                assert_eq!(table[at + 3], if seen.len() == 1 { 3 } else { 1 });
                assert_eq!((le::<4>(table, at + 4), le::<4>(table, at + 8)), (0x1234, 0x5678));
            }
            if table[at] == IO_APIC {
                assert_eq!(table[at + 1], 4, "an id no CPU has");
            }
            at += if table[at] == PROCESSOR { 20 } else { 8 };
        }
        assert_eq!(at, table.len());
        assert_eq!(le::<2>(table, 34), seen.len() as u64);
        assert_eq!(seen.iter().filter(|kind| **kind == PROCESSOR).count(), 4);
        assert_eq!(seen.iter().filter(|kind| **kind == IO_INTERRUPT).count(), 24);
    }
}
