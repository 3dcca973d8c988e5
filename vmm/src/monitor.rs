//! The main loop: one thread owns the control socket, the VM and its devices, and carries out one thing at a time.
//!
//! ```text
//! control socket ──> Op ── legal? (vm::lifecycle) ──> Vm ──> reply, now or when the guest has answered
//! queues, backends ──> devices ──> Event
//! vCPU threads   ──> the guest ended ──> ExitReason
//! ```

mod operations;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use virtio::vsock::VsockEvent;
use vmm_api::{ApiError, ErrorCode, Event, ExitReason, FdIndex, Op, Reply, Request, Timeline};

use crate::control::{Control, Incoming};
use crate::dials::Dials;
use crate::error::Coded;
use crate::event_loop::{EventLoop, Interest, Token};
use crate::kvm::{Coming, Shell};
use crate::upcall;
use crate::vcpu::End;
use crate::vm::Vm;
use crate::vm::builder::VmError;
use crate::vm::lifecycle::{self, Permit, State};

/// How long the owner may take over the last packets.
const LAST_PACKETS: Duration = Duration::from_secs(1);

/// What ended the main loop.
#[derive(Debug)]
pub enum Outcome {
    /// The VM, or its lease, came to its end.
    Ended(ExitReason),
    /// The owner left before there was a VM, after this was in its way.
    NeverStarted(VmError),
}

/// The process' state.
#[derive(Debug)]
pub struct Monitor {
    control: Control,
    events: EventLoop,
    state: State,
    vm: Option<Vm>,
    /// An empty VM, begun before the owner says what it shall be.
    shell: Option<Coming>,
    timeline: Timeline,
    dials: Dials,
    /// The owner left the upcall channel's port to us.
    serves_upcall: bool,
    /// Why the last `Configure` failed.
    refused: Option<VmError>,
}

/// How an operation ended, or that it ends later.
enum Answer {
    Now(Reply),
    Later,
}

impl Monitor {
    /// A monitor without a VM. `main_us` is when the process began.
    pub fn new(socket: OwnedFd, main_us: u64) -> std::io::Result<Self> {
        let control = Control::new(socket)?;
        let events = EventLoop::new()?;
        events.add(&control, Token::Control)?;
        Ok(Monitor {
            control,
            events,
            state: State::Created,
            vm: None,
            // A thread that cannot be had costs time only: `Configure` does without.
            shell: Shell::begin().ok(),
            timeline: Timeline { main_us, ..Timeline::default() },
            dials: Dials::default(),
            serves_upcall: false,
            refused: None,
        })
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
        let mut waits_for_room = false;
        loop {
            if self.control.is_closed() {
                return ExitReason::LeaseLost;
            }
            if self.control.is_clogged() != waits_for_room {
                waits_for_room = !waits_for_room;
                let interest = if waits_for_room { Interest::Write } else { Interest::Read };
                if let Err(e) = self.events.change(&self.control, Token::Control, interest) {
                    return ExitReason::Internal { detail: format!("wait for the control socket: {e}") };
                }
            }
            let now = Instant::now();
            let change = self.vm.as_ref().and_then(|vm| vm.next_change_timeout(now));
            let timeout = [self.dials.next_timeout(now), change].into_iter().flatten().min();
            let ready = match self.events.wait(timeout) {
                Ok(ready) => ready,
                Err(e) => return ExitReason::Internal { detail: format!("epoll_wait: {e}") },
            };
            for token in ready {
                if let Some(reason) = self.dispatch(token) {
                    return reason;
                }
            }
            self.expire_dials();
            self.relay_connections();
            self.answer_changes();
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
            Token::DeviceStatus => {
                if let Some(vm) = &mut self.vm {
                    vm.on_device_status(&self.events);
                }
                None
            }
            Token::Queue { slot, queue } => self.with_devices(|devices| devices.on_queue(slot, queue)),
            Token::Backend { slot } => {
                self.with_devices(|devices| devices.on_backend(slot));
                self.tell_of_image(slot);
                None
            }
            Token::Upcall => {
                if let Some(vm) = &mut self.vm {
                    vm.on_upcall(&self.events);
                }
                None
            }
        }
    }

    /// Tells the owner of an image that has lost its connection.
    fn tell_of_image(&mut self, slot: u16) {
        let lost = self.vm.as_ref().and_then(|vm| vm.devices().take_lost_image(slot));
        if let Some(disk) = lost {
            self.control.event(Event::ImageLost { disk }, vec![]);
        }
    }

    fn with_devices(&self, work: impl FnOnce(&crate::devices::Devices)) -> Option<ExitReason> {
        if let Some(vm) = &self.vm {
            work(vm.devices());
        }
        None
    }

    fn take_request(&mut self) -> Option<ExitReason> {
        match self.control.receive() {
            Incoming::Nothing | Incoming::Refused => None,
            Incoming::Closed => Some(ExitReason::LeaseLost),
            Incoming::Request(request, fds) => self.carry_out(*request, fds),
        }
    }

