//! Contents: holes, allocation, copies, locks, and ways to read and write.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::pipe::SpliceFlags;

use crate::Operation;

pub const OPERATIONS: &[Operation] = &[
    ("hole and data", holes),
    ("fallocate", |d| allocate(d, FallocateFlags::empty(), 1 << 20)),
    ("fallocate keep size", |d| allocate(d, FallocateFlags::KEEP_SIZE, 8192)),
    ("fallocate punch hole", punch),
    ("fallocate zero range", |d| allocate(d, FallocateFlags::ZERO_RANGE, 1 << 20)),
    ("fallocate collapse range", |d| allocate(d, FallocateFlags::COLLAPSE_RANGE, 4096)),
    ("truncate", truncate),
    ("append", append),
    ("exclusive creation", exclusive),
    ("O_TMPFILE", tmpfile),
    ("O_DIRECT", direct),
    ("O_SYNC", sync_writes),
    ("fsync, fdatasync, syncfs, sync_file_range", sync),
    ("fadvise and readahead", advise),
    ("vectors", vectors),
    ("preadv2 without waiting", no_wait),
    ("copy_file_range", copy_range),
    ("reflink", reflink),
    ("sendfile", send_file),
    ("splice", splice),
    ("flock", flock),
    ("fcntl lock", fcntl_lock),
    ("fcntl lock of an open file", open_file_lock),
    ("lease", lease),
    ("8 MiB written and read", large),
    ("64 files at once", many),
];

fn open(path: &Path) -> Result<File> {
    Ok(File::options().read(true).write(true).create(true).truncate(false).open(path)?)
}

fn holes(dir: &Path) -> Result<()> {
    const FAR: u64 = 8 << 20;
    let mut file = open(&dir.join("f"))?;
    file.write_all_at(b"end", FAR)?;
    ensure!(file.metadata()?.len() == FAR + 3, "size {}", file.metadata()?.len());
    ensure!(file.metadata()?.blocks() * 512 < FAR, "{} blocks", file.metadata()?.blocks());
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0))?;
    ensure!(data == FAR, "data at {data}");
    let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(FAR))?;
    ensure!(hole == FAR + 3, "hole at {hole}");
    let none = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(FAR + 3));
    ensure!(none == Err(Errno::NXIO), "data behind the end: {none:?}");
    file.seek(SeekFrom::Start(FAR - 1))?;
    let mut got = Vec::new();
    file.read_to_end(&mut got)?;
    ensure!(got == b"\0end", "{got:?}");
    Ok(())
}

/// Asks for 1 MiB in a file of 8 KiB (that loses its first 4 KiB where that is asked), which is then so large.
fn allocate(dir: &Path, flags: FallocateFlags, size: u64) -> Result<()> {
    let file = open(&dir.join("f"))?;
    file.write_all_at(&[1; 8192], 0)?;
    let length = if flags == FallocateFlags::COLLAPSE_RANGE { 4096 } else { 1 << 20 };
    rustix::fs::fallocate(&file, flags, 0, length)?;
    ensure!(file.metadata()?.len() == size, "size {}", file.metadata()?.len());
    let mut got = [9];
    file.read_exact_at(&mut got, 0)?;
    ensure!(got[0] == u8::from(flags != FallocateFlags::ZERO_RANGE), "{got:?}");
    Ok(())
}

fn punch(dir: &Path) -> Result<()> {
    let file = open(&dir.join("f"))?;
    file.write_all_at(&[1; 65_536], 0)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 16_384, 16_384)?;
    let mut got = vec![9; 65_536];
    file.read_exact_at(&mut got, 0)?;
    let zeros = got.iter().filter(|byte| **byte == 0).count();
    ensure!(zeros == 16_384 && got[16_383] == 1 && got[16_384] == 0 && got[32_768] == 1, "{zeros} zeros");
    Ok(())
}

fn truncate(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = open(&path)?;
    file.write_all_at(b"0123456789", 0)?;
    file.set_len(4)?;
    file.set_len(6)?;
    ensure!(fs::read(&path)? == b"0123\0\0", "{:?}", fs::read(&path)?);
    File::create(&path)?;
    ensure!(file.metadata()?.len() == 0, "O_TRUNC leaves {}", file.metadata()?.len());
    Ok(())
}

