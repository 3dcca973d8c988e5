//! The file behind the disk.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, FileType, OFlags, SeekFrom, fallocate, fcntl_getfl, fdatasync, fstat, seek,
};
use rustix::io::Errno;

use super::SECTOR;
use crate::queue::{Reader, Writer};

/// Longest identification string (virtio 1.2, 5.2.6).
pub const ID_LEN: usize = 20;
/// Bytes of zeros written at once where the file system cannot do it by itself.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file cannot be used as disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be looked at.
    #[error("disk file cannot be examined")]
    Examine(#[source] io::Error),
    /// A directory, a pipe, …
    #[error("disk is neither a regular file nor a block device but {kind:?}")]
    Kind {
        /// What it is.
        kind: FileType,
    },
    /// Not whole sectors.
    #[error("disk size of {bytes} bytes is not a multiple of {SECTOR}")]
    Size {
        /// Its size.
        bytes: u64,
    },
    /// Nothing in it.
    #[error("disk is empty")]
    Empty,
    /// The descriptor does not allow what the guest may do.
    #[error("disk file is not open for {access}")]
    Access {
        /// "reading" or "writing".
        access: &'static str,
    },
    /// The identification is too long.
    #[error("disk id {id:?} has {} bytes, at most {ID_LEN} are possible", id.len())]
    Id {
        /// The identification.
        id: String,
    },
}

/// A raw disk image or a host's block device.
#[derive(Debug)]
pub struct Disk {
    file: OwnedFd,
    bytes: u64,
    read_only: bool,
    id: [u8; ID_LEN],
}

impl Disk {
    /// Takes a file as it is; its size must not change any more. `id` is the serial number that the guest sees.
    pub fn new(file: OwnedFd, read_only: bool, id: &str) -> Result<Self, DiskError> {
        let examine = |e: Errno| DiskError::Examine(e.into());
        let kind = FileType::from_raw_mode(fstat(&file).map_err(examine)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::BlockDevice) {
            return Err(DiskError::Kind { kind });
        }
        let mode = fcntl_getfl(&file).map_err(examine)? & OFlags::ACCMODE;
        if mode == OFlags::WRONLY {
            return Err(DiskError::Access { access: "reading" });
        }
        if mode == OFlags::RDONLY && !read_only {
            return Err(DiskError::Access { access: "writing" });
        }
        // Also right for block devices, whose st_size is 0.
        let bytes = seek(&file, SeekFrom::End(0)).map_err(examine)?;
        if bytes == 0 {
            return Err(DiskError::Empty);
        }
        if !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { bytes });
        }
        let mut padded = [0; ID_LEN];
        match padded.get_mut(..id.len()) {
            Some(place) => place.copy_from_slice(id.as_bytes()),
            None => return Err(DiskError::Id { id: id.into() }),
        }
        Ok(Disk { file, bytes, read_only, id: padded })
    }

    /// Size in [`SECTOR`]s.
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR
    }

    /// The guest may not change it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The serial number, filled up with zeros.
    pub fn id(&self) -> &[u8; ID_LEN] {
        &self.id
    }

    /// Fills `data` from `offset` on.
    pub fn read(&self, data: &mut Writer<'_>, offset: u64) -> io::Result<()> {
        data.read_exact_at(self.file.as_fd(), offset)
    }

    /// Writes `data` from `offset` on.
    pub fn write(&self, data: &mut Reader<'_>, offset: u64) -> io::Result<()> {
        data.write_all_at(self.file.as_fd(), offset)
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Gives `len` bytes from `offset` on back to the host. A hint: a file system that cannot do it does nothing.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.punch(offset, len).map(|_| ())
    }

    /// Makes `len` bytes from `offset` on read as zeros, and gives them back to the host if `unmap` allows it.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.punch(offset, len)? {
            return Ok(());
        }
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if self.try_fallocate(zero_range, offset, len)? {
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let step = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
            match rustix::io::pwrite(&self.file, &ZEROS[..step], at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => at += count as u64,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.try_fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Tells whether the file system knows how to.
    fn try_fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        loop {
            return match fallocate(&self.file, flags, offset, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
                Err(e) => Err(e.into()),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Write;

    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    #[test]
    fn a_file_of_whole_sectors_is_a_disk() {
        let disk = Disk::new(file(512 * 7).into(), false, "serial").unwrap();
        assert_eq!((disk.sectors(), disk.is_read_only()), (7, false));
        assert_eq!(disk.id(), b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_value() {
        let message = |result: Result<Disk, DiskError>| result.unwrap_err().to_string();
        assert_eq!(
            message(Disk::new(file(1000).into(), false, "")),
            "disk size of 1000 bytes is not a multiple of 512"
        );
        assert_eq!(message(Disk::new(file(0).into(), false, "")), "disk is empty");
        let long = "123456789012345678901";
        assert_eq!(
            message(Disk::new(file(512).into(), false, long)),
            "disk id \"123456789012345678901\" has 21 bytes, at most 20 are possible"
        );
        let folder = File::open(std::env::temp_dir()).unwrap();
        assert_eq!(
            message(Disk::new(folder.into(), true, "")),
            "disk is neither a regular file nor a block device but Directory"
        );
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(512).unwrap();
        let read_only = || File::open(named.path()).unwrap().into();
        assert_eq!(message(Disk::new(read_only(), false, "")), "disk file is not open for writing");
        assert!(Disk::new(read_only(), true, "").is_ok());
        let write_only = OpenOptions::new().write(true).open(named.path()).unwrap();
        assert_eq!(message(Disk::new(write_only.into(), true, "")), "disk file is not open for reading");
    }

    #[test]
    fn zeros_are_written_whatever_the_file_system_can() {
        use std::os::unix::fs::FileExt;
        for unmap in [false, true] {
            let mut file = file(0);
            file.write_all(&[7; 200 * 1024]).unwrap();
            let disk = Disk::new(file.try_clone().unwrap().into(), false, "").unwrap();
            disk.write_zeroes(1024, 150 * 1024, unmap).unwrap();
            let mut bytes = vec![0; 200 * 1024];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes[..1024].iter().chain(&bytes[151 * 1024..]).all(|b| *b == 7));
            assert!(bytes[1024..151 * 1024].iter().all(|b| *b == 0));
            assert_eq!(file.metadata().unwrap().len(), 200 * 1024);
        }
    }
}
