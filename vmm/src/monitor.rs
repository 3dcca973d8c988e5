//! The main loop: one thread owns the control socket, the VM and its devices, and carries out one thing at a time.
//!
//! ```text
//! control socket ──> Op ── legal? (vm::lifecycle) ──> Vm ──> reply
//! vCPU threads   ──> the guest ended ──> ExitReason
//! ```

use std::os::fd::OwnedFd;
use std::time::Duration;

use vmm_api::{ApiError, ErrorCode, Event, ExitReason, Op, Reply, Request, Stats, Timeline, VmConfig};

use crate::clock::monotonic_us;
use crate::config::{ConfigError, ValidConfig};
use crate::control::{Control, Incoming};
use crate::event_loop::{EventLoop, Interest, Token};
use crate::kvm::{Kvm, KvmError};
use crate::vcpu::End;
use crate::vm::Vm;
use crate::vm::builder::{self, VmError};
use crate::vm::lifecycle::{self, Permit, State};

/// How long the owner may take over the last packets.
const LAST_PACKETS: Duration = Duration::from_secs(1);

/// What ended the main loop.
#[derive(Debug)]
pub enum Outcome {
    /// The VM came to its end.
    Ended(ExitReason),
    /// The owner left before there was a VM, after this was in its way.
    NeverStarted(VmError),
}

/// The process' state.
#[derive(Debug)]
pub struct Monitor {
    control: Control,
    events: EventLoop,
    kvm: Result<Kvm, KvmError>,
    state: State,
    vm: Option<Vm>,
    timeline: Timeline,
    /// Why the last `Configure` failed.
    refused: Option<VmError>,
}

type Answer = Result<(Reply, Vec<OwnedFd>), ApiError>;

fn done() -> Answer {
    Ok((Reply::Done, vec![]))
}

impl Monitor {
    /// A monitor without a VM. `main_us` is when the process began.
    pub fn new(socket: OwnedFd, kvm: Result<Kvm, KvmError>, main_us: u64) -> std::io::Result<Self> {
        let control = Control::new(socket)?;
        let events = EventLoop::new()?;
        events.add(&control, Token::Control)?;
        let timeline = Timeline { main_us, ..Timeline::default() };
        Ok(Monitor { control, events, kvm, state: State::Created, vm: None, timeline, refused: None })
    }

    /// Serves until the VM is at its end, and says so to the owner.
    pub fn run(mut self) -> Outcome {
        let reason = self.serve();
        let reason = self.end(reason);
        if let (ExitReason::LeaseLost, Some(refused)) = (&reason, self.refused.take()) {
            return Outcome::NeverStarted(refused);
        }
        self.control.event(Event::Exiting { reason: reason.clone() }, vec![]);
        self.control.flush_all(LAST_PACKETS);
        Outcome::Ended(reason)
    }

    fn serve(&mut self) -> ExitReason {
        let mut clogged = false;
        loop {
            if self.control.is_closed() {
                return ExitReason::LeaseLost;
            }
            if self.control.is_clogged() != clogged {
                clogged = !clogged;
                let interest = if clogged { Interest::Write } else { Interest::Read };
                if let Err(e) = self.events.change(&self.control, Token::Control, interest) {
                    return ExitReason::Internal { detail: format!("wait for the control socket: {e}") };
                }
            }
            let ready = match self.events.wait(None) {
                Ok(ready) => ready,
                Err(e) => return ExitReason::Internal { detail: format!("epoll_wait: {e}") },
            };
            for token in ready {
                if let Some(reason) = self.dispatch(token) {
                    return reason;
                }
            }
        }
    }

    fn dispatch(&mut self, token: Token) -> Option<ExitReason> {
        match token {
            Token::Control if self.control.is_clogged() => {
                self.control.flush();
                None
            }
            Token::Control => self.take_request(),
            Token::GuestEnd => self.guest_end(),
            Token::DeviceStatus | Token::Queue { .. } | Token::Backend { .. } => None,
        }
    }

    fn take_request(&mut self) -> Option<ExitReason> {
        match self.control.receive() {
            Incoming::Nothing | Incoming::Refused => None,
            Incoming::Closed => Some(ExitReason::LeaseLost),
            Incoming::Request(request, fds) => self.carry_out(*request, fds),
        }
    }

