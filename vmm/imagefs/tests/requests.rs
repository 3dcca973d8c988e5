//! What a guest can do, request by request.

mod client;
mod confine;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use client::{Client, ROOT, directory};
use imagefs::wire::*;
use imagefs::{Cache, MountOptions};
use tempfile::tempdir;
use zerocopy::IntoBytes;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_session_agrees_on_what_both_sides_know() {
    let out = Client::new().init().unwrap();
    assert_eq!((out.major, out.max_write, out.max_pages, out.time_gran), (7, 1 << 20, 256, 1));
    assert_eq!(out.max_readahead, 131_072);
    for wanted in [init::AUTO_INVAL_DATA, init::DO_READDIRPLUS, init::HANDLE_KILLPRIV_V2, init::MAX_PAGES] {
        assert_ne!(u64::from(out.flags) & wanted, 0, "{wanted:#x}");
    }
    // Write-back cache, locks, ACLs, submounts, more flags: bits 16, 1, 10, 20, 27, 30.
    for unwanted in [16, 1, 10, 20, 27, 30] {
        assert_eq!(out.flags & 1 << unwanted, 0, "bit {unwanted}");
    }
}

#[test]
fn versions_that_cannot_work_are_refused() {
    let client = Client::unstarted(client::LIMITS);
    let init = |major, minor| {
        let ask = InitIn { major, minor, max_readahead: 0, flags: 0 };
        client.ask::<InitOut>(Opcode::Init, 0, &[ask.as_bytes()])
    };
    assert_eq!(init(6, 40), Err(libc::EPROTO));
    assert_eq!(init(7, 30), Err(libc::EPROTO));
    // A newer one is told what we speak, and asks again.
    assert_eq!(init(8, 0).unwrap().major, 7);
    assert!(init(7, 31).is_ok());
}

#[test]
fn a_file_is_written_read_and_looks_the_same_from_outside() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, handle) = client.create(m, "file", 0o640, libc::O_RDWR).unwrap();
    assert_eq!(client.write(handle, 0, b"hello, world").unwrap(), 12);
    assert_eq!(client.write(handle, 7, b"earth").unwrap(), 5);
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"hello, earth");
    assert_eq!(client.read(handle, 7, 3).unwrap(), b"ear");
    assert_eq!(client.read(handle, 12, 100).unwrap(), b"");
    let attr = client.getattr(entry.nodeid, Some(handle.fh)).unwrap();
    assert_eq!((attr.size, attr.mode), (12, libc::S_IFREG | 0o640));
    client.release(handle).unwrap();
    assert_eq!(client.read(handle, 0, 1), Err(libc::EBADF));
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"hello, earth");
}

#[test]
fn a_large_file_is_the_same_byte_for_byte() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (_, handle) = client.create(m, "large", 0o600, libc::O_RDWR).unwrap();
    // 64 MiB without a period that a misplaced block could hide in.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let block: Vec<u8> = (0..(64 << 20) / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    for (i, part) in block.chunks(1 << 20).enumerate() {
        assert_eq!(client.write(handle, (i as u64) << 20, part).unwrap(), 1 << 20);
    }
    assert!(fs::read(dir.path().join("large")).unwrap() == block, "the host sees other bytes");
    // Sizes and offsets that are no multiple of anything.
    let mut at = 0;
    while at < block.len() {
        let size = 777_777.min(block.len() - at);
        let got = client.read(handle, at as u64, u32::try_from(size).unwrap()).unwrap();
        assert!(got == block[at..at + size], "other bytes at {at}");
        at += size;
    }
}

