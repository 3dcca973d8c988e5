//! One VM: memory, vCPUs, devices. Owned, and changed, by the main thread alone; the others reach devices through the
//! buses.
//!
//! `builder` makes it, `lifecycle` says what is legal when, `change` makes it larger and smaller and has devices come and go,
//! `monitor` asks for it.

pub mod builder;
pub mod change;
pub mod lifecycle;
mod parts;
pub mod plugs;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::arch::x86_64::boot::{self, Initrd};
use crate::arch::x86_64::cpuid::Answers;
use crate::arch::x86_64::kernel::Kernel;
use crate::arch::x86_64::{layout, mptable};
use crate::bus::Bus;
use crate::config::cmdline_with_devices;
use crate::devices::Devices;
use crate::event_loop::EventLoop;
use crate::kvm::{KvmVcpu, KvmVm};
use crate::memory::GuestRam;
use crate::seccomp::{self, Role};
use crate::upcall::Channel;
use crate::vcpu::{Ends, Surroundings, Vcpus};
use builder::VmError;
use change::Changes;
use plugs::Pending;

/// What the guest's command line says of plugged memory: three quarters of it hold only what can be moved, and so can be
/// had back; a quarter is the kernel's, which needs the more of it the more there is. `docs/memory.md` has the figures.
const MEMORY_ONLINE_POLICY: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// A VM that has been configured.
#[derive(Debug)]
pub struct Vm {
    /// Keeps the VM alive; vCPUs that come later are made of it.
    kvm: Arc<KvmVm>,
    ram: GuestRam,
    kernel: Kernel,
    initrd: Option<Initrd>,
    cmdline: String,
    answers: Arc<Answers>,
    /// vCPUs that have no thread yet: all it boots with, until `boot`.
    made: Vec<KvmVcpu>,
    vcpus: Vcpus,
    ports: Bus,
    devices: Devices,
    ends: Arc<Ends>,
    channel: Channel,
    changes: Changes,
    /// Attaches and detaches that are not answered, by request.
    pending: BTreeMap<u64, Pending>,
}

impl Vm {
    /// Writes what the kernel finds in memory, and starts the vCPU threads, parked. From here on devices are added in another
    /// way.
    pub fn prepare(&mut self) -> Result<(), VmError> {
        let (count, max) = (self.made.len(), self.changes.possible().len());
        let mut words = Vec::new();
        if count < usize::from(max) {
            // The MP table lists all that can be, as a kernel cannot learn of more; those above wait to be onlined.
            words.push(format!("maxcpus={count}"));
        }
        if self.ram.hotplug().is_some() {
            words.push(MEMORY_ONLINE_POLICY.to_owned());
        }
        // First, as the kernel takes the last of two.
        words.push(self.cmdline.clone());
        let cmdline =
            cmdline_with_devices(&words.join(" "), &self.devices.places(), layout::VIRTIO_MMIO_SIZE)?;
        log::debug!("kernel command line: {cmdline}");
        boot::write_tables(&self.ram, &self.kernel, &cmdline, self.initrd);
        let (signature, features) = self.answers.signature();
        boot::write_mp_table(&self.ram, &mptable::build(max, signature, features));
        let around = Surroundings {
            ports: Arc::new(self.ports.clone()),
            mmio: Arc::new(self.devices.bus()?),
            ends: Arc::clone(&self.ends),
            confine: builder::confine_vcpu,
        };
        let maker = builder::vcpu_maker(&self.kvm, &self.answers);
        self.vcpus = Vcpus::spawn(std::mem::take(&mut self.made), max, &maker, &around)?;
        if self.devices.vsock().is_some() {
            // The guest can be told of devices that come later.
            self.devices.work_elsewhere().map_err(builder::host("start the thread that makes devices"))?;
        }
        // Last, as new threads inherit the filter: there are none from here on.
        seccomp::confine(Role::Vmm).map_err(VmError::Confine)
    }

    /// Lets the prepared vCPUs run.
    pub fn run(&self) {
        self.vcpus.run();
    }

    /// Stops vCPUs, then devices.
    pub fn pause(&mut self, events: &EventLoop) -> Result<(), VmError> {
        let paused = self
            .vcpus
            .pause()
            .map_err(VmError::from)
            .and_then(|()| self.devices.pause(events).map_err(builder::host("stop waiting for devices")));
        if paused.is_err() {
            // As it was: a pause is whole or not at all.
            self.vcpus.run();
        }
        paused
    }

    /// Lets devices, then vCPUs, go on.
    pub fn resume(&mut self, events: &EventLoop) -> Result<(), VmError> {
        self.devices.resume(events).map_err(builder::host("wait for devices"))?;
        self.vcpus.run();
        Ok(())
    }

    /// Devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// How the guest ended, if it did.
    pub fn ends(&self) -> &Arc<Ends> {
        &self.ends
    }

    /// vCPUs, for counters.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// Ends the guest. What it wrote to disks is durable then.
    pub fn stop(&mut self) -> Result<(), VmError> {
        let finished = self.vcpus.finish();
        // Whatever a vCPU does: the disks come first.
        self.devices.flush()?;
        Ok(finished?)
    }
}
