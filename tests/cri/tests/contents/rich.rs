//! An image of all that a layer can say, in three layers.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use e2e::layer::{Entry, Kind, Layer};
use e2e::{oci, run};

const MIB: usize = 1 << 20;

/// A file capability, `cap_net_bind_service=ep` (`struct vfs_cap_data` of version 2).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Small files in one folder: the builder takes a minute for 40,000.
const ONE_FOLDER: usize = 2_000;

/// Writes the image's layers, the lowest first, into `folder`: all the contents are below `/content`, of them `many` small files.
pub fn layers(folder: &Path, many: usize) -> Result<Vec<PathBuf>> {
    let names = ["base.tar", "changes.tar", "returns.tar"].map(|name| folder.join(name));
    base(&names[0], &programs(folder)?, many)?;
    changes(&names[1])?;
    returns(&names[2])?;
    Ok(names.into())
}

/// A tree with a shell, the program that lists, and a large program with its libraries.
fn programs(folder: &Path) -> Result<PathBuf> {
    let tree = folder.join("programs");
    oci::busybox_tree(&tree, &["sh", "cat", "chmod", "chown", "ln", "mkdir", "mv", "rm", "touch"])?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
    fs::copy("/opt/ctvm/tests/exerciser", tree.join("bin/exerciser"))?;
    let large = Path::new(e2e::BIN).join("ctvm-convert");
    // The loader says what it would load (ld.so(8)).
    let needed = run(std::process::Command::new(&large).env("LD_TRACE_LOADED_OBJECTS", "1"))?.ok()?;
    for library in needed.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = tree.join(&library[1..]);
        fs::create_dir_all(to.parent().context("a library in a folder")?)?;
        fs::copy(library, to)?;
    }
    fs::copy(large, tree.join("bin/large"))?;
    Ok(tree)
}