#[test]
fn appending_goes_to_the_end_and_cached_pages_do_not() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let flags = libc::O_RDWR | libc::O_APPEND;
    let (_, handle) = client.create(m, "log", 0o600, flags).unwrap();
    client.write_with(handle, 0, b"one\n", 0, flags).unwrap();
    fs::OpenOptions::new()
        .append(true)
        .open(dir.path().join("log"))
        .unwrap()
        .write_all_at(b"host\n", 4)
        .unwrap();
    // The guest believes that the file ends at 4.
    client.write_with(handle, 4, b"two\n", 0, flags).unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"one\nhost\ntwo\n");
    // A shared mapping's page, written back through the same handle.
    client.write_with(handle, 0, b"ONE\n", WRITE_CACHE, flags).unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"ONE\nhost\ntwo\n");
}

#[test]
fn new_files_belong_to_their_maker_with_every_bit_of_their_mode() {
    if !is_root() {
        return eprintln!("skipped: only root can make files in another's name");
    }
    let dir = tempdir().unwrap(); // 0700 and root's
    let (mut client, m) = Client::of(dir.path(), MountOptions::default());
    (client.uid, client.gid) = (1234, 567);
    let (_, handle) = client.create(m, "file", 0o4777, libc::O_WRONLY).unwrap();
    client.release(handle).unwrap();
    client.mkdir(m, "dir", 0o1777).unwrap();
    client.symlink(m, "link", "nowhere").unwrap();
    client.mknod(m, "fifo", libc::S_IFIFO | 0o622, 0).unwrap();
    client.mknod(m, "socket", libc::S_IFSOCK | 0o755, 0).unwrap();
    let modes = [
        ("file", 0o10_4777),
        ("dir", 0o4_1777),
        ("fifo", 0o1_0622),
        ("socket", 0o14_0755),
        ("link", 0o12_0777),
    ];
    for (name, mode) in modes {
        let meta = fs::symlink_metadata(dir.path().join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.mode()), (1234, 567, mode), "{name}");
    }
    // A directory that gives its group to what is made in it.
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    std::os::unix::fs::chown(&shared, Some(0), Some(44)).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o2770)).unwrap();
    let node = client.lookup(m, "shared").unwrap().nodeid;
    client.mkdir(node, "sub", 0o755).unwrap();
    let meta = fs::metadata(shared.join("sub")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (1234, 44, 0o2755));
}

#[test]
fn creating_what_is_there_opens_it_unless_exclusive() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("old"), "old").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    client.mknod(m, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let (_, handle) = client.create(m, "old", 0o600, libc::O_RDWR | libc::O_CREAT).unwrap();
    assert_eq!(client.read(handle, 0, 10).unwrap(), b"old");
    let exclusive = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    assert_eq!(client.create(m, "old", 0o600, exclusive).map(drop), Err(libc::EEXIST));
    let (_, handle) = client.create(m, "old", 0o600, libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC).unwrap();
    assert_eq!(client.read(handle, 0, 10).unwrap(), b"");
    // Neither waits for a writer of the fifo nor follows the link.
    assert_eq!(client.create(m, "fifo", 0o600, libc::O_RDONLY).map(drop), Err(libc::ENXIO));
    assert_eq!(client.create(m, "link", 0o600, libc::O_RDONLY).map(drop), Err(libc::ENXIO));
}

