//! Devices that come and go while the VM runs: from the owner's request to the state machine, and from its answer to the
//! owner's.

use std::time::{Duration, Instant};

use vmm_api::config::DEVICE_SLOTS;
use vmm_api::{ApiError, Attached, DeviceName, ErrorCode, MemoryRange};

use super::Vm;
use super::builder::VmError;
use super::change::{Crowded, Left, Plug, PlugAsked, Plugged, Why};
use crate::config::NewDevice;
use crate::devices::{DeviceError, DeviceKey};
use crate::error::Coded;
use crate::event_loop::EventLoop;
use crate::upcall::DevicePlace;

/// What is remembered of a request until it is answered.
#[derive(Debug)]
pub(super) struct Pending {
    name: DeviceName,
    slot: u16,
    place: DevicePlace,
    memory: Option<MemoryRange>,
}

/// A device did not come, or did not go.
#[derive(Debug, thiserror::Error)]
#[error("{verb} {name}: {why} (after {took_ms} of {timeout_ms} ms); {}", left_text(*left, *slot))]
pub struct PlugError {
    verb: &'static str,
    name: DeviceName,
    slot: u16,
    why: Why,
    left: Left,
    took_ms: u128,
    timeout_ms: u128,
}

fn left_text(left: Left, slot: u16) -> String {
    match left {
        Left::Out => "nothing of it is left".to_owned(),
        Left::In => "it stays attached, and can be detached later".to_owned(),
        Left::Parked => {
            format!("it is parked in slot {slot} of {DEVICE_SLOTS}, and goes when the guest has given it up")
        }
    }
}

impl Coded for PlugError {
    fn code(&self) -> ErrorCode {
        match &self.why {
            Why::NoChannel | Why::Unserved(_) | Why::Refused(_) | Why::DriverFailed(_) => {
                ErrorCode::FailedPrecondition
            }
            Why::Gone => ErrorCode::NotFound,
            Why::NoTurn | Why::NoDriver(_) | Why::TimedOut => ErrorCode::DeadlineExceeded,
            Why::Reset(_) => ErrorCode::Unavailable,
            Why::NotDurable(_) => ErrorCode::Internal,
        }
    }
}

impl Coded for Crowded {
    fn code(&self) -> ErrorCode {
        ErrorCode::ResourceExhausted
    }
}

/// An attach or a detach cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum PlugRefused {
    /// The host cannot make the device.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Too many wait.
    #[error(transparent)]
    Crowded(#[from] Crowded),
    /// There is no such device.
    #[error("there is no {0}")]
    NotFound(DeviceName),
}

impl Coded for PlugRefused {
    fn code(&self) -> ErrorCode {
        match self {
            PlugRefused::Vm(error) => error.code(),
            PlugRefused::Crowded(error) => error.code(),
            PlugRefused::NotFound(_) => ErrorCode::NotFound,
        }
    }
}

impl Vm {
    /// Adds a device to a VM that has not been prepared.
    pub fn attach(&mut self, events: &EventLoop, device: NewDevice) -> Result<Attached, VmError> {
        let name = device.name();
        let key = self.devices.add_new(events, device)?;
        let (slot, place) = self.devices.place(key).expect("just added");
        let memory = self.devices.image_memory(key);
        Ok(attached(&Pending { name, slot, place, memory }, Duration::ZERO))
    }

    /// Begins to add a device to a guest that runs, or has it wait. It is on the bus from here on.
    pub fn plug(
        &mut self,
        events: &EventLoop,
        device: NewDevice,
        id: u64,
        timeout: Duration,
    ) -> Result<(), PlugRefused> {
        let name = device.name();
        self.check_name(&name).map_err(VmError::from)?;
        let key = self.devices.add_new(events, device).map_err(VmError::from)?;
        let begun = self.ask_to_plug(events, key, Plug::Add, id, timeout);
        if begun.is_err() {
            self.devices.remove(events, key);
        }
        begun
    }

    /// Begins to take a device away from a guest that runs, or has that wait.
    pub fn unplug(
        &mut self,
        events: &EventLoop,
        name: &DeviceName,
        id: u64,
        timeout: Duration,
    ) -> Result<(), PlugRefused> {
        let found = self.devices.find(name).filter(|_| !is_nameless(name));
        let key = found.ok_or_else(|| PlugRefused::NotFound(name.clone()))?;
        self.ask_to_plug(events, key, Plug::Remove, id, timeout)
    }

    fn ask_to_plug(
        &mut self,
        events: &EventLoop,
        device: DeviceKey,
        plug: Plug,
        id: u64,
        timeout: Duration,
    ) -> Result<(), PlugRefused> {
        let (slot, place) = self.devices.place(device).expect("found or added by the caller");
        let name = self.devices.name(device).expect("only what has a name is asked for").clone();
        let asked = PlugAsked { id, device, plug, at: Instant::now(), timeout };
        self.with_changes(events, |changes, parts| changes.plug(asked, parts))?;
        let memory = self.devices.image_memory(device);
        self.pending.insert(id, Pending { name, slot, place, memory });
        Ok(())
    }

    /// Guest and owner tell devices apart by their names.
    fn check_name(&self, name: &DeviceName) -> Result<(), DeviceError> {
        if is_nameless(name) {
            return Err(DeviceError::Nameless(name.clone()));
        }
        match self.devices.find(name) {
            Some(key) if self.changes.is_parked(key) => Err(DeviceError::Parked(name.clone())),
            Some(_) => Err(DeviceError::Exists(name.clone())),
            None => Ok(()),
        }
    }

    /// A driver has changed the status of a device.
    pub fn on_device_status(&mut self, events: &EventLoop) {
        self.devices.on_status();
        let now = Instant::now();
        self.with_changes(events, |changes, parts| changes.device_moved(parts, now));
    }

    /// Answers since the last call: of attaches with the device, of detaches with nothing.
    pub fn take_plug_answers(&mut self) -> Vec<(u64, Result<Option<Attached>, ApiError>)> {
        let answers = self.changes.take_plugged();
        answers.into_iter().filter_map(|plugged| self.plug_answer(plugged)).collect()
    }

    fn plug_answer(&mut self, plugged: Plugged) -> Option<(u64, Result<Option<Attached>, ApiError>)> {
        let Plugged { id, plug, ended, took, timeout, .. } = plugged;
        let pending = self.pending.remove(&id)?;
        let verb = match plug {
            Plug::Add => "attach",
            Plug::Remove => "detach",
        };
        let answer = match ended {
            Ok(()) => {
                log::info!("{verb} {}: done in {took:?}", pending.name);
                Ok((plug == Plug::Add).then(|| attached(&pending, took)))
            }
            Err((why, left)) => {
                let Pending { name, slot, .. } = pending;
                let (took_ms, timeout_ms) = (took.as_millis(), timeout.as_millis());
                Err(PlugError { verb, name, slot, why, left, took_ms, timeout_ms }.to_api())
            }
        };
        Some((id, answer))
    }
}

/// A disk without a serial number: at boot a guest can tell it by its position.
fn is_nameless(name: &DeviceName) -> bool {
    matches!(name, DeviceName::Disk(id) if id.is_empty())
}

fn attached(pending: &Pending, took: Duration) -> Attached {
    Attached {
        name: pending.name.clone(),
        slot: u8::try_from(pending.slot).expect("there are 19"),
        registers: pending.place.base,
        irq: pending.place.irq,
        memory: pending.memory,
        took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
    }
}
