//! The devices of a VM: a closed set, each behind a virtio-mmio transport in a slot of its own.
//!
//! A vCPU reaches a device's registers through the MMIO bus, under the transport's lock; that happens while a driver
//! sets up. Notifications come to the main loop as events and interrupts leave as events, so work takes the lock
//! uncontended. The file system device and the disks of images have threads of their own, and their queues never wake the
//! main loop.
//!
//! Devices come before the guest runs, or later: then a thread that is confined for just that makes them ([`worker`]), the same
//! way ([`make`]).

mod blocks;
mod device;
mod error;
mod images;
mod make;
mod threads;
mod window;
mod worker;

use std::io;
use std::sync::{Arc, MutexGuard};

use imagefs::FileServer;
pub use images::ChannelError as ImageChannelError;
use virtio::balloon::Balloon;
use virtio::console::Console;
use virtio::device::VirtioDevice;
use virtio::mem::{Mem, MemConfig};
use virtio::mmio::MmioTransport;
use virtio::rng::Rng;
use virtio::vsock::{Vsock, VsockEvent};
use vmm_api::config::{MAX_DISKS, MAX_NETS, MAX_SHARES};
use vmm_api::{DeviceName, VsockConfig};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::arch::x86_64::layout;
use crate::bus::{Bus, Overlap};
use crate::config;
use crate::event_loop::{EventLoop, Token};
use crate::kvm::KvmVm;
use crate::memory::{GivesBack, GuestRam, Hotplug};
use crate::upcall::{self, DevicePlace};
use crate::vcpu::Ends;
use crate::vm::change::Gone;
use device::{Bystanders, Device, Shared, lock, unwatch, watch, with};
pub use error::DeviceError;
pub use make::Host;
use make::{At, Slot};
use window::Window;
use worker::Worker;

/// Names a device for as long as the VM lives: what was its slot may be another's later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceKey(pub u64);

/// All devices, by slot.
#[derive(Debug)]
pub struct Devices {
    slots: Vec<Option<Slot>>,
    host: Host,
    window: Arc<Window>,
    /// Makes them once the main thread is confined.
    worker: Option<Worker>,
    next_key: u64,
    /// The share that [`vmm_api::VmConfig::fs`] asked for.
    first_share: Option<DeviceKey>,
    bystanders: Bystanders,
}

impl Devices {
    /// No devices.
    pub fn new(events: &EventLoop, kvm: &Arc<KvmVm>, ram: &GuestRam, ends: &Arc<Ends>) -> io::Result<Self> {
        let status = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        events.add(&*status, Token::DeviceStatus)?;
        let host = Host {
            kvm: Arc::clone(kvm),
            memory: ram.memory().clone(),
            ends: Arc::clone(ends),
            status,
            images: None,
            files: ram.files().cloned(),
        };
        Ok(Devices {
            slots: (0..layout::VIRTIO_SLOTS).map(|_| None).collect(),
            host,
            window: Arc::new(Window::new()),
            worker: None,
            next_key: 0,
            first_share: None,
            bystanders: Bystanders::default(),
        })
    }

    /// From now on devices are made elsewhere. To be called before the main thread is confined.
    pub fn work_elsewhere(&mut self) -> io::Result<()> {
        self.worker = Some(Worker::spawn(&self.host.ends)?);
        Ok(())
    }

    /// Adds what the owner asks for.
    pub fn add_new(&mut self, events: &EventLoop, new: config::NewDevice) -> Result<DeviceKey, DeviceError> {
        match new {
            config::NewDevice::Disk(disk) => self.add_disk(events, disk),
            config::NewDevice::Net(net) => self.add_net(events, net),
            config::NewDevice::Fs(fs) => self.add_fs(events, fs),
        }
    }

    /// Adds a disk: the guest's next `vdX`, or, an image that is memory, its next `pmemN`.
    pub fn add_disk(&mut self, events: &EventLoop, disk: config::Disk) -> Result<DeviceKey, DeviceError> {
        let kind = if disk.image.as_ref().is_some_and(|image| image.dax) { "pmem" } else { "blk" };
        let at = self.find_place(kind, Some(MAX_DISKS), Some(DeviceName::Disk(disk.id.clone())))?;
        self.add(events, move |host| host.disk(at, disk))
    }

