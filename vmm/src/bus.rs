//! From an address the guest touched to the device behind it.
//!
//! Filled before the guest runs and only read from then on, so vCPU threads share it without a lock; a device that
//! several of them reach keeps its own.

use std::fmt::Debug;
use std::sync::Arc;

/// Something with registers.
pub trait BusDevice: Debug + Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("addresses {start:#x} to {end:#x} overlap those of another device, or are empty")]
pub struct Overlap {
    /// First address wanted.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

#[derive(Debug, Clone)]
struct Place {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address: memory-mapped registers, or I/O ports.
#[derive(Debug, Clone, Default)]
pub struct Bus {
    /// Ascending.
    places: Vec<Place>,
}

impl Bus {
    /// Puts `device` at `[start, start + len)`.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let overlap = Overlap { start, end: start.saturating_add(len) };
        let Some(end) = start.checked_add(len).filter(|_| len > 0) else { return Err(overlap) };
        let at = self.places.partition_point(|p| p.start < start);
        let before = at.checked_sub(1).map(|i| &self.places[i]);
        if before.is_some_and(|p| p.start + p.len > start)
            || self.places.get(at).is_some_and(|p| p.start < end)
        {
            return Err(overlap);
        }
        self.places.insert(at, Place { start, len, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let at = self.places.partition_point(|p| p.start <= address).checked_sub(1)?;
        let place = &self.places[at];
        let offset = address - place.start;
        (offset < place.len).then_some((&*place.device, offset))
    }

    /// Lets the device at `address` answer a read; where there is none all bits read as one. Says whether there is.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Gives a write to the device at `address`. Says whether there is one.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let found = self.find(address);
        if let Some((device, offset)) = found {
            device.write(offset, data);
        }
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Remembers the last write and answers reads with its offset.
    #[derive(Debug, Default)]
    struct Probe(Mutex<Vec<u8>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, _: u64, data: &[u8]) {
            *self.0.lock().unwrap() = data.to_vec();
        }
    }

    #[test]
    fn an_access_reaches_its_device_and_no_other() {
        let (low, high) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x10, high.clone()).unwrap();
        bus.insert(0x1000, 0x10, low.clone()).unwrap();
        let mut data = [0];
        assert!(bus.read(0x100f, &mut data));
        assert_eq!(data, [15]);
        assert!(bus.write(0x2000, &[7]));
        assert_eq!(*high.0.lock().unwrap(), [7]);
        assert!(low.0.lock().unwrap().is_empty());
        for hole in [0xfff, 0x1010, 0x2010, u64::MAX] {
            assert!(!bus.read(hole, &mut data));
            assert_eq!(data, [0xff]);
            assert!(!bus.write(hole, &[1]));
        }
    }

    #[test]
    fn nothing_overlaps() {
        let mut bus = Bus::default();
        let probe = || Arc::new(Probe::default());
        bus.insert(0x1000, 0x10, probe()).unwrap();
        for (start, len) in
            [(0x1000, 1), (0xfff, 2), (0x100f, 1), (0x1004, 4), (0, 0x2000), (5, 0), (u64::MAX, 2)]
        {
            assert!(bus.insert(start, len, probe()).is_err(), "{start:#x} {len:#x}");
        }
        bus.insert(0xff0, 0x10, probe()).unwrap();
        bus.insert(0x1010, 0x10, probe()).unwrap();
    }
}
