"""Rewrites a linked kernel so that only what is needed is on disk and loaded.

The linker aligns the kernel's parts to 2 MiB in the file as in memory, and pads the text around the entry code to 2 MiB
with int3: more than half of a small vmlinux is padding. Here every loadable segment is cut at long runs of padding, and
the pieces are laid one after the other, each at a page boundary. Addresses do not change. Section headers, which no
loader reads, are dropped; the note with the PVH entry stays reachable through its program header.

Pieces that were cut out of data read as zero (`p_memsz` reaches over them); what lay between pieces of text is never read.
"""

import struct

PAGE = 4096
RUN = 8 * PAGE  # shorter runs of padding are kept: every piece costs the loader a read
PT_LOAD, PT_NOTE = 1, 4
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
NOTE = struct.Struct("<III")
XEN_ELFNOTE_PHYS32_ENTRY = 18


class ElfError(Exception):
    pass


def compact(data):
    """Returns the compacted image of the ELF file `data`."""
    header = list(HEADER.unpack_from(data))
    if not data.startswith(b"\x7fELF\x02\x01"):
        raise ElfError("not a 64-bit little-endian ELF file")
    segments = [SEGMENT.unpack_from(data, header[5] + i * SEGMENT.size) for i in range(header[10])]
    pieces = [piece for segment in segments if segment[0] == PT_LOAD for piece in split(data, segment)]
    notes = [segment for segment in segments if segment[0] == PT_NOTE]

    count = len(pieces) + len(notes)
    body, table, moved = bytearray(), [], []
    start = page_up(HEADER.size + count * SEGMENT.size)
    for flags, offset, vaddr, paddr, filesz, memsz in pieces:
        at = start + len(body)
        body += data[offset : offset + filesz].ljust(page_up(filesz), b"\0")
        table.append(SEGMENT.pack(PT_LOAD, flags, at, vaddr, paddr, filesz, memsz, PAGE))
        moved.append((offset, filesz, at))
    for _, flags, offset, vaddr, paddr, filesz, memsz, align in notes:
        at = next((new + offset - old for old, size, new in moved if old <= offset and offset + filesz <= old + size), None)
        if at is None:
            raise ElfError(f"the note at {offset:#x} is in no loadable segment")
        table.append(SEGMENT.pack(PT_NOTE, flags, at, vaddr, paddr, filesz, memsz, align))

    header[5], header[6], header[10] = HEADER.size, 0, count  # e_phoff, e_shoff, e_phnum
    header[11:14] = 0, 0, 0  # e_shentsize, e_shnum, e_shstrndx
    head = HEADER.pack(*header) + b"".join(table)
    return head.ljust(start, b"\0") + bytes(body)


def split(data, segment):
    """Cuts one loadable segment at its runs of padding: [(flags, offset, vaddr, paddr, filesz, memsz)]."""
    _, flags, offset, vaddr, paddr, filesz, memsz, _ = segment
    kept, zeroed, at = [], [], 0
    while at < filesz:
        run = padding(data, offset + at, offset + filesz)
        if run >= RUN or (run and at + run == filesz):
            if data[offset + at] == 0 and kept:
                zeroed.append((len(kept) - 1, at + run))
            at += run
            continue
        end = min(filesz, at + max(run, PAGE))
        if kept and kept[-1][1] == at:
            kept[-1][1] = end
        else:
            kept.append([at, end])
        at = end
    reach = {index: end for index, end in zeroed}
    result = []
    for index, (begin, end) in enumerate(kept):
        last = index == len(kept) - 1
        memory = memsz if last else reach.get(index, end)
        result.append((flags, offset + begin, vaddr + begin, paddr + begin, end - begin, memory - begin))
    return result


def padding(data, at, end):
    """Length of the run of whole pages from `at` that hold only one padding byte, 0 if the first page holds more."""
    fill = data[at : at + 1]
    if fill not in (b"\0", b"\xcc"):
        return 0
    page, length = fill * PAGE, 0
    while at + length < end and data[at + length : min(at + length + PAGE, end)] == page[: end - at - length]:
        length += min(PAGE, end - at - length)
    return length


def page_up(value):
    return -(-value // PAGE) * PAGE


def has_pvh_note(data):
    """Whether a loader finds the 32-bit PVH entry point in the file's notes."""
    header = HEADER.unpack_from(data)
    for i in range(header[10]):
        kind, _, offset, _, _, filesz, _, _ = SEGMENT.unpack_from(data, header[5] + i * SEGMENT.size)
        end = offset + filesz
        while kind == PT_NOTE and offset + NOTE.size <= end:
            name_size, size, note = NOTE.unpack_from(data, offset)
            name = data[offset + NOTE.size : offset + NOTE.size + name_size]
            if name == b"Xen\0" and note == XEN_ELFNOTE_PHYS32_ENTRY:
                return True
            offset += NOTE.size + -(-name_size // 4) * 4 + -(-size // 4) * 4
    return False
