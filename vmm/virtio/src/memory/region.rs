//! One range of guest physical addresses.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::{
    AtomicAccess, Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, ReadVolatile, VolatileSlice, WriteVolatile,
};

use super::Blocks;

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// A mapping, and which of its blocks are there.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap,
    /// `None`: all of it, always.
    blocks: Option<Arc<Blocks>>,
    /// No device writes there.
    read_only: bool,
}

impl Region {
    /// Memory that is there from the beginning to the end.
    pub fn ram(mapping: GuestRegionMmap) -> Self {
        Region { mapping, blocks: None, read_only: false }
    }

    /// Memory of which `blocks` tells what is there. Whatever it says is there must be accessible; see the head of
    /// [`crate::memory`] for the order in which the two change.
    ///
    /// # Panics
    /// If the blocks are not those of the mapping.
    pub fn in_blocks(mapping: GuestRegionMmap, blocks: Arc<Blocks>) -> Self {
        assert_eq!(mapping.len(), blocks.bytes(), "a region has as many bytes as its blocks");
        Region { mapping, blocks: Some(blocks), read_only: false }
    }

    /// As [`Region::in_blocks`], of memory that neither guest nor devices may write. A slice of it is one to read from: who
    /// is going to write asks [`is_writable`](super::is_writable) first.
    ///
    /// # Panics
    /// If the blocks are not those of the mapping.
    pub fn read_only(mapping: GuestRegionMmap, blocks: Arc<Blocks>) -> Self {
        Region { read_only: true, ..Region::in_blocks(mapping, blocks) }
    }

    /// Whether one of the `len` bytes at `address` is of this region, and may not be written.
    #[inline]
    pub(super) fn forbids_writing(&self, address: u64, len: u64) -> bool {
        let start = self.start_addr().0;
        self.read_only && len > 0 && address < start + self.len() && address.saturating_add(len) > start
    }

    #[inline]
    fn check(&self, offset: MemoryRegionAddress, count: usize) -> Result<()> {
        match &self.blocks {
            Some(blocks) if !blocks.hold(offset.0, count as u64) => {
                Err(GuestMemoryError::InvalidBackendAddress)
            }
            _ => Ok(()),
        }
    }

    /// As much of the `len` bytes at `offset` as the region has.
    fn up_to(&self, offset: MemoryRegionAddress, len: usize) -> Result<VolatileSlice<'_>> {
        let left = self.len().checked_sub(offset.0).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        if left == 0 && len > 0 {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        self.get_slice(offset, len.min(left))
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    #[inline]
    fn len(&self) -> GuestUsize {
        self.mapping.len()
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, offset: MemoryRegionAddress) -> Result<*mut u8> {
        self.check(offset, 1)?;
        self.mapping.get_host_address(offset)
    }

    #[inline]
    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, BS<'_, ()>>> {
        self.check(offset, count)?;
        self.mapping.get_slice(offset, count)
    }
}

/// Each access is to a slice of the bytes in question: the whole region, which `vm-memory`'s own implementation takes a
/// slice of, need not be there.
impl Bytes<MemoryRegionAddress> for Region {
    type E = GuestMemoryError;

    fn write(&self, bytes: &[u8], at: MemoryRegionAddress) -> Result<usize> {
        Ok(self.up_to(at, bytes.len())?.write(bytes, 0)?)
    }

    fn read(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Result<usize> {
        Ok(self.up_to(at, bytes.len())?.read(bytes, 0)?)
    }

    fn write_slice(&self, bytes: &[u8], at: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(at, bytes.len())?.write_slice(bytes, 0)?)
    }

