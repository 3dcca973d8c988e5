//! Names, links, owners, modes, times and attributes.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::Operation;

pub const OPERATIONS: &[Operation] = &[
    ("xattr user", |d| xattr(d, "user.exercise")),
    ("xattr security.capability", capability),
    ("xattr trusted", |d| xattr(d, "trusted.exercise")),
    ("xattr posix acl", |d| xattr(d, "system.posix_acl_access")),
    ("listing of 10000 entries", listing),
    ("a folder made, filled and emptied", filled),
    ("rename over", rename_over),
    ("rename noreplace", rename_noreplace),
    ("rename exchange", rename_exchange),
    ("rename whiteout", rename_whiteout),
    ("rename of a folder", rename_folder),
    ("symbolic link", symlink),
    ("hard link", hard_link),
    ("link of an open file", link_by_descriptor),
    ("fifo", fifo),
    ("socket", socket),
    ("device node", device),
    ("whiteout node", whiteout_node),
    ("times", times),
    ("owner", owner),
    ("mode", mode),
    ("set-id bits go with a new owner", set_id),
    ("statx", statx),
    ("statfs", statfs),
    ("name of 255 bytes", long_name),
    ("name of 256 bytes", too_long_name),
    ("use after unlink", unlinked),
    ("file handle", file_handle),
    ("flags of a file (lsattr)", file_flags),
    ("run a program", run_program),
];

fn xattr(dir: &Path, name: &str) -> Result<()> {
    let file = dir.join("f");
    fs::write(&file, "")?;
    rustix::fs::setxattr(&file, name, b"value", XattrFlags::CREATE)?;
    let again = rustix::fs::setxattr(&file, name, b"value", XattrFlags::CREATE);
    ensure!(again == Err(Errno::EXIST), "created twice: {again:?}");
    rustix::fs::setxattr(&file, name, b"other", XattrFlags::REPLACE)?;
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&file, name, &mut value)?;
    ensure!(&value[..length] == b"other", "value {:?}", &value[..length]);
    let length = rustix::fs::listxattr(&file, &mut value)?;
    ensure!(value[..length].starts_with(name.as_bytes()), "list {:?}", &value[..length]);
    rustix::fs::removexattr(&file, name)?;
    let gone = rustix::fs::getxattr(&file, name, &mut value);
    ensure!(gone == Err(Errno::NODATA), "removed: {gone:?}");
    Ok(())
}

/// What `setcap cap_net_raw+ep` writes (`struct vfs_cap_data`, revision 2).
fn capability(dir: &Path) -> Result<()> {
    let file = dir.join("f");
    fs::write(&file, "")?;
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    rustix::fs::setxattr(&file, "security.capability", &bytes, XattrFlags::empty())?;
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(&file, "security.capability", &mut value)?;
    ensure!(value[..length] == bytes, "value {:?}", &value[..length]);
    Ok(())
}

/// Of those that the host has made, if it has: making them one by one takes minutes in an emulated machine.
fn listing(dir: &Path) -> Result<()> {
    const ENTRIES: usize = 10_000;
    let Some(many) = dir.ancestors().nth(2).map(|folder| folder.join("many")).filter(|many| many.exists())
    else {
        return Ok(());
    };
    let mut seen: Vec<_> = fs::read_dir(many)?.collect::<std::io::Result<Vec<_>>>()?;
    ensure!(seen.len() == ENTRIES, "{} entries", seen.len());
    seen.sort_by_key(fs::DirEntry::file_name);
    seen.dedup_by_key(|entry| entry.file_name());
    ensure!(seen.len() == ENTRIES, "{} different entries", seen.len());
    Ok(())
}

fn filled(dir: &Path) -> Result<()> {
    const ENTRIES: usize = 300;
    for number in 0..ENTRIES {
        rustix::fs::mkdirat(CWD, dir.join(format!("entry-{number}")), Mode::RWXU)?;
    }
    // Emptied while it is read, as `rm -r` does.
    let mut removed = 0;
    for entry in fs::read_dir(dir)? {
        fs::remove_dir(entry?.path())?;
        removed += 1;
    }
    ensure!(removed == ENTRIES && fs::read_dir(dir)?.next().is_none(), "{removed} entries");
    Ok(())
}

fn two(dir: &Path) -> Result<[std::path::PathBuf; 2]> {
    let paths = [dir.join("one"), dir.join("two")];
    fs::write(&paths[0], "1")?;
    fs::write(&paths[1], "2")?;
    Ok(paths)
}

fn rename_over(dir: &Path) -> Result<()> {
    let [one, two] = two(dir)?;
    fs::rename(&one, &two)?;
    ensure!(!one.exists() && fs::read(&two)? == b"1", "not replaced");
    Ok(())
}

