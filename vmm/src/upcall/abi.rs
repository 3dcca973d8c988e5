//! The upcall channel's structures, as `kernel-config/upcall/ctvm_upcall_abi.h` has them. A test compares the two.

#![allow(missing_debug_implementations, reason = "said of what zerocopy derives, which has one")]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `CTVM_UPCALL_MAGIC`.
pub const MAGIC: u32 = 0x5055_5443;
/// `CTVM_UPCALL_VERSION`.
pub const VERSION: u16 = 1;
/// `CTVM_UPCALL_PORT`: the host's port, which the guest's kernel dials.
pub const PORT: u32 = 1023;
/// Ports below this are for the guest's kernel, and for whom it lets (`LAST_RESERVED_PORT` of Linux).
pub const PRIVILEGED: u32 = 1024;
/// `CTVM_UPCALL_MAX_LEN`.
pub const MAX_LEN: usize = 4096;
/// `CTVM_UPCALL_REPLY`.
pub const REPLY: u16 = 0x8000;

/// `enum ctvm_upcall_type`.
pub mod kind {
    /// Guest: here I am.
    pub const HELLO: u16 = 1;
    /// Host: go on, with this epoch.
    pub const WELCOME: u16 = 2;
    /// Host: go away.
    pub const REFUSED: u16 = 3;
    /// How the guest sees itself.
    pub const QUERY: u16 = 16;
    /// Which CPUs shall be online.
    pub const SET_CPUS: u16 = 17;
    /// Do what the virtio-mem device asks for.
    pub const SET_MEMORY: u16 = 18;
    /// A device has come.
    pub const ADD_DEVICE: u16 = 19;
    /// A device is to go.
    pub const REMOVE_DEVICE: u16 = 20;
    /// Wall clock.
    pub const SET_TIME: u16 = 21;
    /// Entropy.
    pub const RESEED: u16 = 22;
    /// Hold still for a snapshot.
    pub const FREEZE: u16 = 23;
    /// Go on after it.
    pub const THAW: u16 = 24;
}

macro_rules! structures {
    ($($(#[$doc:meta])* $c:literal $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
            #[repr(C)]
            #[allow(missing_docs, reason = "the header says what each field is")]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        )*

        /// Each structure's name in C, its size, and its fields with their offsets.
        #[cfg(test)]
        pub(super) fn layout() -> Vec<(&'static str, usize, Vec<(&'static str, usize)>)> {
            vec![$((
                $c,
                size_of::<$name>(),
                vec![$((stringify!($field), std::mem::offset_of!($name, $field))),*],
            )),*]
        }
    };
}

structures! {
    /// Before every frame.
    "ctvm_upcall_header" Header {
        magic: U32,
        version: U16,
        type_: U16,
        len: U32,
        status: U32,
        deadline_ms: U32,
        reserved: U32,
        epoch: U64,
        seq: U64,
    }
    /// What the guest is.
    "ctvm_upcall_hello" Hello {
        ops: U64,
        memory_block: U64,
        page_size: U32,
        reserved: U32,
        possible: [U64; 4],
        online: [U64; 4],
        release: [u8; 64],
    }
    /// How the guest sees itself.
    "ctvm_upcall_view" View {
        online: [U64; 4],
        total_bytes: U64,
        free_bytes: U64,
        realtime_ns: U64,
        frozen: U32,
        devices: U32,
    }
    /// CPUs that shall be online.
    "ctvm_upcall_cpus" Cpus {
        online: [U64; 4],
    }
    /// What became of one CPU.
    "ctvm_upcall_cpu_result" CpuResult {
        apic_id: U32,
        status: U32,
    }
    /// What became of all.
    "ctvm_upcall_cpus_done" CpusDone {
        online: [U64; 4],
        count: U32,
        reserved: U32,
    }
    /// Which device asks for memory, and how much.
    "ctvm_upcall_memory" Memory {
        base: U64,
        requested_bytes: U64,
    }
    /// A virtio-mmio device.
    "ctvm_upcall_device" Device {
        base: U64,
        size: U64,
        irq: U32,
        reserved: U32,
    }
    /// Wall clock.
    "ctvm_upcall_time" Time {
        realtime_ns: U64,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernel-config/upcall/ctvm_upcall_abi.h");

    /// Lets a C compiler check what this module believes of the header.
    #[test]
    fn the_header_says_the_same() {
        let mut source = format!("#include <stddef.h>\n#include \"{HEADER}\"\n");
        let mut claim = |claim: String| source.push_str(&format!("_Static_assert({claim}, \"{claim}\");\n"));
        for (name, size, fields) in layout() {
            claim(format!("sizeof(struct {name}) == {size}"));
            for (field, offset) in fields {
                let field = field.trim_end_matches('_');
                claim(format!("offsetof(struct {name}, {field}) == {offset}"));
            }
        }
        let kinds = [
            ("HELLO", kind::HELLO),
            ("WELCOME", kind::WELCOME),
            ("REFUSED", kind::REFUSED),
            ("QUERY", kind::QUERY),
            ("SET_CPUS", kind::SET_CPUS),
            ("SET_MEMORY", kind::SET_MEMORY),
            ("ADD_DEVICE", kind::ADD_DEVICE),
            ("REMOVE_DEVICE", kind::REMOVE_DEVICE),
            ("SET_TIME", kind::SET_TIME),
            ("RESEED", kind::RESEED),
            ("FREEZE", kind::FREEZE),
            ("THAW", kind::THAW),
            ("REPLY", REPLY),
            ("VERSION", VERSION),
        ];
        for (name, value) in kinds {
            claim(format!("CTVM_UPCALL_{name} == {value}"));
        }
        claim(format!("CTVM_UPCALL_MAGIC == {MAGIC}"));
        claim(format!("CTVM_UPCALL_PORT == {PORT}"));
        claim(format!("CTVM_UPCALL_MAX_LEN == {MAX_LEN}"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("abi.c");
        std::fs::write(&file, source).unwrap();
        let checked = Command::new("cc").arg("-fsyntax-only").arg(&file).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }

    #[test]
    fn the_header_has_no_structure_that_is_not_here() {
        let header = std::fs::read_to_string(HEADER).unwrap();
        let mut found: Vec<_> =
            header.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {")).collect();
        let mut known: Vec<_> = layout().into_iter().map(|(name, ..)| name).collect();
        found.sort_unstable();
        known.sort_unstable();
        assert_eq!(found, known);
    }
}