#[test]
fn names_are_made_moved_and_removed() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let d = client.mkdir(m, "d", 0o755).unwrap().nodeid;
    let (file, handle) = client.create(m, "a", 0o600, libc::O_RDWR).unwrap();
    client.write(handle, 0, b"a").unwrap();
    client.release(handle).unwrap();

    let linked = client.link(file.nodeid, d, "b").unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2), "one inode, one node");
    client.rename((m, "a"), (d, "c"), 0).unwrap();
    assert_eq!(client.lookup(m, "a"), Err(libc::ENOENT));
    assert_eq!(client.lookup(d, "c").unwrap().nodeid, file.nodeid);

    client.create(d, "other", 0o600, libc::O_RDWR).unwrap();
    assert_eq!(client.rename((d, "other"), (d, "c"), libc::RENAME_NOREPLACE), Err(libc::EEXIST));
    client.rename((d, "other"), (d, "c"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(client.lookup(d, "other").unwrap().nodeid, file.nodeid);
    client.rename((d, "other"), (d, "c"), 0).unwrap();
    assert_eq!(client.lookup(d, "c").unwrap().nodeid, file.nodeid);
    assert_eq!(client.rename((d, "c"), (d, "x"), 1 << 7), Err(libc::EINVAL));

    assert_eq!(client.rmdir(m, "d"), Err(libc::ENOTEMPTY));
    assert_eq!(client.unlink(m, "d"), Err(libc::EISDIR));
    client.unlink(d, "b").unwrap();
    client.unlink(d, "c").unwrap();
    assert_eq!(client.getattr(file.nodeid, None).unwrap().nlink, 0, "known as long as it is not forgotten");
    client.rmdir(m, "d").unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_removed_file_lives_on_while_it_is_open() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, handle) = client.create(m, "tmp", 0o600, libc::O_RDWR).unwrap();
    client.unlink(m, "tmp").unwrap();
    client.write(handle, 0, b"still here").unwrap();
    assert_eq!(client.read(handle, 0, 100).unwrap(), b"still here");
    // Opened again by its node, as through /proc/self/fd in the guest.
    let again = client.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(again, 0, 100).unwrap(), b"still here");
    client.truncate(entry.nodeid, 5).unwrap();
    assert_eq!(client.read(again, 0, 100).unwrap(), b"still");
}

#[test]
fn attributes_are_set() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, handle) = client.create(m, "f", 0o600, libc::O_RDWR).unwrap();
    let node = entry.nodeid;
    assert_eq!(client.chmod(node, 0o4751).unwrap().mode, libc::S_IFREG | 0o4751);
    let set = SetattrIn {
        valid: fattr::ATIME | fattr::MTIME,
        atime: (-5i64).cast_unsigned(),
        atimensec: 7,
        mtime: 1_000_000_000,
        mtimensec: 999_999_999,
        ..SetattrIn::default()
    };
    let attr = client.setattr(node, &set).unwrap();
    assert_eq!((attr.atime.cast_signed(), attr.atimensec), (-5, 7));
    assert_eq!((attr.mtime, attr.mtimensec), (1_000_000_000, 999_999_999));
    let now = SetattrIn { valid: fattr::MTIME | fattr::MTIME_NOW, ..SetattrIn::default() };
    assert!(client.setattr(node, &now).unwrap().mtime > 1_600_000_000);
    let by_handle =
        SetattrIn { valid: fattr::SIZE | fattr::FH, fh: handle.fh, size: 4096, ..SetattrIn::default() };
    assert_eq!(client.setattr(node, &by_handle).unwrap().size, 4096);
    assert_eq!(client.truncate(node, 1 << 40).unwrap().size, 1 << 40, "sparse");
    assert_eq!(client.truncate(m, 0), Err(libc::EISDIR));
    let link = client.symlink(m, "l", "f").unwrap();
    assert_eq!(client.truncate(link.nodeid, 0), Err(libc::EINVAL));
    // Times of the link, not of what it names.
    let set = SetattrIn { valid: fattr::MTIME, mtime: 42, ..SetattrIn::default() };
    assert_eq!(client.setattr(link.nodeid, &set).unwrap().mtime, 42);
    assert_ne!(client.getattr(node, None).unwrap().mtime, 42);
}

