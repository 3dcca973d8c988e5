//! What a guest cannot do: leave its directories, write where it may not, hold more than its share, break the server.

mod client;
mod confine;

use std::fs;
use std::mem::size_of;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use client::{Client, Handle, ROOT, directory, text};
use imagefs::wire::*;
use imagefs::{Limits, MountError, MountOptions, UnmountError};
use tempfile::tempdir;
use zerocopy::IntoBytes;

#[test]
fn nothing_above_a_mounted_directory_is_reached_by_name() {
    let outer = tempdir().unwrap();
    let inner = outer.path().join("inner");
    fs::create_dir_all(inner.join("dir")).unwrap();
    fs::write(outer.path().join("secret"), "secret").unwrap();
    symlink(outer.path(), inner.join("abs")).unwrap();
    symlink("..", inner.join("up")).unwrap();
    symlink("../secret", inner.join("file")).unwrap();
    let (client, m) = Client::of(&inner, MountOptions::default());
    let dir = client.lookup(m, "dir").unwrap().nodeid;

    let names = ["..", ".", "", "../secret", "dir/../../secret", "/etc/passwd", "/", "dir/"];
    for parent in [m, dir, ROOT] {
        for name in names {
            let create =
                |opcode, body: &[u8]| client.call(opcode, parent, &[body, &text(name)], 256).map(drop);
            assert_eq!(create(Opcode::Lookup, &[]), Err(libc::EINVAL), "lookup {name:?}");
            assert_eq!(
                create(Opcode::Mkdir, MkdirIn::default().as_bytes()),
                Err(libc::EINVAL),
                "mkdir {name:?}"
            );
            assert_eq!(
                create(Opcode::Create, CreateIn::default().as_bytes()),
                Err(libc::EINVAL),
                "create {name:?}"
            );
            assert_eq!(create(Opcode::Unlink, &[]), Err(libc::EINVAL), "unlink {name:?}");
            assert_eq!(create(Opcode::Rmdir, &[]), Err(libc::EINVAL), "rmdir {name:?}");
            assert_eq!(client.symlink(parent, name, "x").map(drop), Err(libc::EINVAL), "symlink {name:?}");
            assert_eq!(client.link(m, parent, name).map(drop), Err(libc::EINVAL), "link {name:?}");
            assert_eq!(client.rename((parent, name), (dir, "x"), 0), Err(libc::EINVAL), "rename {name:?}");
            assert_eq!(client.rename((dir, "x"), (parent, name), 0), Err(libc::EINVAL), "rename to {name:?}");
        }
    }
    // Links are nodes of their own, which lead nowhere here.
    for link in ["abs", "up", "file"] {
        let node = client.lookup(m, link).unwrap().nodeid;
        assert_eq!(client.lookup(node, "secret"), Err(libc::ENOTDIR), "{link}");
        assert_eq!(client.open(node, libc::O_RDONLY).map(drop), Err(libc::ENXIO), "{link}");
        assert_eq!(client.opendir(node).map(drop), Err(libc::ENOTDIR), "{link}");
        assert_eq!(client.create(node, "x", 0o600, libc::O_RDWR).map(drop), Err(libc::ENOTDIR), "{link}");
        // `create` where a link lies opens nothing either.
        assert_eq!(client.create(m, link, 0o600, libc::O_RDWR).map(drop), Err(libc::ENXIO), "{link}");
    }
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
}

/// The directory that the guest stands in is moved out of its share by someone on the host; then it has what lies
/// below, as any process that stands there, and still no way up.
#[test]
fn a_directory_moved_away_under_the_guest_gives_no_way_up() {
    let outer = tempdir().unwrap();
    let share = outer.path().join("share");
    fs::create_dir_all(share.join("a/b")).unwrap();
    fs::write(outer.path().join("secret"), "").unwrap();
    let (client, m) = Client::of(&share, MountOptions::default());
    let b = client.walk(m, "a/b").unwrap().nodeid;
    fs::rename(share.join("a/b"), outer.path().join("b")).unwrap();
    assert_eq!(client.lookup(b, ".."), Err(libc::EINVAL));
    assert_eq!(client.lookup(b, "secret"), Err(libc::ENOENT));
    client.create(b, "x", 0o600, libc::O_RDWR).unwrap();
    assert!(outer.path().join("b/x").exists());
}

