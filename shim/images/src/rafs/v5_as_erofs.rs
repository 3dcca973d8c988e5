//! An image of version 5 as an EROFS, as those of version 6 are one: the same files of the same chunks, so that a guest mounts both in the
//! same way and nobody has to serve files.
//!
//! ```text
//! 1024         superblock, 128 bytes
//! 1152         device table, 128 bytes a blob
//! next block   inodes, each at a multiple of 32: 64 bytes, attributes, then a file's chunk indexes, or what a folder or a symbolic link
//!              holds where it fits into the rest of the block
//! next block   folders and symbolic links that did not fit
//! ```
//!
//! The same image always becomes the same bytes: a guest goes on with what it has mounted when a service that was killed makes them again.
//! What comes out is at most some three times as large as what comes in: a number is in one folder, so names are taken once.

use std::collections::HashMap;

use super::bytes::u32_at;
use super::v5::{BLOCK, Inode, Inodes, file_offset, moved_record};
use super::{Bytes, Image, MAX_BOOTSTRAP, RafsError};

const SUPER: u64 = 1024;
const DEVICES: u64 = SUPER + 128;
const INODE: usize = 64;
const SLOT: u64 = 32;
const ROOT: u32 = 1;

/// How an inode's data is kept (`i_format`).
mod layout {
    pub const PLAIN: u16 = 0;
    pub const INLINE: u16 = 2;
    pub const CHUNKS: u16 = 4;
}

mod kind {
    pub const FILE: u32 = 0o100_000;
    pub const FOLDER: u32 = 0o040_000;
    pub const SYMLINK: u32 = 0o120_000;
}

/// Type of a folder's entry, by the type in a mode; none for what is no type.
fn entry_type(mode: u32) -> Option<u8> {
    Some(match mode & 0o170_000 {
        kind::FILE => 1,
        kind::FOLDER => 2,
        0o020_000 => 3,
        0o060_000 => 4,
        0o010_000 => 5,
        0o140_000 => 6,
        kind::SYMLINK => 7,
        _ => return None,
    })
}

/// The EROFS of a bootstrap for which [`Image::parse`] gave an image of version 5.
///
/// # Errors
/// Its files are no tree, or have not all their chunks.
pub fn v5_as_erofs(bootstrap: &[u8], image: &Image) -> Result<Vec<u8>, RafsError> {
    let bytes = Bytes::new(bootstrap);
    let size = u64::from(bytes.u32("superblock", 12)?);
    if !size.is_power_of_two() || !(BLOCK..=u64::from(super::MAX_CHUNK)).contains(&size) {
        return Err(wrong("the size of chunks", size, "no power of two from 4 KiB to 16 MiB"));
    }
    let inodes = Inodes::new(bytes)?;
    let tree = Tree::read(&inodes)?;
    let start = (DEVICES + 128 * image.blobs.len() as u64).next_multiple_of(BLOCK);
    let mut writer = Writer { inodes: &inodes, chunk_size: size, tree: &tree, places: HashMap::new() };
    let (plans, end) = writer.plan(start)?;
    let mut out = vec![0; usize::try_from(end).unwrap_or(usize::MAX)];
    writer.fill(&plans, &mut out)?;
    superblock(image, start, &mut out);
    Ok(out)
}