#[test]
fn set_id_bits_go_when_an_unprivileged_process_writes() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, handle) = client.create(m, "su", 0o755, libc::O_RDWR).unwrap();
    let node = entry.nodeid;
    let mode = |mode: u32| client.chmod(node, mode).unwrap();
    let now = || client.getattr(node, None).unwrap().mode & 0o7777;

    mode(0o6755);
    client.write(handle, 0, b"by root").unwrap();
    if is_root() {
        assert_eq!(now(), 0o6755);
    }
    client.write_with(handle, 0, b"by a user", WRITE_KILL_SUIDGID, 0).unwrap();
    assert_eq!(now(), 0o755);
    // Without the group's execute bit, set-group-id means locking, and stays.
    mode(0o6745);
    client.write_with(handle, 0, b"by a user", WRITE_KILL_SUIDGID, 0).unwrap();
    assert_eq!(now(), 0o2745);

    mode(0o6755);
    let cut = SetattrIn { valid: fattr::SIZE | fattr::KILL_SUIDGID, ..SetattrIn::default() };
    client.setattr(node, &cut).unwrap();
    assert_eq!(now(), 0o755);

    mode(0o6755);
    let ask =
        OpenIn { flags: (libc::O_WRONLY | libc::O_TRUNC).cast_unsigned(), open_flags: OPEN_KILL_SUIDGID };
    client.ask::<OpenOut>(Opcode::Open, node, &[ask.as_bytes()]).unwrap();
    assert_eq!(now(), 0o755);

    if is_root() {
        mode(0o6755);
        let owner = SetattrIn { valid: fattr::UID | fattr::GID, uid: 5, gid: 6, ..SetattrIn::default() };
        let attr = client.setattr(node, &owner).unwrap();
        assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (5, 6, 0o755));
        // Both at once: the owner first, or the bits would be lost.
        let both =
            SetattrIn { valid: fattr::UID | fattr::MODE, uid: 7, mode: 0o4755, ..SetattrIn::default() };
        let attr = client.setattr(node, &both).unwrap();
        assert_eq!((attr.uid, attr.mode & 0o7777), (7, 0o4755));
    }
}

#[test]
fn attributes_beyond_the_mode() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, _) = client.create(m, "f", 0o600, libc::O_RDWR).unwrap();
    let node = entry.nodeid;
    client.setxattr(node, "user.color", b"blue").unwrap();
    client.setxattr(node, "user.empty", b"").unwrap();
    assert_eq!(client.getxattr(node, "user.color", 0).unwrap(), 4u64.to_le_bytes());
    assert_eq!(client.getxattr(node, "user.color", 3), Err(libc::ERANGE));
    assert_eq!(client.getxattr(node, "user.color", 64).unwrap(), b"blue");
    assert_eq!(client.getxattr(node, "user.empty", 64).unwrap(), b"");
    assert_eq!(client.getxattr(node, "user.none", 64), Err(libc::ENODATA));
    let names = String::from_utf8(client.listxattr(node, 1000).unwrap()).unwrap();
    let names: BTreeSet<&str> = names.split_terminator('\0').collect();
    assert_eq!(names, ["user.color", "user.empty"].into());
    client.tell(Opcode::Removexattr, node, &[&client::text("user.color")]).unwrap();
    assert_eq!(client.getxattr(node, "user.color", 64), Err(libc::ENODATA));

    for refused in ["trusted.overlay.redirect", "security.selinux", "system.posix_acl_access"] {
        assert_eq!(client.setxattr(node, refused, b"x"), Err(libc::EOPNOTSUPP), "{refused}");
        assert_eq!(client.getxattr(node, refused, 64), Err(libc::EOPNOTSUPP), "{refused}");
    }
    if is_root() {
        // cap_net_raw=ep, version 2 (linux/capability.h: vfs_cap_data)
        let caps = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        client.setxattr(node, "security.capability", &caps).unwrap();
        assert_eq!(client.getxattr(node, "security.capability", 64).unwrap(), caps);
        let handle = client.open(node, libc::O_WRONLY).unwrap();
        client.write(handle, 0, b"x").unwrap();
        assert_eq!(
            client.getxattr(node, "security.capability", 64),
            Err(libc::ENODATA),
            "a write drops them"
        );
    }
    let fifo = client.mknod(m, "fifo", libc::S_IFIFO | 0o600, 0).unwrap().nodeid;
    assert_eq!(client.getxattr(fifo, "user.x", 64), Err(libc::ENODATA));
    assert_eq!(client.setxattr(fifo, "user.x", b""), Err(libc::EPERM));
    assert_eq!(client.listxattr(fifo, 64).unwrap(), b"");
}