/// A race that path-walking servers lose: a directory is swapped for a link while the guest looks it up and opens it.
#[test]
fn swapping_a_directory_for_a_link_wins_nothing() {
    let outer = tempdir().unwrap();
    let share = outer.path().join("share");
    fs::create_dir_all(share.join("dir")).unwrap();
    fs::write(share.join("dir/file"), "inside").unwrap();
    fs::write(outer.path().join("file"), "outside").unwrap();
    symlink(outer.path(), share.join("link")).unwrap();
    let (client, m) = Client::of(&share, MountOptions::default());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, share.join("dir"), CWD, share.join("link"), RenameFlags::EXCHANGE)
                    .unwrap();
            }
        });
        let mut opened = 0;
        for _ in 0..20_000 {
            for name in ["dir", "link"] {
                let Ok(dir) = client.lookup(m, name) else { continue };
                if let Ok(file) = client.lookup(dir.nodeid, "file") {
                    let handle = client.open(file.nodeid, libc::O_RDONLY).unwrap();
                    assert_eq!(client.read(handle, 0, 100).unwrap(), b"inside");
                    client.release(handle).unwrap();
                    client.forget(file.nodeid, 1);
                    opened += 1;
                }
                client.forget(dir.nodeid, 1);
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(opened > 100, "only {opened} of 40000 tries met the directory");
    });
    assert_eq!(client.count("nodes"), 1, "every lookup was counted and forgotten, save the mount's own node");
}

#[test]
fn devices_of_the_host_are_neither_made_nor_opened() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let null = 1 << 8 | 3;
    assert_eq!(client.mknod(m, "null", libc::S_IFCHR | 0o666, null).map(drop), Err(libc::EPERM));
    assert_eq!(client.mknod(m, "disk", libc::S_IFBLK | 0o666, 8 << 8).map(drop), Err(libc::EPERM));
    assert_eq!(client.mknod(m, "dir", libc::S_IFDIR | 0o666, 0).map(drop), Err(libc::EINVAL));
    assert_eq!(client.mknod(m, "link", libc::S_IFLNK | 0o666, 0).map(drop), Err(libc::EINVAL));
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // How overlay file systems mark what was removed.
    let whiteout = client.mknod(m, "whiteout", libc::S_IFCHR, 0).unwrap();
    assert_eq!(whiteout.attr.rdev, 0);
    // One that the host has put there is shown, and not opened.
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    mknodat(
        CWD,
        dir.path().join("zero"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        makedev(1, 5),
    )
    .unwrap();
    let zero = client.lookup(m, "zero").unwrap();
    assert_eq!(zero.attr.rdev, 1 << 8 | 5);
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
        assert_eq!(client.open(zero.nodeid, flags).map(drop), Err(libc::ENXIO));
        assert_eq!(client.create(m, "zero", 0o600, flags).map(drop), Err(libc::ENXIO));
    }
    assert_eq!(client.truncate(zero.nodeid, 0), Err(libc::EINVAL));
}

