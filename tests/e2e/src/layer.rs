//! Layers written entry by entry: owners, attributes, devices, times and names that no tree on a disk is needed for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use tar::{Builder, EntryType, Header};

/// Longest name in a header of its own; longer ones are in an extended header before it.
const SHORT: usize = 100;
/// Largest owner in seven octal digits.
const LARGEST: u64 = 0o7_777_777;

/// A layer's archive, being written.
pub struct Layer(Builder<BufWriter<File>>);

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// A file of these bytes.
    File(&'a [u8]),
    /// A folder.
    Folder,
    /// A symbolic link to there.
    Symlink(&'a OsStr),
    /// Another name of a file that is in the layer already.
    HardLink(&'a str),
    /// A character device, major and minor.
    Char(u32, u32),
    /// A block device.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// An entry, of root's, of the first second of 2024 unless said otherwise.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    path: &'a OsStr,
    kind: Kind<'a>,
    mode: u32,
    owner: (u64, u64),
    time: String,
    attributes: Vec<(String, Vec<u8>)>,
}

impl<'a> Entry<'a> {
    /// What is at `path`, from the root and without a slash at its beginning.
    pub fn new(path: &'a (impl AsRef<OsStr> + ?Sized), kind: Kind<'a>) -> Self {
        let mode = match kind {
            Kind::Folder => 0o755,
            Kind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let (path, time) = (path.as_ref(), "1704067200".to_owned());
        Self { path, kind, mode, owner: (0, 0), time, attributes: Vec::new() }
    }

    /// Changes its mode.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// Changes user and group.
    #[must_use]
    pub fn owner(self, user: u64, group: u64) -> Self {
        Self { owner: (user, group), ..self }
    }

    /// Changes its time: seconds, and maybe a point and a fraction.
    #[must_use]
    pub fn time(self, time: &str) -> Self {
        Self { time: time.to_owned(), ..self }
    }

    /// Adds an extended attribute.
    #[must_use]
    pub fn attribute(mut self, name: &str, value: &[u8]) -> Self {
        self.attributes.push((format!("SCHILY.xattr.{name}"), value.to_vec()));
        self
    }
}

impl Layer {
    /// A new archive at `path`.
    pub fn create(path: &Path) -> Result<Layer> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        Ok(Layer(Builder::new(BufWriter::new(file))))
    }

    /// Adds an entry. What does not fit into its header is in an extended one (POSIX pax).
    pub fn add(&mut self, entry: Entry<'_>) -> Result<()> {
        let mut header = Header::new_ustar();
        let mut extended = entry.attributes;
        let path = entry.path.as_bytes();
        let target = match entry.kind {
            Kind::Symlink(target) => target.as_bytes(),
            Kind::HardLink(target) => target.as_bytes(),
            _ => b"",
        };
        let ustar = header.as_ustar_mut().context("an ustar header")?;
        let mut name = |field: &mut [u8], key: &str, bytes: &[u8]| {
            let len = bytes.len().min(SHORT);
            field[..len].copy_from_slice(&bytes[..len]);
            if bytes.len() > SHORT {
                extended.push((key.to_owned(), bytes.to_vec()));
            }
        };
        name(&mut ustar.name, "path", path);
        name(&mut ustar.linkname, "linkpath", target);
        let (kind, content): (_, &[u8]) = match entry.kind {
            Kind::File(bytes) => (EntryType::Regular, bytes),
            Kind::Folder => (EntryType::Directory, &[]),
            Kind::Symlink(_) => (EntryType::Symlink, &[]),
            Kind::HardLink(_) => (EntryType::Link, &[]),
            Kind::Char(..) => (EntryType::Char, &[]),
            Kind::Block(..) => (EntryType::Block, &[]),
            Kind::Fifo => (EntryType::Fifo, &[]),
        };
        header.set_entry_type(kind);
        header.set_mode(entry.mode);
        let mut owner = |key: &str, id: u64| {
            if id > LARGEST {
                extended.push((key.to_owned(), id.to_string().into_bytes()));
            }
            id.min(LARGEST)
        };
        let (user, group) = (owner("uid", entry.owner.0), owner("gid", entry.owner.1));
        header.set_uid(user);
        header.set_gid(group);
        let (seconds, fraction) = entry.time.split_once('.').unwrap_or((&entry.time, ""));
        header.set_mtime(seconds.parse().context("a time")?);
        if !fraction.is_empty() {
            extended.push(("mtime".to_owned(), entry.time.clone().into_bytes()));
        }
        header.set_size(content.len() as u64);
        let (major, minor) = match entry.kind {
            Kind::Char(major, minor) | Kind::Block(major, minor) => (major, minor),
            _ => (0, 0),
        };
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        header.set_cksum();
        if !extended.is_empty() {
            let records = extended.iter().map(|(key, value)| (&**key, &**value));
            self.0.append_pax_extensions(records)?;
        }
        Ok(self.0.append(&header, content)?)
    }

    /// Adds all of a folder, below `at`.
    pub fn add_tree(&mut self, at: &str, tree: &Path) -> Result<()> {
        self.0.follow_symlinks(false);
        Ok(self.0.append_dir_all(at, tree)?)
    }

    /// Ends the archive.
    pub fn finish(self) -> Result<()> {
        Ok(self.0.into_inner()?.flush()?)
    }
}