fn base(path: &Path, programs: &Path, many: usize) -> Result<()> {
    let mut layer = Layer::create(path)?;
    layer.add_tree("", programs)?;
    let mut add = |entry: Entry<'_>| layer.add(entry);
    add(Entry::new("content", Kind::Folder).time("1500000000"))?;

    for (name, mode) in
        [("none", 0), ("setuid", 0o4755), ("setgid", 0o2711), ("sticky", 0o1644), ("all", 0o7777)]
    {
        add(Entry::new(&format!("content/mode-{name}"), Kind::File(name.as_bytes())).mode(mode))?;
    }
    add(Entry::new("content/folder-setgid", Kind::Folder).mode(0o2775).owner(0, 50))?;
    add(Entry::new("content/folder-sticky", Kind::Folder).mode(0o1777))?;
    add(Entry::new("content/folder-secret", Kind::Folder).mode(0o700).owner(1000, 1000))?;
    add(Entry::new("content/folder-secret/file", Kind::File(b"secret")).mode(0o400).owner(1000, 1000))?;
    for (user, group) in [(65_535, 65_536), (100_000, 165_536), (2_097_152, 2_097_153), (4_294_967_294, 0)] {
        let name = format!("content/owner-{user}");
        add(Entry::new(&name, Kind::File(b"")).owner(user, group))?;
    }

    for (name, time) in [("epoch", "0"), ("2038", "2147483648"), ("2106", "4294967297")] {
        add(Entry::new(&format!("content/time-{name}"), Kind::File(b"")).time(time))?;
    }
    add(Entry::new("content/time-fraction", Kind::File(b"")).time("1234567890.123456789"))?;

    add(Entry::new("content/char", Kind::Char(1, 3)).mode(0o666))?;
    add(Entry::new("content/char-large", Kind::Char(511, 0xabcde)).mode(0o600).owner(0, 6))?;
    add(Entry::new("content/block", Kind::Block(7, 300)).mode(0o660))?;
    add(Entry::new("content/fifo", Kind::Fifo).mode(0o622).time("1600000000"))?;

    add(Entry::new("content/hard-one", Kind::File(b"one of three")).attribute("user.of", b"three"))?;
    add(Entry::new("content/hard-two", Kind::HardLink("content/hard-one")))?;
    add(Entry::new("content/hard-three", Kind::HardLink("content/hard-one")))?;

    let long = [b'v'; 3000];
    for (name, key, value) in [
        ("user", "user.text", &b"a value"[..]),
        ("bytes", "user.bytes", b"\0\n=\xff of all kinds\n"),
        ("empty", "user.empty", b""),
        ("long", "user.long", &long),
        ("capability", "security.capability", &CAPABILITY),
        ("trusted", "trusted.text", b"of root's"),
    ] {
        add(Entry::new(&format!("content/attribute-{name}"), Kind::File(b"x")).attribute(key, value))?;
    }
    let mut several = Entry::new("content/attribute-several", Kind::Folder);
    for number in 0..40 {
        several =
            several.attribute(&format!("user.number-{number}"), format!("{}", number * number).as_bytes());
    }
    add(several)?;

    add(Entry::new("content/link", Kind::Symlink(OsStr::new("../bin/sh"))).owner(100_000, 5))?;
    add(Entry::new("content/link-nowhere", Kind::Symlink(OsStr::new("/no/where"))))?;
    let target = "t/".repeat(2047);
    add(Entry::new("content/link-long", Kind::Symlink(OsStr::new(&target))))?;
    for bytes in [&b"\xff\xfe latin"[..], b"new\nline", b"-rf", b"a:b,c\\d", "\u{fc}n\u{ef}".as_bytes()] {
        let name = [b"content/name ", bytes].concat();
        add(Entry::new(OsStr::from_bytes(&name), Kind::File(bytes)))?;
    }
    add(Entry::new(&format!("content/{}", "n".repeat(255)), Kind::File(b"long name")))?;
    let mut deep = "content".to_owned();
    for letter in 'a'..='l' {
        deep = format!("{deep}/{}", letter.to_string().repeat(240));
        add(Entry::new(&deep, Kind::Folder))?;
    }
    add(Entry::new(&format!("{deep}/file"), Kind::File(b"deep")))?;

    add(Entry::new("content/empty", Kind::File(b"")))?;
    add(Entry::new("content/folder-empty", Kind::Folder).time("1"))?;
    for size in [1, 4095, 4096, 4097, 65_535, 65_536, 262_143, 262_145] {
        let bytes = oci::noise(size as u64, size);
        add(Entry::new(&format!("content/size-{size}"), Kind::File(&bytes)))?;
    }
    let mut sparse = vec![0; 6 * MIB];
    sparse[4 * MIB..4 * MIB + 5].copy_from_slice(b"thing");
    add(Entry::new("content/zeros", Kind::File(&sparse)))?;
    add(Entry::new("content/noise", Kind::File(&oci::noise(99, 3 * MIB + 77))))?;

    add(Entry::new("content/many", Kind::Folder))?;
    for number in 0..many {
        if number % ONE_FOLDER == 0 {
            add(Entry::new(&format!("content/many/{}", number / ONE_FOLDER), Kind::Folder))?;
        }
        // Some are empty, some the same, most neither.
        let bytes = "x".repeat(number % 97) + &(number % 5000).to_string();
        let bytes = if number % 50 == 0 { "" } else { &bytes };
        add(Entry::new(
            &format!("content/many/{}/{number:06}", number / ONE_FOLDER),
            Kind::File(bytes.as_bytes()),
        ))?;
    }

    // What the layers above are about.
    for folder in ["gone", "opaque", "kept", "to-file", "to-link", "other", "merged"] {
        add(Entry::new(&format!("content/over/{folder}"), Kind::Folder).owner(1, 2))?;
        for file in ["one", "two"] {
            let name = format!("content/over/{folder}/{file}");
            add(Entry::new(&name, Kind::File(folder.as_bytes())).attribute("user.layer", b"base"))?;
        }
    }
    for file in ["gone-file", "to-folder", "file-to-link", "to-fifo", "changed", "mode", "returns", "twice"] {
        let name = format!("content/over/{file}");
        add(Entry::new(&name, Kind::File(b"base")).attribute("user.layer", b"base"))?;
    }
    add(Entry::new("content/over/link-to-folder", Kind::Symlink(OsStr::new("kept"))))?;
    add(Entry::new("content/over/link-to-file", Kind::Symlink(OsStr::new("changed"))))?;
    for name in ["one", "two", "three"] {
        match name {
            "one" => add(Entry::new("content/over/linked-one", Kind::File(b"linked")))?,
            _ => {
                let name = format!("content/over/linked-{name}");
                add(Entry::new(&name, Kind::HardLink("content/over/linked-one")))?;
            }
        }
    }
    layer.finish()
}