#[test]
fn a_read_only_mount_refuses_every_change() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    fs::create_dir(dir.path().join("dir")).unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions { read_only: true, ..MountOptions::default() });
    let file = client.lookup(m, "file").unwrap().nodeid;
    let before = client.getattr(file, None).unwrap();

    let rofs = Err(libc::EROFS);
    assert_eq!(client.create(m, "new", 0o600, libc::O_RDONLY).map(drop), rofs);
    assert_eq!(client.create(m, "file", 0o600, libc::O_RDONLY).map(drop), rofs);
    assert_eq!(client.mkdir(m, "new", 0o700).map(drop), rofs);
    assert_eq!(client.mknod(m, "new", libc::S_IFREG | 0o600, 0).map(drop), rofs);
    assert_eq!(client.symlink(m, "new", "x").map(drop), rofs);
    assert_eq!(client.link(file, m, "new").map(drop), rofs);
    assert_eq!(client.unlink(m, "file"), rofs);
    assert_eq!(client.rmdir(m, "dir"), rofs);
    assert_eq!(client.rename((m, "file"), (m, "new"), 0), rofs);
    assert_eq!(
        client.tell(Opcode::Rename, m, &[RenameIn { newdir: m }.as_bytes(), &text("file"), &text("n")]),
        rofs
    );
    for valid in [fattr::MODE, fattr::UID, fattr::GID, fattr::SIZE, fattr::ATIME, fattr::MTIME, 0, u32::MAX] {
        let set = SetattrIn { valid, ..SetattrIn::default() };
        assert_eq!(client.setattr(file, &set).map(drop), rofs, "setattr {valid:#x}");
    }
    assert_eq!(client.setxattr(file, "user.x", b"x"), rofs);
    assert_eq!(client.tell(Opcode::Removexattr, file, &[&text("user.x")]), rofs);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC, libc::O_RDWR | libc::O_APPEND]
    {
        assert_eq!(client.open(file, flags).map(drop), rofs, "open {flags:#o}");
    }
    // A handle for reading does not write.
    let handle = client.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(client.read(handle, 0, 10).unwrap(), b"text");
    assert_eq!(client.write(handle, 0, b"x"), Err(libc::EBADF));
    let allocate = FallocateIn { fh: handle.fh, length: 4096, ..FallocateIn::default() };
    assert_eq!(client.tell(Opcode::Fallocate, file, &[allocate.as_bytes()]), Err(libc::EBADF));
    let copy = CopyFileRangeIn {
        fh_in: handle.fh,
        nodeid_out: file,
        fh_out: handle.fh,
        len: 4,
        ..Default::default()
    };
    assert!(client.tell(Opcode::CopyFileRange, file, &[copy.as_bytes()]).is_err());

    let after = client.getattr(file, None).unwrap();
    assert_eq!(
        (after.mtime, after.mtimensec, after.ctimensec),
        (before.mtime, before.mtimensec, before.ctimensec)
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    assert_eq!(client.list(m, true).unwrap().len(), 4);
}

#[test]
fn one_directory_may_be_read_only_here_and_writable_there() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let (client, _) = Client::of(dir.path(), MountOptions { read_only: true, ..MountOptions::default() });
    client.server.mount("rw", directory(dir.path()), MountOptions::default()).unwrap();
    let (ro, rw) = (client.lookup(ROOT, "m").unwrap().nodeid, client.lookup(ROOT, "rw").unwrap().nodeid);
    let (in_ro, in_rw) = (client.lookup(ro, "f").unwrap(), client.lookup(rw, "f").unwrap());
    assert_ne!(in_ro.nodeid, in_rw.nodeid);
    assert_eq!(in_ro.attr.ino, in_rw.attr.ino);
    client.chmod(in_rw.nodeid, 0o600).unwrap();
    assert_eq!(client.chmod(in_ro.nodeid, 0o644).map(drop), Err(libc::EROFS));
    // No way from one to the other.
    assert_eq!(client.link(in_rw.nodeid, ro, "g").map(drop), Err(libc::EROFS));
    client.server.mount("rw2", directory(dir.path()), MountOptions::default()).unwrap();
    let rw2 = client.lookup(ROOT, "rw2").unwrap().nodeid;
    assert_eq!(client.link(in_rw.nodeid, rw2, "g").map(drop), Err(libc::EXDEV));
    assert_eq!(client.rename((rw, "f"), (rw2, "g"), 0), Err(libc::EXDEV));
}

#[test]
fn the_root_lists_mounts_and_cannot_be_changed() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    client.server.mount("second", directory(dir.path()), MountOptions::default()).unwrap();
    for plus in [false, true] {
        let names: Vec<String> =
            client.list(ROOT, plus).unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, [".", "..", "m", "second"]);
    }
    assert_eq!(client.getattr(ROOT, None).unwrap().nlink, 4);
    assert_eq!(client.lookup(ROOT, "third"), Err(libc::ENOENT));
    let rofs = Err(libc::EROFS);
    assert_eq!(client.create(ROOT, "x", 0o600, libc::O_RDWR).map(drop), rofs);
    assert_eq!(client.mkdir(ROOT, "x", 0o700).map(drop), rofs);
    assert_eq!(client.rmdir(ROOT, "m"), rofs);
    assert_eq!(client.rename((ROOT, "m"), (m, "x"), 0), rofs);
    assert_eq!(client.rename((m, "x"), (ROOT, "m"), 0), rofs);
    assert_eq!(client.chmod(ROOT, 0o700).map(drop), rofs);
    assert_eq!(client.setxattr(ROOT, "user.x", b""), rofs);
    assert_eq!(client.listxattr(ROOT, 64).unwrap(), b"");
    assert_eq!(client.open(ROOT, libc::O_RDONLY).map(drop), Err(libc::EISDIR));
}