/// Copies bytes to a place that was planned for them.
fn copy(out: &mut [u8], at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn check_end(end: u64) -> Result<(), RafsError> {
    if end <= MAX_BOOTSTRAP { Ok(()) } else { Err(wrong("the size as an EROFS", end, "more than 512 MiB")) }
}

/// A symbolic link's length.
fn check_symlink(inode: &Inode) -> Result<u64, RafsError> {
    let len = inode.symlink.len() as u64;
    let fine = (1..BLOCK).contains(&len) && !inode.symlink.contains(&0);
    if fine { Ok(len) } else { Err(wrong("a symbolic link's length", len, "or what is in it, cannot be")) }
}

/// Attributes as they follow an inode: nothing, or 12 bytes and each attribute to a multiple of 4. Kinds of which EROFS knows nothing are
/// left out.
fn attributes(mut from: &[u8]) -> Result<Vec<u8>, RafsError> {
    const KINDS: [(&[u8], u8); 5] = [
        (b"user.", 1),
        (b"system.posix_acl_access", 2),
        (b"system.posix_acl_default", 3),
        (b"trusted.", 4),
        (b"security.", 6),
    ];
    let mut out = Vec::new();
    while let Some(pair) = from.split_at_checked(4) {
        let len = u32_at(pair.0, 0) as usize;
        let ragged = wrong("an attribute's length", len as u64, "more than there is, or without a name");
        let Some((attribute, rest)) = pair.1.split_at_checked(len) else { return Err(ragged) };
        let zero = attribute.iter().position(|byte| *byte == 0).ok_or(ragged)?;
        let (name, value) = (&attribute[..zero], &attribute[zero + 1..]);
        from = rest;
        let known = KINDS.iter().find_map(|(prefix, kind)| Some((name.strip_prefix(*prefix)?, *kind)));
        let Some((name, kind)) = known else { continue };
        let large = || {
            wrong("an attribute's size", attribute.len() as u64, "of a name above 255 or a value above 65535")
        };
        let name_len = u8::try_from(name.len()).map_err(|_| large())?;
        let value_len = u16::try_from(value.len()).map_err(|_| large())?;
        if out.is_empty() {
            out.resize(12, 0);
        }
        out.extend([name_len, kind]);
        out.extend(value_len.to_le_bytes());
        out.extend(name);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        if out.len() > 4 * usize::from(u16::MAX) {
            return Err(wrong("a file's attributes", out.len() as u64, "more than 256 KiB"));
        }
    }
    Ok(out)
}

fn wrong(what: &'static str, value: u64, limit: &'static str) -> RafsError {
    RafsError::Value { what, value, limit }
}

fn put<const N: usize>(out: &mut [u8], at: u64, bytes: [u8; N]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    out[at..at + N].copy_from_slice(&bytes);
}

fn superblock(image: &Image, root: u64, out: &mut [u8]) {
    const MAGIC: u32 = 0xE0F5_E1E2;
    /// Files of chunks, and a table of devices.
    const FEATURES: u32 = 0x4 | 0x8;
    let short = |value: u64| u16::try_from(value).unwrap_or(0);
    put(out, SUPER, MAGIC.to_le_bytes());
    put(out, SUPER + 12, [12]);
    // At most 128 blobs: the first inode is in the sixth block at the latest.
    put(out, SUPER + 14, short(root / SLOT).to_le_bytes());
    let blocks = u32::try_from(out.len() as u64 / BLOCK).unwrap_or(u32::MAX);
    put(out, SUPER + 36, blocks.to_le_bytes());
    put(out, SUPER + 80, FEATURES.to_le_bytes());
    put(out, SUPER + 86, short(image.blobs.len() as u64).to_le_bytes());
    put(out, SUPER + 88, short(DEVICES / 128).to_le_bytes());
    for (at, blob) in (DEVICES..).step_by(128).zip(&image.blobs) {
        let id: [u8; 64] = blob.id.as_bytes().try_into().unwrap_or([0; 64]);
        put(out, at, id);
        let blocks = u32::try_from(blob.bytes.div_ceil(BLOCK)).unwrap_or(u32::MAX);
        put(out, at + 64, blocks.to_le_bytes());
    }
}

/// The folders' children, from the root downwards.
struct Tree {
    /// Numbers, each folder before what is in it. Of a file with several names only its first.
    order: Vec<u32>,
    /// Of a folder: the children's numbers by their names, and the folder that it is in.
    folders: HashMap<u32, (Vec<u32>, u32)>,
}

impl Tree {
    fn read(inodes: &Inodes) -> Result<Tree, RafsError> {
        let mut tree = Tree { order: Vec::new(), folders: HashMap::new() };
        let (mut met, mut listed) = (vec![false; inodes.count() + 1], vec![false; inodes.count() + 1]);
        let mut left = std::collections::VecDeque::from([(ROOT, ROOT)]);
        // No folder has the root as its child.
        if let Some(root) = met.get_mut(ROOT as usize) {
            *root = true;
        }
        while let Some((number, parent)) = left.pop_front() {
            let inode = get(inodes, number)?;
            let first = first_number(inodes, number, &inode)?;
            if !std::mem::replace(&mut listed[first as usize], true) {
                tree.order.push(first);
            }
            if inode.mode & 0o170_000 != kind::FOLDER {
                if number == ROOT {
                    return Err(wrong("the root's type", inode.mode.into(), "no folder"));
                }
                continue;
            }
            let mut children = Vec::new();
            let last = inode.child_index.saturating_add(inode.child_count);
            for child in inode.child_index..last {
                let met = met.get_mut(child as usize).filter(|met| child > 0 && !**met);
                *met.ok_or_else(|| wrong("a folder's child", child.into(), "none, or another folder's"))? =
                    true;
                children.push((check_name(get(inodes, child)?.name)?, child));
                left.push_back((child, number));
            }
            children.sort_unstable();
            if children.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                return Err(wrong("a folder", number.into(), "with a name twice"));
            }
            let children = children.into_iter().map(|(_, child)| child).collect();
            tree.folders.insert(number, (children, parent));
        }
        Ok(tree)
    }
}

