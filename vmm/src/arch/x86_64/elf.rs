//! An uncompressed kernel: ELF segments and the PVH note.

use super::kernel::{Entry, Image, Kernel, KernelError, le};
use super::layout::HIGH_MEMORY;
use crate::memory::GuestRam;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// A kernel has fewer than ten.
const MAX_PROGRAM_HEADERS: u64 = 64;
/// A kernel's notes are some hundred bytes.
const MAX_NOTES: u64 = 64 << 10;
const CLASS_64: u64 = 2;
const LITTLE_ENDIAN: u64 = 1;
const X86_64: u64 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a guest is entered in 32-bit mode.
const PHYS32_ENTRY: u64 = 18;

struct Segment {
    kind: u64,
    offset: u64,
    gpa: u64,
    in_file: u64,
    in_memory: u64,
    align: u64,
}

pub(super) fn load(ram: &GuestRam, image: &Image<'_>, pvh: bool) -> Result<Kernel, KernelError> {
    let mut end = 0;
    let mut note = None;
    for segment in segments(image)? {
        match segment.kind {
            PT_LOAD => end = end.max(load_segment(ram, image, &segment)?),
            PT_NOTE if pvh && note.is_none() => note = find_pvh_note(image, &segment)?,
            _ => {}
        }
    }
    let (what, rip) = match note {
        Some(eip) => ("PVH entry", u64::from(eip)),
        None => ("entry", le::<8>(&image.head, 24)),
    };
    if rip < HIGH_MEMORY || rip >= end {
        return Err(KernelError::Bounds { what, value: rip, limit: end });
    }
    let entry = match note {
        Some(eip) => Entry::Pvh { eip },
        None => Entry::Linux64 { rip, setup_header: None },
    };
    Ok(Kernel { entry, end })
}

fn segments(image: &Image<'_>) -> Result<Vec<Segment>, KernelError> {
    image.check("the ELF header's end", 0, HEADER as u64)?;
    let head = &image.head;
    let expect = |what, got, want| match got == want {
        true => Ok(()),
        false => Err(KernelError::Elf { what, got, want }),
    };
    expect("class", le::<1>(head, 4), CLASS_64)?;
    expect("byte order", le::<1>(head, 5), LITTLE_ENDIAN)?;
    expect("machine", le::<2>(head, 18), X86_64)?;
    expect("program header size", le::<2>(head, 54), PROGRAM_HEADER as u64)?;
    let (offset, count) = (le::<8>(head, 32), le::<2>(head, 56));
    if count > MAX_PROGRAM_HEADERS {
        let limit = MAX_PROGRAM_HEADERS + 1;
        return Err(KernelError::Bounds { what: "number of program headers", value: count, limit });
    }
    image.check("the program headers' end", offset, count * PROGRAM_HEADER as u64)?;
    let mut table = vec![0; usize::try_from(count).expect("at most 64") * PROGRAM_HEADER];
    image.read(&mut table, offset)?;
    let parse = |h: &[u8]| Segment {
        kind: le::<4>(h, 0),
        offset: le::<8>(h, 8),
        gpa: le::<8>(h, 24),
        in_file: le::<8>(h, 32),
        in_memory: le::<8>(h, 40),
        align: le::<8>(h, 48),
    };
    Ok(table.chunks_exact(PROGRAM_HEADER).map(parse).collect())
}

/// Loads a segment and says where it ends. What is in memory but not in the file (`.bss`) is zero already: guest
/// memory is fresh.
fn load_segment(ram: &GuestRam, image: &Image<'_>, segment: &Segment) -> Result<u64, KernelError> {
    let &Segment { gpa, in_memory, in_file, offset, .. } = segment;
    if in_memory == 0 {
        return Ok(0);
    }
    if gpa < HIGH_MEMORY {
        return Err(KernelError::TooLow { gpa });
    }
    if in_file > in_memory {
        return Err(KernelError::Bounds {
            what: "a segment's size in the file",
            value: in_file,
            limit: in_memory + 1,
        });
    }
    image.check("a segment's end", offset, in_file)?;
    let end = gpa.saturating_add(in_memory);
    if !ram.has(gpa, in_memory) {
        return Err(crate::memory::MemoryError::NoMemory { what: "the kernel", gpa, end }.into());
    }
    let len = usize::try_from(in_file).expect("smaller than guest memory");
    ram.read_file("the kernel image", image.file, offset, gpa, len)?;
    Ok(end)
}

fn find_pvh_note(image: &Image<'_>, segment: &Segment) -> Result<Option<u32>, KernelError> {
    if segment.in_file > MAX_NOTES {
        let limit = MAX_NOTES + 1;
        return Err(KernelError::Bounds { what: "size of the notes", value: segment.in_file, limit });
    }
    image.check("the notes' end", segment.offset, segment.in_file)?;
    let mut notes = vec![0; usize::try_from(segment.in_file).expect("at most 64 KiB")];
    image.read(&mut notes, segment.offset)?;
    Ok(pvh_entry(&notes, if segment.align == 8 { 8 } else { 4 }))
}