    fn read_slice(&self, bytes: &mut [u8], at: MemoryRegionAddress) -> Result<()> {
        Ok(self.get_slice(at, bytes.len())?.read_slice(bytes, 0)?)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Result<usize> {
        let slice = self.up_to(at, count)?;
        Ok(slice.read_volatile_from(0, from, slice.len())?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        from: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(at, count)?.read_exact_volatile_from(0, from, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<usize> {
        let slice = self.up_to(at, count)?;
        Ok(slice.write_volatile_to(0, to, slice.len())?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        to: &mut F,
        count: usize,
    ) -> Result<()> {
        Ok(self.get_slice(at, count)?.write_all_volatile_to(0, to, count)?)
    }

    fn store<T: AtomicAccess>(&self, value: T, at: MemoryRegionAddress, order: Ordering) -> Result<()> {
        Ok(self.get_slice(at, size_of::<T>())?.store(value, 0, order)?)
    }

    fn load<T: AtomicAccess>(&self, at: MemoryRegionAddress, order: Ordering) -> Result<T> {
        Ok(self.get_slice(at, size_of::<T>())?.load(0, order)?)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemory as _;

    use super::super::{BLOCK, GuestMemory};
    use super::*;

    const BASE: u64 = 0x1_0000_0000;

    /// One page of boot memory, and a region of four blocks of which `blocks` tells.
    fn memory() -> (GuestMemory, Arc<Blocks>) {
        let map = |gpa, len| GuestRegionMmap::from_range(GuestAddress(gpa), len, None).unwrap();
        let blocks = Arc::new(Blocks::new(4));
        let len = usize::try_from(4 * BLOCK).unwrap();
        let regions =
            vec![Region::ram(map(BASE - 4096, 4096)), Region::in_blocks(map(BASE, len), Arc::clone(&blocks))];
        (GuestMemory::from_regions(regions).unwrap(), blocks)
    }

    #[test]
    fn a_block_that_is_not_plugged_is_no_memory() {
        let (memory, blocks) = memory();
        let at = |offset| GuestAddress(BASE + offset);
        let all_fail = |offset: u64| {
            assert!(memory.get_slice(at(offset), 1).is_err());
            assert!(memory.get_host_address(at(offset)).is_err());
            assert!(memory.write(&[1], at(offset)).is_err());
            assert!(memory.read_slice(&mut [0], at(offset)).is_err());
            assert!(memory.load::<u16>(at(offset & !1), Ordering::SeqCst).is_err());
            assert!(memory.store(1_u16, at(offset & !1), Ordering::SeqCst).is_err());
            assert!(!memory.check_range(at(offset), 1));
        };
        for offset in [0, BLOCK - 1, BLOCK, 4 * BLOCK - 1] {
            all_fail(offset);
        }
        blocks.set(1..3, true);
        all_fail(BLOCK - 1);
        all_fail(3 * BLOCK);
        assert!(memory.check_range(at(BLOCK), usize::try_from(2 * BLOCK).unwrap()));
        assert!(!memory.check_range(at(BLOCK - 1), 2));
        assert!(!memory.check_range(at(3 * BLOCK - 1), 2));
        memory.write_slice(b"across two blocks", at(2 * BLOCK - 8)).unwrap();
        let mut bytes = [0; 17];
        memory.read_slice(&mut bytes, at(2 * BLOCK - 8)).unwrap();
        assert_eq!(&bytes, b"across two blocks");
        memory.store(7_u32, at(BLOCK), Ordering::SeqCst).unwrap();
        assert_eq!(memory.load::<u32>(at(BLOCK), Ordering::SeqCst).unwrap(), 7);
        blocks.set(1..2, false);
        all_fail(BLOCK);
        assert!(memory.check_range(at(2 * BLOCK), 1));
    }

    #[test]
    fn what_begins_in_boot_memory_ends_where_blocks_end() {
        let (memory, blocks) = memory();
        let before = GuestAddress(BASE - 8);
        assert!(memory.write_slice(&[1; 16], before).is_err());
        assert_eq!(memory.write(&[1; 16], before).unwrap(), 8);
        blocks.set(0..1, true);
        memory.write_slice(&[2; 16], before).unwrap();
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, before).unwrap();
        assert_eq!(bytes, [2; 16]);
    }

    #[test]
    fn a_region_by_itself_answers_as_memory_does() {
        let (memory, blocks) = memory();
        blocks.set(3..4, true);
        let region = memory.find_region(GuestAddress(BASE)).unwrap();
        let end = MemoryRegionAddress(4 * BLOCK - 2);
        assert_eq!(region.write(&[1, 2, 3], end).unwrap(), 2);
        let mut bytes = [0; 3];
        assert_eq!(region.read(&mut bytes, end).unwrap(), 2);
        assert_eq!(bytes, [1, 2, 0]);
        assert!(region.write_slice(&[1, 2, 3], end).is_err());
        assert!(region.write(&[1], MemoryRegionAddress(4 * BLOCK)).is_err());
        assert!(region.write(&[1], MemoryRegionAddress(u64::MAX)).is_err());
        assert!(region.write(&[1], MemoryRegionAddress(0)).is_err());
        let mut out = Vec::new();
        assert_eq!(region.write_volatile_to(end, &mut out, 5).unwrap(), 2);
        assert_eq!(out, [1, 2]);
        assert!(region.read_exact_volatile_from(MemoryRegionAddress(0), &mut &[1_u8, 2][..], 2).is_err());
        region.read_exact_volatile_from(end, &mut &[8_u8, 9][..], 2).unwrap();
        region.read_slice(&mut bytes[..2], end).unwrap();
        assert_eq!(bytes, [8, 9, 0]);
        region.store(5_u16, end, Ordering::SeqCst).unwrap();
        assert_eq!(region.load::<u16>(end, Ordering::SeqCst).unwrap(), 5);
        assert!(region.load::<u16>(MemoryRegionAddress(0), Ordering::SeqCst).is_err());
    }
}
