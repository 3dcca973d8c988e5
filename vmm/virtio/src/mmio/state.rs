//! What is saved of a transport and its device.

use serde::{Deserialize, Serialize};

use super::{MmioTransport, status};
use crate::device::{ActivateError, VirtioDevice};
use crate::queue::{QueueState, SetupError};

/// A transport with its device, as the guest sees them. `S` is the device's own state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState<S> {
    /// Kind of device; restored only into the same kind.
    pub device_id: u32,
    /// `Status`, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// The device waits for a reset.
    pub needs_reset: bool,
    /// The device is at work. Not the same as `DRIVER_OK`: the activation may have failed.
    pub active: bool,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// The queues.
    pub queues: Vec<QueueState>,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// The device.
    pub device: S,
}

/// A state does not fit the transport that it is restored into, or cannot be taken now.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Saving is for paused devices.
    #[error("{device} is not paused")]
    NotPaused {
        /// Device name.
        device: &'static str,
    },
    /// Restoring is for new devices.
    #[error("{device} is in use and cannot be restored")]
    InUse {
        /// Device name.
        device: &'static str,
    },
    /// Another kind of device.
    #[error("state is of device id {saved}, {device} has {id}")]
    DeviceId {
        /// Device name.
        device: &'static str,
        /// Id in the state.
        saved: u32,
        /// Id of the device.
        id: u32,
    },
    /// A device with other queues.
    #[error("state has queues of at most {saved:?} descriptors, {device} of {own:?}")]
    Queues {
        /// Device name.
        device: &'static str,
        /// Largest sizes in the state.
        saved: Vec<u16>,
        /// Largest sizes of the device.
        own: Vec<u16>,
    },
    /// The driver relies on features that this device does not have.
    #[error("{device} lacks features {missing:#x} that the driver uses")]
    Features {
        /// Device name.
        device: &'static str,
        /// Feature bits.
        missing: u64,
    },
    /// A queue makes no sense.
    #[error("{device} queue {index} cannot be restored")]
    Queue {
        /// Device name.
        device: &'static str,
        /// Which queue.
        index: usize,
        /// Why.
        #[source]
        source: SetupError,
    },
    /// The device refused.
    #[error(transparent)]
    Activate(#[from] ActivateError),
    /// No more file descriptors.
    #[error("notification event cannot be duplicated")]
    Kick(#[source] std::io::Error),
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// The state of transport and device. Only while paused.
    pub fn save(&self) -> Result<MmioState<D::State>, StateError> {
        if !self.paused {
            return Err(StateError::NotPaused { device: D::NAME });
        }
        Ok(MmioState {
            device_id: D::ID,
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            active: self.active,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            queues: if self.active { self.device.queues() } else { self.queues.clone() },
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            device: self.device.save(),
        })
    }

    /// Makes a new transport what `save` saw. It is paused then. After an error, drop it.
    pub fn restore(&mut self, state: &MmioState<D::State>) -> Result<(), StateError> {
        let device = D::NAME;
        if self.status != 0 || self.active {
            return Err(StateError::InUse { device });
        }
        if state.device_id != D::ID {
            return Err(StateError::DeviceId { device, saved: state.device_id, id: D::ID });
        }
        let sizes = |queues: &[QueueState]| queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        let (saved, own) = (sizes(&state.queues), sizes(&self.queues));
        if saved != own {
            return Err(StateError::Queues { device, saved, own });
        }
        // Until FEATURES_OK, a driver may have written anything.
        let agreed = if state.status & status::FEATURES_OK != 0 { state.driver_features } else { 0 };
        let missing = agreed & !self.offered_features();
        if missing != 0 {
            return Err(StateError::Features { device, missing });
        }

        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.queues.clone_from(&state.queues);
        self.interrupt.restore(state.interrupt_status, state.needs_reset, state.config_generation);
        let activation = if state.active { Some(self.activation()?) } else { None };
        self.device.restore(&state.device, activation)?;
        self.active = state.active;
        self.paused = true;
        Ok(())
    }
}