fn get<'a>(inodes: &Inodes<'a>, number: u32) -> Result<Inode<'a>, RafsError> {
    inodes.number(number)?.ok_or_else(|| wrong("an inode's number", number.into(), "none of the table"))
}

/// The number of the inode that stands for a file: of several names, the first.
fn first_number(inodes: &Inodes, number: u32, inode: &Inode) -> Result<u32, RafsError> {
    if inode.mode & 0o170_000 != kind::FILE {
        return Ok(number);
    }
    let Some(first) = u32::try_from(inode.first()).ok().filter(|first| *first != number) else {
        return Ok(number);
    };
    let found = inodes.number(first)?;
    let is_it = found.is_some_and(|found| {
        found.mode == inode.mode && found.size() == inode.size() && found.first() == u64::from(first)
    });
    Ok(if is_it { first } else { number })
}

fn check_name(name: &[u8]) -> Result<&[u8], RafsError> {
    let fine = (1..=255).contains(&name.len())
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
        && name != b"."
        && name != b"..";
    if fine {
        Ok(name)
    } else {
        Err(wrong("a name's length", name.len() as u64, "or what is in it, cannot be"))
    }
}

/// Where an inode goes.
struct Plan {
    number: u32,
    at: u64,
    attributes: Vec<u8>,
    layout: u16,
    /// Bytes of data, and where they are; of chunks, the indexes.
    data: u64,
    data_at: u64,
}

struct Writer<'a> {
    inodes: &'a Inodes<'a>,
    chunk_size: u64,
    tree: &'a Tree,
    /// Of each number in the order: its inode's place.
    places: HashMap<u32, u64>,
}

