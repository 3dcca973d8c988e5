//! A VM with nothing in it yet.

use kvm_bindings::CpuId;

use super::{Kvm, KvmError, KvmVm};

/// What the host gives whatever the VM will be made of.
#[derive(Debug)]
pub struct Shell {
    /// The VM.
    pub vm: KvmVm,
    /// What KVM can show a guest by CPUID.
    pub cpuid: CpuId,
}

impl Shell {
    /// Opens `/dev/kvm` and makes a VM. Most of that is waiting: KVM puts a kernel thread of its own into the caller's
    /// cgroups, for which the host lets a grace period pass (6 ms in exact time; 30 ms have been seen).
    pub fn make() -> Result<Self, KvmError> {
        let kvm = Kvm::open()?;
        Ok(Shell { vm: kvm.create_vm()?, cpuid: kvm.supported_cpuid()? })
    }
}
