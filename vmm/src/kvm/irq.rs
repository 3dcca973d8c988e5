//! Doorbells and interrupts that bypass this process: ioeventfd and irqfd.

use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, KvmVm, Named};

/// Where a guest's write rings a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KickAddress {
    /// Guest physical address of a 32-bit register.
    pub gpa: u64,
    /// Only this value rings.
    pub value: u32,
}

impl KvmVm {
    /// Raises `event` when the guest writes `at.value` at `at.gpa`, with no exit to user space (api.rst, 4.59
    /// `KVM_IOEVENTFD`).
    pub fn register_kick(&self, event: &EventFd, at: KickAddress) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(at.gpa), at.value)
            .named(format!("KVM_IOEVENTFD at {:#x} for value {}", at.gpa, at.value))
    }

    /// Interrupts the guest at pin `gsi` of the IOAPIC when `event` is raised (api.rst, 4.75 `KVM_IRQFD`).
    pub fn register_irq(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).named(format!("KVM_IRQFD for interrupt {gsi}"))
    }

    /// Takes back what [`KvmVm::register_kick`] did, with the same event.
    pub fn unregister_kick(&self, event: &EventFd, at: KickAddress) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(at.gpa), at.value)
            .named(format!("KVM_IOEVENTFD, taken back, at {:#x} for value {}", at.gpa, at.value))
    }

    /// Takes back what [`KvmVm::register_irq`] did, with the same event. No interrupt comes of it any more when it returns.
    pub fn unregister_irq(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.unregister_irqfd(event, gsi).named(format!("KVM_IRQFD, taken back, for interrupt {gsi}"))
    }
}