/// The 32-bit entry among `notes`, whose fields are aligned to `align`.
fn pvh_entry(mut notes: &[u8], align: usize) -> Option<u32> {
    const NOTE_HEADER: usize = 12;
    while notes.len() >= NOTE_HEADER {
        let field = |at| usize::try_from(le::<4>(notes, at)).expect("32 bits fit usize");
        let (name_len, desc_len) = (field(0), field(4));
        let desc_at = (NOTE_HEADER + name_len).next_multiple_of(align);
        let next = (desc_at + desc_len).next_multiple_of(align);
        let name = notes.get(NOTE_HEADER..NOTE_HEADER + name_len);
        if name == Some(b"Xen\0") && le::<4>(notes, 8) == PHYS32_ENTRY && desc_len >= 4 {
            return u32::try_from(le::<4>(notes, desc_at)).ok().filter(|&entry| entry != 0);
        }
        notes = notes.get(next..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::super::kernel::load;
    use super::super::kernel::tests::{file, ram};
    use super::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        note.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        note.extend(u32::try_from(desc.len()).unwrap().to_le_bytes());
        note.extend(kind.to_le_bytes());
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// An ELF file with one loaded segment at `gpa` and one of notes.
    fn elf(gpa: u64, code: &[u8], in_memory: u64, notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; HEADER];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[24..32].copy_from_slice(&gpa.to_le_bytes());
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 2;
        let mut segment = |kind: u32, offset: usize, gpa: u64, in_file: usize, in_memory: u64| {
            elf.extend(kind.to_le_bytes());
            elf.extend(5u32.to_le_bytes());
            for field in [offset as u64, gpa, gpa, in_file as u64, in_memory, 4] {
                elf.extend(field.to_le_bytes());
            }
        };
        segment(1, 4096, gpa, code.len(), in_memory);
        segment(4, 4096 + code.len(), 0, notes.len(), notes.len() as u64);
        elf.resize(4096, 0);
        elf.extend(code);
        elf.extend(notes);
        elf
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn enters_at_the_note_when_there_is_one_and_it_is_wanted() {
        let mut notes = note(b"GNU\0", 3, b"build id that is longer");
        notes.extend(note(b"Xen\0", 18, &0x100_0040u32.to_le_bytes()));
        let image = elf(16 * MIB, &[0xf4; 128], MIB, &notes);
        let (ram, image) = (ram(), file(&image));
        let kernel = load(&ram, &image, true).unwrap();
        assert_eq!(kernel, Kernel { entry: Entry::Pvh { eip: 0x100_0040 }, end: 17 * MIB });
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(16 * MIB + 127)).unwrap(), 0xf4);
        let kernel = load(&ram, &image, false).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64 { rip: 16 * MIB, setup_header: None });
    }

    #[test]
    fn without_a_note_the_elf_entry_is_taken() {
        let image = elf(16 * MIB, &[0xf4; 128], MIB, &note(b"Xen\0", 6, b"linux\0"));
        let kernel = load(&ram(), file(&image), true).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64 { rip: 16 * MIB, setup_header: None });
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let text = |image: &[u8]| load(&ram(), file(image), true).unwrap_err().to_string();
        assert_eq!(
            text(&elf(63 * MIB, &[0xf4], 2 * MIB, &[])),
            "the kernel needs guest memory from 0x3f00000 to 0x4100000, where there is none"
        );
        assert!(text(&elf(4096, &[0xf4], 8, &[])).contains("0x1000, below the first address"));
        assert!(text(&elf(MIB, &[0xf4; 16], 8, &[])).contains("0x10 is not below 0x9"));
        let mut cut = elf(MIB, &[0xf4; 4096], MIB, &[]);
        cut.truncate(5000);
        assert!(text(&cut).contains("a segment's end 0x2000 is not below 0x1389"));
        let mut wrong = elf(MIB, &[0xf4], MIB, &[]);
        wrong[18] = 183;
        assert_eq!(text(&wrong), "the kernel's ELF header says machine 0xb7 where 0x3e is needed");
        let mut entry = elf(MIB, &[0xf4], MIB, &[]);
        entry[24..32].copy_from_slice(&(9 * MIB).to_le_bytes());
        assert!(text(&entry).contains("entry 0x900000 is not below 0x200000"));
        assert!(text(&b"\x7fELF\x02\x01"[..]).contains("damaged"));
    }

    #[test]
    fn nonsense_among_the_notes_ends_the_search() {
        assert_eq!(pvh_entry(&[0xff; 64], 4), None);
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &[0; 4]), 4), None);
        assert_eq!(pvh_entry(&note(b"Xen\0", 18, &[1; 2]), 4), None);
        assert_eq!(pvh_entry(&[], 8), None);
    }
}
