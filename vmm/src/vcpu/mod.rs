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
//!
//! A vCPU that the VM does not boot with has its thread from the start, asleep and with nothing made: threads inherit the
//! filter of who makes them, and the main thread's, once it is confined, has no system call for one. The thread makes its
//! vCPU when it is first wanted. A vCPU that the guest gave up is paused and stays, as KVM cannot take one away.

mod exits;
mod gate;
mod runner;
mod set;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub use exits::{End, Ends, ExitCounts};
use gate::{Gate, Phase, Wanted};
use runner::{Runner, Source};
pub use set::CpuSet;

use crate::bus::Bus;
use crate::kvm::{Kicker, KvmError, KvmVcpu};

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
    /// It could not be made when it was wanted.
    #[error("make vCPU {index}: {detail}")]
    Make {
        /// Which.
        index: u8,
        /// What KVM said.
        detail: String,
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

/// Makes a vCPU when it is wanted, on its own thread.
#[derive(Clone)]
pub struct Maker(pub Arc<dyn Fn(u8) -> Result<KvmVcpu, KvmError> + Send + Sync>);

impl fmt::Debug for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Maker")
    }
}

/// All vCPUs of a VM, driven by the main thread.
#[derive(Debug, Default)]
pub struct Vcpus {
    threads: Vec<VcpuThread>,
    /// Those that run when the VM does.
    active: CpuSet,
}

#[derive(Debug)]
struct VcpuThread {
    index: u8,
    gate: Arc<Gate>,
    counts: Arc<ExitCounts>,
    /// `None` until it is made.
    kicker: Option<Kicker>,
    made: Receiver<Result<Kicker, KvmError>>,
    thread: JoinHandle<()>,
}

impl Vcpus {
    /// Starts a parked thread for each of `vcpus`, in order, and for each of those that `maker` may have to make, up to
    /// `max` in all.
    pub fn spawn(
        vcpus: Vec<KvmVcpu>,
        max: u8,
        maker: &Maker,
        around: &Surroundings,
    ) -> Result<Self, VcpuError> {
        let active = CpuSet::first(u8::try_from(vcpus.len()).expect("at most 32"));
        let later = (0..).map(|_| Source::Later(maker.clone()));
        let sources = vcpus.into_iter().map(Source::Made).chain(later);
        let threads = (0..max).zip(sources).map(|(index, source)| VcpuThread::spawn(index, source, around));
        Ok(Vcpus { threads: threads.collect::<Result<_, _>>()?, active })
    }

    /// Lets all run that are active, from `Parked` or `Paused`.
    pub fn run(&self) {
        for vcpu in self.threads.iter().filter(|vcpu| self.active.has(vcpu.index)) {
            vcpu.run();
        }
    }

    /// From now on these run too; on a running VM at once, where they wait for the guest to wake them. All or none.
    pub fn start(&mut self, set: CpuSet) -> Result<(), VcpuError> {
        let begun: Vec<_> = set.iter().collect();
        // All begin first: making one waits for the host.
        for index in &begun {
            self.threads[usize::from(*index)].run();
        }
        self.active = self.active.and(set);
        // All are waited for, as one that is there can be stopped only by what it brings.
        let made = begun.iter().map(|index| self.threads[usize::from(*index)].wait_until_made());
        let made = made.fold(Ok(()), Result::and);
        if made.is_err()
            && let Err(error) = self.park(set)
        {
            log::error!("{error}");
        }
        made
    }

    /// From now on these rest.
    pub fn park(&mut self, set: CpuSet) -> Result<(), VcpuError> {
        self.active = self.active.without(set);
        self.stop(set, Wanted::Pause)
    }

    /// Stops all between two instructions. Returns when they have.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.stop(self.active, Wanted::Pause)
    }

    /// Ends all threads. Returns when no guest code runs any more.
    pub fn finish(&self) -> Result<(), VcpuError> {
        self.stop(CpuSet::first(u8::MAX), Wanted::Finish)
    }

    fn stop(&self, set: CpuSet, wanted: Wanted) -> Result<(), VcpuError> {
        let set = || self.threads.iter().filter(|vcpu| set.has(vcpu.index));
        // All are told first, so that they stop at nearly the same time.
        for vcpu in set() {
            vcpu.gate.want(wanted);
            if let Some(kicker) = &vcpu.kicker {
                kicker.kick(&vcpu.thread);
            }
        }
        for vcpu in set() {
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

impl VcpuThread {
    fn spawn(index: u8, source: Source, around: &Surroundings) -> Result<Self, VcpuError> {
        let kicker = match &source {
            Source::Made(vcpu) => Some(vcpu.kicker().map_err(|source| VcpuError::Prepare { index, source })?),
            Source::Later(_) => None,
        };
        let (gate, counts) = (Arc::<Gate>::default(), Arc::<ExitCounts>::default());
        let (tell, made) = mpsc::channel();
        let runner = Runner {
            index,
            tell,
            gate: Arc::clone(&gate),
            counts: Arc::clone(&counts),
            around: around.clone(),
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || runner.live(source))
            .map_err(|source| VcpuError::Spawn { index, source })?;
        Ok(VcpuThread { index, gate, counts, kicker, made, thread })
    }

    fn run(&self) {
        if let Some(kicker) = &self.kicker {
            kicker.release();
        }
        self.gate.want(Wanted::Run);
    }

    fn wait_until_made(&mut self) -> Result<(), VcpuError> {
        if self.kicker.is_some() {
            return Ok(());
        }
        let failed = |detail| VcpuError::Make { index: self.index, detail };
        match self.made.recv_timeout(KICK_PATIENCE) {
            Ok(Ok(kicker)) => self.kicker = Some(kicker),
            Ok(Err(error)) => return Err(failed(chain(&error))),
            Err(_) => return Err(failed(format!("nothing after {KICK_PATIENCE:?}"))),
        }
        Ok(())
    }
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |e| e.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
