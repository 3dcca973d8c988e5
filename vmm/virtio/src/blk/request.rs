//! From the bytes of a chain to a request that fits the disk (virtio 1.2, 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::SECTOR;
use crate::queue::{Reader, ShortChain, Writer};

/// Most bytes in one buffer (`size_max`).
pub const SIZE_MAX: u32 = 256 * 1024;
/// Most ranges in one discard request (`max_discard_seg`).
pub const MAX_DISCARD_RANGES: u32 = 16;
/// Most sectors in one range to discard (`max_discard_sectors`): 1 GiB.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most ranges in one write-zeroes request (`max_write_zeroes_seg`).
pub const MAX_ZEROES_RANGES: u32 = 1;
/// Most sectors in one range of zeros (`max_write_zeroes_sectors`): 32 MiB, as they may have to be written one by one.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 16;

/// What starts each request.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// One range to discard or to fill with zeros.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawRange {
    sector: U64,
    sectors: U32,
    flags: U32,
}

/// Bytes of the disk, all on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// They may be given back to the host.
    pub unmap: bool,
}

/// What the driver wants, in bytes of the disk and checked against its size and mode.
#[derive(Debug)]
pub enum Request<'m> {
    /// Fill `data`.
    Read { offset: u64, data: Writer<'m> },
    /// Take `data`.
    Write { offset: u64, data: Reader<'m> },
    /// Make writes durable.
    Flush,
    /// Forget these bytes.
    Discard(Vec<Range>),
    /// Zero these bytes.
    WriteZeroes(Vec<Range>),
    /// Say who you are.
    GetId(Writer<'m>),
}

/// Why a request gets an error for an answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadRequest {
    /// No room for a header, or a list of ranges that ends within one.
    #[error("request ends early: {0}")]
    Short(#[from] ShortChain),
    /// Nothing we know.
    #[error("request type {0} is unknown")]
    UnknownType(u32),
    /// Not whole sectors.
    #[error("{0} bytes of data are not whole sectors")]
    PartSector(usize),
    /// More than a driver may ask for at once.
    #[error("request of {len} {unit} is larger than {max}")]
    TooLarge {
        /// How much.
        len: u64,
        /// At most.
        max: u64,
        /// Of what.
        unit: &'static str,
    },
    /// Not on the disk, at least in part.
    #[error("{sectors} sectors from {sector} on are not on a disk of {size}")]
    BeyondEnd {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// Size of the disk in sectors.
        size: u64,
    },
    /// The disk is read-only.
    #[error("disk is read-only")]
    ReadOnly,
    /// Flags that are not for this request.
    #[error("range has flags {0:#x}")]
    Flags(u32),
}

impl BadRequest {
    /// Whether the status is "unsupported" rather than "I/O error" (5.2.6.2).
    pub fn is_unsupported(&self) -> bool {
        matches!(self, BadRequest::UnknownType(_) | BadRequest::Flags(_))
    }
}

/// The disk, as far as a request must fit it.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size in sectors.
    pub sectors: u64,
    /// No changes.
    pub read_only: bool,
    /// Most bytes of data in a request.
    pub max_data: u64,
}

/// What a flush costs, in bytes moved.
const FLUSH_COST: u64 = 1 << 20;

impl<'m> Request<'m> {
    /// How much of a turn's budget this takes, in bytes moved: at worst, whether or not it works out.
    pub fn cost(&self) -> u64 {
        match self {
            Request::Read { data, .. } => data.left() as u64,
            Request::Write { data, .. } => data.left() as u64,
            Request::Flush => FLUSH_COST,
            Request::Discard(_) | Request::GetId(_) => 0,
            Request::WriteZeroes(ranges) => ranges.iter().map(|range| range.len).sum(),
        }
    }

    /// Reads a request. `room` is the writable part without the status byte.
    pub fn parse(mut reader: Reader<'m>, room: Writer<'m>, disk: &Limits) -> Result<Self, BadRequest> {
        let header: Header = reader.read_obj()?;
        let sector = header.sector.get();
        match header.kind.get() {
            VIRTIO_BLK_T_IN => Ok(Request::Read { offset: disk.data(sector, room.left())?, data: room }),
            VIRTIO_BLK_T_OUT if disk.read_only => Err(BadRequest::ReadOnly),
            VIRTIO_BLK_T_OUT => {
                Ok(Request::Write { offset: disk.data(sector, reader.left())?, data: reader })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Request::GetId(room)),
            VIRTIO_BLK_T_DISCARD if disk.read_only => Err(BadRequest::ReadOnly),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = disk.ranges(&mut reader, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, 0)?;
                Ok(Request::Discard(ranges))
            }
            VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => Err(BadRequest::ReadOnly),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = disk.ranges(&mut reader, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS, unmap)?;
                Ok(Request::WriteZeroes(ranges))
            }
            kind => Err(BadRequest::UnknownType(kind)),
        }
    }
}

impl Limits {
    /// Checks a transfer of `len` bytes and gives its place in bytes.
    fn data(&self, sector: u64, len: usize) -> Result<u64, BadRequest> {
        let bytes = len as u64;
        if bytes > self.max_data {
            return Err(BadRequest::TooLarge { len: bytes, max: self.max_data, unit: "bytes" });
        }
        if !bytes.is_multiple_of(SECTOR) {
            return Err(BadRequest::PartSector(len));
        }
        self.place(sector, bytes / SECTOR)
    }

    /// The first byte of sectors that are on the disk.
    fn place(&self, sector: u64, sectors: u64) -> Result<u64, BadRequest> {
        match sector.checked_add(sectors) {
            Some(end) if end <= self.sectors => Ok(sector * SECTOR),
            _ => Err(BadRequest::BeyondEnd { sector, sectors, size: self.sectors }),
        }
    }

    fn ranges(
        &self,
        reader: &mut Reader<'_>,
        max_ranges: u32,
        max_sectors: u32,
        allowed_flags: u32,
    ) -> Result<Vec<Range>, BadRequest> {
        let max = size_of::<RawRange>() * max_ranges as usize;
        if reader.left() > max {
            return Err(BadRequest::TooLarge {
                len: reader.left() as u64,
                max: max as u64,
                unit: "bytes of ranges",
            });
        }
        let mut ranges = Vec::new();
        while reader.left() > 0 {
            let raw: RawRange = reader.read_obj()?;
            let (sectors, flags) = (raw.sectors.get(), raw.flags.get());
            if flags & !allowed_flags != 0 {
                return Err(BadRequest::Flags(flags));
            }
            if sectors > max_sectors {
                return Err(BadRequest::TooLarge {
                    len: sectors.into(),
                    max: max_sectors.into(),
                    unit: "sectors",
                });
            }
            let offset = self.place(raw.sector.get(), sectors.into())?;
            // fallocate refuses to do nothing.
            if sectors > 0 {
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                ranges.push(Range { offset, len: u64::from(sectors) * SECTOR, unmap });
            }
        }
        Ok(ranges)
    }
}
