//! The devices of a VM: a closed set, each behind a virtio-mmio transport in a slot of its own.
//!
//! A vCPU reaches a device's registers through the MMIO bus, under the transport's lock; that happens while a driver
//! sets up. Notifications come to the main loop as events and interrupts leave as events, so work takes the lock
//! uncontended. The file system device has threads of its own and its queues never wake the main loop.

mod blocks;
mod fs_threads;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use imagefs::{FileServer, Limits};
use virtio::balloon::Balloon;
use virtio::blk::{self, Blk};
use virtio::console::Console;
use virtio::device::VirtioDevice;
use virtio::fs::Fs;
use virtio::irq::IrqLine;
use virtio::mem::{Mem, MemConfig};
use virtio::mmio::{MmioTransport, registers};
use virtio::net::{Net, Taps};
use virtio::rng::Rng;
use virtio::vsock::{Vsock, VsockEvent};
use vmm_api::VsockConfig;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config;
use crate::event_loop::{EventLoop, Token};
use crate::kvm::{KickAddress, KvmError, KvmVm};
use crate::memory::{GivesBack, GuestRam, Hotplug};
use crate::upcall;
use crate::vcpu::Ends;

/// A device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// All slots are taken.
    #[error("no slot left for {device}: a VM has {}", layout::VIRTIO_SLOTS)]
    Slots {
        /// Device.
        device: String,
    },
    /// The host has no descriptors left, or the like.
    #[error("make {device}")]
    Host {
        /// Device.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// KVM did not take its doorbells or its interrupt.
    #[error("connect {device}")]
    Kvm {
        /// Device.
        device: String,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// What the guest wrote may be lost.
    #[error("flush {device}")]
    Flush {
        /// Device.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The device refuses what it was given.
    #[error("make {device}")]
    Refused {
        /// Device.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DeviceError {
    fn refused<E: std::error::Error + Send + Sync + 'static>(device: &str) -> impl Fn(E) -> Self {
        move |source| DeviceError::Refused { device: device.to_owned(), source: Box::new(source) }
    }
}

/// A device with its transport.
type Shared<D> = Arc<Mutex<MmioTransport<D>>>;

/// What a device is.
#[derive(Debug, Clone)]
enum Device {
    Blk(Shared<Blk>),
    Net(Shared<Net>),
    Vsock(Shared<Vsock>),
    Fs(Shared<Fs>),
    Console(Shared<Console>),
    Rng(Shared<Rng>),
    Balloon(Shared<Balloon>),
    Mem(Shared<Mem>),
}

/// Does the same with whatever device it is.
macro_rules! with {
    ($device:expr, |$transport:ident| $body:expr) => {
        match $device {
            Device::Blk(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Net(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Vsock(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Fs(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Console(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Rng(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Balloon(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
            Device::Mem(shared) => {
                let $transport = &mut *lock(shared);
                $body
            }
        }
    };
}

/// Devices that are to stand still while a block of memory goes: all but the memory device, which takes it away.
type Bystanders = Arc<Mutex<Vec<Device>>>;

/// Does `task` while nothing holds a slice of guest memory on behalf of `devices`: their transports are locked, and their
/// threads wait between two requests. False if one would not in time; then `task` was not done.
fn while_still(devices: &[Device], task: &mut dyn FnMut()) -> bool {
    let Some((first, others)) = devices.split_first() else {
        task();
        return true;
    };
    with!(first, |transport| transport
        .device_mut()
        .while_still(|| while_still(others, task))
        .unwrap_or(false))
}

fn lock<D: VirtioDevice>(shared: &Shared<D>) -> MutexGuard<'_, MmioTransport<D>> {
    shared.lock().expect("a panic ends the process before anyone else takes the lock")
}

#[derive(Debug)]
struct Slot {
    /// For counters: `vsock`, `blk0`, …
    name: String,
    device: Device,
    registers: Arc<dyn BusDevice>,
    gpa: u64,
    irq: u32,
}

/// What a device is put into.
#[derive(Debug, Clone, Copy)]
pub struct Host<'a> {
    /// For doorbells and interrupts.
    pub kvm: &'a KvmVm,
    /// For queues and backends.
    pub events: &'a EventLoop,
    /// What the devices work on.
    pub ram: &'a GuestRam,
}

/// All devices, by slot.
#[derive(Debug)]
pub struct Devices {
    slots: Vec<Slot>,
    /// Raised when a driver has reset the socket device.
    status: Arc<EventFd>,
    files: Option<Arc<FileServer>>,
    bystanders: Bystanders,
}

impl Devices {
    /// No devices.
    pub fn new(events: &EventLoop) -> io::Result<Self> {
        let status = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        events.add(&*status, Token::DeviceReset)?;
        Ok(Devices { slots: vec![], status, files: None, bystanders: Bystanders::default() })
    }

    /// Adds a disk: the guest's next `vdX`.
    pub fn add_disk(&mut self, host: Host<'_>, disk: config::Disk) -> Result<(), DeviceError> {
        let name = format!("blk{}", self.disks());
        let config::Disk { file, read_only, id, queues } = disk;
        let disk = blk::Disk::new(file, read_only, &id).map_err(DeviceError::refused(&name))?;
        self.add(host, &name, Blk::new(disk, queues.into()), Device::Blk)
    }

    /// Number of disks.
    pub fn disks(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.device, Device::Blk(_))).count()
    }

    /// Makes what the guest wrote to its disks durable. Tries all, and gives the first error.
    pub fn flush(&self) -> Result<(), DeviceError> {
        let mut flushed = Ok(());
        for slot in &self.slots {
            if let Device::Blk(shared) = &slot.device
                && let Err(source) = lock(shared).device().flush()
            {
                flushed = flushed.and(Err(DeviceError::Flush { device: slot.name.clone(), source }));
            }
        }
        flushed
    }

    /// Adds a network device: the guest's next `ethX`.
    pub fn add_net(&mut self, host: Host<'_>, net: config::Net) -> Result<(), DeviceError> {
        let nets = self.slots.iter().filter(|slot| matches!(slot.device, Device::Net(_))).count();
        let name = format!("net{nets}");
        let taps = Taps::new(net.taps).map_err(DeviceError::refused(&name))?;
        self.add(host, &name, Net::new(taps, net.mac, net.mtu), Device::Net)
    }

    /// Adds a socket device.
    pub fn add_vsock(&mut self, host: Host<'_>, config: &VsockConfig) -> Result<(), DeviceError> {
        // The upcall channel's port is served here, unless the owner serves it.
        let mut ports = config.ports.clone();
        if !ports.contains(&upcall::abi::PORT) {
            ports.push(upcall::abi::PORT);
        }
        let device = Vsock::new(config.cid, &ports).map_err(DeviceError::refused("vsock"))?;
        self.add(host, "vsock", device, Device::Vsock)
    }

    /// Adds a file share with nothing mounted. Its threads are started, and confine themselves.
    pub fn add_fs(
        &mut self,
        host: Host<'_>,
        config: vmm_api::FsConfig,
        ends: &Arc<Ends>,
    ) -> Result<(), DeviceError> {
        let refused = |source| DeviceError::Host { device: "fs".to_owned(), source };
        // A guest that lists a tree makes the server hold a descriptor for each file.
        imagefs::raise_descriptor_limit().map_err(refused)?;
        let files = Arc::new(FileServer::new(Limits::of_process()).map_err(refused)?);
        let server: Arc<dyn virtio::fs::FsServer> = Arc::clone(&files) as _;
        let config = virtio::fs::FsConfig { tag: config.tag, threads: config.threads.into() };
        let device =
            Fs::new(config, server, &fs_threads::confined(ends)).map_err(DeviceError::refused("fs"))?;
        self.files = Some(files);
        self.add(host, "fs", device, Device::Fs)
    }

    /// Adds a console.
    pub fn add_console(&mut self, host: Host<'_>, config: config::Console) -> Result<(), DeviceError> {
        let device = Console::new(config.output, config.input).map_err(DeviceError::refused("console"))?;
        self.add(host, "console", device, Device::Console)
    }

    /// Adds a source of entropy.
    pub fn add_rng(&mut self, host: Host<'_>) -> Result<(), DeviceError> {
        self.add(host, "rng", Rng::new(), Device::Rng)
    }

    /// Adds a balloon.
    pub fn add_balloon(&mut self, host: Host<'_>) -> Result<(), DeviceError> {
        self.add(host, "balloon", Balloon::new(Box::new(GivesBack)), Device::Balloon)
    }

    /// Adds a region of memory that comes and goes.
    pub fn add_mem(&mut self, host: Host<'_>, hotplug: &Arc<Hotplug>) -> Result<(), DeviceError> {
        let range = hotplug.range();
        let config = MemConfig { addr: range.gpa, most: range.most, step: range.step };
        let backend = blocks::HostBlocks::new(Arc::clone(hotplug), Arc::clone(&self.bystanders));
        let device = Mem::new(config, Arc::clone(hotplug.blocks()), Box::new(backend));
        self.add(host, "mem", device, Device::Mem)
    }

    fn add<D: VirtioDevice + 'static>(
        &mut self,
        host: Host<'_>,
        name: &str,
        device: D,
        kind: fn(Shared<D>) -> Device,
    ) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Host { device: name.to_owned(), source };
        let kvm = |source| DeviceError::Kvm { device: name.to_owned(), source };
        let slot = u16::try_from(self.slots.len()).expect("checked below, each time");
        if u32::from(slot) >= layout::VIRTIO_SLOTS {
            return Err(DeviceError::Slots { device: name.to_owned() });
        }
        let (gpa, irq) = layout::virtio_slot(slot.into());

        let line = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        host.kvm.register_irq(&line, irq).map_err(kvm)?;
        let line: Arc<dyn IrqLine> = Arc::new(line);
        let transport = MmioTransport::new(device, host.ram.memory().clone(), line).map_err(failed)?;
        for (queue, kick) in (0u16..).zip(transport.kicks()) {
            let at = KickAddress { gpa: gpa + registers::QUEUE_NOTIFY, value: queue.into() };
            host.kvm.register_kick(kick, at).map_err(kvm)?;
            if !D::OWN_THREADS {
                host.events.add(kick, Token::Queue { slot, queue }).map_err(failed)?;
            }
        }
        if let Some(backend) = transport.backend() {
            host.events.add(&backend, Token::Backend { slot }).map_err(failed)?;
        }
        let shared = Arc::new(Mutex::new(transport));
        let registers =
            Arc::new(Registers { transport: Arc::clone(&shared), status: Arc::clone(&self.status) });
        let device = kind(shared);
        if D::ID != Mem::ID {
            self.bystanders.lock().expect("nothing panics under this lock").push(device.clone());
        }
        self.slots.push(Slot { name: name.to_owned(), device, registers, gpa, irq });
        Ok(())
    }

    /// Address and interrupt of each device, in the order in which the guest shall find them.
    pub fn places(&self) -> Vec<(u64, u32)> {
        self.slots.iter().map(|slot| (slot.gpa, slot.irq)).collect()
    }

    /// The MMIO bus with all devices' registers.
    pub fn bus(&self) -> Result<Bus, Overlap> {
        let mut bus = Bus::default();
        for slot in &self.slots {
            bus.insert(slot.gpa, layout::VIRTIO_MMIO_SIZE, Arc::clone(&slot.registers))?;
        }
        Ok(bus)
    }

    /// The guest notified a queue.
    pub fn on_queue(&self, slot: u16, queue: u16) {
        if let Some(slot) = self.slots.get(usize::from(slot)) {
            with!(&slot.device, |transport| transport.on_queue(queue.into()));
        }
    }

    /// A backend is ready.
    pub fn on_backend(&self, slot: u16) {
        if let Some(slot) = self.slots.get(usize::from(slot)) {
            with!(&slot.device, |transport| transport.on_backend());
        }
    }

    /// A driver reset the socket device: takes the event back. What follows from it is for the caller to look for.
    pub fn on_reset(&self) {
        // Empty when a call was spurious.
        let _ = self.status.read();
    }

    /// The socket device.
    pub fn vsock(&self) -> Option<MutexGuard<'_, MmioTransport<Vsock>>> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Device::Vsock(shared) => Some(lock(shared)),
            _ => None,
        })
    }

    /// The memory that comes and goes, and the address of its registers.
    pub fn mem(&self) -> Option<(u64, MutexGuard<'_, MmioTransport<Mem>>)> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Device::Mem(shared) => Some((slot.gpa, lock(shared))),
            _ => None,
        })
    }

    /// The balloon.
    pub fn balloon(&self) -> Option<MutexGuard<'_, MmioTransport<Balloon>>> {
        self.slots.iter().find_map(|slot| match &slot.device {
            Device::Balloon(shared) => Some(lock(shared)),
            _ => None,
        })
    }

    /// What happened to connections since the last call.
    pub fn take_vsock_events(&self) -> Vec<VsockEvent> {
        self.vsock().map(|mut transport| transport.device_mut().take_events()).unwrap_or_default()
    }

    /// The file server.
    pub fn files(&self) -> Option<&FileServer> {
        self.files.as_deref()
    }

    /// What the guest wrote last on its console, and whether its kernel panicked. Takes what still lies in the
    /// console's queue first.
    pub fn last_words(&self) -> Option<(String, bool)> {
        const TRANSMIT: usize = 1;
        self.slots.iter().find_map(|slot| match &slot.device {
            Device::Console(shared) => {
                let mut transport = lock(shared);
                transport.on_queue(TRANSMIT);
                let console = transport.device();
                Some((String::from_utf8_lossy(&console.last_words()).into_owned(), console.panicked()))
            }
            _ => None,
        })
    }

    /// Stops all devices between two requests. vCPUs are stopped already.
    pub fn pause(&self, events: &EventLoop) -> io::Result<()> {
        for slot in &self.slots {
            with!(&slot.device, |transport| {
                if let Some(backend) = transport.backend() {
                    events.remove(&backend)?;
                }
                transport.pause();
            });
        }
        Ok(())
    }

    /// Lets all devices go on.
    pub fn resume(&self, events: &EventLoop) -> io::Result<()> {
        for (index, slot) in (0u16..).zip(&self.slots) {
            with!(&slot.device, |transport| {
                transport.resume();
                if let Some(backend) = transport.backend() {
                    events.add(&backend, Token::Backend { slot: index })?;
                }
            });
        }
        Ok(())
    }

    /// Name and counters of each device.
    pub fn metrics(&self) -> impl Iterator<Item = (&str, Vec<(&'static str, u64)>)> {
        self.slots
            .iter()
            .map(|slot| (slot.name.as_str(), with!(&slot.device, |transport| transport.metrics())))
    }
}

/// A transport as the bus sees it.
#[derive(Debug)]
struct Registers<D: VirtioDevice> {
    transport: Shared<D>,
    status: Arc<EventFd>,
}

impl<D: VirtioDevice> BusDevice for Registers<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.transport).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(&self.transport).write(offset, data);
        // A reset ends connections, which the owner is waiting to hear of.
        if D::ID == Vsock::ID && offset == registers::STATUS && data.iter().all(|byte| *byte == 0) {
            // Fails only when the counter is full: then the main loop is woken anyway.
            let _ = self.status.write(1);
        }
    }
}
