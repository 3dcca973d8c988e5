//! A mount of a create request that is an image on a disk of the VM: its type, and what its options say.
//!
//! `source` is the serial number of the disk ([`crate::disk_serial`]). The options are the parts of the disk, in order:
//! first the EROFS, then the blobs that it takes its data from; and [`OWN_USERS`]. An overlay over it is a mount of its own.
//!
//! An image that is memory of the VM has no serial number; the first option says where it is ([`memory`]), and `source` names it in
//! messages alone.

/// `type` of such a mount.
pub const MOUNT_TYPE: &str = "ctvm-image";

/// Option: owners of files are shifted as the sandbox's user namespace shifts them.
pub const OWN_USERS: &str = "own-users";

/// Below it, by the container's id, are the images that overlays lie over.
pub const LOWER_PATH: &str = "/run/ctvm/image";
/// Below it, by the container's id, are root directories that are not in the file share.
pub const ROOT_PATH: &str = "/run/ctvm/root";

/// Most parts: an EROFS and as many blobs as an image can have.
pub const MAX_PARTS: usize = 129;

/// Bytes of a sector, of which a partition is made.
const SECTOR: u64 = 512;

/// The option for an image that is memory, from that guest physical address on: it is to be mounted with DAX.
pub fn memory(start: u64) -> String {
    format!("memory={start:#x}")
}

/// What such an option says; `None` if it is none.
pub fn parse_memory(option: &str) -> Option<u64> {
    u64::from_str_radix(option.strip_prefix("memory=0x")?, 16).ok()
}

/// The option for a part of a disk, in bytes.
pub fn part(start: u64, bytes: u64) -> String {
    format!("part={start}:{bytes}")
}

/// What such an option says: first byte and length, whole sectors below 2^63. `None` if it is none.
pub fn parse_part(option: &str) -> Option<(u64, u64)> {
    let (start, bytes) = option.strip_prefix("part=")?.split_once(':')?;
    let (start, bytes): (u64, u64) = (start.parse().ok()?, bytes.parse().ok()?);
    let end = start.checked_add(bytes)?;
    let whole = start.is_multiple_of(SECTOR) && bytes.is_multiple_of(SECTOR) && bytes > 0;
    (whole && i64::try_from(end).is_ok()).then_some((start, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_from_their_options() {
        for start in [0, 0x1_8000_0000, u64::MAX] {
            assert_eq!(parse_memory(&memory(start)), Some(start));
        }
        for option in
            ["memory=", "memory=0x", "memory=4096", "memory=0x10000000000000000", "part=0:512", "ro"]
        {
            assert_eq!(parse_memory(option), None, "{option}");
        }
    }

    #[test]
    fn parts_come_back_from_their_options() {
        for (start, bytes) in [(0, 512), (8192, 1 << 40), (i64::MAX.cast_unsigned() / 512 * 512 - 512, 512)] {
            assert_eq!(parse_part(&part(start, bytes)), Some((start, bytes)));
        }
        for option in [
            "ro",
            "part=",
            "part=0",
            "part=0:0",
            "part=1:512",
            "part=0:513",
            "part=-512:512",
            "part=18446744073709551104:512",
            "part=9223372036854775296:1024",
            "part=0:512:0",
        ] {
            assert_eq!(parse_part(option), None, "{option}");
        }
    }
}
