//! The FUSE protocol as Linux speaks it over virtio-fs (virtio 1.2, 5.11): opcodes and flags; `messages` has the
//! structures.
//!
//! Numbers and layouts are those of the kernel's `include/uapi/linux/fuse.h`, version 7.38, without what this server
//! never sees or sends (locks, polling, DAX mappings). All fields are little endian, as the guest's are.

pub use super::messages::*;

/// Protocol version spoken.
pub const MAJOR: u32 = 7;
/// Newest minor version known. Structures only grow at their end, and only when a flag asks for it.
pub const MINOR: u32 = 38;
/// Oldest minor version served: 7.31 came with Linux 5.4, the first with virtio-fs.
pub const MINOR_MIN: u32 = 31;

/// Most data bytes in one read or write.
pub const MAX_DATA: u32 = 1 << 20;
/// The same in pages of 4 KiB, the unit of [`InitOut::max_pages`].
pub const MAX_PAGES: u16 = 256;

macro_rules! opcodes {
    ($($name:ident = $value:literal),* $(,)?) => {
        /// What the guest asks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Opcode { $($name = $value),* }

        impl Opcode {
            /// Every opcode that this server knows.
            pub const ALL: &[Opcode] = &[$(Opcode::$name),*];

            /// The opcode of this number, if this server knows it.
            pub fn from_wire(value: u32) -> Option<Self> {
                match value { $($value => Some(Opcode::$name),)* _ => None }
            }
        }
    };
}

opcodes! {
    Lookup = 1, Forget = 2, Getattr = 3, Setattr = 4, Readlink = 5, Symlink = 6, Mknod = 8, Mkdir = 9, Unlink = 10,
    Rmdir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, Statfs = 17, Release = 18, Fsync = 20,
    Setxattr = 21, Getxattr = 22, Listxattr = 23, Removexattr = 24, Flush = 25, Init = 26, Opendir = 27, Readdir = 28,
    Releasedir = 29, Fsyncdir = 30, Access = 34, Create = 35, Interrupt = 36, Destroy = 38, Ioctl = 39,
    BatchForget = 42, Fallocate = 43, Readdirplus = 44, Rename2 = 45, Lseek = 46, CopyFileRange = 47, Syncfs = 50,
}

impl Opcode {
    /// The guest waits for no answer and may have given no room for one.
    pub fn is_silent(self) -> bool {
        matches!(self, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt)
    }
}

/// `init` flags, agreed upon at the start of a session.
pub mod init {
    /// Several reads of one file at a time.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// `O_TRUNC` comes with `open` instead of a `setattr` of its own.
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    /// Writes of more than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// The guest drops cached pages when it sees another size or modification time.
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    /// `readdirplus` is there.
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    /// The guest chooses between `readdir` and `readdirplus` by what its program does.
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    /// Several direct requests of one file at a time.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// Lookups and listings of one directory may run side by side.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `max_pages` in the answer counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// The guest may keep the text of symbolic links.
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    /// The server clears set-id bits and file capabilities on write, truncation and change of owner.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
}

/// `OpenOut::flags`: do not drop cached pages at this open.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `OpenOut::flags`: the guest may keep this directory's listing.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;

/// `GetattrIn::flags`: `fh` counts.
pub const GETATTR_FH: u32 = 1 << 0;
/// `OpenIn::open_flags` and `CreateIn::open_flags`: truncation must clear set-id bits.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `WriteIn::write_flags`: pages of the guest's cache are written back, at an offset that counts.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: the write must clear set-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FsyncIn::flags`: only data, and what is needed to find it.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

/// `SetattrIn::valid` bits: which fields to set.
pub mod fattr {
    /// Permission bits.
    pub const MODE: u32 = 1 << 0;
    /// Owner.
    pub const UID: u32 = 1 << 1;
    /// Group.
    pub const GID: u32 = 1 << 2;
    /// Size.
    pub const SIZE: u32 = 1 << 3;
    /// Access time.
    pub const ATIME: u32 = 1 << 4;
    /// Modification time.
    pub const MTIME: u32 = 1 << 5;
    /// `fh` counts.
    pub const FH: u32 = 1 << 6;
    /// Access time, now.
    pub const ATIME_NOW: u32 = 1 << 7;
    /// Modification time, now.
    pub const MTIME_NOW: u32 = 1 << 8;
    /// Truncation must clear set-id bits.
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_come_back_from_their_numbers() {
        for &opcode in Opcode::ALL {
            assert_eq!(Opcode::from_wire(opcode as u32), Some(opcode));
        }
        for unknown in [0, 7, 19, 37, 40, 48, 49, 51, 52, 1 << 20, u32::MAX] {
            assert_eq!(Opcode::from_wire(unknown), None);
        }
    }
}