impl Writer<'_> {
    /// Gives each inode its place from `start` on, the root's first; and the end of all.
    fn plan(&mut self, start: u64) -> Result<(Vec<Plan>, u64), RafsError> {
        let mut plans = Vec::with_capacity(self.tree.order.len());
        let mut at = start;
        for number in &self.tree.order {
            let inode = get(self.inodes, *number)?;
            let attributes = attributes(inode.attributes)?;
            let head = (INODE + attributes.len()) as u64;
            let (layout, data) = match inode.mode & 0o170_000 {
                kind::FILE => (layout::CHUNKS, self.chunk_count(&inode)? * 8),
                kind::FOLDER => (layout::INLINE, self.folder_bytes(*number)?),
                kind::SYMLINK => (layout::INLINE, check_symlink(&inode)?),
                _ => (layout::PLAIN, 0),
            };
            let layout = if data == 0 { layout::PLAIN } else { layout };
            // What is inline ends in the block where it begins.
            let fits = |at: u64| (at + head) / BLOCK == (at + head + data - 1) / BLOCK;
            let block = at.next_multiple_of(BLOCK);
            let (place, layout) = match layout {
                layout::INLINE if fits(at) => (at, layout),
                layout::INLINE if fits(block) => (block, layout),
                layout::INLINE => (at, layout::PLAIN),
                _ => (at, layout),
            };
            let follows = match layout {
                layout::CHUNKS => (place + head).next_multiple_of(8),
                layout::INLINE => place + head,
                _ => 0,
            };
            at = if follows == 0 { place + head } else { follows + data }.next_multiple_of(SLOT);
            self.places.insert(*number, place);
            plans.push(Plan { number: *number, at: place, attributes, layout, data, data_at: follows });
            check_end(at)?;
        }
        let mut end = at.next_multiple_of(BLOCK);
        for plan in plans.iter_mut().filter(|plan| plan.layout == layout::PLAIN && plan.data > 0) {
            plan.data_at = end;
            end = (end + plan.data).next_multiple_of(BLOCK);
            check_end(end)?;
        }
        Ok((plans, end))
    }

    fn fill(&self, plans: &[Plan], out: &mut [u8]) -> Result<(), RafsError> {
        for plan in plans {
            let inode = get(self.inodes, plan.number)?;
            let mut head = [0; INODE];
            let count = match plan.attributes.len() {
                0 => 0,
                len => u16::try_from((len - 12) / 4 + 1).unwrap_or(0),
            };
            put(&mut head, 0, (plan.layout << 1 | 1).to_le_bytes());
            put(&mut head, 2, count.to_le_bytes());
            put(&mut head, 4, u16::try_from(inode.mode & 0o177_777).unwrap_or(0).to_le_bytes());
            let (size, union) = match inode.mode & 0o170_000 {
                kind::FILE => (inode.size(), 0x20 | (self.chunk_size / BLOCK).trailing_zeros()),
                kind::FOLDER | kind::SYMLINK => (plan.data, u32::try_from(plan.data_at / BLOCK).unwrap_or(0)),
                _ => (0, inode.device()),
            };
            put(&mut head, 8, size.to_le_bytes());
            put(&mut head, 16, if plan.layout == layout::INLINE { 0 } else { union }.to_le_bytes());
            put(&mut head, 20, plan.number.to_le_bytes());
            let ([user, group], (seconds, nanoseconds)) = (inode.owner(), inode.mtime());
            put(&mut head, 24, user.to_le_bytes());
            put(&mut head, 28, group.to_le_bytes());
            put(&mut head, 32, seconds.to_le_bytes());
            put(&mut head, 40, (nanoseconds % 1_000_000_000).to_le_bytes());
            put(&mut head, 44, inode.links().max(1).to_le_bytes());
            put(out, plan.at, head);
            copy(out, plan.at + INODE as u64, &plan.attributes);
            match inode.mode & 0o170_000 {
                kind::FILE => self.fill_chunks(&inode, plan.data_at, out)?,
                kind::FOLDER => self.fill_folder(plan, out)?,
                kind::SYMLINK => copy(out, plan.data_at, inode.symlink),
                _ => {}
            }
        }
        Ok(())
    }

    fn chunk_count(&self, inode: &Inode) -> Result<u64, RafsError> {
        let count = inode.size().div_ceil(self.chunk_size);
        if count != u64::from(inode.child_count) {
            return Err(wrong(
                "a file's number of chunks",
                inode.child_count.into(),
                "too few or too many for its size",
            ));
        }
        Ok(count)
    }

    fn fill_chunks(&self, inode: &Inode, at: u64, out: &mut [u8]) -> Result<(), RafsError> {
        for (index, record) in (0..).zip(self.inodes.chunks(inode)?) {
            let (read, begins) = (moved_record(record), index * self.chunk_size);
            let size = (inode.size() - begins).min(self.chunk_size);
            if file_offset(record) != begins || u64::from(read.chunk.size) != size {
                return Err(wrong(
                    "a chunk's place in its file",
                    file_offset(record),
                    "not behind the one before it",
                ));
            }
            // A chunk that was read with its image: a block of 32 bits, of a blob below 128.
            let device = u16::try_from(read.blob + 1).unwrap_or(0);
            let block = u32::try_from(read.chunk.offset / BLOCK).unwrap_or(u32::MAX);
            put(out, at + index * 8 + 2, device.to_le_bytes());
            put(out, at + index * 8 + 4, block.to_le_bytes());
        }
        Ok(())
    }

    /// Bytes of a folder's entries: whole blocks, but for the last.
    fn folder_bytes(&self, number: u32) -> Result<u64, RafsError> {
        let mut blocks = 0;
        let mut used = 0;
        for (_, name) in self.entries(number)? {
            let entry = 12 + name.len() as u64;
            if used + entry > BLOCK {
                (blocks, used) = (blocks + 1, 0);
            }
            used += entry;
        }
        Ok(blocks * BLOCK + used)
    }

    fn fill_folder(&self, plan: &Plan, out: &mut [u8]) -> Result<(), RafsError> {
        let entries = self.entries(plan.number)?;
        let mut at = plan.data_at;
        let mut rest = &entries[..];
        while !rest.is_empty() {
            let mut used = 0;
            let fit = rest.iter().take_while(|(_, name)| {
                used += 12 + name.len() as u64;
                used <= BLOCK
            });
            let (block, others) = rest.split_at(fit.count());
            let mut name_at = block.len() as u64 * 12;
            for (slot, (number, name)) in (at..).step_by(12).zip(block) {
                let inode = get(self.inodes, *number)?;
                let first = first_number(self.inodes, *number, &inode)?;
                let kind = entry_type(inode.mode);
                let kind = kind.ok_or_else(|| wrong("a file's type", inode.mode.into(), "none"))?;
                let place = self.places.get(&first).expect("the tree's order has all that its folders have");
                put(out, slot, (place / SLOT).to_le_bytes());
                put(out, slot + 8, u16::try_from(name_at).unwrap_or(0).to_le_bytes());
                put(out, slot + 10, [kind]);
                copy(out, at + name_at, name);
                name_at += name.len() as u64;
            }
            (at, rest) = (at + BLOCK, others);
        }
        Ok(())
    }

    /// Numbers and names of a folder's entries, in the order of the names.
    fn entries(&self, number: u32) -> Result<Vec<(u32, &[u8])>, RafsError> {
        let (children, parent) = &self.tree.folders[&number];
        let mut entries: Vec<(u32, &[u8])> = vec![(number, b"."), (*parent, b"..")];
        for child in children {
            entries.push((*child, get(self.inodes, *child)?.name));
        }
        entries.sort_unstable_by_key(|(_, name)| *name);
        Ok(entries)
    }
}
