//! Layers' archives: read through gzip or zstd, made palatable to the builder, and the bootstrap's own.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::oci::BOOTSTRAP_FILE;
use crate::values::Values;

const BLOCK: usize = 512;

/// Most bytes of the extended header of one file.
const MAX_EXTENDED: u64 = 1 << 20;

/// Opens a layer, decompressed, whatever its compression is.
pub fn open_layer(path: &Path) -> Result<Box<dyn Read>> {
    let mut file = BufReader::new(File::open(path).with_context(|| format!("open {}", path.display()))?);
    let start = io::BufRead::fill_buf(&mut file)?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    })
}

/// The folders of an image's layers so far, as their archives have them.
///
/// An archive need not have an entry for each folder. Unpacked over the layers below, such a folder is what it was, so the lower
/// layer's entry is repeated; and the builder must not be left to make it: it puts what follows into another folder.
#[derive(Debug, Default)]
pub struct Folders {
    /// Of each folder's path: its blocks.
    known: HashMap<Vec<u8>, Vec<u8>>,
    /// Those that the archive at hand has.
    seen: HashSet<Vec<u8>>,
}

impl Folders {
    /// Begins the next layer.
    pub fn next_layer(&mut self) {
        self.seen.clear();
    }

    /// The blocks of the folders above `path` that the archive does not have.
    fn missing(&mut self, path: &[u8]) -> Result<Vec<u8>> {
        let mut blocks = Vec::new();
        for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            let folder = &path[..at];
            if self.seen.contains(folder) {
                continue;
            }
            match self.known.get(folder) {
                Some(known) => blocks.extend_from_slice(known),
                None => blocks.extend(plain_folder(folder)?),
            }
            self.seen.insert(folder.to_vec());
        }
        Ok(blocks)
    }
}

/// Blocks of a folder of root's that everybody may look into.
fn plain_folder(path: &[u8]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    archive.append_data(&mut header, OsStr::from_bytes(path), io::empty())?;
    let mut blocks = archive.get_ref().clone();
    // The header, and before it, for a path that is too long, that of the path's own entry.
    let (whole, _) = blocks.as_chunks_mut::<BLOCK>();
    let last = whole.len().saturating_sub(1);
    for (_, block) in whole.iter_mut().enumerate().filter(|(at, _)| *at == 0 || *at == last) {
        mend(block);
    }
    Ok(blocks)
}

/// Copies an archive so that the builder reads it. GNU tar leaves a file's device numbers blank, which the builder takes for broken
/// numbers: zeros are put in. Folders that are missing are put in, too, and attributes with line ends are exchanged.
pub fn normalise(
    from: impl Read,
    to: &mut impl Write,
    folders: &mut Folders,
    values: &mut Values,
) -> Result<()> {
    walk(from, folders, values, |blocks, content| {
        to.write_all(blocks)?;
        Ok(content.map_or(Ok(0), |content| io::copy(content, to))?)
    })
}

/// Whether the builder reads an archive right as it is.
pub fn is_normal(mut from: impl Read) -> Result<bool> {
    let (mut folders, mut values, mut whole) = (Folders::default(), Values::default(), Sha256::new());
    let mut hashed = HashingReader { from: &mut from, hash: Sha256::new() };
    let mut to = HashingWriter { to: io::sink(), hash: &mut whole };
    normalise(&mut hashed, &mut to, &mut folders, &mut values)?;
    io::copy(&mut hashed, &mut io::sink())?;
    Ok(whole.finalize() == hashed.hash.finalize())
}

struct HashingReader<R> {
    from: R,
    hash: Sha256,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

struct HashingWriter<'a, W> {
    to: W,
    hash: &'a mut Sha256,
}

impl<W: Write> Write for HashingWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Gives every entry's blocks and content, padded, to `take`, which says how many bytes of content it took.
fn walk(
    mut from: impl Read,
    folders: &mut Folders,
    values: &mut Values,
    mut take: impl FnMut(&[u8], Option<&mut dyn Read>) -> Result<u64>,
) -> Result<()> {
    let mut block = [0; BLOCK];
    // Headers that say more of the entry that follows: its path and size where they do not fit.
    let (mut before, mut long_path, mut long_size) = (Vec::new(), None, None);
    while fill(&mut from, &mut block)? {
        let kind = block[156];
        if block.iter().all(|byte| *byte == 0) {
            take(&block, None)?;
            continue;
        }
        let written = number(&block[124..136]).context("an archive with a file's size that is no number")?;
        mend(&mut block);
        if matches!(kind, b'x' | b'g' | b'L' | b'K') {
            ensure!(written <= MAX_EXTENDED, "an archive with an extended header of {written} bytes");
            let len = usize::try_from(written)?;
            let mut records = vec![0; len.next_multiple_of(BLOCK)];
            from.read_exact(&mut records).context("an archive that ends in a header")?;
            match kind {
                b'x' => {
                    long_size = extended(&records[..len], b"size=")
                        .and_then(|size| std::str::from_utf8(&size).ok()?.parse().ok());
                    long_path = extended(&records[..len], b"path=").or(long_path);
                    values.exchange(&mut records[..len])?;
                }
                b'L' => long_path = Some(text(&records[..len]).to_vec()),
                _ => {}
            }
            before.extend_from_slice(&block);
            before.append(&mut records);
            ensure!(before.len() as u64 <= 4 * MAX_EXTENDED, "an archive with extended headers without end");
            continue;
        }
        let path = clean(&long_path.take().unwrap_or_else(|| short_path(&block)))?;
        let mut blocks = folders.missing(&path)?;
        before.extend_from_slice(&block);
        if kind == b'5' {
            folders.known.insert(path.clone(), before.clone());
            folders.seen.insert(path);
        }
        blocks.append(&mut before);
        // Links, folders and devices have no content, whatever their size says.
        let size = long_size.take().unwrap_or(written);
        let size = if matches!(kind, b'1'..=b'6') { 0 } else { size };
        let padded =
            size.checked_next_multiple_of(BLOCK as u64).context("an archive with a file of any size")?;
        let copied = take(&blocks, Some(&mut (&mut from).take(padded)))?;
        ensure!(copied == padded, "an archive that ends in a file");
    }
    Ok(())
}

