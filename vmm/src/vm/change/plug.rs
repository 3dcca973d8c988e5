//! Devices that come and go: what the guest is asked, and what its answer means.
//!
//! ```text
//! Add:     device is on the bus ──> ADD_DEVICE ──> 0 ──> driver says DRIVER_OK ──> in
//!                                     │            │             └── gave up, or none came ──> REMOVE_DEVICE ──> out
//!                                     │            └── errno ──> out
//!                                     └── no answer ──> parked ──> REMOVE_DEVICE, as soon as the guest can be asked ──> out
//! Remove:  REMOVE_DEVICE ──> 0 ──> out
//!                │           └── errno ──> stays
//!                └── no answer ──> stays
//! ```
//!
//! A device that the guest may have is never taken from under it: it stays on the bus and works until the guest has said that
//! it is rid of it. Every request says how it shall be, so asking again is no harm.

use std::time::{Duration, Instant};

use virtio::mmio::status::{DRIVER_OK, FAILED, NEEDS_RESET};

use super::changes::{Changes, GRACE, Open, QUERY, Question, Waiting, errno_text};
use super::{Gone, Machine};
use crate::devices::DeviceKey;
use crate::upcall::Ask;
use crate::upcall::abi::kind;
use vmm_api::Ending;
use vmm_api::config::MAX_WAITING;

/// What is to become of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plug {
    /// It is on the bus, and the guest is to be told.
    Add,
    /// It is to go.
    Remove,
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct PlugAsked {
    /// Names the answer.
    pub id: u64,
    /// Which device.
    pub device: DeviceKey,
    /// What is to become of it.
    pub plug: Plug,
    /// When it came.
    pub at: Instant,
    /// How long it may take.
    pub timeout: Duration,
}

impl PlugAsked {
    pub(super) fn deadline(&self) -> Instant {
        self.at + self.timeout
    }
}

/// Why a device did not come or go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// Nobody to ask.
    #[error("the guest's kernel has not opened the upcall channel")]
    NoChannel,
    /// The guest's driver is of another time, or its kernel lacks something.
    #[error("the guest's kernel opened the upcall channel, and does not serve requests of type {0}")]
    Unserved(u16),
    /// What was asked before took too long.
    #[error("an earlier change took all the time")]
    NoTurn,
    /// It is not there any more.
    #[error("it is gone already")]
    Gone,
    /// The guest's kernel says no.
    #[error("the guest refused: {}", errno_text(*.0))]
    Refused(u32),
    /// Its driver says no.
    #[error("the guest's driver gave up: device status {0:#x}")]
    DriverFailed(u32),
    /// No driver came.
    #[error("no driver of the guest has taken it: device status {0:#x}, where {DRIVER_OK:#x} was waited for")]
    NoDriver(u32),
    /// No answer.
    #[error("the guest did not answer")]
    TimedOut,
    /// The channel was lost.
    #[error("the upcall channel was lost: {0}")]
    Reset(String),
    /// It is out of the guest, but the host could not make durable what was written to it.
    #[error("it is gone, and what the guest wrote to it may not be on the disk: {0}")]
    NotDurable(String),
}

/// Where a device is after a request about it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Gone, and nothing of it is left.
    Out,
    /// In the guest as before.
    In,
    /// The guest may have it; it goes when the guest has given it up.
    Parked,
}

/// The one answer to the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugged {
    /// Of the request.
    pub id: u64,
    /// Which device.
    pub device: DeviceKey,
    /// What was asked.
    pub plug: Plug,
    /// How it ended.
    pub ended: Result<(), (Why, Left)>,
    /// How long it took.
    pub took: Duration,
    /// How long it might have taken.
    pub timeout: Duration,
}

/// Too many wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WAITING} attaches and detaches wait for their turn already")]
pub struct Crowded;

/// A plug under way.
#[derive(Debug)]
pub(super) struct Current {
    pub asked: PlugAsked,
    /// It failed, and the guest has still to give the device up.
    failed: Option<Why>,
}

impl Current {
    pub(super) fn new(asked: PlugAsked) -> Self {
        Current { asked, failed: None }
    }
}

/// A device that the guest may have and that is to go.
#[derive(Debug, Default)]
pub(super) struct Parked {
    /// The guest is to be asked when it can be.
    pub due: bool,
    /// The request that it has not answered in time.
    seq: Option<u64>,
}

/// What is counted of plugs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlugCounters {
    /// Devices that came.
    pub attached: u64,
    /// Devices that went.
    pub detached: u64,
    /// Requests that host or guest refused.
    pub refused: u64,
    /// Requests without an answer in time.
    pub timed_out: u64,
    /// Requests that the loss of the channel ended.
    pub reset: u64,
}

