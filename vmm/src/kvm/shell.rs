//! A VM with nothing in it yet.

use std::io;
use std::thread::{self, JoinHandle};

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

/// A VM that the host is making.
#[derive(Debug)]
pub struct Coming(JoinHandle<Result<Shell, KvmError>>);

/// The thread waits in one ioctl.
const STACK: usize = 64 << 10;

impl Shell {
    /// Begins to make a VM on a thread of its own. Whatever it will be configured as, this is the longest part of its
    /// way, and nearly all of it waiting.
    pub fn begin() -> io::Result<Coming> {
        thread::Builder::new().name("kvm".to_owned()).stack_size(STACK).spawn(Shell::make).map(Coming)
    }

    /// Opens `/dev/kvm` and makes a VM. Most of that is waiting: KVM puts a kernel thread of its own into the caller's
    /// cgroups, for which the host lets a grace period pass (6 ms in exact time; 30 ms have been seen).
    pub fn make() -> Result<Self, KvmError> {
        let kvm = Kvm::open()?;
        Ok(Shell { vm: kvm.create_vm()?, cpuid: kvm.supported_cpuid()? })
    }
}

impl Coming {
    /// Waits until the VM is made.
    pub fn wait(self) -> Result<Shell, KvmError> {
        self.0.join().expect("making a VM does not panic")
    }
}