    /// Makes what the guest wrote to its disks durable. Tries all, and gives the first error.
    pub fn flush(&self) -> Result<(), DeviceError> {
        let mut flushed = Ok(());
        for slot in self.slots() {
            if let Device::Blk(shared) = &slot.device
                && let Err(source) = lock(shared).device().flush()
            {
                flushed = flushed.and(Err(DeviceError::Flush { device: slot.at.name.clone(), source }));
            }
        }
        flushed
    }

    /// Adds a network device: the guest's next `ethX`.
    pub fn add_net(&mut self, events: &EventLoop, net: config::Net) -> Result<DeviceKey, DeviceError> {
        let at = self.find_place("net", Some(MAX_NETS), Some(DeviceName::Net(net.mac)))?;
        self.add(events, move |host| host.net(at, net))
    }

    /// Adds a share with nothing mounted. The first one added before the guest runs is that of the configuration.
    pub fn add_fs(
        &mut self,
        events: &EventLoop,
        config: vmm_api::FsConfig,
    ) -> Result<DeviceKey, DeviceError> {
        let at = self.find_place("fs", Some(MAX_SHARES), Some(DeviceName::Fs(config.tag.clone())))?;
        let late = at.late;
        let key = self.add(events, move |host| host.fs(at, config))?;
        if !late && self.first_share.is_none() {
            self.first_share = Some(key);
        }
        Ok(key)
    }

    /// Adds a socket device.
    pub fn add_vsock(&mut self, events: &EventLoop, config: &VsockConfig) -> Result<(), DeviceError> {
        // The upcall channel's port is served here, unless the owner serves it.
        let mut ports = config.ports.clone();
        if !ports.contains(&upcall::abi::PORT) {
            ports.push(upcall::abi::PORT);
        }
        let device = Vsock::new(config.cid, &ports).map_err(DeviceError::refused("vsock"))?;
        self.add_own(events, "vsock", device, Device::Vsock)
    }

    /// Adds a console.
    pub fn add_console(&mut self, events: &EventLoop, config: config::Console) -> Result<(), DeviceError> {
        let device = Console::new(config.output, config.input).map_err(DeviceError::refused("console"))?;
        self.add_own(events, "console", device, Device::Console)
    }

    /// Adds a source of entropy.
    pub fn add_rng(&mut self, events: &EventLoop) -> Result<(), DeviceError> {
        self.add_own(events, "rng", Rng::new(), Device::Rng)
    }

    /// Adds a balloon.
    pub fn add_balloon(&mut self, events: &EventLoop) -> Result<(), DeviceError> {
        self.add_own(events, "balloon", Balloon::new(Box::new(GivesBack)), Device::Balloon)
    }

    /// Adds a region of memory that comes and goes.
    pub fn add_mem(&mut self, events: &EventLoop, hotplug: &Arc<Hotplug>) -> Result<(), DeviceError> {
        let range = hotplug.range();
        let config = MemConfig { addr: range.gpa, most: range.most, step: range.step };
        let backend = blocks::HostBlocks::new(Arc::clone(hotplug), Arc::clone(&self.bystanders));
        let device = Mem::new(config, Arc::clone(hotplug.blocks()), Box::new(backend));
        self.add_own(events, "mem", device, Device::Mem)
    }