/// Fills in device numbers that are blank.
fn mend(block: &mut [u8; BLOCK]) {
    let device = matches!(block[156], b'3' | b'4');
    let blank = |field: &[u8]| field.iter().all(|byte| matches!(byte, 0 | b' '));
    if !device && block[257..262] == *b"ustar" && blank(&block[329..337]) && blank(&block[337..345]) {
        block[329..337].copy_from_slice(b"0000000\0");
        block[337..345].copy_from_slice(b"0000000\0");
        set_checksum(block);
    }
}

/// The path in a header.
fn short_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let (name, prefix) = (text(&block[..100]), text(&block[345..500]));
    // GNU's own format has times where POSIX's has the path's beginning.
    if block[257..263] == *b"ustar\0" && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

/// A path without what does not matter in it.
fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    ensure!(
        !parts.contains(&&b".."[..]),
        "an archive with a path that leaves it: {}",
        String::from_utf8_lossy(path)
    );
    Ok(parts.join(&b'/'))
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Whether there was another block. The end of the file is an end, in a block it is none.
fn fill(from: &mut impl Read, block: &mut [u8; BLOCK]) -> Result<bool> {
    let mut at = 0;
    while at < BLOCK {
        match from.read(&mut block[at..]) {
            Ok(0) if at == 0 => return Ok(false),
            Ok(0) => bail!("an archive that ends in a block"),
            Ok(count) => at += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read the layer"),
        }
    }
    Ok(true)
}