fn append(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let mut files = [0; 2].map(|_| File::options().append(true).create(true).open(&path));
    for round in 0..10 {
        let file = files[round % 2].as_mut().map_err(|e| Errno::from_io_error(e).unwrap_or(Errno::IO))?;
        writeln!(file, "{round}")?;
    }
    let got = fs::read_to_string(&path)?;
    ensure!(got.lines().eq((0..10).map(|n| n.to_string())), "{got:?}");
    Ok(())
}

fn exclusive(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    File::create_new(&path)?;
    let again = File::create_new(&path).map_err(|e| e.kind());
    ensure!(matches!(again, Err(std::io::ErrorKind::AlreadyExists)), "{again:?}");
    Ok(())
}

fn tmpfile(dir: &Path) -> Result<()> {
    let file = File::from(rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR | Mode::WUSR)?);
    file.write_all_at(b"x", 0)?;
    Ok(())
}

/// Blocks of 4 KiB at addresses that are multiples of it.
#[repr(align(4096))]
struct Block([u8; 8192]);

fn direct(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    let file = options.open(&path)?;
    let mut block = Box::new(Block([7; 8192]));
    file.write_all_at(&block.0, 4096)?;
    block.0.fill(0);
    file.read_exact_at(&mut block.0, 4096)?;
    ensure!(block.0.iter().all(|byte| *byte == 7), "other bytes");
    ensure!(fs::read(&path)?[4096..] == block.0, "other bytes through the cache");
    Ok(())
}

fn sync_writes(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    for flags in [libc::O_SYNC, libc::O_DSYNC] {
        let mut file = File::options().append(true).create(true).custom_flags(flags).open(&path)?;
        file.write_all(b"x")?;
    }
    ensure!(fs::read(&path)? == b"xx", "{:?}", fs::read(&path)?);
    Ok(())
}

fn sync(dir: &Path) -> Result<()> {
    let mut file = File::create(dir.join("f"))?;
    file.write_all(&[1; 100_000])?;
    file.sync_all()?;
    file.sync_data()?;
    rustix::fs::syncfs(&file)?;
    rustix::fs::fsync(rustix::fs::open(dir, OFlags::RDONLY, Mode::empty())?)?;
    // SAFETY: the descriptor is open; the call reads no memory.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    if done != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn advise(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, [1; 100_000])?;
    let file = File::open(&path)?;
    for advice in [Advice::Sequential, Advice::Random, Advice::WillNeed, Advice::DontNeed] {
        rustix::fs::fadvise(&file, 0, None, advice)?;
    }
    // SAFETY: the descriptor is open; the call reads no memory.
    if unsafe { libc::readahead(file.as_raw_fd(), 0, 100_000) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn vectors(dir: &Path) -> Result<()> {
    let mut file = open(&dir.join("f"))?;
    let pieces: Vec<Vec<u8>> = (0..100).map(|n| vec![n; 1000]).collect();
    let slices: Vec<_> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    ensure!(file.write_vectored(&slices)? == 100_000, "short");
    rustix::io::pwritev2(&file, &[IoSlice::new(b"x")], 100_000, ReadWriteFlags::DSYNC)?;
    let mut got = vec![vec![0; 1000]; 101];
    let mut slices: Vec<_> = got.iter_mut().map(|piece| IoSliceMut::new(piece)).collect();
    let count = rustix::io::preadv2(&file, &mut slices, 0, ReadWriteFlags::empty())?;
    ensure!(count == 100_001 && got[..100] == pieces && got[100][0] == b'x', "{count} bytes");
    Ok(())
}

fn no_wait(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, "x")?;
    let (file, mut room) = (File::open(&path)?, [0]);
    match rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut room)], 0, ReadWriteFlags::NOWAIT) {
        // What is not in the cache would be waited for.
        Ok(1) | Err(Errno::AGAIN) => Ok(()),
        Ok(count) => anyhow::bail!("{count} bytes"),
        Err(error) => Err(error.into()),
    }
}

fn copy_range(dir: &Path) -> Result<()> {
    let from = open(&dir.join("from"))?;
    let bytes: Vec<u8> = (0..=250).cycle().take(1_000_000).collect();
    from.write_all_at(&bytes, 0)?;
    let to = open(&dir.join("to"))?;
    let (mut read, mut written) = (10, 5);
    let count = rustix::fs::copy_file_range(&from, Some(&mut read), &to, Some(&mut written), 500_000)?;
    ensure!(
        count > 0 && (read, written) == (10 + count as u64, 5 + count as u64),
        "{count} at {read}, {written}"
    );
    let got = fs::read(dir.join("to"))?;
    ensure!(got[..5] == [0; 5] && got[5..] == bytes[10..10 + count], "other bytes");
    Ok(())
}