#[test]
fn holes_are_found_made_and_filled() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (entry, handle) = client.create(m, "sparse", 0o600, libc::O_RDWR).unwrap();
    client.truncate(entry.nodeid, 1 << 20).unwrap();
    client.write(handle, 512 << 10, &[1; 4096]).unwrap();
    let seek = |offset, whence: i32| {
        let ask = LseekIn { fh: handle.fh, offset, whence: whence.cast_unsigned(), padding: 0 };
        client.ask::<LseekOut>(Opcode::Lseek, entry.nodeid, &[ask.as_bytes()]).map(|out| out.offset)
    };
    assert_eq!(seek(0, libc::SEEK_DATA), Ok(512 << 10));
    assert_eq!(seek(512 << 10, libc::SEEK_HOLE), Ok(516 << 10));
    assert_eq!(seek(600 << 10, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(u64::MAX, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(libc::EINVAL));

    let allocate = |mode: i32, offset, length| {
        let ask = FallocateIn { fh: handle.fh, offset, length, mode: mode.cast_unsigned(), padding: 0 };
        client.tell(Opcode::Fallocate, entry.nodeid, &[ask.as_bytes()])
    };
    allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 512 << 10, 4096).unwrap();
    assert_eq!(client.read(handle, 512 << 10, 4096).unwrap(), [0; 4096]);
    allocate(0, 0, 2 << 20).unwrap();
    assert_eq!(client.getattr(entry.nodeid, None).unwrap().size, 2 << 20);
    assert_eq!(allocate(0, u64::MAX, 1), Err(libc::EINVAL));
}

#[test]
fn ranges_are_copied_by_the_host() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (_, from) = client.create(m, "from", 0o600, libc::O_RDWR).unwrap();
    let (_, to) = client.create(m, "to", 0o600, libc::O_RDWR).unwrap();
    client.write(from, 0, b"0123456789").unwrap();
    let ask = CopyFileRangeIn {
        fh_in: from.fh,
        off_in: 2,
        nodeid_out: to.node,
        fh_out: to.fh,
        off_out: 1,
        len: u64::MAX,
        flags: 0,
    };
    let copied: WriteOut = client.ask(Opcode::CopyFileRange, from.node, &[ask.as_bytes()]).unwrap();
    assert_eq!(copied.size, 8);
    assert_eq!(client.read(to, 0, 100).unwrap(), b"\x0023456789");
    let wrong = CopyFileRangeIn { flags: 1, ..ask };
    assert_eq!(client.tell(Opcode::CopyFileRange, from.node, &[wrong.as_bytes()]), Err(libc::EINVAL));
}

#[test]
fn durability_is_passed_on() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (_, file) = client.create(m, "f", 0o600, libc::O_RDWR).unwrap();
    let d = client.opendir(m).unwrap();
    let root = client.opendir(ROOT).unwrap();
    for flags in [0, FSYNC_FDATASYNC] {
        let ask = |fh| FsyncIn { fh, flags, padding: 0 };
        client.tell(Opcode::Fsync, file.node, &[ask(file.fh).as_bytes()]).unwrap();
        client.tell(Opcode::Fsyncdir, d.node, &[ask(d.fh).as_bytes()]).unwrap();
        client.tell(Opcode::Fsyncdir, root.node, &[ask(root.fh).as_bytes()]).unwrap();
        assert_eq!(client.tell(Opcode::Fsync, file.node, &[ask(999).as_bytes()]), Err(libc::EBADF));
    }
    // Never to be asked for again.
    for never in [Opcode::Flush, Opcode::Access, Opcode::Syncfs] {
        assert_eq!(client.tell(never, file.node, &[&[0; 24]]), Err(libc::ENOSYS));
    }
}

