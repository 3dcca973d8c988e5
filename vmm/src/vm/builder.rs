//! How a VM is made: a recipe, read from top to bottom. The VM does not run at its end.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Vm;
use super::change::Changes;
use crate::arch::x86_64::boot::{Initrd, load_initrd};
use crate::arch::x86_64::cpuid::Answers;
use crate::arch::x86_64::kernel::{self, Kernel, KernelError};
use crate::arch::x86_64::{layout, msr, regs};
use crate::bus::{Bus, Overlap};
use crate::config::{ConfigError, ValidConfig};
use crate::devices::{DeviceError, Devices};
use crate::event_loop::{EventLoop, Token};
use crate::kvm::{self, Coming, KvmError, KvmVcpu, KvmVm, Shell};
use crate::legacy::i8042::I8042;
use crate::legacy::serial::Serial;
use crate::memory::{GuestRam, MemoryError};
use crate::seccomp::{self, Role};
use crate::upcall::Channel;
use crate::vcpu::{CpuSet, Ends, Maker, VcpuError, Vcpus};

/// A VM cannot be made, or driven.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// What was asked for is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel image.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// This host's KVM cannot be used.
    #[error(transparent)]
    NoKvm(KvmError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A system call filter.
    #[error("confine the main thread")]
    Confine(#[source] seccompiler::Error),
    /// Devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Two devices at one address: a defect of the layout.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// The host has no more of something small.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Makes a VM with its kernel loaded; its devices wait on `events`. `shell` is the empty VM, if one has been begun;
/// `made` is called when KVM's part exists.
pub fn build(
    events: &EventLoop,
    shell: Option<Coming>,
    config: ValidConfig,
    made: impl FnOnce(),
) -> Result<Vm, VmError> {
    let mut ram = GuestRam::map(&layout::ram_ranges(config.memory_bytes), config.backing, config.prefault)?;
    if config.hotplug_bytes > 0 {
        ram = ram.with_hotplug(layout::hotplug_range(config.memory_bytes, config.hotplug_bytes))?;
    }
    // While the host makes the VM.
    let loaded = load(&ram, &config);
    // A host without KVM is the first thing to put right.
    let Shell { vm, cpuid } = shell.map_or_else(Shell::make, Coming::wait).map_err(VmError::NoKvm)?;
    let (kernel, initrd) = loaded?;
    // Before the interrupt controller: a slot set after it waits for a grace period of the host.
    vm.map_ram(&ram)?;
    vm.set_tss_address(layout::TSS)?;
    vm.create_irqchip()?;
    let (vm, answers) = (Arc::new(vm), Arc::new(Answers::new(&cpuid, config.max_vcpus)));
    if config.images {
        let hotplug = ram.hotplug().map(|hotplug| hotplug.range());
        // Without, an image can be a disk all the same.
        if let Some(range) = layout::files_range(config.memory_bytes, hotplug, answers.address_bits()) {
            ram = ram.with_files(range)?;
        }
    }
    let vcpus = create_vcpus(&vm, &answers, config.vcpus)?;
    enter_kernel(&vcpus[0], &kernel)?;
    made();

    let ends = Arc::new(Ends::new().map_err(host("make an event"))?);
    events.add(ends.event(), Token::GuestEnd).map_err(host("wait for the guest's end"))?;
    let ports = legacy_ports(&vm, &ends, config.serial.map(File::from))?;
    let mut devices = Devices::new(events, &vm, &ram, &ends).map_err(host("make an event"))?;
    if config.images {
        devices.start_image_thread()?;
    }
    for disk in config.disks {
        devices.add_disk(events, disk)?;
    }
    for net in config.nets {
        devices.add_net(events, net)?;
    }
    if let Some(vsock) = &config.vsock {
        devices.add_vsock(events, vsock)?;
    }
    if let Some(fs) = config.fs {
        devices.add_fs(events, fs)?;
    }
    if let Some(console) = config.console {
        devices.add_console(events, console)?;
    }
    if config.rng {
        devices.add_rng(events)?;
    }
    if config.balloon {
        devices.add_balloon(events)?;
    }
    if let Some(hotplug) = ram.hotplug() {
        devices.add_mem(events, hotplug)?;
    }
    kvm::register_kick_signal().map_err(host("register the vCPU kick signal"))?;
    Ok(Vm {
        kvm: vm,
        ram,
        devices,
        kernel,
        initrd,
        cmdline: config.cmdline,
        answers,
        made: vcpus,
        vcpus: Vcpus::default(),
        ports,
        ends,
        channel: Channel::new(),
        pending: std::collections::BTreeMap::new(),
        changes: Changes::new(
            CpuSet::first(config.vcpus),
            CpuSet::first(config.max_vcpus),
            config.memory_bytes,
        ),
    })
}

fn load(ram: &GuestRam, config: &ValidConfig) -> Result<(Kernel, Option<Initrd>), VmError> {
    let kernel = kernel::load(ram, &config.kernel, config.pvh)?;
    let initrd = config.initrd.as_ref().map(|file| load_initrd(ram, &kernel, file)).transpose()?;
    Ok((kernel, initrd))
}

fn create_vcpus(vm: &KvmVm, answers: &Answers, count: u8) -> Result<Vec<KvmVcpu>, VmError> {
    (0..count).map(|index| Ok(create_vcpu(vm, answers, index)?)).collect()
}

fn create_vcpu(vm: &KvmVm, answers: &Answers, index: u8) -> Result<KvmVcpu, KvmError> {
    let vcpu = vm.create_vcpu(index)?;
    vcpu.set_cpuid(&answers.of_vcpu(index))?;
    vcpu.set_msrs(&msr::at_boot())?;
    Ok(vcpu)
}

/// Makes the vCPUs that come later.
pub(super) fn vcpu_maker(vm: &Arc<KvmVm>, answers: &Arc<Answers>) -> Maker {
    let (vm, answers) = (Arc::clone(vm), Arc::clone(answers));
    Maker(Arc::new(move |index| {
        let vcpu = create_vcpu(&vm, &answers, index)?;
        vcpu.announce()?;
        Ok(vcpu)
    }))
}

/// Puts the boot CPU at the kernel's entry. The others stay as reset left them, waiting for INIT and SIPI.
fn enter_kernel(boot_cpu: &KvmVcpu, kernel: &Kernel) -> Result<(), VmError> {
    let mut sregs = boot_cpu.sregs()?;
    let mut general = Default::default();
    regs::enter(&kernel.entry, &mut sregs, &mut general);
    boot_cpu.set_sregs(&sregs)?;
    boot_cpu.set_regs(&general)?;
    Ok(())
}

fn legacy_ports(vm: &KvmVm, ends: &Arc<Ends>, serial: Option<File>) -> Result<Bus, VmError> {
    let mut ports = Bus::default();
    ports.insert(layout::I8042_PORT.into(), I8042::PORTS, Arc::new(I8042::new(Arc::clone(ends))))?;
    if let Some(output) = serial {
        let line = EventFd::new(EFD_NONBLOCK).map_err(host("make an event"))?;
        vm.register_irq(&line, layout::SERIAL_IRQ)?;
        ports.insert(layout::SERIAL_PORT.into(), Serial::PORTS, Arc::new(Serial::new(output, line)))?;
    }
    Ok(ports)
}

/// First thing on each vCPU thread.
pub(super) fn confine_vcpu() -> Result<(), String> {
    seccomp::confine(Role::Vcpu).map_err(|e| format!("install the system call filter: {e}"))
}

/// Names what was tried when the host says no.
pub fn host(what: &'static str) -> impl Fn(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}