fn reflink(dir: &Path) -> Result<()> {
    let (from, to) = (open(&dir.join("from"))?, open(&dir.join("to"))?);
    from.write_all_at(&[1; 4096], 0)?;
    rustix::fs::ioctl_ficlone(&to, &from)?;
    Ok(())
}

fn send_file(dir: &Path) -> Result<()> {
    let path = dir.join("from");
    fs::write(&path, [3; 200_000])?;
    let (from, to) = (File::open(&path)?, File::create(dir.join("to"))?);
    let mut offset = 0;
    while offset < 200_000 {
        ensure!(rustix::fs::sendfile(&to, &from, Some(&mut offset), 200_000)? > 0, "short");
    }
    ensure!(fs::read(dir.join("to"))? == [3; 200_000], "other bytes");
    Ok(())
}

fn splice(dir: &Path) -> Result<()> {
    let path = dir.join("from");
    fs::write(&path, [4; 60_000])?;
    let (from, to) = (File::open(&path)?, File::create(dir.join("to"))?);
    let (reader, writer) = rustix::pipe::pipe()?;
    let mut left = 60_000;
    while left > 0 {
        let taken = rustix::pipe::splice(&from, None, &writer, None, left, SpliceFlags::empty())?;
        ensure!(taken > 0, "short by {left}");
        left -= taken;
        let mut inside = taken;
        while inside > 0 {
            inside -= rustix::pipe::splice(&reader, None, &to, None, inside, SpliceFlags::MOVE)?;
        }
    }
    ensure!(fs::read(dir.join("to"))? == [4; 60_000], "other bytes");
    Ok(())
}

fn flock(dir: &Path) -> Result<()> {
    let (one, two) = (open(&dir.join("f"))?, open(&dir.join("f"))?);
    rustix::fs::flock(&one, FlockOperation::LockExclusive)?;
    let refused = rustix::fs::flock(&two, FlockOperation::NonBlockingLockShared);
    ensure!(refused == Err(Errno::WOULDBLOCK), "locked twice: {refused:?}");
    drop(one);
    rustix::fs::flock(&two, FlockOperation::NonBlockingLockShared)?;
    Ok(())
}

fn lock(file: &File, command: libc::c_int, kind: libc::c_int) -> Result<(), Errno> {
    let mut range = libc::flock {
        l_type: kind.try_into().expect("a kind of lock is a small number"),
        l_whence: 0,
        l_start: 10,
        l_len: 10,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `range` is the structure that these commands take.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut range) };
    if done == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

fn fcntl_lock(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = open(&path)?;
    lock(&file, libc::F_SETLK, libc::F_WRLCK)?;
    // Such a lock belongs to a process, and goes with the first of its descriptors that is closed.
    let held = || lock(&File::open(&path)?, libc::F_OFD_SETLK, libc::F_RDLCK).map_err(anyhow::Error::from);
    ensure!(held().is_err(), "nobody sees the lock");
    held()
}

fn open_file_lock(dir: &Path) -> Result<()> {
    let (one, two) = (open(&dir.join("f"))?, open(&dir.join("f"))?);
    lock(&one, libc::F_OFD_SETLK, libc::F_WRLCK)?;
    let refused = lock(&two, libc::F_OFD_SETLK, libc::F_RDLCK);
    ensure!(refused == Err(Errno::AGAIN), "locked twice: {refused:?}");
    lock(&one, libc::F_OFD_SETLK, libc::F_UNLCK)?;
    lock(&two, libc::F_OFD_SETLK, libc::F_RDLCK)?;
    Ok(())
}

fn lease(dir: &Path) -> Result<()> {
    let file = open(&dir.join("f"))?;
    // SAFETY: the descriptor is open; the argument is a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn large(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let bytes: Vec<u8> = (0..8u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    fs::write(&path, &bytes)?;
    rustix::fs::fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?;
    ensure!(fs::read(&path)? == bytes, "other bytes");
    Ok(())
}

fn many(dir: &Path) -> Result<()> {
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..64)
            .map(|number| {
                scope.spawn(move || {
                    let path = dir.join(number.to_string());
                    fs::write(&path, number.to_string().repeat(1000))?;
                    fs::read_to_string(&path).map(|text| text == number.to_string().repeat(1000))
                })
            })
            .collect();
        for writer in writers {
            ensure!(writer.join().expect("a writer does not panic")?, "other bytes");
        }
        Ok(())
    })
}