#[test]
fn a_directory_lists_what_is_in_it_and_its_nodes() {
    let dir = tempdir().unwrap();
    for i in 0..200 {
        fs::write(dir.path().join(format!("file-{i:03}")), "").unwrap();
    }
    fs::create_dir(dir.path().join("dir")).unwrap();
    std::os::unix::fs::symlink("x", dir.path().join("link")).unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let nodes_before = client.count("nodes");
    for plus in [false, true] {
        let list = client.list(m, plus).unwrap();
        let names: HashSet<&str> = list.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!((list.len(), names.len()), (204, 204));
        for entry in &list {
            let kind = match entry.name.as_str() {
                "." | ".." | "dir" => 4,
                "link" => 10,
                _ => 8,
            };
            assert_eq!(entry.kind, kind, "{}", entry.name);
            if plus && !entry.name.starts_with('.') {
                let attr = client.getattr(entry.node, None).unwrap();
                assert_eq!(attr.ino, entry.ino, "{}", entry.name);
                client.forget(entry.node, 1);
            } else {
                assert_eq!(entry.node, 0, "{}", entry.name);
            }
        }
        assert_eq!(client.count("nodes"), nodes_before, "each entry counts one lookup, and the dots none");
    }
}

#[test]
fn a_listing_goes_on_from_any_position_and_starts_afresh() {
    let dir = tempdir().unwrap();
    for i in 0..300 {
        fs::write(dir.path().join(format!("{i}")), "").unwrap();
    }
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let all = client.list(m, false).unwrap();
    let handle = client.opendir(m).unwrap();
    for at in [0, 250, 10, 301, 10] {
        let offset = if at == 0 { 0 } else { all[at - 1].off };
        let page = client.page(handle, offset, 4096, false).unwrap();
        let expected = &all[at..at + page.len()];
        assert_eq!(page, expected, "from entry {at}");
        assert!(!page.is_empty() || at == all.len());
    }
    // Too little room for one entry is an empty page, not an error.
    assert_eq!(client.page(handle, 0, 8, false).unwrap(), []);
    assert_eq!(client.page(handle, 0, 0, true).unwrap(), []);
    // rewinddir(3) shows what has changed since.
    fs::write(dir.path().join("new"), "").unwrap();
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let page = client.page(handle, offset, 4096, false).unwrap();
        let Some(last) = page.last() else { break };
        offset = last.off;
        names.extend(page.into_iter().map(|entry| entry.name));
    }
    assert!(names.contains(&"new".to_owned()));
}

#[test]
fn a_directory_of_a_hundred_thousand_entries() {
    let dir = tempdir().unwrap();
    let many = 100_000;
    for i in 0..many {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join(format!("entry-{i}")),
            rustix::fs::FileType::RegularFile,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
    }
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    for plus in [false, true] {
        let list = client.list(m, plus).unwrap();
        let names: HashSet<&str> = list.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!((list.len(), names.len()), (many + 2, many + 2), "plus: {plus}");
        if plus {
            // More than may be held: the rest is told by name only, and there is still room to look names up.
            let told = list.iter().filter(|entry| entry.node != 0).count();
            assert!(told > 1000 && told < client::LIMITS.nodes, "{told}");
            assert!(client.lookup(m, "entry-99999").is_ok());
        }
    }
}

#[test]
fn links_are_read_and_never_followed() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let long = "x/".repeat(2000);
    for (name, target) in [("abs", "/etc/passwd"), ("up", "../../../etc"), ("long", long.as_str())] {
        let link = client.symlink(m, name, target).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(client.readlink(link.nodeid).unwrap(), target);
        assert_eq!(client.open(link.nodeid, libc::O_RDONLY).map(drop), Err(libc::ENXIO));
        assert_eq!(client.lookup(link.nodeid, "passwd"), Err(libc::ENOTDIR));
        // One more name for the link itself.
        let again = client.link(link.nodeid, m, &format!("{name}2")).unwrap();
        assert_eq!(again.nodeid, link.nodeid);
    }
    assert_eq!(client.readlink(m), Err(libc::EINVAL));
}

