//! From a kernel image's file to a kernel in guest memory and the place to enter it.
//!
//! Three roads: an ELF `vmlinux` by its PVH note, an ELF `vmlinux` by its 64-bit entry, a bzImage by its 64-bit
//! entry. The image is read straight into guest memory. Nothing in it is trusted: every offset and length is
//! checked against the file and against guest memory.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, fstat};

use super::layout::HIGH_MEMORY;
use super::{bzimage, elf};
use crate::memory::{GuestRam, MemoryError};

/// A kernel image cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be looked at.
    #[error("read the kernel image")]
    Io(#[from] io::Error),
    /// Not a file.
    #[error("the kernel image is not a regular file")]
    NotAFile,
    /// Neither format.
    #[error(
        "the kernel image is neither an ELF vmlinux nor a bzImage: it begins with {magic:02x?}{hint}, {size} bytes in all"
    )]
    Format {
        /// First bytes.
        magic: Vec<u8>,
        /// What it may be instead.
        hint: &'static str,
        /// Size of the file.
        size: u64,
    },
    /// An ELF file of another kind.
    #[error("the kernel's ELF header says {what} {got:#x} where {want:#x} is needed")]
    Elf {
        /// Which field.
        what: &'static str,
        /// What it holds.
        got: u64,
        /// What it must hold.
        want: u64,
    },
    /// A field of the image points or reaches where it must not.
    #[error("the kernel image is damaged: {what} {value:#x} is not below {limit:#x}")]
    Bounds {
        /// Which field.
        what: &'static str,
        /// What it holds.
        value: u64,
        /// Its limit.
        limit: u64,
    },
    /// Part of the kernel belongs where the VMM's boot tables are.
    #[error("the kernel wants to be at {gpa:#x}, below the first address for kernels, {HIGH_MEMORY:#x}")]
    TooLow {
        /// Where.
        gpa: u64,
    },
    /// A bzImage of an old protocol.
    #[error("the bzImage speaks boot protocol {major}.{minor:02}; 2.12 with a 64-bit entry is needed")]
    Protocol {
        /// Major version.
        major: u16,
        /// Minor version.
        minor: u16,
    },
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Where, and how, a kernel is entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// In 32-bit protected mode, at the address of the PVH note (Xen's "x86/HVM direct boot ABI").
    Pvh {
        /// Physical address.
        eip: u32,
    },
    /// In long mode with a `boot_params` (x86 boot protocol, "64-bit boot protocol").
    Linux64 {
        /// Physical address.
        rip: u64,
        /// Setup header of a bzImage; an ELF image has none.
        setup_header: Option<Vec<u8>>,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// How to enter it.
    pub entry: Entry,
    /// First address that it does not need when it starts.
    pub end: u64,
}

/// Loads the kernel in `image`; `pvh`: by its PVH note where it has one.
pub fn load(ram: &GuestRam, image: impl AsFd, pvh: bool) -> Result<Kernel, KernelError> {
    let image = Image::open(image.as_fd())?;
    if image.head.starts_with(b"\x7fELF") {
        elf::load(ram, &image, pvh)
    } else if image.head.get(0x202..0x206) == Some(b"HdrS") {
        bzimage::load(ram, &image)
    } else {
        let magic = image.head[..image.head.len().min(4)].to_vec();
        Err(KernelError::Format { hint: hint(&magic), magic, size: image.size })
    }
}

fn hint(magic: &[u8]) -> &'static str {
    match magic {
        [0x1f, 0x8b, ..] => " (gzip: unpack it)",
        [0x28, 0xb5, 0x2f, 0xfd] => " (zstd: unpack it)",
        [b'M', b'Z', ..] => " (an EFI program)",
        [] => " (it is empty)",
        _ => "",
    }
}

/// A kernel image's file, its size and its first bytes.
#[derive(Debug)]
pub(super) struct Image<'a> {
    pub(super) file: std::os::fd::BorrowedFd<'a>,
    pub(super) size: u64,
    pub(super) head: Vec<u8>,
}

impl<'a> Image<'a> {
    /// Enough for the header and program headers of a kernel, and for the setup header of a bzImage.
    const HEAD: usize = 4096;

    fn open(file: std::os::fd::BorrowedFd<'a>) -> Result<Self, KernelError> {
        let stat = fstat(file).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(KernelError::NotAFile);
        }
        let size = u64::try_from(stat.st_size).expect("a file's size is not negative");
        let mut head = vec![0; Self::HEAD.min(usize::try_from(size).unwrap_or(Self::HEAD))];
        read_exact_at(file, &mut head, 0)?;
        Ok(Image { file, size, head })
    }

    /// Reads `buf.len()` bytes at `offset`.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), KernelError> {
        Ok(read_exact_at(self.file, buf, offset)?)
    }

    /// Checks that `[offset, offset + len)` lies in the file.
    pub(super) fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), KernelError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            end => Err(KernelError::Bounds { what, value: end.unwrap_or(u64::MAX), limit: self.size + 1 }),
        }
    }
}

fn read_exact_at(file: std::os::fd::BorrowedFd<'_>, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match rustix::io::pread(file, &mut *buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// The little-endian number of `N` bytes at `offset`; zero beyond the end of `bytes`.
pub(super) fn le<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    const { assert!(N <= 8) };
    let mut wide = [0; 8];
    if let Some(field) = bytes.get(offset..offset.saturating_add(N)) {
        wide[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(wide)
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::io::Write;

    use vmm_api::GuestMemoryBacking;

    use super::*;

    pub(in super::super) fn ram() -> GuestRam {
        GuestRam::map(&[(0, 64 << 20)], GuestMemoryBacking::Anonymous, false).unwrap()
    }

    pub(in super::super) fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_no_kernel_is_said_to_be_none() {
        let text = |bytes: &[u8]| load(&ram(), file(bytes), true).unwrap_err().to_string();
        assert_eq!(
            text(b"#!/bin/sh\n"),
            "the kernel image is neither an ELF vmlinux nor a bzImage: it begins with [23, 21, 2f, 62], 10 bytes in all"
        );
        assert!(text(b"\x1f\x8b\x08\0").contains("gzip"));
        assert!(text(b"").contains("empty"));
    }

    #[test]
    fn a_directory_is_no_kernel() {
        let dir = File::open("/").unwrap();
        assert!(matches!(load(&ram(), dir, true), Err(KernelError::NotAFile)));
    }

    #[test]
    fn numbers_beyond_the_end_are_zero() {
        assert_eq!(le::<4>(&[1, 2, 3, 4], 0), 0x0403_0201);
        assert_eq!(le::<4>(&[1, 2, 3], 0), 0);
        assert_eq!(le::<8>(&[1], usize::MAX), 0);
    }
}
