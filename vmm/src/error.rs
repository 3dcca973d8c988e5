//! The one table from our errors to the codes of the control socket.

use imagefs::{MountError, UnmountError};
use virtio::vsock::{ConnectError, Refusal};
use vmm_api::{ApiError, ErrorCode};

use crate::arch::x86_64::kernel::KernelError;
use crate::config::ConfigError;
use crate::devices::{DeviceError, ImageChannelError};
use crate::dials::TooMany;
use crate::memory::MemoryError;
use crate::vm::builder::VmError;
use crate::vm::lifecycle::Denied;

/// An error that the owner may be told.
pub trait Coded: std::error::Error + Sized + 'static {
    /// What kind of failure it is.
    fn code(&self) -> ErrorCode;

    /// For the wire.
    fn to_api(&self) -> ApiError {
        ApiError::new(self.code(), self)
    }
}

impl Coded for Denied {
    fn code(&self) -> ErrorCode {
        ErrorCode::FailedPrecondition
    }
}

impl Coded for ConfigError {
    fn code(&self) -> ErrorCode {
        match self {
            ConfigError::Version(_) => ErrorCode::FailedPrecondition,
            _ => ErrorCode::InvalidArgument,
        }
    }
}

impl Coded for MemoryError {
    fn code(&self) -> ErrorCode {
        match self {
            MemoryError::Map { .. } | MemoryError::HugePages { .. } | MemoryError::Advise { .. } => {
                ErrorCode::ResourceExhausted
            }
            MemoryError::NoMemory { .. } | MemoryError::ShortFile { .. } | MemoryError::Read { .. } => {
                ErrorCode::InvalidArgument
            }
        }
    }
}

impl Coded for VmError {
    fn code(&self) -> ErrorCode {
        match self {
            VmError::NoKvm(_) => ErrorCode::FailedPrecondition,
            VmError::Config(error) => error.code(),
            VmError::Memory(error) | VmError::Kernel(KernelError::Memory(error)) => error.code(),
            VmError::Kernel(_) => ErrorCode::InvalidArgument,
            VmError::Device(DeviceError::Refused { .. } | DeviceError::Nameless(_)) => {
                ErrorCode::InvalidArgument
            }
            VmError::Device(DeviceError::Exists(_) | DeviceError::Parked(_)) => ErrorCode::AlreadyExists,
            VmError::Device(_) | VmError::Host { .. } => ErrorCode::ResourceExhausted,
            VmError::Kvm(_) | VmError::Vcpu(_) | VmError::Overlap(_) | VmError::Confine(_) => {
                ErrorCode::Internal
            }
        }
    }
}

impl Coded for MountError {
    fn code(&self) -> ErrorCode {
        match self {
            MountError::Exists { .. } => ErrorCode::AlreadyExists,
            _ => ErrorCode::InvalidArgument,
        }
    }
}

impl Coded for UnmountError {
    fn code(&self) -> ErrorCode {
        match self {
            UnmountError::NotFound { .. } => ErrorCode::NotFound,
        }
    }
}

impl Coded for ImageChannelError {
    fn code(&self) -> ErrorCode {
        match self {
            ImageChannelError::NoImage { .. } => ErrorCode::NotFound,
            ImageChannelError::Refused { .. } => ErrorCode::InvalidArgument,
        }
    }
}

impl Coded for ConnectError {
    fn code(&self) -> ErrorCode {
        match self {
            ConnectError::NotActive => ErrorCode::Unavailable,
            ConnectError::Full(_) | ConnectError::Socket(_) => ErrorCode::ResourceExhausted,
        }
    }
}

impl Coded for Refusal {
    fn code(&self) -> ErrorCode {
        ErrorCode::Unavailable
    }
}

impl Coded for TooMany {
    fn code(&self) -> ErrorCode {
        ErrorCode::ResourceExhausted
    }
}