    /// Carries out a request if it is legal now. It is answered here, or, where the guest has a say, later.
    fn carry_out(&mut self, request: Request, fds: Vec<OwnedFd>) -> Option<ExitReason> {
        let Request { id, op } = request;
        log::debug!("request {id}: {} with {} descriptors", lifecycle::name(&op), fds.len());
        let shutdown = matches!(op, Op::Shutdown);
        let answer = match lifecycle::permit(self.state, &op) {
            Err(denied) => Err(denied.to_api()),
            Ok(Permit::Already) => Ok(Answer::Now(Reply::Done)),
            Ok(Permit::Go(next)) => {
                let answer = self.perform(id, op, fds);
                if answer.is_ok() {
                    self.state = next;
                }
                answer
            }
        };
        match answer {
            Ok(Answer::Now(reply)) => self.control.reply(id, Ok((reply, vec![]))),
            Ok(Answer::Later) => {}
            Err(error) => self.control.reply(id, Err(error)),
        }
        shutdown.then_some(ExitReason::Shutdown)
    }

    /// Tells the owner of connections. While it does not read, the device keeps them, and holds back the guest.
    fn relay_connections(&mut self) {
        if self.control.is_clogged() {
            return;
        }
        let events = self.vm.as_ref().map(|vm| vm.devices().take_vsock_events()).unwrap_or_default();
        for event in events {
            match event {
                VsockEvent::Accepted { port: upcall::abi::PORT, guest_port, socket }
                    if self.serves_upcall =>
                {
                    if let Some(vm) = &mut self.vm {
                        vm.accept_upcall(socket, guest_port, &self.events);
                    }
                }
                VsockEvent::Accepted { port, guest_port, socket } => {
                    let event = Event::VsockAccepted { port, guest_port, socket: FdIndex(0) };
                    self.control.event(event, vec![socket]);
                }
                VsockEvent::Connected { request: dial, socket } => {
                    if let Some(id) = self.dials.end(dial) {
                        self.control.reply(id, Ok((Reply::Connected { socket: FdIndex(0) }, vec![socket])));
                    }
                }
                VsockEvent::Refused { request: dial, reason } => {
                    if let Some(id) = self.dials.end(dial) {
                        self.control.reply(id, Err(reason.to_api()));
                    }
                }
            }
        }
    }

    fn answer_changes(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        vm.expire_changes(&self.events, Instant::now());
        for answer in vm.take_resize_answers() {
            log::info!("resize: {}", answer.resized);
            self.control.reply(answer.id, Ok((Reply::Resized(answer.resized), vec![])));
        }
        for (id, answer) in vm.take_plug_answers() {
            let reply = answer.map(|attached| attached.map_or(Reply::Done, Reply::Attached));
            self.control.reply(id, reply.map(|reply| (reply, vec![])));
        }
    }

    fn expire_dials(&mut self) {
        for (dial, id, timeout) in self.dials.expire(Instant::now()) {
            if let Some(mut vsock) = self.vm.as_ref().and_then(|vm| vm.devices().vsock()) {
                // False if the answer came just now: its event finds no dial, and its socket is closed.
                vsock.device_mut().cancel(dial);
            }
            let late = format!("the guest did not answer within {} ms", timeout.as_millis());
            self.control.reply(id, Err(ApiError::msg(ErrorCode::DeadlineExceeded, late)));
        }
    }

    fn guest_end(&mut self) -> Option<ExitReason> {
        let last_words = String::new();
        Some(match self.vm.as_ref()?.ends().get()?.clone() {
            End::Reset => ExitReason::GuestReset,
            End::Failed { vcpu, detail } => ExitReason::VcpuFailed { vcpu, detail, last_words },
            End::ThreadDied { name } => ExitReason::Internal { detail: format!("thread {name} died") },
        })
    }

    /// Stops what runs, answers what is open. The reason may become a truer one.
    fn end(&mut self, reason: ExitReason) -> ExitReason {
        self.state = State::Stopped;
        for id in self.dials.end_all() {
            self.control.reply(id, Err(ApiError::msg(ErrorCode::Unavailable, "the VM has ended")));
        }
        let Some(vm) = &mut self.vm else { return reason };
        for id in vm.end_changes() {
            self.control.reply(id, Err(ApiError::msg(ErrorCode::Unavailable, "the VM has ended")));
        }
        if let Err(e) = vm.stop() {
            log::error!("{e}");
            return ExitReason::Internal { detail: e.to_string() };
        }
        let (words, panicked) = vm.devices().last_words().unwrap_or_default();
        match reason {
            ExitReason::GuestReset | ExitReason::VcpuFailed { .. } if panicked => {
                ExitReason::GuestPanic { last_words: words }
            }
            ExitReason::VcpuFailed { vcpu, detail, .. } => {
                ExitReason::VcpuFailed { vcpu, detail, last_words: words }
            }
            other => other,
        }
    }
}
