//! The range of addresses in which all virtio-mmio registers lie, a page for each slot.
//!
//! It is on the bus from the start and stays, empty or not; what changes is what lies behind a page. A vCPU holds its page's
//! lock while it is at a device, so a device that has been taken out is one that no vCPU is at any more.

use std::sync::{Arc, RwLock};

use crate::arch::x86_64::layout::{VIRTIO_MMIO, VIRTIO_MMIO_SIZE, VIRTIO_SLOTS};
use crate::bus::BusDevice;

/// The window.
#[derive(Debug)]
pub struct Window {
    slots: Vec<RwLock<Option<Arc<dyn BusDevice>>>>,
}

impl Window {
    /// Where it begins.
    pub const BASE: u64 = VIRTIO_MMIO;
    /// Its length in bytes.
    pub const LEN: u64 = VIRTIO_MMIO_SIZE * VIRTIO_SLOTS as u64;

    /// A window with nothing behind it.
    pub fn new() -> Self {
        Window { slots: (0..VIRTIO_SLOTS).map(|_| RwLock::default()).collect() }
    }

    /// Puts `registers` behind the page of `slot`, or nothing. Waits for a vCPU that is at what is there.
    pub fn put(&self, slot: u16, registers: Option<Arc<dyn BusDevice>>) {
        *self.slots[usize::from(slot)]
            .write()
            .expect("a panic ends the process before anyone takes the lock") = registers;
    }

    /// Calls `work` with what is behind `offset` and the offset in it; false if nothing is.
    fn with(&self, offset: u64, work: impl FnOnce(&dyn BusDevice, u64)) -> bool {
        let slot = usize::try_from(offset / VIRTIO_MMIO_SIZE).ok().and_then(|slot| self.slots.get(slot));
        let Some(slot) = slot else { return false };
        let slot = slot.read().expect("a panic ends the process before anyone takes the lock");
        let Some(device) = slot.as_deref() else { return false };
        work(device, offset % VIRTIO_MMIO_SIZE);
        true
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.with(offset, |device, offset| device.read(offset, data)) {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with(offset, |device, offset| device.write(offset, data));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// Answers with its number; while it does, it is at the gate.
    #[derive(Debug)]
    struct Probe(u8, Option<mpsc::SyncSender<()>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            if let Some(gate) = &self.1 {
                gate.send(()).unwrap();
                gate.send(()).unwrap();
            }
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn read(window: &Window, offset: u64) -> u8 {
        let mut data = [0];
        window.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_page_leads_to_its_device_and_an_empty_one_reads_as_ones() {
        let window = Window::new();
        window.put(1, Some(Arc::new(Probe(10, None))));
        window.put(18, Some(Arc::new(Probe(20, None))));
        assert_eq!([0, 0x1000, 0x1003, 0x2000, 0x1_2001].map(|at| read(&window, at)), [255, 10, 13, 255, 21]);
        window.put(1, Some(Arc::new(Probe(30, None))));
        assert_eq!(read(&window, 0x1000), 30);
        window.put(1, None);
        window.write(0x1000, &[1]);
        for nowhere in [0x1000, Window::LEN, u64::MAX] {
            assert_eq!(read(&window, nowhere), 255);
        }
    }

    #[test]
    fn what_is_taken_out_is_what_nobody_is_at() {
        let (gate, at_device) = mpsc::sync_channel(0);
        let window = Window::new();
        window.put(3, Some(Arc::new(Probe(7, Some(gate)))));
        thread::scope(|scope| {
            let vcpu = scope.spawn(|| read(&window, 0x3000));
            at_device.recv().unwrap();
            let taken = scope.spawn(|| window.put(3, None));
            thread::sleep(Duration::from_millis(20));
            assert!(!taken.is_finished());
            at_device.recv().unwrap();
            taken.join().unwrap();
            assert_eq!(vcpu.join().unwrap(), 7);
        });
        assert_eq!(read(&window, 0x3000), 255);
    }
}