/// A number in octal digits, or in binary where its first bit is set (GNU).
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (high, low) = field.split_at(field.len() - 8);
        let fits = high[0] & 0x7f == 0 && high[1..].iter().all(|byte| *byte == 0);
        return fits.then(|| low.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// A value of an extended header: records of "LENGTH KEY=VALUE\n". The last of several counts.
fn extended(records: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let mut rest = records;
    let mut found = None;
    while let Some(space) = rest.iter().position(|byte| *byte == b' ') {
        let len: usize = std::str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
        let record = rest.get(space + 1..len)?.strip_suffix(b"\n")?;
        found = record.strip_prefix(key).map(<[u8]>::to_vec).or(found);
        rest = &rest[len..];
    }
    found
}

fn set_checksum(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// A file's SHA-256, in hexadecimal digits, and its size.
pub fn digest(path: &Path) -> Result<(String, u64)> {
    let mut hash = Sha256::new();
    let size =
        io::copy(&mut File::open(path)?, &mut hash).with_context(|| format!("read {}", path.display()))?;
    Ok((format!("{:x}", hash.finalize()), size))
}

/// Writes the bootstrap's layer, gzip. The digest of the archive before compression.
pub fn write_bootstrap_layer(bootstrap: &Path, layer: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let gzip =
        flate2::GzBuilder::new().write(BufWriter::new(File::create(layer)?), flate2::Compression::default());
    let mut archive = tar::Builder::new(HashingWriter { to: gzip, hash: &mut hash });
    let header = |path: &str, kind: tar::EntryType, mode: u32, size: u64| -> Result<tar::Header> {
        let mut header = tar::Header::new_ustar();
        header.set_path(path)?;
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_cksum();
        Ok(header)
    };
    archive.append(&header("image/", tar::EntryType::Directory, 0o755, 0)?, io::empty())?;
    let file = File::open(bootstrap).with_context(|| format!("open {}", bootstrap.display()))?;
    let size = file.metadata()?.len();
    archive.append(&header(BOOTSTRAP_FILE, tar::EntryType::Regular, 0o444, size)?, file)?;
    archive.into_inner()?.to.finish()?.flush()?;
    Ok(format!("{:x}", hash.finalize()))
}

/// Takes the bootstrap out of its layer.
pub fn read_bootstrap_layer(layer: &Path, bootstrap: &Path) -> Result<()> {
    let mut archive = tar::Archive::new(open_layer(layer)?);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if entry.path()?.to_string_lossy().trim_start_matches("./") == BOOTSTRAP_FILE {
            ensure!(entry.size() <= images::rafs::MAX_BOOTSTRAP, "a bootstrap of {} bytes", entry.size());
            io::copy(&mut entry, &mut File::create(bootstrap)?)?;
            return Ok(());
        }
    }
    bail!("the bootstrap's layer has no {BOOTSTRAP_FILE}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_device_numbers_become_zeros_and_nothing_else_changes() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(700);
        header.set_mode(0o644);
        archive.append_data(&mut header, "name", &[7; 700][..]).expect("to memory");
        let whole = archive.into_inner().expect("to memory");
        let mut blanked = whole.clone();
        blanked[329..345].fill(0);
        let mut block: [u8; BLOCK] = blanked[..BLOCK].try_into().expect("a block");
        set_checksum(&mut block);
        blanked[..BLOCK].copy_from_slice(&block);
        for bytes in [&whole, &blanked] {
            let mut out = Vec::new();
            normalise(bytes.as_slice(), &mut out, &mut Folders::default(), &mut Values::default())
                .expect("fine");
            assert_eq!(out.len(), whole.len());
            assert_eq!(out[329..345], *b"0000000\x000000000\0");
            let mut archive = tar::Archive::new(out.as_slice());
            let entry = archive.entries().expect("entries").next().expect("one").expect("whole");
            assert_eq!((entry.size(), entry.header().device_major().expect("a number")), (700, Some(0)));
            assert!(is_normal(out.as_slice()).expect("whole"));
        }
        assert!(!is_normal(blanked.as_slice()).expect("whole"));
        assert!(is_normal(&whole[..600]).is_err(), "cut in a file");
        assert!(is_normal(&whole[..100]).is_err(), "cut in a header");
    }

    #[test]
    fn missing_folders_are_those_of_the_layer_below() {
        let file = |path: &str| {
            let mut archive = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_size(0);
            archive.append_data(&mut header, path, io::empty()).expect("to memory");
            archive.into_inner().expect("to memory")
        };
        let mut below = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o1777);
        header.set_uid(7);
        header.set_size(0);
        below.append_data(&mut header, "./tmp/", io::empty()).expect("to memory");
        let mut folders = Folders::default();
        normalise(
            below.into_inner().expect("to memory").as_slice(),
            &mut io::sink(),
            &mut folders,
            &mut Values::default(),
        )
        .expect("fine");
        folders.next_layer();
        let long = format!("tmp/{}x", "folder/".repeat(30));
        let mut out = Vec::new();
        normalise(file(&long).as_slice(), &mut out, &mut folders, &mut Values::default()).expect("fine");
        assert!(is_normal(out.as_slice()).expect("whole"), "all are there now");
        let mut archive = tar::Archive::new(out.as_slice());
        let found: Vec<(String, u32, u64)> = archive
            .entries()
            .expect("entries")
            .map(|entry| {
                let entry = entry.expect("whole");
                let path = entry.path().expect("a path").display().to_string();
                (path, entry.header().mode().expect("a mode"), entry.header().uid().expect("a number"))
            })
            .collect();
        assert_eq!(found.len(), 32);
        assert_eq!(found[0], ("tmp/".into(), 0o1777, 7));
        assert_eq!(found[1], ("tmp/folder".into(), 0o755, 0));
        assert_eq!(found[31].0, long);
        assert!(clean(b"a/../b").is_err());
        assert_eq!(clean(b"./a//b/").expect("a path"), b"a/b");
    }

    #[test]
    fn sizes_in_all_their_forms() {
        assert_eq!(number(b"00000001750\0"), Some(1000));
        assert_eq!(number(b"       1750 "), Some(1000));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1]), Some(0x2_0000_0001));
        assert_eq!(number(&[0xff; 12]), None);
        assert_eq!(number(b"9"), None);
        assert_eq!(extended(b"18 size=9000000000\n", b"size="), None, "a length that is wrong");
        assert_eq!(
            extended(b"11 path=ab\n19 size=9000000000\n", b"size=").as_deref(),
            Some(&b"9000000000"[..])
        );
        assert_eq!(extended(b"999 size=1\n", b"size="), None);
    }

    #[test]
    fn a_bootstrap_comes_back_from_its_layer() {
        let folder = tempfile::TempDir::new().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("boot"), [5; 5000]).expect("a file");
        let uncompressed = write_bootstrap_layer(&at("boot"), &at("layer")).expect("written");
        let mut hash = Sha256::new();
        io::copy(&mut open_layer(&at("layer")).expect("open"), &mut hash).expect("read");
        assert_eq!(uncompressed, format!("{:x}", hash.finalize()));
        read_bootstrap_layer(&at("layer"), &at("again")).expect("read");
        assert_eq!(std::fs::read(at("again")).expect("read"), [5; 5000]);
    }
}
