//! A VM with nothing in it, made while the main thread does something else.
//!
//! Why: `KVM_CREATE_VM` puts a kernel thread of its own into the caller's cgroups, for which the host waits for a grace
//! period: 6 ms in exact time of which nearly all is waiting, and 30 ms have been seen. The configuration is read and
//! the kernel loaded meanwhile.

use std::thread::{self, JoinHandle};

use kvm_bindings::CpuId;

use super::{Kvm, KvmError, KvmVm};

/// Two ioctls deep.
const STACK: usize = 64 << 10;

/// What the host gives before it is known what the VM is made of.
#[derive(Debug)]
pub struct Shell {
    /// The VM.
    pub vm: KvmVm,
    /// What KVM can show a guest by CPUID.
    pub cpuid: CpuId,
}

impl Shell {
    /// Opens `/dev/kvm` and makes a VM, here and now.
    pub fn make() -> Result<Self, KvmError> {
        let kvm = Kvm::open()?;
        Ok(Shell { vm: kvm.create_vm()?, cpuid: kvm.supported_cpuid()? })
    }
}

/// A shell that is being made.
#[derive(Debug)]
pub struct Making(Option<JoinHandle<Result<Shell, KvmError>>>);

impl Making {
    /// Begins, on a thread of its own.
    pub fn begin() -> Self {
        // Without a thread it is made when it is asked for.
        Making(thread::Builder::new().name("kvm".to_owned()).stack_size(STACK).spawn(Shell::make).ok())
    }

    /// Waits for it. Asked again, makes another one: the first may have been used up, or something put right.
    pub fn take(&mut self) -> Result<Shell, KvmError> {
        match self.0.take() {
            Some(thread) => thread.join().expect("making a shell does not panic"),
            None => Shell::make(),
        }
    }
}