#[test]
fn mounts_have_names_and_are_directories() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let client = Client::new();
    let mount = |at: &str, path: &str| {
        client.server.mount(at, directory(&dir.path().join(path)), MountOptions::default())
    };
    for bad in ["", ".", "..", "a/b", "/", "a\0b", &"n".repeat(256)] {
        assert!(matches!(mount(bad, ""), Err(MountError::Name { .. })), "{bad:?}");
    }
    assert!(matches!(mount("f", "f"), Err(MountError::NotADirectory { .. })));
    mount("m", "").unwrap();
    let taken = mount("m", "").unwrap_err();
    assert_eq!(taken.to_string(), "\"m\" is mounted already");
    assert!(matches!(client.server.unmount("x"), Err(UnmountError::NotFound { .. })));
    client.server.unmount("m").unwrap();
    mount("m", "").unwrap();
}

#[test]
fn unmounting_ends_names_and_lets_go_of_all_but_open_files() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("open"), "open").unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let open = client.lookup(m, "open").unwrap().nodeid;
    let sub = client.lookup(m, "sub").unwrap().nodeid;
    let handle = client.open(open, libc::O_RDWR).unwrap();
    let listing = client.opendir(sub).unwrap();
    let below = || {
        let links = fs::read_dir("/proc/self/fd").unwrap();
        links
            .filter(|link| {
                fs::read_link(link.as_ref().unwrap().path()).is_ok_and(|to| to.starts_with(dir.path()))
            })
            .count()
    };
    assert_eq!(below(), 5, "root, two nodes, two handles");
    assert_eq!(client.server.unmount("m").unwrap(), 2);
    assert_eq!(below(), 2, "two handles");

    assert_eq!(client.lookup(ROOT, "m"), Err(libc::ENOENT));
    assert_eq!(client.lookup(m, "open"), Err(libc::ENOENT));
    assert_eq!(client.getattr(open, None), Err(libc::ENOENT));
    assert_eq!(client.open(open, libc::O_RDONLY).map(drop), Err(libc::ENOENT));
    assert_eq!(client.create(sub, "x", 0o600, libc::O_RDWR).map(drop), Err(libc::ENOENT));
    assert_eq!(client.list(ROOT, true).unwrap().len(), 2);

    assert_eq!(client.read(handle, 0, 10).unwrap(), b"open");
    client.write(handle, 4, b"!").unwrap();
    assert_eq!(client.getattr(open, Some(handle.fh)).unwrap().size, 5);
    assert_eq!(client.page(listing, 0, 4096, true).unwrap().len(), 2);
    client.release(handle).unwrap();
    client.release(listing).unwrap();
    assert_eq!(below(), 0);

    // The guest forgets; the name may be used again and is another node.
    for node in [open, sub, m] {
        client.forget(node, 1);
    }
    assert_eq!(client.count("nodes"), 0);
    client.server.mount("m", directory(dir.path()), MountOptions::default()).unwrap();
    assert_ne!(client.lookup(ROOT, "m").unwrap().nodeid, m);
}

