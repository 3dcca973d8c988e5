//! Why a device cannot be made.

use std::io;

use vmm_api::DeviceName;

use crate::arch::x86_64::layout;
use crate::kvm::KvmError;

/// A device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// All slots are taken.
    #[error("no slot left for {device}: a VM has {}", layout::VIRTIO_SLOTS)]
    Slots {
        /// Device.
        device: String,
    },
    /// The host has no descriptors left, or the like.
    #[error("make {device}")]
    Host {
        /// Device.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// KVM did not take its doorbells or its interrupt.
    #[error("connect {device}")]
    Kvm {
        /// Device.
        device: String,
        /// What KVM said.
        #[source]
        source: KvmError,
    },
    /// What the guest wrote may be lost.
    #[error("flush {device}")]
    Flush {
        /// Device.
        device: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There are enough of its kind.
    #[error("{device} would be number {count} of its kind, at most {most} can be")]
    Kind {
        /// Device.
        device: String,
        /// How many there would be.
        count: usize,
        /// How many may be.
        most: usize,
    },
    /// It has a name that no other may have, as guest and owner tell devices apart by it.
    #[error("{0} has no name: one that comes while the guest runs is looked for by it")]
    Nameless(DeviceName),
    /// There is one.
    #[error("{0} is there already")]
    Exists(DeviceName),
    /// There is one that is to go.
    #[error("{0} is parked: it was to go, and the guest has not given it up yet")]
    Parked(DeviceName),
    /// The device refuses what it was given.
    #[error("make {device}")]
    Refused {
        /// Device.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl DeviceError {
    pub(super) fn refused<E: std::error::Error + Send + Sync + 'static>(device: &str) -> impl Fn(E) -> Self {
        move |source| DeviceError::Refused { device: device.to_owned(), source: Box::new(source) }
    }
}