    /// Carries out a request that is legal now, and answers it, here or later.
    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>) -> Option<ExitReason> {
        let Request { id, op } = request;
        let name = lifecycle::name(&op);
        log::debug!("{name} with {} descriptors", fds.len());
        let next = match lifecycle::permit(self.state, &op) {
            Ok(Permit::Go(next)) => next,
            Ok(Permit::Already) => {
                self.control.reply(id, done());
                return None;
            }
            Err(denied) => {
                self.control.reply(id, Err(ApiError::new(ErrorCode::FailedPrecondition, &denied)));
                return None;
            }
        };
        let shutdown = matches!(op, Op::Shutdown);
        let answer = self.perform(op, fds);
        if answer.is_ok() {
            self.state = next;
        }
        self.control.reply(id, answer);
        shutdown.then_some(ExitReason::Shutdown)
    }

    fn perform(&mut self, op: Op, fds: Vec<OwnedFd>) -> Answer {
        match op {
            Op::Configure(config) => self.configure(*config, fds),
            Op::Boot => self.boot(),
            Op::Pause => self.vm().pause().map_err(api_error).and_then(|()| done()),
            Op::Resume => {
                self.vm().resume();
                done()
            }
            Op::Stats => Ok((Reply::Stats(Box::new(self.stats())), vec![])),
            Op::Shutdown => done(),
            Op::Attach { .. } | Op::FsMount { .. } | Op::FsUnmount { .. } | Op::VsockConnect { .. } => {
                Err(ApiError::msg(ErrorCode::FailedPrecondition, "no such device"))
            }
        }
    }

    fn vm(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("the lifecycle lets nothing through before there is one")
    }

    fn configure(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Answer {
        self.timeline.configure_us = monotonic_us();
        match self.build(config, fds) {
            Ok(vm) => {
                self.vm = Some(vm);
                self.refused = None;
                done()
            }
            Err(error) => {
                let answer = api_error_of(&error);
                self.refused = Some(error);
                Err(answer)
            }
        }
    }

    fn build(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Result<Vm, VmError> {
        let config = ValidConfig::check(config, fds)?;
        let kvm = match &mut self.kvm {
            Ok(kvm) => kvm,
            Err(error) => return Err(VmError::NoKvm(error.to_string())),
        };
        let timeline = &mut self.timeline;
        let vm = builder::build(kvm, config, || timeline.kvm_ready_us = monotonic_us())?;
        self.events
            .add(vm.ends().event(), Token::GuestEnd)
            .map_err(builder::host("wait for the guest's end"))?;
        Ok(vm)
    }

    fn boot(&mut self) -> Answer {
        self.vm().prepare().map_err(api_error)?;
        self.timeline.loaded_us = monotonic_us();
        self.timeline.running_us = monotonic_us();
        self.vm().run();
        Ok((Reply::Booted { timeline: self.timeline }, vec![]))
    }

    fn stats(&self) -> Stats {
        let mut stats =
            Stats { state: self.state.name().to_owned(), timeline: self.timeline, ..Stats::default() };
        if let Some(vm) = &self.vm {
            for (kind, count) in vm.vcpus().exit_counts().flatten() {
                *stats.exits.entry(kind.to_owned()).or_default() += count;
            }
        }
        stats
    }

    fn guest_end(&mut self) -> Option<ExitReason> {
        let vm = self.vm.as_mut()?;
        Some(match vm.ends().get()?.clone() {
            End::Reset => ExitReason::GuestReset,
            End::Failed { vcpu, detail } => {
                ExitReason::VcpuFailed { vcpu, detail, last_words: String::new() }
            }
        })
    }

    /// Stops what runs. The reason may become a worse one.
    fn end(&mut self, reason: ExitReason) -> ExitReason {
        self.state = State::Stopped;
        if let Some(vm) = &mut self.vm
            && let Err(e) = vm.stop()
        {
            return ExitReason::Internal { detail: e.to_string() };
        }
        reason
    }
}

fn api_error(error: VmError) -> ApiError {
    api_error_of(&error)
}

/// The one table from our errors to codes.
fn api_error_of(error: &VmError) -> ApiError {
    let code = match error {
        VmError::Config(ConfigError::Version(_)) | VmError::NoKvm(_) => ErrorCode::FailedPrecondition,
        VmError::Config(_) | VmError::Kernel(_) => ErrorCode::InvalidArgument,
        VmError::Memory(_) => ErrorCode::ResourceExhausted,
        _ => ErrorCode::Internal,
    };
    ApiError::new(code, error)
}
