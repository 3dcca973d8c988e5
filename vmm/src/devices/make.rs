//! How a device is made and connected, and how it is taken apart: the same way at boot and later. It may be done on another
//! thread than the main one ([`super::worker`]).

use std::sync::{Arc, Mutex};

use imagefs::image::ImageThread;
use imagefs::{FileServer, Limits};
use virtio::GuestMemory;
use virtio::blk::{self, Blk};
use virtio::device::VirtioDevice;
use virtio::fs::Fs;
use virtio::irq::IrqLine;
use virtio::mmio::{MmioTransport, registers};
use virtio::net::{Net, Taps};
use virtio::vsock::Vsock;
use vmm_api::DeviceName;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, Shared, lock, with};
use super::{DeviceError, DeviceKey, threads};
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::config;
use crate::kvm::{KickAddress, KvmError, KvmVm};
use crate::memory::{FileWindow, Shown};
use crate::seccomp::Role;
use crate::upcall::DevicePlace;
use crate::vcpu::Ends;
use crate::vm::change::Gone;

/// What devices are connected to.
#[derive(Debug, Clone)]
pub struct Host {
    /// For doorbells and interrupts.
    pub kvm: Arc<KvmVm>,
    /// What they work on.
    pub memory: GuestMemory,
    /// Where the death of a thread of theirs is reported.
    pub ends: Arc<Ends>,
    /// Raised when a driver has changed a status that somebody waits for.
    pub status: Arc<EventFd>,
    /// What serves disks that are images, if there may be any.
    pub images: Option<Arc<ImageThread>>,
    /// Where images are shown that are memory.
    pub files: Option<Arc<FileWindow>>,
}

/// Where a device goes.
#[derive(Debug, Clone)]
pub(super) struct At {
    pub key: DeviceKey,
    pub slot: u16,
    /// For counters: `vsock`, `blk0`, …
    pub name: String,
    /// For the owner.
    pub title: Option<DeviceName>,
    /// It comes to a guest that runs.
    pub late: bool,
}

/// A device in its place.
#[derive(Debug)]
pub(super) struct Slot {
    pub at: At,
    pub device: Device,
    pub registers: Arc<dyn BusDevice>,
    pub place: DevicePlace,
    line: Arc<EventFd>,
    /// What a share serves.
    pub files: Option<Arc<FileServer>>,
    /// What an image shows that is memory.
    pub shown: Option<Shown>,
}

impl Host {
    /// A disk of what was asked for.
    pub(super) fn disk(&self, at: At, disk: config::Disk) -> Result<Slot, DeviceError> {
        let config::Disk { file, read_only, id, queues, image } = disk;
        if let Some(image) = image {
            return if image.dax {
                self.image_memory(at, file, image)
            } else {
                self.image(at, file, image, &id)
            };
        }
        let disk = blk::Disk::new(file, read_only, &id).map_err(DeviceError::refused(&at.name))?;
        self.connect(at, Blk::new(disk, queues.into()), Device::Blk)
    }

    /// A network device.
    pub(super) fn net(&self, at: At, net: config::Net) -> Result<Slot, DeviceError> {
        let taps = Taps::new(net.taps).map_err(DeviceError::refused(&at.name))?;
        self.connect(at, Net::new(taps, net.mac, net.mtu), Device::Net)
    }

    /// A file share with nothing mounted. Its threads are started, and confine themselves.
    pub(super) fn fs(&self, at: At, config: vmm_api::FsConfig) -> Result<Slot, DeviceError> {
        let failed = |source| DeviceError::Host { device: at.name.clone(), source };
        // A guest that lists a tree makes the server hold a descriptor for each file.
        imagefs::raise_descriptor_limit().map_err(failed)?;
        let limits = if at.late { Limits::of_a_further_server() } else { Limits::of_process() };
        let files = Arc::new(FileServer::new(limits).map_err(failed)?);
        let server: Arc<dyn virtio::fs::FsServer> = Arc::clone(&files) as _;
        let config = virtio::fs::FsConfig { tag: config.tag, threads: config.threads.into() };
        let device = Fs::new(config, server, &threads::confined(Role::Fs, &self.ends))
            .map_err(DeviceError::refused(&at.name))?;
        let slot = self.connect(at, device, Device::Fs)?;
        Ok(Slot { files: Some(files), ..slot })
    }

