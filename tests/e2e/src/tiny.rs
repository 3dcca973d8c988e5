//! Guests of a few instructions, for what no Linux would do.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::Result;
use vmm_api::{FdIndex, KernelConfig, VmConfig};

/// `mov al, 0xfe; out 0x64, al; hlt; jmp $-1`: the keyboard controller's reset.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Where the code of [`kernel`] lies.
const ENTRY: u32 = 0x100_0000;

/// One vCPU, 64 MiB, the kernel as descriptor 0, and no device.
pub fn config() -> VmConfig {
    let kernel = KernelConfig { image: FdIndex(0), initrd: None, cmdline: String::new(), pvh: true };
    VmConfig { name: "tiny".into(), ..VmConfig::new(64, kernel) }
}

/// An ELF kernel that is nothing but `code`, entered in 32-bit mode, without paging, at its first byte.
///
/// # Errors
/// No file can be made in `/var/tmp`.
pub fn kernel(code: &[u8]) -> Result<OwnedFd> {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[24..32].copy_from_slice(&u64::from(ENTRY).to_le_bytes());
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 2;
    // The PVH note: sizes of name and descriptor, type, "Xen", the entry.
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let (code_len, note_len) = (code.len() as u64, note.len() as u64);
    for (kind, offset, gpa, len) in [(1_u32, 4096, ENTRY.into(), code_len), (4, 4096 + code_len, 0, note_len)]
    {
        elf.extend(kind.to_le_bytes());
        elf.extend(5_u32.to_le_bytes());
        for field in [offset, gpa, gpa, len, len, 4] {
            elf.extend(field.to_le_bytes());
        }
    }
    elf.resize(4096, 0);
    elf.extend(code);
    elf.extend(note);
    let mut file: File = tempfile::tempfile_in("/var/tmp")?;
    file.write_all(&elf)?;
    Ok(file.into())
}