fn rename_noreplace(dir: &Path) -> Result<()> {
    let [one, two] = two(dir)?;
    let refused = rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::NOREPLACE);
    ensure!(refused == Err(Errno::EXIST), "over another: {refused:?}");
    rustix::fs::renameat_with(CWD, &one, CWD, dir.join("three"), RenameFlags::NOREPLACE)?;
    Ok(())
}

fn rename_exchange(dir: &Path) -> Result<()> {
    let [one, two] = two(dir)?;
    rustix::fs::renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE)?;
    ensure!(fs::read(&one)? == b"2" && fs::read(&two)? == b"1", "not exchanged");
    Ok(())
}

fn rename_whiteout(dir: &Path) -> Result<()> {
    let [one, _] = two(dir)?;
    rustix::fs::renameat_with(CWD, &one, CWD, dir.join("three"), RenameFlags::WHITEOUT)?;
    ensure!(fs::symlink_metadata(&one)?.rdev() == 0, "no whiteout");
    Ok(())
}

fn rename_folder(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("a/b"))?;
    fs::write(dir.join("a/b/f"), "x")?;
    fs::create_dir(dir.join("c"))?;
    fs::rename(dir.join("a"), dir.join("c/a"))?;
    ensure!(fs::read(dir.join("c/a/b/f"))? == b"x", "not below its new name");
    Ok(())
}

fn symlink(dir: &Path) -> Result<()> {
    fs::write(dir.join("f"), "x")?;
    std::os::unix::fs::symlink("f", dir.join("l"))?;
    ensure!(
        fs::read_link(dir.join("l"))? == Path::new("f") && fs::read(dir.join("l"))? == b"x",
        "another target"
    );
    std::os::unix::fs::symlink("x".repeat(4000), dir.join("long"))?;
    ensure!(fs::read_link(dir.join("long"))?.as_os_str().len() == 4000, "cut");
    Ok(())
}

fn hard_link(dir: &Path) -> Result<()> {
    let [one, _] = two(dir)?;
    fs::hard_link(&one, dir.join("three"))?;
    let (a, b) = (fs::metadata(&one)?, fs::metadata(dir.join("three"))?);
    ensure!(a.ino() == b.ino() && a.nlink() == 2 && b.nlink() == 2, "links {} and {}", a.nlink(), b.nlink());
    fs::remove_file(&one)?;
    ensure!(fs::metadata(dir.join("three"))?.nlink() == 1, "the count stays");
    Ok(())
}

fn link_by_descriptor(dir: &Path) -> Result<()> {
    let [one, _] = two(dir)?;
    let file = File::open(one)?;
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::linkat(CWD, name, CWD, dir.join("three"), AtFlags::SYMLINK_FOLLOW)?;
    ensure!(fs::read(dir.join("three"))? == b"1", "another file");
    Ok(())
}

fn fifo(dir: &Path) -> Result<()> {
    let path = dir.join("fifo");
    rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0)?;
    // Opened for both, so that nobody waits for anybody.
    let mut file = File::options().read(true).write(true).open(&path)?;
    file.write_all(b"through")?;
    let mut got = [0; 7];
    file.read_exact(&mut got)?;
    ensure!(&got == b"through", "{got:?}");
    Ok(())
}

fn socket(dir: &Path) -> Result<()> {
    let path = dir.join("s");
    let listener = UnixListener::bind(&path)?;
    let mut client = UnixStream::connect(&path)?;
    client.write_all(b"x")?;
    let mut got = [0];
    listener.accept()?.0.read_exact(&mut got)?;
    ensure!(&got == b"x", "{got:?}");
    Ok(())
}

fn device(dir: &Path) -> Result<()> {
    // /dev/null
    let number = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, dir.join("null"), FileType::CharacterDevice, Mode::RWXU, number)?;
    Ok(())
}

fn whiteout_node(dir: &Path) -> Result<()> {
    rustix::fs::mknodat(CWD, dir.join("w"), FileType::CharacterDevice, Mode::empty(), 0)?;
    Ok(())
}

fn times(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, "")?;
    let at = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let wanted =
        Timestamps { last_access: at(1_000_000_000, 5), last_modification: at(2_000_000_000, 999_999_999) };
    rustix::fs::utimensat(CWD, &path, &wanted, AtFlags::empty())?;
    let got = fs::metadata(&path)?;
    ensure!(
        (got.atime(), got.atime_nsec()) == (1_000_000_000, 5),
        "access {}.{}",
        got.atime(),
        got.atime_nsec()
    );
    ensure!((got.mtime(), got.mtime_nsec()) == (2_000_000_000, 999_999_999), "modified {}", got.mtime());
    std::os::unix::fs::symlink("f", dir.join("l"))?;
    rustix::fs::utimensat(CWD, dir.join("l"), &wanted, AtFlags::SYMLINK_NOFOLLOW)?;
    File::options().write(true).open(&path)?.set_modified(std::time::SystemTime::now())?;
    ensure!(fs::metadata(&path)?.mtime() != 2_000_000_000, "not changed by the descriptor");
    Ok(())
}

