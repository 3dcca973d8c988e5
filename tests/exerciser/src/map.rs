//! Files in memory.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use crate::Operation;

pub const OPERATIONS: &[Operation] = &[
    ("private mapping", private),
    ("shared mapping", shared),
    ("shared mapping of a file that is opened to append", append),
    ("shared mapping, read only", read_only),
    ("executable mapping", executable),
];

const SIZE: usize = 256 << 10;

/// A mapping of a whole file of [`SIZE`] bytes.
struct Map(*mut u8);

impl Map {
    fn new(file: &File, protection: ProtFlags, flags: MapFlags) -> Result<Map> {
        // SAFETY: the kernel chooses where, so nothing that exists is overwritten.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), SIZE, protection, flags, file, 0) }?;
        Ok(Map(address.cast()))
    }

    fn at(&self, at: usize) -> *mut u8 {
        assert!(at < SIZE);
        // SAFETY: within the mapping.
        unsafe { self.0.add(at) }
    }

    fn write(&self, at: usize, byte: u8) {
        // SAFETY: in a mapping that is writable where this is called; volatile, as others write too.
        unsafe { self.at(at).write_volatile(byte) };
    }

    fn read(&self, at: usize) -> u8 {
        // SAFETY: in a mapping that is readable; volatile, as others write too.
        unsafe { self.at(at).read_volatile() }
    }

    fn sync(&self) -> Result<()> {
        // SAFETY: the range is the mapping.
        unsafe { rustix::mm::msync(self.0.cast(), SIZE, MsyncFlags::SYNC) }?;
        Ok(())
    }
}

/// Has `look` look at the first `size` bytes of a file that nobody changes, mapped.
pub fn with_bytes<T>(file: &File, size: usize, look: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let (protection, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
    // SAFETY: the kernel chooses where, so nothing that exists is overwritten.
    let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, protection, flags, file, 0) }?;
    // SAFETY: readable for `size` bytes until it is unmapped below; the image's files do not change, and a file that is cut short
    // would end this program by a signal, which its test notices.
    let seen = look(unsafe { std::slice::from_raw_parts(address.cast(), size) });
    // SAFETY: the range is the mapping, and `look` has given its reference back.
    unsafe { rustix::mm::munmap(address, size) }?;
    Ok(seen)
}

/// Writes a file's first [`SIZE`] bytes from its own pages to a disk, past the page cache, and compares what the disk has then.
pub fn direct(file: &Path, disk: &Path) -> Result<()> {
    let source = File::open(file)?;
    let mut to = File::options();
    let to = to.read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    with_bytes(&source, SIZE, |bytes| to.write_all_at(bytes, 0))??;
    drop(to);
    let (mut wanted, mut got) = (vec![0; SIZE], vec![0; SIZE]);
    source.read_exact_at(&mut wanted, 0)?;
    File::open(disk)?.read_exact_at(&mut got, 0)?;
    ensure!(wanted == got, "the disk has other bytes");
    Ok(())
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping, and nobody has a reference into it.
        let _ = unsafe { rustix::mm::munmap(self.0.cast(), SIZE) }; // cannot fail for a whole mapping
    }
}

fn file(dir: &Path) -> Result<File> {
    let path = dir.join("f");
    fs::write(&path, vec![1; SIZE])?;
    Ok(File::options().read(true).write(true).open(path)?)
}

fn byte(file: &File, at: usize) -> Result<u8> {
    let mut got = [0];
    file.read_exact_at(&mut got, at as u64)?;
    Ok(got[0])
}

fn private(dir: &Path) -> Result<()> {
    let file = file(dir)?;
    let map = Map::new(&file, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?;
    map.write(SIZE - 1, 9);
    ensure!(map.read(SIZE - 1) == 9 && byte(&file, SIZE - 1)? == 1, "the file changed");
    Ok(())
}

fn shared(dir: &Path) -> Result<()> {
    let file = file(dir)?;
    let map = Map::new(&file, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?;
    map.write(70_000, 9);
    map.sync()?;
    ensure!(byte(&file, 70_000)? == 9, "the file did not change");
    file.write_all_at(&[5], 70_001)?;
    ensure!(map.read(70_001) == 5, "the mapping did not change");
    drop(map);
    file.sync_all()?;
    ensure!(fs::read(dir.join("f"))?[70_000..70_002] == [9, 5], "lost");
    Ok(())
}

fn append(dir: &Path) -> Result<()> {
    drop(file(dir)?);
    let file = File::options().read(true).append(true).open(dir.join("f"))?;
    let map = Map::new(&file, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)?;
    map.write(0, 9);
    map.sync()?;
    ensure!(file.metadata()?.len() == SIZE as u64 && byte(&file, 0)? == 9, "size {}", file.metadata()?.len());
    Ok(())
}

fn read_only(dir: &Path) -> Result<()> {
    drop(file(dir)?);
    let map = Map::new(&File::open(dir.join("f"))?, ProtFlags::READ, MapFlags::SHARED)?;
    ensure!((0..SIZE).step_by(4096).all(|at| map.read(at) == 1), "other bytes");
    Ok(())
}

fn executable(dir: &Path) -> Result<()> {
    let map = Map::new(&file(dir)?, ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE)?;
    ensure!(map.read(0) == 1, "other bytes");
    Ok(())
}
