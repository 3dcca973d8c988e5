//! One VM: memory, vCPUs, devices. Owned, and changed, by the main thread alone; the others reach devices through the
//! buses.
//!
//! `builder` makes it, `lifecycle` says what is legal when, `monitor` asks for it.

pub mod builder;
pub mod lifecycle;

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
use crate::vcpu::{Ends, Surroundings, Vcpus};
use builder::VmError;

/// A VM that has been configured.
#[derive(Debug)]
pub struct Vm {
    /// Keeps the VM alive; doorbells and interrupts of new devices are registered with it.
    kvm: KvmVm,
    ram: GuestRam,
    kernel: Kernel,
    initrd: Option<Initrd>,
    cmdline: String,
    answers: Answers,
    /// vCPUs that have no thread yet: all of them until `boot`.
    made: Vec<KvmVcpu>,
    vcpus: Vcpus,
    ports: Bus,
    devices: Devices,
    ends: Arc<Ends>,
}

impl Vm {
    /// Writes what the kernel finds in memory, and starts the vCPU threads, parked. From here on no device is added.
    pub fn prepare(&mut self) -> Result<(), VmError> {
        let cmdline = cmdline_with_devices(&self.cmdline, &self.devices.places(), layout::VIRTIO_MMIO_SIZE)?;
        log::debug!("kernel command line: {cmdline}");
        boot::write_tables(&self.ram, &self.kernel, &cmdline, self.initrd);
        let (signature, features) = self.answers.signature();
        let vcpus = u8::try_from(self.made.len()).expect("at most 32");
        boot::write_mp_table(&self.ram, &mptable::build(vcpus, signature, features));
        let around = Surroundings {
            ports: Arc::new(self.ports.clone()),
            mmio: Arc::new(self.devices.bus()?),
            ends: Arc::clone(&self.ends),
            confine: builder::confine_vcpu,
        };
        self.vcpus = Vcpus::spawn(std::mem::take(&mut self.made), &around)?;
        Ok(())
    }

    /// Lets the prepared vCPUs run.
    pub fn run(&self) {
        self.vcpus.run();
    }

    /// Stops vCPUs, then devices.
    pub fn pause(&mut self, events: &EventLoop) -> Result<(), VmError> {
        self.vcpus.pause()?;
        self.devices.pause(events).map_err(builder::host("stop waiting for devices"))
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

    /// Ends the VM.
    pub fn stop(&mut self) -> Result<(), VmError> {
        Ok(self.vcpus.finish()?)
    }
}