#[test]
fn what_a_guest_may_hold_is_bounded() {
    let dir = tempdir().unwrap();
    for i in 0..20 {
        fs::write(dir.path().join(format!("{i}")), "").unwrap();
    }
    let client = Client::with(Limits { nodes: 10, handles: 3 });
    client.server.mount("m", directory(dir.path()), MountOptions::default()).unwrap();
    let m = client.lookup(ROOT, "m").unwrap().nodeid;
    let nodes: Vec<_> = (0..9).map(|i| client.lookup(m, &i.to_string()).unwrap().nodeid).collect();
    assert_eq!(client.lookup(m, "9"), Err(libc::ENFILE));
    assert_eq!(client.lookup(m, "8").unwrap().nodeid, nodes[8], "what is known costs nothing");
    assert_eq!(client.mkdir(m, "new", 0o700).map(drop), Err(libc::ENFILE));
    let listed = client.list(m, true).unwrap();
    assert!(listed.len() > 20 && listed.iter().all(|entry| entry.node == 0), "listing goes on, by name only");
    client.forget(nodes[0], 1);
    client.lookup(m, "9").unwrap();

    let handles: Vec<_> = (1..4).map(|i| client.open(nodes[i], libc::O_RDONLY).unwrap()).collect();
    assert_eq!(client.open(nodes[4], libc::O_RDONLY).map(drop), Err(libc::ENFILE));
    assert_eq!(client.opendir(m).map(drop), Err(libc::ENFILE));
    client.release(handles[0]).unwrap();
    client.open(nodes[4], libc::O_RDONLY).unwrap();

    // A new session holds nothing.
    client.init().unwrap();
    assert_eq!((client.count("nodes"), client.count("handles")), (1, 0));
    assert_eq!(client.getattr(nodes[4], None), Err(libc::ESTALE));
    assert_eq!(client.read(handles[1], 0, 1), Err(libc::EBADF));
    client.lookup(ROOT, "m").unwrap();
}

#[test]
fn forgetting_too_much_or_the_unknown_does_no_harm() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let file = client.lookup(m, "f").unwrap().nodeid;
    client.lookup(m, "f").unwrap();
    client.forget(file, 1);
    client.getattr(file, None).unwrap();
    client.forget(file, u64::MAX);
    assert_eq!(client.getattr(file, None), Err(libc::ESTALE));
    for node in [0, ROOT, m, file, u64::MAX] {
        client.forget(node, u64::MAX);
    }
    // The root of a mount stays.
    client.lookup(m, "f").unwrap();
    client.lookup(ROOT, "m").unwrap();
    #[derive(zerocopy::IntoBytes, zerocopy::Immutable)]
    #[repr(C)]
    struct Batch(BatchForgetIn, [ForgetOne; 2]);
    let one = |nodeid| ForgetOne { nodeid, nlookup: 1 };
    client.silent(
        Opcode::BatchForget,
        0,
        &Batch(BatchForgetIn { count: 2, dummy: 0 }, [one(99), one(file + 1)]),
    );
    client.silent(
        Opcode::BatchForget,
        0,
        &Batch(BatchForgetIn { count: u32::MAX, dummy: 0 }, [one(99), one(98)]),
    );
    assert_eq!(client.count("malformed"), 1);
}

/// Every opcode with every length of request up to a full one, and too little room for the answer.
#[test]
fn requests_that_make_no_sense_are_answered_or_dropped() {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("f"), "text").unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let file = client.lookup(m, "f").unwrap().nodeid;
    let handle = client.open(file, libc::O_RDWR).unwrap();
    let opcodes: Vec<u32> =
        client::opcodes().iter().map(|&opcode| opcode as u32).chain([0, 7, 99, u32::MAX]).collect();
    let mut answers = 0;
    for &opcode in &opcodes {
        for node in [0, ROOT, m, file, u64::MAX] {
            for len in 0..=size_of::<InHeader>() + 96 {
                for fill in [0, 1, 0xff] {
                    let header = InHeader {
                        len: u32::try_from(len).unwrap(),
                        opcode,
                        nodeid: node,
                        ..Default::default()
                    };
                    let mut request = [header.as_bytes(), &[fill; 96]].concat();
                    request.truncate(len);
                    if opcode == Opcode::Fallocate as u32 && fill == 1 {
                        continue; // asks for 2^56 bytes, which sparse file systems of tests may grant
                    }
                    for room in [0, 15, 16, 200] {
                        let answer = client.raw(&request, room);
                        assert!(answer.len() <= room);
                        answers += usize::from(!answer.is_empty());
                    }
                }
            }
        }
    }
    assert!(answers > 10_000, "{answers}");
    // It lives, and a new session works.
    client.init().unwrap();
    let m = client.lookup(ROOT, "m").unwrap().nodeid;
    assert_eq!(client.read(handle, 0, 4), Err(libc::EBADF), "the session is another");
    client.lookup(m, "f").unwrap();
}