/// Files and folders that are removed, replaced, and changed.
fn changes(path: &Path) -> Result<()> {
    let mut layer = Layer::create(path)?;
    let mut add = |entry: Entry<'_>| layer.add(entry);
    add(Entry::new("content", Kind::Folder).time("1500000001"))?;
    // Its attributes are the new ones; what is in it stays.
    add(Entry::new("content/over", Kind::Folder).mode(0o711).owner(7, 8).time("1500000002"))?;
    for name in ["gone", "gone-file", "linked-two", "returns"] {
        add(Entry::new(&format!("content/over/.wh.{name}"), Kind::File(b"")))?;
    }
    add(Entry::new("content/over/opaque", Kind::Folder).mode(0o750))?;
    add(Entry::new("content/over/opaque/.wh..wh..opq", Kind::File(b"")))?;
    add(Entry::new("content/over/opaque/new", Kind::File(b"new")))?;
    // A file in a folder that has no entry here.
    add(Entry::new("content/over/kept/three", Kind::File(b"changes")))?;
    add(Entry::new("content/over/kept/.wh.one", Kind::File(b"")))?;
    add(Entry::new("content/over/to-folder", Kind::Folder).mode(0o751))?;
    add(Entry::new("content/over/to-folder/in", Kind::File(b"in a folder that was a file")))?;
    add(Entry::new("content/over/to-file", Kind::File(b"was a folder")))?;
    add(Entry::new("content/over/to-link", Kind::Symlink(OsStr::new("kept"))))?;
    add(Entry::new("content/over/file-to-link", Kind::Symlink(OsStr::new("nowhere"))))?;
    add(Entry::new("content/over/link-to-folder", Kind::Folder))?;
    add(Entry::new("content/over/link-to-folder/in", Kind::File(b"a folder now")))?;
    add(Entry::new("content/over/link-to-file", Kind::File(b"a file now")))?;
    add(Entry::new("content/over/to-fifo", Kind::Fifo))?;
    add(Entry::new("content/over/changed", Kind::File(&oci::noise(5, 300_000)))
        .attribute("user.other", b"changes"))?;
    add(Entry::new("content/over/mode", Kind::File(b"base")).mode(0o4711).attribute("user.layer", b"base"))?;
    add(Entry::new("content/over/linked-three", Kind::File(b"on its own")))?;
    add(Entry::new("content/over/twice", Kind::Folder))?;
    add(Entry::new("content/over/twice/in", Kind::File(b"once")))?;
    add(Entry::new("content/over/other", Kind::Folder).owner(9, 9).attribute("user.layer", b"changes"))?;
    layer.finish()
}

/// What was removed comes back, what was replaced is replaced again.
fn returns(path: &Path) -> Result<()> {
    let mut layer = Layer::create(path)?;
    let mut add = |entry: Entry<'_>| layer.add(entry);
    add(Entry::new("content/over/returns", Kind::File(b"again")).time("1700000000"))?;
    add(Entry::new("content/over/gone", Kind::Folder).owner(3, 3))?;
    add(Entry::new("content/over/gone/new", Kind::File(b"nothing of the old")))?;
    add(Entry::new("content/over/twice", Kind::File(b"a file again")))?;
    add(Entry::new("content/over/merged/three", Kind::File(b"beside the two of the lowest layer")))?;
    add(Entry::new("content/over/to-folder/.wh.in", Kind::File(b"")))?;
    add(Entry::new("content/over/to-folder/other", Kind::HardLink("content/over/returns")))?;
    add(Entry::new("content/over/opaque/.wh.new", Kind::File(b"")))?;
    // Nothing of that name was ever there.
    add(Entry::new("content/over/.wh.never", Kind::File(b"")))?;
    layer.finish()
}
