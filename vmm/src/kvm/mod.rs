//! Everything said to KVM, and all the `unsafe` that needs.
//!
//! ```text
//! Shell { Kvm (/dev/kvm) ── create_vm ──> KvmVm } ── create_vcpu ──> KvmVcpu ── kicker ──> Kicker
//! ```
//!
//! The order of calls matters for the time a start takes: memory slots before the interrupt controller (a slot set
//! after it waits for a grace period of the host), no PIT, and no call whose result is KVM's default anyway.
//!
//! Not here: what the registers, tables and CPUID leaves hold (`arch`), and when vCPUs run (`vcpu`).

mod irq;
mod shell;
mod vcpu;

use std::io;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};

pub use irq::KickAddress;
pub use shell::{Coming, Shell};
pub use vcpu::{Entered, Kicker, KvmVcpu, register_kick_signal};

use crate::memory::{GuestRam, RamRange, Shown};

/// A call to KVM failed.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error("/dev/kvm is not there: load kvm-intel or kvm-amd, or enable virtualisation in the firmware")]
    Missing,
    /// It may not be opened.
    #[error("no permission to open /dev/kvm for reading and writing (uid {uid})")]
    Permission {
        /// Who tried.
        uid: u32,
    },
    /// It cannot be opened for another reason.
    #[error("open /dev/kvm")]
    Open(#[source] io::Error),
    /// The KVM of this host does not offer what the VMM is built on.
    #[error("this host's KVM lacks {what}")]
    Lacks {
        /// What is missing.
        what: &'static str,
    },
    /// A call failed.
    #[error("{call}")]
    Call {
        /// The ioctl and its important argument.
        call: String,
        /// What KVM said.
        #[source]
        source: io::Error,
    },
}

/// Names the ioctl a result belongs to.
trait Named<T> {
    fn named(self, call: impl Into<String>) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: impl Into<String>) -> Result<T, KvmError> {
        self.map_err(|e| KvmError::Call { call: call.into(), source: e.into() })
    }
}

/// Version of the KVM interface since Linux 2.6.22 (api.rst, 4.1 `KVM_GET_API_VERSION`).
const API_VERSION: i32 = 12;

/// Memory slots of files begin here; those of memory are fewer.
const FILE_SLOTS: u32 = 16;

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has what no VM of ours can do without.
    pub fn open() -> Result<Self, KvmError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Permission { uid: rustix::process::geteuid().as_raw() },
            _ => KvmError::Open(e.into()),
        })?;
        if fd.get_api_version() != API_VERSION {
            return Err(KvmError::Lacks { what: "version 12 of the KVM interface" });
        }
        // Whatever has these has the older ones too: irqfd, ioeventfd, the in-kernel interrupt controller.
        if !fd.check_extension(Cap::ImmediateExit) {
            return Err(KvmError::Lacks { what: "KVM_CAP_IMMEDIATE_EXIT (Linux 4.13)" });
        }
        if !fd.check_extension(Cap::TscDeadlineTimer) {
            return Err(KvmError::Lacks { what: "KVM_CAP_TSC_DEADLINE_TIMER" });
        }
        Ok(Kvm { fd })
    }

    /// The CPUID leaves that this host's KVM can show a guest (api.rst, 4.46 `KVM_GET_SUPPORTED_CPUID`).
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).named("KVM_GET_SUPPORTED_CPUID")
    }

    /// Makes a VM with nothing in it.
    pub fn create_vm(&self) -> Result<KvmVm, KvmError> {
        let fd = loop {
            match self.fd.create_vm() {
                // The host may have been waiting for a lock when a signal came.
                Err(e) if e.errno() == libc::EINTR => {}
                other => break other.named("KVM_CREATE_VM")?,
            }
        };
        Ok(KvmVm { fd })
    }
}

/// A VM as KVM sees it: slots of memory, interrupt controller, doorbells.
#[derive(Debug)]
pub struct KvmVm {
    fd: VmFd,
}

impl KvmVm {
    /// Shows the guest all of `ram`, one slot for each range and one for what comes and goes, all of which is accessible or not
    /// within its slot. Call it before [`KvmVm::create_irqchip`]. The mappings stay for as long as the VM is: `ram` keeps
    /// them and never unmaps.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), KvmError> {
        let hotplug = ram.hotplug().map(|hotplug| RamRange {
            gpa: hotplug.range().gpa,
            len: hotplug.range().len,
            host: hotplug.host(),
        });
        for (slot, range) in (0u32..).zip(ram.ranges().iter().chain(&hotplug)) {
            self.set_slot(slot, *range, 0)?;
        }
        Ok(())
    }

    /// Shows the guest files that it may read and not write (api.rst, 4.35: `KVM_MEM_READONLY`), while it runs or not. They stay mapped
    /// until [`KvmVm::hide_files`]. `device` is the slot of theirs among devices.
    pub fn show_files(&self, device: u16, shown: &Shown) -> Result<(), KvmError> {
        self.set_slot(FILE_SLOTS + u32::from(device), shown.place(), KVM_MEM_READONLY)
    }

    /// The contrary. The guest finds nothing there any more.
    pub fn hide_files(&self, device: u16, shown: &Shown) -> Result<(), KvmError> {
        // No length: no slot.
        self.set_slot(FILE_SLOTS + u32::from(device), RamRange { len: 0, ..shown.place() }, KVM_MEM_READONLY)
    }

    fn set_slot(&self, slot: u32, range: RamRange, flags: u32) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: range.host as u64,
        };
        // SAFETY: `range` lies in a mapping that `GuestRam` made, which stays reserved until the process ends, so the
        // guest can reach nothing else through the slot; the ranges of one `GuestRam` do not overlap.
        unsafe { self.fd.set_user_memory_region(region) }.named(format!(
            "KVM_SET_USER_MEMORY_REGION of {} MiB at {:#x}",
            range.len >> 20,
            range.gpa
        ))
    }

    /// Room KVM needs on Intel hosts for a task state segment, three pages below 4 GiB that the guest does not use
    /// (api.rst, 4.44 `KVM_SET_TSS_ADDR`). Call it before the first vCPU.
    pub fn set_tss_address(&self, gpa: u32) -> Result<(), KvmError> {
        self.fd.set_tss_address(gpa as usize).named("KVM_SET_TSS_ADDR")
    }

    /// Interrupt controllers in the kernel: two PICs, an IOAPIC of 24 pins, a local APIC for each vCPU.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().named("KVM_CREATE_IRQCHIP")
    }

    /// A vCPU whose id, and APIC id, is `index`.
    pub fn create_vcpu(&self, index: u8) -> Result<KvmVcpu, KvmError> {
        let fd = self.fd.create_vcpu(index.into()).named(format!("KVM_CREATE_VCPU {index}"))?;
        Ok(KvmVcpu::new(fd, self.fd.run_size()))
    }
}
