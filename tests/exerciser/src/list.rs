//! `exerciser list FOLDER`: a line for everything below a folder, with all that a file system says of it. Two folders are the same where
//! the lines are. `exerciser reads FILE COUNT`: bytes of a file read in no order, by calls and by a mapping.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{lgetxattr, llistxattr, major, minor};
use rustix::io::Errno;

/// What is said of a name:
///
/// ```text
/// NAME KIND MODE USER:GROUP SECONDS.NANOSECONDS [SIZE DIGEST | -> TARGET | MAJOR:MINOR] [= FIRST NAME] [ATTRIBUTE="VALUE"]…
/// ```
///
/// Sizes and link counts of folders are each file system's own; of files with several names, so is the count where some of them are
/// in layers below.
pub fn list(folder: &Path) -> Result<()> {
    let mut out = std::io::stdout().lock();
    // Of a file with several names: the first that was met.
    let mut first = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let whole = folder.join(&path);
        let line =
            line(&whole, &path, &mut first).with_context(|| format!("at {}", quoted(path.as_os_str())))?;
        writeln!(out, "{line}")?;
        if fs::symlink_metadata(&whole)?.is_dir() {
            let mut names =
                fs::read_dir(&whole)?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
            names.sort();
            // The last is taken first.
            left.extend(names.iter().rev().map(|name| path.join(name)));
        }
    }
    Ok(out.flush()?)
}

fn line(whole: &Path, path: &Path, first: &mut BTreeMap<(u64, u64), PathBuf>) -> Result<String> {
    let stat = fs::symlink_metadata(whole)?;
    let kind = match stat.mode() & libc::S_IFMT {
        libc::S_IFREG => "file",
        libc::S_IFDIR => "folder",
        libc::S_IFLNK => "link",
        libc::S_IFCHR => "char",
        libc::S_IFBLK => "block",
        libc::S_IFIFO => "fifo",
        _ => "other",
    };
    let mut line = format!(
        "{} {kind} {:o} {}:{} {}.{:09}",
        quoted(path.as_os_str()),
        stat.mode() & 0o7777,
        stat.uid(),
        stat.gid(),
        stat.mtime(),
        stat.mtime_nsec()
    );
    match kind {
        "file" => {
            let digest = digest(whole, stat.len())?;
            line += &format!(" {} {digest:016x}", stat.len());
            let other = first.entry((stat.dev(), stat.ino())).or_insert_with(|| path.to_owned());
            if other != path {
                line += &format!(" = {}", quoted(other.as_os_str()));
            }
        }
        "link" => line += &format!(" {} -> {}", stat.len(), quoted(fs::read_link(whole)?.as_os_str())),
        "char" | "block" => line += &format!(" {}:{}", major(stat.rdev()), minor(stat.rdev())),
        _ => {}
    }
    for (name, value) in attributes(whole)? {
        line += &format!(" {name}={}", quoted(OsStr::from_bytes(&value)));
    }
    Ok(line)
}

/// Extended attributes, by name.
fn attributes(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 1 << 16];
    let len = match llistxattr(path, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        len => len.context("listing attributes")?,
    };
    let mut found = BTreeMap::new();
    for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = OsStr::from_bytes(name);
        let mut value = vec![0; 1 << 16];
        let len = lgetxattr(path, name, &mut value).with_context(|| format!("attribute {}", quoted(name)))?;
        value.truncate(len);
        found.insert(quoted(name), value);
    }
    Ok(found)
}

/// Of a file's bytes, read from its beginning to its end. No secret is kept by it: files are told apart.
fn digest(path: &Path, size: u64) -> Result<u64> {
    let mut file = File::open(path)?;
    let (mut state, mut total, mut buffer) = (Digest::default(), 0, vec![0; 1 << 17]);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        state.take(&buffer[..count]);
        total += count as u64;
    }
    ensure!(total == size, "{total} bytes of {size}");
    Ok(state.0)
}

#[derive(Default)]
struct Digest(u64);

impl Digest {
    fn take(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.mix(u64::from_le_bytes(*word));
        }
        for byte in rest {
            self.mix(u64::from(*byte) | 0x100);
        }
    }

    fn mix(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

/// Text in which every byte can be seen.
fn quoted(text: &OsStr) -> String {
    text.as_bytes().escape_ascii().to_string().replace(' ', "\\x20")
}

/// Reads `count` pieces of the file at places that look random, the same at each run: by calls, then of a mapping. Prints the digest of all
/// that was read, which has to be the same in both ways.
pub fn reads(path: &Path, count: usize) -> Result<()> {
    let file = File::open(path)?;
    let size = usize::try_from(file.metadata()?.len())?;
    let places = || {
        let mut state = 88_172_645_463_325_252_u64;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let start = usize::try_from(state >> 20).unwrap_or(0) % size;
            (start, (usize::try_from(state & 0x7fff).unwrap_or(0) + 1).min(size - start))
        })
        .take(count)
    };
    let mut by_calls = Digest::default();
    for (start, len) in places() {
        let mut piece = vec![0; len];
        file.read_exact_at(&mut piece, start as u64)?;
        by_calls.take(&piece);
    }
    let by_mapping = crate::map::with_bytes(&file, size, |bytes| {
        let mut state = Digest::default();
        // From the last to the first page is what read-ahead does not expect.
        let pages = bytes.chunks(4096).rev().fold(0_u64, |sum, page| sum.wrapping_add(u64::from(page[0])));
        for (start, len) in places() {
            state.take(&bytes[start..start + len]);
        }
        (state.0, pages)
    })?;
    ensure!(by_calls.0 == by_mapping.0, "read {:016x}, mapped {:016x}", by_calls.0, by_mapping.0);
    println!("{:016x} {}", by_mapping.0, by_mapping.1);
    Ok(())
}