    /// Adds a device that a VM has once, or not.
    fn add_own<D: VirtioDevice + 'static>(
        &mut self,
        events: &EventLoop,
        name: &str,
        device: D,
        kind: fn(Shared<D>) -> Device,
    ) -> Result<(), DeviceError> {
        let at = self.find_place(name, None, None)?;
        self.add(events, move |host| host.connect(at, device, kind)).map(|_| ())
    }

    /// A free slot, for a device of a kind of which there may be `most`, if they are numbered.
    fn find_place(
        &mut self,
        kind: &str,
        most: Option<usize>,
        title: Option<DeviceName>,
    ) -> Result<At, DeviceError> {
        let names: Vec<_> = self.slots().map(|slot| &slot.at.name).collect();
        let name = match most {
            // A VM has one share, as a rule.
            Some(_) if kind == "fs" && !names.iter().any(|name| *name == kind) => kind.to_owned(),
            Some(most) => {
                let mut numbered = (0..).map(|n| format!("{kind}{n}"));
                let count = 1 + names.iter().filter(|name| name.starts_with(kind)).count();
                if count > most {
                    let device = title.map_or(kind.to_owned(), |title| title.to_string());
                    return Err(DeviceError::Kind { device, count, most });
                }
                numbered.find(|name| !names.contains(&name)).expect("there are more numbers than names")
            }
            None => kind.to_owned(),
        };
        let slot = self.slots.iter().position(Option::is_none);
        let Some(slot) = slot else { return Err(DeviceError::Slots { device: name }) };
        let slot = u16::try_from(slot).expect("there are 19");
        self.next_key += 1;
        Ok(At { key: DeviceKey(self.next_key), slot, name, title, late: self.worker.is_some() })
    }

    fn add(
        &mut self,
        events: &EventLoop,
        make: impl FnOnce(&Host) -> Result<Slot, DeviceError> + Send + 'static,
    ) -> Result<DeviceKey, DeviceError> {
        let host = self.host.clone();
        let slot = self.elsewhere(move || make(&host))?;
        let (key, index) = (slot.at.key, slot.at.slot);
        if let Err(source) = watch(events, &slot) {
            let device = slot.at.name.clone();
            self.withdraw(&slot);
            self.take_apart(slot);
            return Err(DeviceError::Host { device, source });
        }
        self.window.put(index, Some(Arc::clone(&slot.registers)));
        self.slots[usize::from(index)] = Some(slot);
        self.note_bystanders();
        Ok(key)
    }

    /// Takes a device out; nothing of it is left. The guest does not use it, or is cut off from it. `None` if there is no
    /// such device.
    pub fn remove(&mut self, events: &EventLoop, key: DeviceKey) -> Option<Gone> {
        let slot = self.slots.iter_mut().find_map(|slot| slot.take_if(|slot| slot.at.key == key))?;
        // From here on no vCPU is at it.
        self.window.put(slot.at.slot, None);
        self.note_bystanders();
        // One that is not waited for, as the VM is paused, is no error.
        let _ = unwatch(events, &slot);
        self.withdraw(&slot);
        Some(self.take_apart(slot))
    }

    fn take_apart(&self, slot: Slot) -> Gone {
        let host = self.host.clone();
        self.elsewhere(move || host.take_apart(slot))
    }

    /// Does `task` where it may be done.
    fn elsewhere<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        match &self.worker {
            Some(worker) => worker.run(task),
            None => task(),
        }
    }

    /// Which devices are there has changed.
    fn note_bystanders(&self) {
        let others = self.slots().filter(|slot| !matches!(slot.device, Device::Mem(_)));
        let others = others.map(|slot| slot.device.clone()).collect();
        *self.bystanders.lock().expect("nothing panics under this lock") = others;
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter().flatten()
    }

    fn slot(&self, index: u16) -> Option<&Slot> {
        self.slots.get(usize::from(index))?.as_ref()
    }

    fn by_key(&self, key: DeviceKey) -> Option<&Slot> {
        self.slots().find(|slot| slot.at.key == key)
    }

    /// The device of this name.
    pub fn find(&self, name: &DeviceName) -> Option<DeviceKey> {
        self.slots().find(|slot| slot.at.title.as_ref() == Some(name)).map(|slot| slot.at.key)
    }

    /// The name of a device.
    pub fn name(&self, key: DeviceKey) -> Option<&DeviceName> {
        self.by_key(key)?.at.title.as_ref()
    }

    /// Slot and place of a device.
    pub fn place(&self, key: DeviceKey) -> Option<(u16, DevicePlace)> {
        self.by_key(key).map(|slot| (slot.at.slot, slot.place))
    }

    /// The status register of a device; 0 if it is gone.
    pub fn driver_status(&self, key: DeviceKey) -> u32 {
        self.by_key(key).map_or(0, |slot| with!(&slot.device, |transport| transport.status()))
    }

    /// Address and interrupt of each device, in the order in which the guest shall find them.
    pub fn places(&self) -> Vec<(u64, u32)> {
        self.slots().map(|slot| (slot.place.base, slot.place.irq)).collect()
    }

    /// The MMIO bus with the window behind which all devices are, those that come later included.
    pub fn bus(&self) -> Result<Bus, Overlap> {
        let mut bus = Bus::default();
        bus.insert(Window::BASE, Window::LEN, Arc::clone(&self.window) as _)?;
        if let Some(files) = &self.host.files {
            // Where the guest may not write, and where nothing is.
            bus.insert(files.range().gpa, files.range().len, Arc::clone(files) as _)?;
        }
        Ok(bus)
    }

    /// The guest notified a queue.
    pub fn on_queue(&self, slot: u16, queue: u16) {
        if let Some(slot) = self.slot(slot) {
            with!(&slot.device, |transport| transport.on_queue(queue.into()));
        }
    }

    /// A backend is ready.
    pub fn on_backend(&self, slot: u16) {
        if let Some(slot) = self.slot(slot) {
            with!(&slot.device, |transport| transport.on_backend());
        }
    }

    /// A driver changed a status: takes the event back. What follows from it is for the caller to look for.
    pub fn on_status(&self) {
        // Empty when a call was spurious.
        let _ = self.host.status.read();
    }

    /// The socket device.
    pub fn vsock(&self) -> Option<MutexGuard<'_, MmioTransport<Vsock>>> {
        self.slots().find_map(|slot| match &slot.device {
            Device::Vsock(shared) => Some(lock(shared)),
            _ => None,
        })
    }

    /// The memory that comes and goes, and the address of its registers.
    pub fn mem(&self) -> Option<(u64, MutexGuard<'_, MmioTransport<Mem>>)> {
        self.slots().find_map(|slot| match &slot.device {
            Device::Mem(shared) => Some((slot.place.base, lock(shared))),
            _ => None,
        })
    }

    /// The balloon.
    pub fn balloon(&self) -> Option<MutexGuard<'_, MmioTransport<Balloon>>> {
        self.slots().find_map(|slot| match &slot.device {
            Device::Balloon(shared) => Some(lock(shared)),
            _ => None,
        })
    }

    /// What happened to connections since the last call.
    pub fn take_vsock_events(&self) -> Vec<VsockEvent> {
        self.vsock().map(|mut transport| transport.device_mut().take_events()).unwrap_or_default()
    }

    /// The files of a share: of that with this tag, or of the configuration's.
    pub fn files(&self, tag: Option<&str>) -> Option<&FileServer> {
        let wanted = match tag {
            Some(tag) => self.find(&DeviceName::Fs(tag.to_owned())),
            None => self.first_share,
        };
        self.by_key(wanted?)?.files.as_deref()
    }

    /// What the guest wrote last on its console, and whether its kernel panicked. Takes what still lies in the
    /// console's queue first.
    pub fn last_words(&self) -> Option<(String, bool)> {
        const TRANSMIT: usize = 1;
        self.slots().find_map(|slot| match &slot.device {
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
        for slot in self.slots() {
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
        for slot in self.slots() {
            with!(&slot.device, |transport| {
                transport.resume();
                if let Some(backend) = transport.backend() {
                    events.add(&backend, Token::Backend { slot: slot.at.slot })?;
                }
            });
        }
        Ok(())
    }

    /// Name and counters of each device.
    pub fn metrics(&self) -> impl Iterator<Item = (&str, Vec<(&'static str, u64)>)> {
        self.slots().map(|slot| (slot.at.name.as_str(), with!(&slot.device, |transport| transport.metrics())))
    }
}