fn owner(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, "")?;
    std::os::unix::fs::symlink("f", dir.join("l"))?;
    rustix::fs::chown(&path, Some(Uid::from_raw(1234)), Some(Gid::from_raw(5678)))?;
    let got = fs::metadata(&path)?;
    ensure!((got.uid(), got.gid()) == (1234, 5678), "{}:{}", got.uid(), got.gid());
    std::os::unix::fs::lchown(dir.join("l"), Some(1), Some(2))?;
    let (link, file) = (fs::symlink_metadata(dir.join("l"))?, fs::metadata(&path)?);
    ensure!((link.uid(), file.uid()) == (1, 1234), "link {}, file {}", link.uid(), file.uid());
    Ok(())
}

fn mode(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let file = File::create(&path)?;
    for bits in [0o000, 0o640, 0o4755, 0o2755, 0o1777] {
        file.set_permissions(fs::Permissions::from_mode(bits))?;
        let got = fs::metadata(&path)?.mode() & 0o7777;
        ensure!(got == bits, "{got:o} instead of {bits:o}");
    }
    Ok(())
}

fn set_id(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, "x")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755))?;
    std::os::unix::fs::chown(&path, Some(1), Some(1))?;
    let got = fs::metadata(&path)?.mode() & 0o7777;
    ensure!(got == 0o755, "{got:o}");
    Ok(())
}

fn statx(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    fs::write(&path, [0; 5000])?;
    let got = rustix::fs::statx(CWD, &path, AtFlags::empty(), rustix::fs::StatxFlags::BASIC_STATS)?;
    ensure!(got.stx_size == 5000 && got.stx_nlink == 1, "{got:?}");
    let got = rustix::fs::statx(CWD, &path, AtFlags::STATX_FORCE_SYNC, rustix::fs::StatxFlags::ALL)?;
    ensure!(got.stx_size == 5000, "{got:?}");
    Ok(())
}

fn statfs(dir: &Path) -> Result<()> {
    let got = rustix::fs::statvfs(dir)?;
    ensure!(got.f_bsize > 0 && got.f_namemax == 255, "{} {}", got.f_bsize, got.f_namemax);
    Ok(())
}

fn long_name(dir: &Path) -> Result<()> {
    let path = dir.join("n".repeat(255));
    fs::write(&path, "")?;
    fs::remove_file(path)?;
    Ok(())
}

fn too_long_name(dir: &Path) -> Result<()> {
    fs::write(dir.join("n".repeat(256)), "")?;
    Ok(())
}

fn unlinked(dir: &Path) -> Result<()> {
    let path = dir.join("f");
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(b"still here")?;
    ensure!(file.metadata()?.nlink() == 0 && file.metadata()?.len() == 10, "{:?}", file.metadata()?);
    let mut got = [0; 10];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, 0)?;
    ensure!(&got == b"still here", "{got:?}");
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.set_len(3)?;
    Ok(())
}

fn file_handle(dir: &Path) -> Result<()> {
    #[repr(C)]
    struct Handle {
        head: libc::file_handle,
        room: [u8; 128],
    }
    let name = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes())?;
    let mut mount = 0;
    let mut handle = Handle {
        head: libc::file_handle { handle_bytes: 128, handle_type: 0, f_handle: [] },
        room: [0; 128],
    };
    // SAFETY: `name` ends with a NUL; `handle` is laid out as a `file_handle` with room for the 128 bytes it announces.
    let done = unsafe {
        libc::name_to_handle_at(libc::AT_FDCWD, name.as_ptr(), &raw mut handle.head, &raw mut mount, 0)
    };
    if done != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let _ = handle.room; // only the kernel's
    Ok(())
}

fn file_flags(dir: &Path) -> Result<()> {
    rustix::fs::ioctl_getflags(rustix::fs::open(dir, OFlags::RDONLY, Mode::empty())?)?;
    Ok(())
}

/// Itself, without an argument.
fn run_program(dir: &Path) -> Result<()> {
    let program = dir.join("program");
    fs::copy("/proc/self/exe", &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let status = std::process::Command::new(&program).status()?;
    ensure!(status.success(), "{status}");
    Ok(())
}
