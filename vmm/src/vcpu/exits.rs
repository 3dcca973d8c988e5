//! What a guest's exit means.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VcpuExit;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Surroundings;

/// How the guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It reset itself.
    Reset,
    /// A vCPU cannot go on.
    Failed {
        /// Which.
        vcpu: u8,
        /// Why, and where the guest was.
        detail: String,
    },
    /// A thread of a device is gone, and the device with it.
    ThreadDied {
        /// Its name.
        name: String,
    },
}

/// Where whoever sees the guest end says so. The first end counts; the main thread waits on the event.
#[derive(Debug)]
pub struct Ends {
    first: OnceLock<End>,
    event: EventFd,
}

impl Ends {
    /// Nothing has ended yet.
    pub fn new() -> io::Result<Self> {
        Ok(Ends { first: OnceLock::new(), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// The guest ended.
    pub fn report(&self, end: End) {
        // A second end is a consequence of the first.
        let _ = self.first.set(end);
        // Fails only when the counter is full: then the main thread is woken anyway.
        let _ = self.event.write(1);
    }

    /// How it ended, if it did.
    pub fn get(&self) -> Option<&End> {
        self.first.get()
    }

    /// Readable once the guest has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Exits of one vCPU to user space, by kind.
#[derive(Debug, Default)]
pub struct ExitCounts {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    other: AtomicU64,
}

impl ExitCounts {
    /// Name and count of each kind.
    pub fn snapshot(&self) -> [(&'static str, u64); 5] {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("io_in", of(&self.io_in)),
            ("io_out", of(&self.io_out)),
            ("mmio_read", of(&self.mmio_read)),
            ("mmio_write", of(&self.mmio_write)),
            ("other", of(&self.other)),
        ]
    }
}

/// What ended the guest, as KVM told it.
#[derive(Debug)]
pub(super) enum Ended {
    Reset,
    Failed(String),
}

/// Carries out what the guest wants; `Some` when it cannot go on.
pub(super) fn answer(exit: VcpuExit<'_>, around: &Surroundings, counts: &ExitCounts) -> Option<Ended> {
    let count = |kind: &AtomicU64| kind.fetch_add(1, Ordering::Relaxed);
    match exit {
        VcpuExit::MmioWrite(gpa, data) => {
            count(&counts.mmio_write);
            if !around.mmio.write(gpa, data) {
                log::debug!("guest wrote {} bytes at {gpa:#x}, where nothing is", data.len());
            }
            None
        }
        VcpuExit::MmioRead(gpa, data) => {
            count(&counts.mmio_read);
            if !around.mmio.read(gpa, data) {
                log::debug!("guest read {} bytes at {gpa:#x}, where nothing is", data.len());
            }
            None
        }
        VcpuExit::IoOut(port, data) => {
            count(&counts.io_out);
            around.ports.write(port.into(), data);
            None
        }
        VcpuExit::IoIn(port, data) => {
            count(&counts.io_in);
            around.ports.read(port.into(), data);
            None
        }
        other => {
            count(&counts.other);
            end_of(&other)
        }
    }
}

/// Told from a reset, which kernels do by the keyboard controller when asked to (`reboot=k`): a guest that falls into
/// this before its console works says nothing else.
const TRIPLE_FAULT: &str = "triple fault (or a reset by one: this VMM wants `reboot=k`)";

fn end_of(exit: &VcpuExit<'_>) -> Option<Ended> {
    match exit {
        VcpuExit::Shutdown => Some(Ended::Failed(TRIPLE_FAULT.to_owned())),
        VcpuExit::SystemEvent(kind, _) => Some(system_event(*kind)),
        VcpuExit::FailEntry(reason, cpu) => Some(Ended::Failed(format!(
            "hardware refused to enter the guest on CPU {cpu}: reason {reason:#x}"
        ))),
        VcpuExit::InternalError => {
            Some(Ended::Failed("KVM internal error (an instruction it cannot emulate)".to_owned()))
        }
        // Only without an in-kernel local APIC.
        VcpuExit::Hlt => Some(Ended::Failed("halted with no interrupt controller".to_owned())),
        VcpuExit::MemoryFault { gpa, .. } => Some(Ended::Failed(no_memory(Some(*gpa)))),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => None,
        other => Some(Ended::Failed(format!("unexpected exit {other:?}"))),
    }
}

/// What an error of `KVM_RUN` means.
pub(super) fn run_error(error: &io::Error) -> Ended {
    Ended::Failed(match error.raw_os_error() {
        Some(libc::EFAULT) => no_memory(None),
        _ => format!("KVM_RUN: {error}"),
    })
}

/// KVM found nothing behind an address of the guest's memory. Older kernels do not say which address it was.
fn no_memory(gpa: Option<u64>) -> String {
    let place = gpa.map(|gpa| format!(" at {gpa:#x}")).unwrap_or_default();
    format!("the guest touched memory{place} that is not plugged in (or that the host could not give)")
}

fn system_event(kind: u32) -> Ended {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_RESET | kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Ended::Reset,
        kind => Ended::Failed(format!("KVM system event {kind}")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::Bus;

    fn around() -> Surroundings {
        Surroundings {
            ports: Arc::new(Bus::default()),
            mmio: Arc::new(Bus::default()),
            ends: Arc::new(Ends::new().unwrap()),
            confine: || Ok(()),
        }
    }

    #[test]
    fn exits_are_counted_by_kind_and_unclaimed_reads_are_ones() {
        let (around, counts) = (around(), ExitCounts::default());
        let mut data = [0; 2];
        assert!(answer(VcpuExit::IoIn(0x60, &mut data), &around, &counts).is_none());
        assert_eq!(data, [0xff; 2]);
        assert!(answer(VcpuExit::MmioWrite(0xd000_0000, &[1]), &around, &counts).is_none());
        assert!(matches!(answer(VcpuExit::Shutdown, &around, &counts), Some(Ended::Failed(_))));
        assert!(matches!(answer(VcpuExit::InternalError, &around, &counts), Some(Ended::Failed(_))));
        assert_eq!(
            counts.snapshot(),
            [("io_in", 1), ("io_out", 0), ("mmio_read", 0), ("mmio_write", 1), ("other", 2)]
        );
    }

    #[test]
    fn memory_that_is_not_there_is_said_with_its_address_where_kvm_has_it() {
        let (around, counts) = (around(), ExitCounts::default());
        let fault = VcpuExit::MemoryFault { flags: 0, gpa: 0x1_0020_0000, size: 4096 };
        let Some(Ended::Failed(said)) = answer(fault, &around, &counts) else { panic!("it goes on") };
        assert!(said.starts_with("the guest touched memory at 0x100200000 that is not plugged in"), "{said}");
        let Ended::Failed(said) = run_error(&io::Error::from_raw_os_error(libc::EFAULT)) else { panic!() };
        assert!(said.starts_with("the guest touched memory that is not plugged in"), "{said}");
        let Ended::Failed(said) = run_error(&io::Error::from_raw_os_error(libc::EIO)) else { panic!() };
        assert!(said.starts_with("KVM_RUN: "), "{said}");
    }

    #[test]
    fn the_first_end_counts() {
        let ends = Ends::new().unwrap();
        assert_eq!(ends.get(), None);
        ends.report(End::Reset);
        ends.report(End::Failed { vcpu: 0, detail: String::new() });
        assert_eq!(ends.get(), Some(&End::Reset));
        assert_eq!(ends.event().read().unwrap(), 2);
    }
}