    /// Gives `device` its transport, registers, doorbells and interrupt.
    pub(super) fn connect<D: VirtioDevice + 'static>(
        &self,
        at: At,
        device: D,
        kind: fn(Shared<D>) -> Device,
    ) -> Result<Slot, DeviceError> {
        let failed = |source| DeviceError::Host { device: at.name.clone(), source };
        let (base, irq) = layout::virtio_slot(at.slot.into());
        let place = DevicePlace { base, size: layout::VIRTIO_MMIO_SIZE, irq };
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?);
        let interrupt: Arc<dyn IrqLine> = Arc::clone(&line) as _;
        let transport = MmioTransport::new(device, self.memory.clone(), interrupt).map_err(failed)?;
        self.wire(place, &line, transport.kicks())
            .map_err(|source| DeviceError::Kvm { device: at.name.clone(), source })?;
        let shared = Arc::new(Mutex::new(transport));
        let registers = Arc::new(Registers {
            transport: Arc::clone(&shared),
            status: Arc::clone(&self.status),
            late: at.late,
        });
        Ok(Slot { at, device: kind(shared), registers, place, line, files: None, shown: None })
    }

    fn wire(&self, place: DevicePlace, line: &EventFd, kicks: &[EventFd]) -> Result<(), KvmError> {
        self.kvm.register_irq(line, place.irq)?;
        for (done, (kick, at)) in kicks.iter().zip(doorbells(place)).enumerate() {
            if let Err(error) = self.kvm.register_kick(kick, at) {
                // KVM keeps a doorbell for as long as the VM is, unless it is told.
                self.unwire(place, line, &kicks[..done]);
                return Err(error);
            }
        }
        Ok(())
    }

    fn unwire(&self, place: DevicePlace, line: &EventFd, kicks: &[EventFd]) {
        let mut undone: Vec<_> =
            kicks.iter().zip(doorbells(place)).map(|(kick, at)| self.kvm.unregister_kick(kick, at)).collect();
        undone.push(self.kvm.unregister_irq(line, place.irq));
        for error in undone.into_iter().filter_map(Result::err) {
            log::error!("take a device out: {error}");
        }
    }

    /// Takes a device apart that no vCPU can reach any more. What the guest wrote to a disk is durable then. All
    /// descriptors are closed, all threads gone.
    pub(super) fn take_apart(&self, slot: Slot) -> Gone {
        let mut gone = Gone::default();
        with!(&slot.device, |transport| {
            self.unwire(slot.place, &slot.line, transport.kicks());
            // A guest that did not give the device up gets nothing of it any more.
            transport.reset();
        });
        if let Device::Blk(shared) = &slot.device
            && let Err(error) = lock(shared).device().flush()
        {
            gone.lost = Some(error.to_string());
        }
        if let Some(shown) = &slot.shown
            && let Err(error) = self.kvm.hide_files(slot.at.slot, shown)
        {
            // The guest may have it still, so nothing else may be put there.
            log::error!("take {} away: {error}", slot.at.name);
            shown.stay();
        }
        // The last there is of it.
        drop(slot);
        gone
    }
}

/// Where the doorbell of each queue is.
fn doorbells(place: DevicePlace) -> impl Iterator<Item = KickAddress> {
    (0u32..).map(move |value| KickAddress { gpa: place.base + registers::QUEUE_NOTIFY, value })
}

/// A transport as the bus sees it.
#[derive(Debug)]
struct Registers<D: VirtioDevice> {
    transport: Shared<D>,
    status: Arc<EventFd>,
    late: bool,
}

impl<D: VirtioDevice> BusDevice for Registers<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.transport).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.transport).write(offset, data);
        if offset != registers::STATUS && offset != registers::QUEUE_READY {
            return;
        }
        // A reset ends connections, which the owner is waiting to hear of; the owner of a device that came late waits to
        // hear of its driver.
        if self.late || D::ID == Vsock::ID && data.iter().all(|byte| *byte == 0) {
            // Fails only when the counter is full: then the main loop is woken anyway.
            let _ = self.status.write(1);
        }
    }
}
