//! Blocks of memory come and go under all the other devices.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio::mem::MemBackend;

use super::device::{Bystanders, while_still};
use crate::memory::Hotplug;

/// The host's side of the memory device.
#[derive(Debug)]
pub(super) struct HostBlocks {
    hotplug: Arc<Hotplug>,
    bystanders: Bystanders,
}

impl HostBlocks {
    pub(super) fn new(hotplug: Arc<Hotplug>, bystanders: Bystanders) -> Self {
        HostBlocks { hotplug, bystanders }
    }
}

impl MemBackend for HostBlocks {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        self.hotplug.plug(&blocks)
    }

    /// On the main thread, which holds no transport's lock but the memory device's; so no lock is waited for in a circle.
    fn unplug(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        let bystanders = self.bystanders.lock().expect("nothing panics under this lock");
        let mut done = Ok(());
        if while_still(&bystanders, &mut || done = self.hotplug.unplug(runs)) {
            return done;
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the file server is at a long request"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread;
    use std::time::Duration;

    use virtio::device::Threads;
    use virtio::fs::{Fs, FsConfig, FsServer};
    use virtio::memory::BLOCK;
    use virtio::mmio::{MmioTransport, registers as reg};
    use virtio::queue::{Reader, Writer};
    use virtio::rng::Rng;
    use virtio::testing::{CountedLine, Descriptor, FakeQueue, NEXT, WRITE};
    use vmm_api::GuestMemoryBacking;

    use super::super::{Device, Shared, lock};
    use super::*;
    use crate::arch::x86_64::layout;
    use crate::memory::GuestRam;

    const MIB: u64 = 1 << 20;

    fn ram() -> GuestRam {
        let ram = GuestRam::map(&layout::ram_ranges(64 * MIB), GuestMemoryBacking::Anonymous, false).unwrap();
        ram.with_hotplug(layout::hotplug_range(64 * MIB, 64 * MIB)).unwrap()
    }

    fn shared<D: virtio::device::VirtioDevice>(device: D, ram: &GuestRam) -> Shared<D> {
        let line = Arc::new(CountedLine::default());
        Arc::new(Mutex::new(MmioTransport::new(device, ram.memory().clone(), line).unwrap()))
    }

    fn backend(ram: &GuestRam, devices: Vec<Device>) -> HostBlocks {
        HostBlocks::new(Arc::clone(ram.hotplug().unwrap()), Arc::new(Mutex::new(devices)))
    }

    /// Reads all of a request and writes all of its answer, for as long as a page takes.
    #[derive(Debug)]
    struct Copier;

    impl FsServer for Copier {
        fn handle(&self, mut request: Reader<'_>, mut reply: Writer<'_>) -> u32 {
            let mut page = [0; 4096];
            while request.read(&mut page) > 0 {
                reply.write(&page);
                thread::yield_now();
            }
            u32::try_from(reply.written()).unwrap()
        }

        fn reset(&self) {}

        fn metrics(&self) -> Vec<(&'static str, u64)> {
            vec![]
        }
    }

    struct AsTheyAre;

    impl Threads for AsTheyAre {
        fn enter(&self, _: &str) -> io::Result<()> {
            Ok(())
        }

        fn died(&self, name: &str) {
            panic!("{name} died");
        }
    }

    /// What a driver writes to set the device up; its request queue.
    fn set_up(fs: &Shared<Fs>, ram: &GuestRam) -> FakeQueue {
        let mut fs = lock(fs);
        let mut write = |register: u64, value: u64| {
            fs.write(register, &u32::try_from(value & 0xffff_ffff).unwrap().to_le_bytes());
        };
        for status in [0, 1, 3] {
            write(reg::STATUS, status);
        }
        write(reg::DRIVER_FEATURES_SEL, 1);
        write(reg::DRIVER_FEATURES, 1);
        write(reg::STATUS, 11);
        let queue = FakeQueue::new(ram.memory(), 2 * MIB, 64, false);
        let state = queue.state();
        write(reg::QUEUE_SEL, 1);
        write(reg::QUEUE_SIZE, 64);
        for (low, high, address) in [
            (reg::QUEUE_DESC_LOW, reg::QUEUE_DESC_HIGH, state.desc_table),
            (reg::QUEUE_DRIVER_LOW, reg::QUEUE_DRIVER_HIGH, state.avail_ring),
            (reg::QUEUE_DEVICE_LOW, reg::QUEUE_DEVICE_HIGH, state.used_ring),
        ] {
            write(low, address);
            write(high, address >> 32);
        }
        write(reg::QUEUE_READY, 1);
        write(reg::STATUS, 15);
        assert!(fs.is_active());
        queue
    }

    /// The file server is in the midst of requests whose buffers lie in a block that goes. That it ends is what is tested:
    /// an access that should not have been is a signal that no test survives.
    #[test]
    fn a_block_goes_under_requests_in_flight() {
        let ram = ram();
        let hotplug = Arc::clone(ram.hotplug().unwrap());
        let config = FsConfig { tag: "t".into(), threads: 2 };
        let threads: Arc<dyn Threads> = Arc::new(AsTheyAre);
        let fs = shared(Fs::new(config, Arc::new(Copier), &threads).unwrap(), &ram);
        let mut backend = backend(&ram, vec![Device::Rng(shared(Rng::new(), &ram)), Device::Fs(fs.clone())]);
        let mut served = 0;
        for round in 0..150 {
            backend.plug(0..2).unwrap();
            hotplug.blocks().set(0..2, true);
            let mut queue = set_up(&fs, &ram);
            let at = |address, flags| Descriptor { address, len: 512 << 10, flags, next: 1 };
            for _ in 0..8 {
                let block = hotplug.range().gpa;
                queue.add_raw(&[at(block + MIB, NEXT), at(block + BLOCK + MIB / 2, WRITE)]);
            }
            lock(&fs).kicks()[1].write(1).unwrap();
            thread::sleep(Duration::from_micros(round * 10));
            for block in [1, 0] {
                hotplug.blocks().set(block..block + 1, false);
                let gone = [Range { start: block, end: block + 1 }];
                while let Err(e) = backend.unplug(&gone) {
                    assert_eq!(e.kind(), io::ErrorKind::TimedOut, "{e}");
                }
            }
            served += queue.used_idx();
        }
        println!("{served} requests were served in time");
        // Some were, and some were not.
        assert!((1..150 * 8).contains(&served), "{served}");
        lock(&fs).write(reg::STATUS, &[0; 4]);
    }

    #[test]
    fn a_block_waits_for_a_vcpu_that_is_at_a_device() {
        let ram = ram();
        let rng = shared(Rng::new(), &ram);
        let mut backend = backend(&ram, vec![Device::Rng(Arc::clone(&rng))]);
        backend.plug(0..1).unwrap();
        thread::scope(|scope| {
            let at_device = lock(&rng);
            let going = scope.spawn(move || {
                let gone = [Range { start: 0, end: 1 }];
                backend.unplug(&gone).unwrap();
            });
            thread::sleep(Duration::from_millis(30));
            assert!(!going.is_finished());
            drop(at_device);
            going.join().unwrap();
        });
    }
}