impl Changes {
    /// Begins, or has wait, what is asked.
    pub fn plug(&mut self, asked: PlugAsked, machine: &mut impl Machine) -> Result<(), Crowded> {
        if self.is_busy() {
            let plugs = self.waiting.iter().filter(|waiting| matches!(waiting, Waiting::Plug(_))).count();
            if plugs >= MAX_WAITING {
                return Err(Crowded);
            }
            self.waiting.push_back(Waiting::Plug(asked));
        } else {
            self.begin(Waiting::Plug(asked));
            self.advance(machine, asked.at);
        }
        Ok(())
    }

    /// A driver has changed the status of a device.
    pub fn device_moved(&mut self, machine: &mut impl Machine, now: Instant) {
        if let Some(Question { open: Open::Driver { device }, .. }) = self.question {
            self.question = None;
            self.look_at_driver(device, machine, now);
            self.advance(machine, now);
        }
    }

    /// Answers since the last call.
    pub fn take_plugged(&mut self) -> Vec<Plugged> {
        std::mem::take(&mut self.plugged)
    }

    /// Devices that the guest may have and that are to go.
    pub fn is_parked(&self, device: DeviceKey) -> bool {
        self.parked.contains_key(&device)
    }

    /// How many there are.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Counters.
    pub fn plug_counters(&self) -> PlugCounters {
        self.plug_counters
    }

    /// Does what is next for the plug under way. Nothing is asked at the moment, and the channel is open.
    pub(super) fn step_plug(&mut self, machine: &mut impl Machine, now: Instant) {
        let Some(Current { asked, failed }) = &mut self.plug else { return };
        let (asked, failed) = (*asked, failed.take());
        if let Some(why) = failed {
            let left = if self.is_parked(asked.device) { Left::Parked } else { Left::Out };
            return self.end_plug(Err((why, left)), now);
        }
        let Some(place) = machine.place(asked.device) else {
            return self.end_plug(Err((Why::Gone, Left::Out)), now);
        };
        if let Some(parked) = self.parked.get_mut(&asked.device) {
            parked.due = false;
        }
        let (ask, open, kind) = match asked.plug {
            Plug::Add => (Ask::AddDevice { place }, Open::Add { device: asked.device }, kind::ADD_DEVICE),
            Plug::Remove => {
                (Ask::RemoveDevice { place }, Open::Remove { device: asked.device }, kind::REMOVE_DEVICE)
            }
        };
        if !machine.serves(kind) {
            return self.fail_unasked(&asked, Why::Unserved(kind), machine, now);
        }
        let within = self.time_left(now);
        self.ask(&ask, open, within, machine, now);
    }

    /// Ends the plug under way if its time is up and the guest has not been asked, or cannot be asked any more.
    pub(super) fn expire_plug(&mut self, machine: &mut impl Machine, now: Instant) {
        let Some(Current { asked, failed }) = &mut self.plug else { return };
        let asked = *asked;
        if self.question.is_some() {
            return;
        }
        match failed {
            // It is asked to give the device up.
            Some(_) if machine.is_open() => {}
            Some(_) => {
                let why = failed.take().expect("just seen");
                self.end_plug(Err((why, Left::Parked)), now);
            }
            None if asked.deadline() > now => {}
            None if machine.is_open() => self.fail_unasked(&asked, Why::NoTurn, machine, now),
            None => self.fail_unasked(&asked, Why::NoChannel, machine, now),
        }
    }

    /// It ends without the guest having been asked.
    fn fail_unasked(&mut self, asked: &PlugAsked, why: Why, machine: &mut impl Machine, now: Instant) {
        let left = self.take_out_unasked(asked, machine);
        self.end_plug(Err((why, left)), now);
    }

    pub(super) fn take_out_unasked(&mut self, asked: &PlugAsked, machine: &mut impl Machine) -> Left {
        match asked.plug {
            Plug::Remove if machine.place(asked.device).is_none() => Left::Out,
            Plug::Remove if self.is_parked(asked.device) => Left::Parked,
            Plug::Remove => Left::In,
            Plug::Add => {
                self.unplug(asked.device, machine);
                Left::Out
            }
        }
    }

    /// The guest has not got it: nothing of it stays. What the host says of it; nothing if it was gone already.
    fn unplug(&mut self, device: DeviceKey, machine: &mut impl Machine) -> Option<Gone> {
        self.parked.remove(&device);
        machine.unplug(device)
    }

    /// The guest has answered ADD_DEVICE or REMOVE_DEVICE.
    pub(super) fn plug_replied(&mut self, open: Open, status: u32, machine: &mut impl Machine, now: Instant) {
        match open {
            Open::Add { device } if status == 0 => self.look_at_driver(device, machine, now),
            Open::Add { device } => {
                // It forgets what it could not add.
                self.unplug(device, machine);
                self.end_plug(Err((Why::Refused(status), Left::Out)), now);
            }
            Open::Remove { device } if status == 0 => {
                let ended = match self.unplug(device, machine) {
                    Some(Gone { lost: Some(why) }) => Err((Why::NotDurable(why), Left::Out)),
                    _ => Ok(()),
                };
                self.end_plug(ended, now);
            }
            Open::Remove { device } => {
                let left = if self.is_parked(device) { Left::Parked } else { Left::In };
                self.end_plug(Err((Why::Refused(status), left)), now);
            }
            Open::TakeBack { device } if status == 0 => {
                self.unplug(device, machine);
            }
            // It stays parked.
            _ => {}
        }
    }

