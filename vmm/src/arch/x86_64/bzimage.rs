//! A compressed kernel (x86 boot protocol, Documentation/arch/x86/boot.rst).

use super::kernel::{Entry, Image, Kernel, KernelError, le};
use super::layout::HIGH_MEMORY;
use crate::memory::{GuestRam, MemoryError};

/// Where the setup header begins, in the image as in `boot_params`.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// Last field read here; the header may be longer.
const KNOWN_END: u64 = 0x264;
const SETUP_SECTS: usize = 0x1f1;
const HEADER_LENGTH: usize = 0x201;
const VERSION: usize = 0x206;
const XLOADFLAGS: usize = 0x236;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// `XLF_KERNEL_64`: there is a 64-bit entry, 0x200 bytes after the load address.
const KERNEL_64: u64 = 1;
const ENTRY_64: u64 = 0x200;
/// `xloadflags` came with 2.12.
const MIN_VERSION: u64 = 0x020c;

pub(super) fn load(ram: &GuestRam, image: &Image<'_>) -> Result<Kernel, KernelError> {
    image.check("the setup header's end", 0, KNOWN_END)?;
    let head = &image.head;
    let version = le::<2>(head, VERSION);
    if version < MIN_VERSION || le::<2>(head, XLOADFLAGS) & KERNEL_64 == 0 {
        let version = u16::try_from(version).expect("two bytes");
        return Err(KernelError::Protocol { major: version >> 8, minor: version & 0xff });
    }
    // Zero stands for four, from before setup sectors were counted.
    let sectors = match le::<1>(head, SETUP_SECTS) {
        0 => 4,
        n => n,
    };
    let offset = (sectors + 1) * 512;
    image.check("the setup code's end", offset, 1)?;
    let len = image.size - offset;

    // The kernel unpacks itself from where it is to where it prefers to be; loaded there, it moves the least. It
    // needs `init_size` bytes from there before it can look at the memory map.
    let gpa = le::<8>(head, PREF_ADDRESS);
    if gpa < HIGH_MEMORY {
        return Err(KernelError::TooLow { gpa });
    }
    let room = le::<4>(head, INIT_SIZE).max(len);
    let end = gpa.saturating_add(room);
    if !ram.has(gpa, room) {
        return Err(MemoryError::NoMemory { what: "the kernel, unpacked,", gpa, end }.into());
    }
    let len = usize::try_from(len).expect("fits guest memory");
    ram.read_file("the kernel image", image.file, offset, gpa, len)?;

    let header_end = HEADER_LENGTH + 1 + usize::try_from(le::<1>(head, HEADER_LENGTH)).expect("one byte");
    let setup_header = head.get(SETUP_HEADER..header_end).unwrap_or_default().to_vec();
    Ok(Kernel { entry: Entry::Linux64 { rip: gpa + ENTRY_64, setup_header: Some(setup_header) }, end })
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::kernel::load;
    use super::super::kernel::tests::{file, ram};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn bzimage(version: u16, pref: u64, init_size: u32, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTS] = 1;
        image[HEADER_LENGTH] = 0x6a;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&version.to_le_bytes());
        image[XLOADFLAGS] = 1;
        image[PREF_ADDRESS..PREF_ADDRESS + 8].copy_from_slice(&pref.to_le_bytes());
        image[INIT_SIZE..INIT_SIZE + 4].copy_from_slice(&init_size.to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn loads_behind_the_setup_code_and_keeps_the_header() {
        let ram = ram();
        let image = bzimage(0x20f, 16 * MIB, 1 << 20, b"payload");
        let kernel = load(&ram, file(&image), true).unwrap();
        assert_eq!(kernel.end, 17 * MIB);
        let Entry::Linux64 { rip, setup_header: Some(header) } = kernel.entry else { panic!() };
        assert_eq!(rip, 16 * MIB + 0x200);
        assert_eq!(header.len(), 0x26c - SETUP_HEADER);
        assert_eq!(&header[0x202 - SETUP_HEADER..][..4], b"HdrS");
        let mut bytes = [0; 7];
        ram.memory().read_slice(&mut bytes, GuestAddress(16 * MIB)).unwrap();
        assert_eq!(&bytes, b"payload");
    }

    #[test]
    fn what_cannot_boot_is_refused_with_the_numbers() {
        let text = |image: &[u8]| load(&ram(), file(image), true).unwrap_err().to_string();
        assert_eq!(
            text(&bzimage(0x20b, 16 * MIB, 0, b"x")),
            "the bzImage speaks boot protocol 2.11; 2.12 with a 64-bit entry is needed"
        );
        assert_eq!(
            text(&bzimage(0x20f, 16 * MIB, 48 << 20 | 1, b"x")),
            "the kernel, unpacked, needs guest memory from 0x1000000 to 0x4000001, where there is none"
        );
        assert!(text(&bzimage(0x20f, 0, 0, b"x")).contains("below the first address"));
        assert!(text(&bzimage(0x20f, 16 * MIB, 0, b"")).contains("damaged"));
        assert!(text(&bzimage(0x20f, 16 * MIB, 0, b"x")[..0x240]).contains("damaged"));
    }
}