#[test]
fn free_space_is_told() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let host = rustix::fs::statvfs(dir.path()).unwrap();
    let guest: StatfsOut = client.ask(Opcode::Statfs, m, &[]).unwrap();
    assert_eq!((guest.blocks, u64::from(guest.frsize)), (host.f_blocks, host.f_frsize));
    let root: StatfsOut = client.ask(Opcode::Statfs, ROOT, &[]).unwrap();
    assert_eq!((root.blocks, root.namelen), (0, 255));
}

/// As an overlay of the guest copies a file up: capabilities, size, mode, owner. See `share/copy_up.rs`.
#[test]
fn a_copy_of_an_overlay_keeps_set_id_bits_and_capabilities_and_nothing_else_does() {
    if !is_root() {
        return eprintln!("skipped: only root may change owners");
    }
    // `cap_net_bind_service=ep`, version 2.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let dir = tempdir().unwrap();
    fs::create_dir_all(dir.path().join("work/work")).unwrap();
    for layer in [true, false] {
        let (client, m) = Client::of(dir.path(), MountOptions { layer, ..MountOptions::default() });
        let work = client.walk(m, "work/work").unwrap().nodeid;
        for (parent, name, kept) in [(work, "#a1", layer), (work, "b1", false), (m, "#a1", false)] {
            let (entry, handle) = client.create(parent, name, 0o600, libc::O_WRONLY).unwrap();
            let file = entry.nodeid;
            client.release(handle).unwrap();
            client.setxattr(file, "security.capability", &capability).unwrap();
            client.truncate(file, 0).unwrap();
            client.chmod(file, 0o6755).unwrap();
            let owner = fattr::UID | fattr::GID;
            let set = SetattrIn { valid: owner, uid: 7, gid: 8, ..SetattrIn::default() };
            let attr = client.setattr(file, &set).unwrap();
            assert_eq!((attr.uid, attr.gid), (7, 8));
            assert_eq!(attr.mode & 0o7777, if kept { 0o6755 } else { 0o755 }, "{name} in a layer: {layer}");
            let found = client.getxattr(file, "security.capability", 64);
            assert_eq!(found.is_ok_and(|found| found == capability), kept, "{name} in a layer: {layer}");
            client.unlink(parent, name).unwrap();
        }
    }
}

#[test]
fn caches_count_as_long_as_the_mount_says() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let client = Client::new();
    let cases = [(Cache::Shared, 1, 0), (Cache::Live, 0, 0), (Cache::Exclusive, 3600, FOPEN_KEEP_CACHE)];
    for (cache, seconds, flags) in cases {
        let options = MountOptions { cache, ..MountOptions::default() };
        client.server.mount("m", directory(dir.path()), options).unwrap();
        let m = client.lookup(ROOT, "m").unwrap();
        assert_eq!(m.entry_valid, 0, "the name of a mount is asked for each time");
        let file = client.lookup(m.nodeid, "f").unwrap();
        assert_eq!((file.entry_valid, file.attr_valid), (seconds, seconds), "{cache:?}");
        let set_id = client.chmod(file.nodeid, 0o4755).unwrap();
        assert_eq!(set_id.mode & 0o7777, 0o4755);
        assert_eq!(client.lookup(m.nodeid, "f").unwrap().attr_valid, 0, "a write may take the bits away");
        client.chmod(file.nodeid, 0o755).unwrap();
        let open: OpenOut = client.ask(Opcode::Open, file.nodeid, &[OpenIn::default().as_bytes()]).unwrap();
        assert_eq!(open.flags, flags, "{cache:?}");
        client.server.unmount("m").unwrap();
    }
}
