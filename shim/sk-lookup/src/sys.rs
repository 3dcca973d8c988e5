//! bpf(2), four of its commands. Each takes the head of `union bpf_attr` of <linux/bpf.h> that belongs to it: the
//! kernel takes what is shorter than its own for followed by zeros.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use super::program::Instruction;

// `enum bpf_cmd`.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

/// `BPF_MAP_TYPE_SOCKMAP`.
const MAP_TYPE_SOCKMAP: u32 = 15;
/// `BPF_PROG_TYPE_SK_LOOKUP`.
const PROG_TYPE_SK_LOOKUP: u32 = 30;
/// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
const ATTACH_SK_LOOKUP: u32 = 36;

/// The program's licence; none of its helpers asks for the GPL.
const LICENSE: &std::ffi::CStr = c"Apache-2.0";

#[derive(Debug, Default)]
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[derive(Debug, Default)]
#[repr(C, align(8))]
struct MapUpdate {
    map_fd: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Debug, Default)]
#[repr(C, align(8))]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[derive(Debug, Default)]
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// One of the structures above.
///
/// # Safety
/// It must be `repr(C)` without padding and the head of the `union bpf_attr` that belongs to `COMMAND`; what its
/// addresses name must be as large as that command reads.
unsafe trait Attributes {
    const COMMAND: libc::c_int;
}

// SAFETY: four fields of one size, those of `BPF_MAP_CREATE`; no addresses.
unsafe impl Attributes for MapCreate {
    const COMMAND: libc::c_int = MAP_CREATE;
}
// SAFETY: the fields of `BPF_MAP_UPDATE_ELEM`, its padding named; made in `put_socket` only, with a key and a value of
// the four bytes that the map was made with.
unsafe impl Attributes for MapUpdate {
    const COMMAND: libc::c_int = MAP_UPDATE_ELEM;
}
// SAFETY: the fields of `BPF_PROG_LOAD` up to `expected_attach_type` at byte 68, with nothing between them; made in
// `load` only, with the address of `insn_cnt` instructions and of a string that ends with a NUL.
unsafe impl Attributes for ProgLoad {
    const COMMAND: libc::c_int = PROG_LOAD;
}
// SAFETY: the fields of `BPF_LINK_CREATE`; no addresses.
unsafe impl Attributes for LinkCreate {
    const COMMAND: libc::c_int = LINK_CREATE;
}

fn bpf<A: Attributes>(attributes: &A) -> io::Result<libc::c_int> {
    let size = libc::c_uint::try_from(size_of::<A>()).expect("a small structure");
    let address: *const A = attributes;
    // SAFETY: the kernel reads `size` bytes at `address`, which is `attributes`, borrowed for the call, and what its
    // addresses name, which `Attributes` promises for this command. It writes nothing: there is no log buffer.
    let result = unsafe { libc::syscall(libc::SYS_bpf, A::COMMAND, address, size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::try_from(result).expect("a descriptor or 0"))
}

/// The same for the commands that make a descriptor (close-on-exec, as all of bpf(2)'s).
fn bpf_fd<A: Attributes>(attributes: &A) -> io::Result<OwnedFd> {
    let fd = bpf(attributes)?;
    // SAFETY: called for map, program and link creation only, which answer with a descriptor made for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(of: *const T) -> u64 {
    of.expose_provenance() as u64
}

/// A map with room for `entries` sockets.
pub fn socket_map(entries: u32) -> io::Result<OwnedFd> {
    bpf_fd(&MapCreate { map_type: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, max_entries: entries })
}

/// Puts `socket` in `slot`, where it stays until it is closed.
pub fn put_socket(map: BorrowedFd<'_>, slot: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let value = number(socket);
    let update = MapUpdate {
        map_fd: number(map),
        key: address(&raw const slot),
        value: address(&raw const value),
        ..MapUpdate::default()
    };
    bpf(&update).map(drop)
}

/// Has the kernel check and take the program.
pub fn load(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let mut prog_name = [0; 16];
    let name = b"ctvm_forward";
    prog_name[..name.len()].copy_from_slice(name);
    bpf_fd(&ProgLoad {
        prog_type: PROG_TYPE_SK_LOOKUP,
        insn_cnt: u32::try_from(instructions.len()).expect("a short program"),
        insns: address(instructions.as_ptr()),
        license: address(LICENSE.as_ptr()),
        prog_name,
        expected_attach_type: ATTACH_SK_LOOKUP,
        ..ProgLoad::default()
    })
}

/// Has `namespace` ask `program` for as long as the descriptor lives.
pub fn attach(program: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf_fd(&LinkCreate {
        prog_fd: number(program),
        target_fd: number(namespace),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn structures_are_laid_out_as_in_the_kernels_header() {
        // gcc's offsetof over <linux/bpf.h>.
        assert_eq!(offset_of!(ProgLoad, log_buf), 32);
        assert_eq!(offset_of!(ProgLoad, prog_name), 48);
        assert_eq!(offset_of!(ProgLoad, expected_attach_type), 68);
        assert_eq!(size_of::<ProgLoad>(), 72);
        assert_eq!((offset_of!(MapUpdate, key), size_of::<MapUpdate>()), (8, 32));
        assert_eq!((offset_of!(LinkCreate, flags), size_of::<LinkCreate>()), (12, 16));
        assert_eq!(size_of::<MapCreate>(), 16);
    }

    #[test]
    fn what_is_no_map_gets_no_socket() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsFd::as_fd(&null);
        assert!(put_socket(fd, 0, fd).is_err());
        assert!(attach(fd, fd).is_err());
    }
}
