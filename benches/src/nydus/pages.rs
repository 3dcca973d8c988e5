//! Which pages of files this machine has in memory.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

const PAGE: usize = 4096;

/// Bytes of a file that are in the page cache.
pub fn resident(path: &Path) -> Result<u64> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let size = usize::try_from(file.metadata()?.len())?;
    if size == 0 {
        return Ok(0); // cannot be mapped
    }
    // SAFETY: the kernel chooses where, so nothing that exists is overwritten; nobody accesses the mapping's pages.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if at == libc::MAP_FAILED {
        bail!("map {}: {}", path.display(), std::io::Error::last_os_error());
    }
    let mut pages = vec![0_u8; size.div_ceil(PAGE)];
    // SAFETY: the range is the mapping above, and `pages` has a byte for each of its pages.
    let looked = unsafe { libc::mincore(at, size, pages.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    // SAFETY: the mapping above, which nobody has a reference into.
    unsafe { libc::munmap(at, size) };
    ensure!(looked == 0, "look at the pages of {}: {error}", path.display());
    Ok(pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE as u64)
}

/// The same of all regular files below a folder.
pub fn resident_below(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sum += resident_below(&entry.path())?;
        } else if kind.is_file() {
            sum += resident(&entry.path())?;
        }
    }
    Ok(sum)
}

/// Drops a file's pages.
pub fn forget(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.sync_all()?;
    // SAFETY: takes no pointers; the descriptor is open.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    ensure!(error == 0, "forget {}: {}", path.display(), std::io::Error::from_raw_os_error(error));
    let left = resident(path)?;
    ensure!(left == 0, "{left} bytes of {} are still in memory", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_there() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/a"), vec![1; 3 * PAGE + 1]).unwrap();
        fs::write(folder.path().join("empty"), "").unwrap();
        assert_eq!(resident_below(folder.path()).unwrap(), 4 * PAGE as u64);
    }
}
