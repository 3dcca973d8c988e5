//! What a driver reads about a disk, and the sizes that follow from it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::SECTOR;
use super::request::{
    MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS, SIZE_MAX,
};

/// Descriptors of a queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most data buffers in a request: all descriptors but those of header and status.
const SEG_MAX: u16 = QUEUE_SIZE - 2;
/// Most bytes of data in a request.
pub const MAX_DATA: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Least unit that is worth discarding, in sectors: a page of the host.
const DISCARD_ALIGNMENT: u32 = 8;

/// The configuration space up to the last field that a feature of ours shows (virtio 1.2, 5.2.4).
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// The configuration space of a disk of that many sectors and request queues.
pub fn config_space(sectors: u64, queues: u16) -> impl IntoBytes + Immutable {
    Config {
        capacity: sectors.into(),
        size_max: SIZE_MAX.into(),
        seg_max: u32::from(SEG_MAX).into(),
        geometry: [0; 4],
        blk_size: u32::try_from(SECTOR).expect("512").into(),
        topology: [0; 8],
        writeback: 0,
        unused0: 0,
        num_queues: queues.into(),
        max_discard_sectors: MAX_DISCARD_SECTORS.into(),
        max_discard_seg: MAX_DISCARD_RANGES.into(),
        discard_sector_alignment: DISCARD_ALIGNMENT.into(),
        max_write_zeroes_sectors: MAX_ZEROES_SECTORS.into(),
        max_write_zeroes_seg: MAX_ZEROES_RANGES.into(),
        write_zeroes_may_unmap: 1,
        unused1: [0; 3],
    }
}