    /// The guest's virtio-mmio has it. Its driver may have been faster, or may come later, or not at all.
    fn look_at_driver(&mut self, device: DeviceKey, machine: &mut impl Machine, now: Instant) {
        let status = machine.driver_status(device);
        if status & (FAILED | NEEDS_RESET) != 0 {
            return self.take_back(device, Why::DriverFailed(status));
        }
        if status & DRIVER_OK != 0 {
            return self.end_plug(Ok(()), now);
        }
        let Some(current) = &self.plug else { return };
        let until = current.asked.deadline();
        if until <= now {
            return self.take_back(device, Why::NoDriver(status));
        }
        self.question = Some(Question { seq: 0, open: Open::Driver { device }, until });
    }

    /// No driver has come in time.
    pub(super) fn driver_is_late(&mut self, device: DeviceKey, machine: &mut impl Machine) {
        self.take_back(device, Why::NoDriver(machine.driver_status(device)));
    }

    /// The guest has it and is to give it up, before the request is answered.
    fn take_back(&mut self, device: DeviceKey, why: Why) {
        self.parked.insert(device, Parked { due: true, seq: None });
        if let Some(current) = &mut self.plug {
            current.failed = Some(why);
        }
    }

    /// A question about a device has no answer.
    pub(super) fn plug_cut_off(&mut self, question: &Question, ending: Ending, why: &str, now: Instant) {
        let why = match ending {
            Ending::TimedOut => Why::TimedOut,
            _ => Why::Reset(why.to_owned()),
        };
        match question.open {
            Open::Add { device } | Open::Driver { device } => {
                self.parked.insert(device, Parked { due: true, seq: None });
                self.end_plug(Err((why, Left::Parked)), now);
            }
            Open::Remove { device } => {
                let left = if self.is_parked(device) { Left::Parked } else { Left::In };
                self.end_plug(Err((why, left)), now);
            }
            Open::TakeBack { device } => {
                if let Some(parked) = self.parked.get_mut(&device) {
                    parked.seq = Some(question.seq);
                }
            }
            _ => {}
        }
    }

    /// Asks the guest to give up a device that is parked, if that is due. True if it was asked.
    pub(super) fn ask_for_parked(&mut self, machine: &mut impl Machine, now: Instant) -> bool {
        let own = self.plug.as_ref().filter(|current| current.asked.plug == Plug::Remove);
        let own = own.map(|current| current.asked.device);
        let due = self.parked.iter_mut().find(|(device, parked)| parked.due && Some(**device) != own);
        let Some((device, parked)) = due else { return false };
        parked.due = false;
        let device = *device;
        if let Some(place) = machine.place(device) {
            let within = if self.is_busy() { self.time_left(now).clamp(GRACE, QUERY) } else { QUERY };
            self.ask(&Ask::RemoveDevice { place }, Open::TakeBack { device }, within, machine, now);
        } else {
            self.parked.remove(&device);
        }
        true
    }

    /// An answer to a question that was given up: a parked device may be free now.
    pub(super) fn late_reply(&mut self, seq: u64, kind: u16, status: u32, machine: &mut impl Machine) {
        if kind != kind::REMOVE_DEVICE || status != 0 {
            return;
        }
        let free = self.parked.iter().find(|(_, parked)| parked.seq == Some(seq));
        if let Some(device) = free.map(|(device, _)| *device) {
            self.unplug(device, machine);
        }
    }

    pub(super) fn end_plug(&mut self, ended: Result<(), (Why, Left)>, now: Instant) {
        let Some(current) = self.plug.take() else { return };
        self.answer_plug(&current.asked, ended, now);
        self.begin_next();
    }

    pub(super) fn answer_plug(&mut self, asked: &PlugAsked, ended: Result<(), (Why, Left)>, now: Instant) {
        let counters = &mut self.plug_counters;
        let counter = match (&ended, asked.plug) {
            (Ok(()), Plug::Add) => &mut counters.attached,
            (Ok(()) | Err((Why::NotDurable(_), _)), _) => &mut counters.detached,
            (Err((Why::TimedOut | Why::NoChannel | Why::NoTurn | Why::NoDriver(_), _)), _) => {
                &mut counters.timed_out
            }
            (Err((Why::Reset(_), _)), _) => &mut counters.reset,
            (Err(_), _) => &mut counters.refused,
        };
        *counter += 1;
        let PlugAsked { id, device, plug, at, timeout } = *asked;
        let took = now.saturating_duration_since(at);
        self.plugged.push(Plugged { id, device, plug, ended, took, timeout });
    }
}