#[test]
fn lengths_that_lie_are_refused() {
    let dir = tempdir().unwrap();
    let (client, m) = Client::of(dir.path(), MountOptions::default());
    let (_, handle) = client.create(m, "f", 0o600, libc::O_RDWR).unwrap();
    let answer = |header: InHeader, body: &[u8]| {
        let answer = client.raw(&[header.as_bytes(), body].concat(), 4096);
        i32::from_le_bytes(answer[4..8].try_into().unwrap())
    };
    let header =
        |opcode: Opcode, len| InHeader { opcode: opcode as u32, nodeid: m, len, ..InHeader::default() };
    assert_eq!(answer(header(Opcode::Lookup, 0), b"f\0"), -libc::EINVAL);
    assert_eq!(answer(header(Opcode::Lookup, 43), b"f\0"), -libc::EINVAL);
    assert_eq!(answer(header(Opcode::Lookup, u32::MAX), b"f\0"), -libc::EINVAL);
    assert_eq!(answer(header(Opcode::Lookup, 41), b"f"), -libc::EINVAL, "no NUL");
    assert_eq!(answer(header(Opcode::Lookup, 42), b"f\0"), 0);
    // Data shorter than the request says, and longer than any request may be.
    let write = |size| WriteIn { fh: handle.fh, size, ..WriteIn::default() };
    for size in [5, (1 << 20) + 1, u32::MAX] {
        let asked = client.call(Opcode::Write, handle.node, &[write(size).as_bytes(), b"data"], 64);
        assert_eq!(asked, Err(libc::EINVAL), "{size}");
    }
    assert_eq!(
        client.read(Handle { fh: handle.fh, node: m }, 0, 4),
        Err(libc::EBADF),
        "another node's handle"
    );
    let read = ReadIn { fh: handle.fh, size: u32::MAX, ..ReadIn::default() };
    assert_eq!(client.call(Opcode::Read, handle.node, &[read.as_bytes()], 64), Err(libc::EINVAL));
    let at_the_end = ReadIn { fh: handle.fh, offset: u64::MAX, size: 16, ..ReadIn::default() };
    assert_eq!(client.call(Opcode::Read, handle.node, &[at_the_end.as_bytes()], 64), Err(libc::EINVAL));
    // A name longer than names are, and text without end.
    assert_eq!(client.lookup(m, &"n".repeat(256)), Err(libc::ENAMETOOLONG));
    assert_eq!(client.lookup(m, &"n".repeat(200_000)), Err(libc::E2BIG));
    assert_eq!(client.setxattr(handle.node, "user.big", &vec![0; 65_537]).map(drop), Err(libc::E2BIG));
    let ask = SetxattrIn { size: 100, flags: 0 };
    assert_eq!(
        client.tell(Opcode::Setxattr, handle.node, &[ask.as_bytes(), b"user.x\0", b"short"]),
        Err(libc::EINVAL)
    );
}

#[test]
fn many_threads_share_one_server() {
    let dir = tempdir().unwrap();
    let (client, _) = Client::of(dir.path(), MountOptions::default());
    let server: Arc<_> = client.server.clone();
    std::thread::scope(|scope| {
        for t in 0..4 {
            let server = server.clone();
            scope.spawn(move || {
                let client = Client::of_server(server);
                let m = client.lookup(ROOT, "m").unwrap().nodeid;
                for i in 0..300 {
                    // All fight for one name, and each has its own too.
                    let _ = client.create(m, "common", 0o600, libc::O_RDWR).map(|(entry, handle)| {
                        client.write(handle, 0, b"x").unwrap();
                        client.release(handle).unwrap();
                        client.forget(entry.nodeid, 1);
                    });
                    let _ = client.unlink(m, "common");
                    let name = format!("{t}-{}", i % 10);
                    let (entry, handle) = client.create(m, &name, 0o600, libc::O_RDWR).unwrap();
                    client.write(handle, 0, name.as_bytes()).unwrap();
                    assert_eq!(client.read(handle, 0, 100).unwrap(), name.as_bytes());
                    client.release(handle).unwrap();
                    for found in client.list(m, true).unwrap() {
                        if found.node != 0 {
                            client.forget(found.node, 1);
                        }
                    }
                    client.unlink(m, &name).unwrap();
                    client.forget(entry.nodeid, 1);
                }
            });
        }
    });
    assert_eq!((client.count("nodes"), client.count("handles")), (1, 0));
}
