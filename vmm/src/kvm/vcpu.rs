//! One vCPU, and the means to get it out of the guest.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, Msrs, kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{KvmError, Named};

/// A vCPU. Belongs to one thread at a time: KVM wants its ioctls from the thread that runs it.
#[derive(Debug)]
pub struct KvmVcpu {
    fd: VcpuFd,
    run_size: usize,
}

/// How `KVM_RUN` came back.
#[derive(Debug)]
pub enum Entered<'a> {
    /// The guest did something that user space has to answer.
    Exit(VcpuExit<'a>),
    /// Somebody wants the vCPU's attention. What the guest had begun, KVM has finished.
    Kicked,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, run_size: usize) -> Self {
        KvmVcpu { fd, run_size }
    }

    /// What the guest sees by the CPUID instruction. Once, before the first run.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).named("KVM_SET_CPUID2")
    }

    /// Sets all of `msrs`.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<(), KvmError> {
        let wanted = msrs.as_slice();
        let set = self.fd.set_msrs(msrs).named("KVM_SET_MSRS")?;
        match wanted.get(set) {
            None => Ok(()),
            // KVM stops at the first it refuses and says how many it took (api.rst, 4.19 `KVM_SET_MSRS`).
            Some(refused) => {
                let source = io::Error::from_raw_os_error(libc::EINVAL);
                Err(KvmError::Call { call: format!("KVM_SET_MSRS of {:#x}", refused.index), source })
            }
        }
    }

    /// Lets interrupts find a vCPU that is made while others run. KVM looks receivers up in a map by APIC id, which it draws
    /// anew as a vCPU's APIC is reset: that is before the vCPU is one of the VM's. Setting the APIC's state, to what it is,
    /// has it draw the map once more; else the INIT that is to wake the vCPU may get lost.
    pub fn announce(&self) -> Result<(), KvmError> {
        let lapic = self.fd.get_lapic().named("KVM_GET_LAPIC")?;
        self.fd.set_lapic(&lapic).named("KVM_SET_LAPIC")
    }

    /// Segment, control and descriptor-table registers.
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().named("KVM_GET_SREGS")
    }

    /// Sets what [`KvmVcpu::sregs`] gives.
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).named("KVM_SET_SREGS")
    }

    /// General registers, instruction pointer, flags.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().named("KVM_GET_REGS")
    }

    /// Sets what [`KvmVcpu::regs`] gives.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).named("KVM_SET_REGS")
    }

    /// Tells a guest that uses kvmclock that it was stopped, so that it does not take the gap for a soft lockup
    /// (api.rst, 4.71 `KVM_KVMCLOCK_CTRL`).
    pub fn tell_guest_it_was_paused(&self) {
        // EINVAL: this guest has not set up kvmclock, and needs no telling.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until it wants something or is kicked. The last exit's answer is delivered on entry.
    pub fn run(&mut self) -> io::Result<Entered<'_>> {
        match self.fd.run() {
            Ok(exit) => Ok(Entered::Exit(exit)),
            Err(e) if e.errno() == libc::EINTR => Ok(Entered::Kicked),
            // KVM could not take the lock of an interrupt in time; nothing happened.
            Err(e) if e.errno() == libc::EAGAIN => Ok(Entered::Kicked),
            Err(e) => Err(e.into()),
        }
    }

    /// What gets this vCPU out of the guest from another thread.
    pub fn kicker(&self) -> Result<Kicker, KvmError> {
        Kicker::map(&self.fd, self.run_size)
            .map_err(|source| KvmError::Call { call: "mmap of a vCPU's run page".to_owned(), source })
    }
}

/// Gets one vCPU out of the guest, or keeps it from entering.
///
/// Why a mapping of its own: `immediate_exit` is written by the main thread while the vCPU's thread has the
/// [`VcpuFd`] exclusively. The flag alone misses a vCPU that is in the guest; the signal alone misses one that is
/// about to enter. With the flag set first, one of the two always works (api.rst, 5, `immediate_exit`).
#[derive(Debug)]
pub struct Kicker {
    page: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the page is only touched through an `AtomicU8`, from any thread.
unsafe impl Send for Kicker {}

impl Kicker {
    fn map(fd: &VcpuFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice; `len` is the size KVM gave for it
        // (api.rst, 4.5 `KVM_GET_VCPU_MMAP_SIZE`). It holds its own reference to the vCPU's file.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Kicker { page: NonNull::new(page).expect("mmap does not return null"), len })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let flag = self.page.as_ptr().wrapping_byte_add(std::mem::offset_of!(kvm_run, immediate_exit));
        // SAFETY: the flag is one byte inside the mapping, which lives as long as `self`. This process writes it
        // only through this atomic; KVM reads it once an entry, which any value survives.
        unsafe { AtomicU8::from_ptr(flag.cast()) }
    }

    /// Makes every `run` of the vCPU on `thread` come back as [`Entered::Kicked`], the present one too, until
    /// [`Kicker::release`].
    pub fn kick<T>(&self, thread: &JoinHandle<T>) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        // Fails only for a thread that has ended, which is out of the guest.
        let _ = thread.kill(kick_signal());
    }

    /// Lets the vCPU enter the guest again.
    pub fn release(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Drop for Kicker {
    fn drop(&mut self) {
        // SAFETY: made by `map` with this length, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr(), self.len) };
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Being delivered is all a kick has to do: it ends the ioctl.
}

/// Gives the kick signal a handler that does nothing, since its default would end the process. Once, before the
/// first vCPU.
pub fn register_kick_signal() -> io::Result<()> {
    register_signal_handler(kick_signal(), on_kick).map_err(Into::into)
}
