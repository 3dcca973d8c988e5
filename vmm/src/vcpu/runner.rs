//! What a vCPU's thread does.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::exits::{self, End, ExitCounts};
use super::gate::{Gate, Phase, Wanted};
use super::{Maker, Surroundings};
use crate::kvm::{Entered, Kicker, KvmError, KvmVcpu};

/// What lives on a vCPU's thread.
#[derive(Debug)]
pub struct Runner {
    pub index: u8,
    pub tell: Sender<Result<Kicker, KvmError>>,
    pub gate: Arc<Gate>,
    pub counts: Arc<ExitCounts>,
    pub around: Surroundings,
}

/// Where a thread's vCPU comes from.
#[derive(Debug)]
pub enum Source {
    /// It is there.
    Made(KvmVcpu),
    /// It is made when it is wanted.
    Later(Maker),
}

impl Runner {
    /// The thread's life.
    pub fn live(self, source: Source) {
        let vcpu = match source {
            Source::Made(vcpu) => Some(vcpu),
            // Not confined before: a filter that lets vCPUs be made would let the guest's thread do it for ever.
            Source::Later(maker) => self.make(&maker),
        };
        match vcpu {
            Some(vcpu) => self.drive(vcpu),
            None => self.gate.enter(Phase::Finished),
        }
    }

    /// Waits until the vCPU is wanted, and makes it; `None` if it is never. What fails may be tried again.
    fn make(&self, maker: &Maker) -> Option<KvmVcpu> {
        loop {
            if self.gate.wait_to_leave() == Wanted::Finish {
                return None;
            }
            let made = (maker.0)(self.index).and_then(|vcpu| Ok((vcpu.kicker()?, vcpu)));
            // Nobody listens when the VM is ending.
            match made {
                Ok((kicker, vcpu)) => {
                    let _ = self.tell.send(Ok(kicker));
                    return Some(vcpu);
                }
                Err(error) => {
                    self.gate.want(Wanted::Pause);
                    self.gate.enter(Phase::Parked);
                    let _ = self.tell.send(Err(error));
                }
            }
        }
    }

    fn drive(&self, mut vcpu: KvmVcpu) {
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
                Phase::Running => self.running(&mut vcpu),
                Phase::Paused => {
                    let next = self.wait();
                    vcpu.tell_guest_it_was_paused();
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

    fn running(&self, vcpu: &mut KvmVcpu) -> Phase {
        loop {
            match vcpu.run() {
                Ok(Entered::Exit(exit)) => {
                    if let Some(end) = exits::answer(exit, &self.around, &self.counts) {
                        self.around.ends.report(self.describe(vcpu, end));
                        return Phase::Finished;
                    }
                }
                Ok(Entered::Kicked) => match self.gate.wanted() {
                    Wanted::Run => {}
                    Wanted::Pause => return Phase::Paused,
                    Wanted::Finish => return Phase::Finished,
                },
                Err(source) => {
                    self.around.ends.report(self.describe(vcpu, exits::run_error(&source)));
                    return Phase::Finished;
                }
            }
        }
    }

    /// Adds where the guest was, which the log of a failure is read for.
    fn describe(&self, vcpu: &KvmVcpu, ended: exits::Ended) -> End {
        let place = match vcpu.regs() {
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
