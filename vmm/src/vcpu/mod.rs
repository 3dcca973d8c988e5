//! vCPU threads: each owns one vCPU and does nothing but run it and hand its exits to the buses.
//!
//! ```text
//!            run              pause
//! Parked ─────────> Running <────────> Paused        any state ── finish ──> Finished
//!                      │       run
//!                      └── the guest ended (reset, failure) ──> Finished
//! ```
//!
//! The main thread wants a state, kicks, and waits until each thread says it is there. A thread leaves `Running` only
//! where `KVM_RUN` came back with nothing pending: KVM has then finished the guest's last port or memory access, so
//! a paused vCPU is between two instructions.

mod exits;
mod gate;

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use exits::{End, Ends, ExitCounts};
use gate::{Gate, Phase, Wanted};

use crate::bus::Bus;
use crate::kvm::{Entered, Kicker, KvmError, KvmVcpu};

/// A vCPU thread needs little: no recursion, no buffers on the stack.
const STACK: usize = 128 << 10;
/// A kicked vCPU leaves the guest in microseconds. A thread that does not is stuck in a device or in the host.
const KICK_PATIENCE: Duration = Duration::from_secs(5);

/// A vCPU thread did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The host did not start it.
    #[error("start the thread of vCPU {index}")]
    Spawn {
        /// Which.
        index: u8,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// KVM did not let it be kicked.
    #[error("prepare vCPU {index}")]
    Prepare {
        /// Which.
        index: u8,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// It is still running.
    #[error("vCPU {index} did not stop within {KICK_PATIENCE:?}")]
    Stuck {
        /// Which.
        index: u8,
    },
}

/// What all vCPU threads share.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Where the end of the guest is reported.
    pub ends: Arc<Ends>,
    /// Called first on each thread: installs its system call filter.
    pub confine: fn() -> Result<(), String>,
}

/// All vCPUs of a VM, driven by the main thread.
#[derive(Debug, Default)]
pub struct Vcpus {
    threads: Vec<VcpuThread>,
}

#[derive(Debug)]
struct VcpuThread {
    index: u8,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    kicker: Kicker,
    thread: JoinHandle<()>,
}

impl Vcpus {
    /// Starts a parked thread for each of `vcpus`, in order.
    pub fn spawn(vcpus: Vec<KvmVcpu>, around: &Surroundings) -> Result<Self, VcpuError> {
        let mut threads = Vec::with_capacity(vcpus.len());
        for (index, vcpu) in (0u8..).zip(vcpus) {
            let kicker = vcpu.kicker().map_err(|source| VcpuError::Prepare { index, source })?;
            let gate = Arc::<Gate>::default();
            let counts = Arc::<ExitCounts>::default();
            let runner = Runner {
                index,
                vcpu,
                gate: Arc::clone(&gate),
                counts: Arc::clone(&counts),
                around: around.clone(),
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || runner.live())
                .map_err(|source| VcpuError::Spawn { index, source })?;
            threads.push(VcpuThread { index, gate, counts, kicker, thread });
        }
        Ok(Vcpus { threads })
    }

    /// Lets all run, from `Parked` or `Paused`.
    pub fn run(&self) {
        for vcpu in &self.threads {
            vcpu.kicker.release();
            vcpu.gate.want(Wanted::Run);
        }
    }

    /// Stops all between two instructions. Returns when they have.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.stop(Wanted::Pause)
    }

    /// Ends all threads. Returns when no guest code runs any more.
    pub fn finish(&self) -> Result<(), VcpuError> {
        self.stop(Wanted::Finish)
    }

    fn stop(&self, wanted: Wanted) -> Result<(), VcpuError> {
        // All are told first, so that they stop at nearly the same time.
        for vcpu in &self.threads {
            vcpu.gate.want(wanted);
            vcpu.kicker.kick(&vcpu.thread);
        }
        for vcpu in &self.threads {
            let stopped = vcpu.gate.wait(KICK_PATIENCE, |phase| match wanted {
                Wanted::Finish => phase == Phase::Finished,
                _ => phase != Phase::Running,
            });
            if !stopped {
                return Err(VcpuError::Stuck { index: vcpu.index });
            }
        }
        Ok(())
    }

    /// Exits to user space, by kind, of each vCPU.
    pub fn exit_counts(&self) -> impl Iterator<Item = [(&'static str, u64); 5]> {
        self.threads.iter().map(|vcpu| vcpu.counts.snapshot())
    }
}

/// What lives on a vCPU's thread.
#[derive(Debug)]
struct Runner {
    index: u8,
    vcpu: KvmVcpu,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    around: Surroundings,
}

impl Runner {
    fn live(mut self) {
        if let Err(detail) = (self.around.confine)() {
            self.around.ends.report(End::Failed { vcpu: self.index, detail });
            self.gate.enter(Phase::Finished);
            return;
        }
        let mut phase = Phase::Parked;
        while phase != Phase::Finished {
            self.gate.enter(phase);
            phase = match phase {
                Phase::Parked | Phase::Finished => self.wait(),
                Phase::Running => self.running(),
                Phase::Paused => {
                    let next = self.wait();
                    self.vcpu.tell_guest_it_was_paused();
                    next
                }
            };
        }
        self.gate.enter(Phase::Finished);
    }

    fn wait(&self) -> Phase {
        match self.gate.wait_to_leave() {
            Wanted::Finish => Phase::Finished,
            Wanted::Run | Wanted::Pause => Phase::Running,
        }
    }

    fn running(&mut self) -> Phase {
        loop {
            match self.vcpu.run() {
                Ok(Entered::Exit(exit)) => {
                    if let Some(end) = exits::answer(exit, &self.around, &self.counts) {
                        self.around.ends.report(self.describe(end));
                        return Phase::Finished;
                    }
                }
                Ok(Entered::Kicked) => match self.gate.wanted() {
                    Wanted::Run => {}
                    Wanted::Pause => return Phase::Paused,
                    Wanted::Finish => return Phase::Finished,
                },
                Err(source) => {
                    let detail = format!("KVM_RUN: {source}");
                    self.around.ends.report(self.describe(exits::Ended::Failed(detail)));
                    return Phase::Finished;
                }
            }
        }
    }

    /// Adds where the guest was, which the log of a failure is read for.
    fn describe(&self, ended: exits::Ended) -> End {
        let place = match self.vcpu.regs() {
            Ok(regs) => format!("rip {:#x} rsp {:#x} rflags {:#x}", regs.rip, regs.rsp, regs.rflags),
            Err(e) => format!("registers unknown: {e}"),
        };
        match ended {
            exits::Ended::Reset => {
                log::debug!("vcpu{}: reset at {place}", self.index);
                End::Reset
            }
            exits::Ended::Failed(what) => {
                End::Failed { vcpu: self.index, detail: format!("{what} at {place}") }
            }
        }
    }
}
