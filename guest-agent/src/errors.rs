//! The one table from what went wrong to the code that containerd understands.

use agent_api::ttrpc::{self, Code};

use crate::devices::DeviceError;
use crate::huge_pages::HugePagesError;
use crate::launch::{LaunchError, chain};
use crate::mounts::MountError;
use crate::resources::ResourcesError;
use crate::spec::SpecError;
use crate::stdio::StdioError;
use crate::sysctl::SysctlError;
use crate::users::UsersError;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No container of that name.
    #[error("container {0:?} not found")]
    NoContainer(String),
    /// No exec of that name in the container.
    #[error("exec {exec:?} not found in container {container:?}")]
    NoExec { container: String, exec: String },
    /// The name is taken.
    #[error("{0:?} already exists")]
    Exists(String),
    /// The process has ended; containerd takes this answer to a signal for success.
    #[error("process already finished")]
    Finished,
    /// The request does not fit the process's state.
    #[error("cannot {what}: process is {state}")]
    State { what: &'static str, state: &'static str },
    /// Linux has no such signal.
    #[error("no signal has number {0}")]
    Signal(u32),
    /// Only process numbers can be shared with one container alone.
    #[error(
        "cannot join the {kind} namespace of container {container:?}: only its pid namespace can be joined"
    )]
    Join { kind: String, container: String },
    /// The configuration cannot be used.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A device is not there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There are no such huge pages, or not so many.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
    /// The sandbox has no such users.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// A kernel parameter cannot be set.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// Limits cannot be changed as asked.
    #[error(transparent)]
    Resources(#[from] ResourcesError),
    /// A mount in the request cannot be made.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Standard streams cannot be connected.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// No process.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The guest's own files.
    #[error("cannot {what}")]
    Io {
        what: &'static str,
        #[source]
        cause: std::io::Error,
    },
}

impl TaskError {
    /// For `map_err`: an I/O error while trying to do `what`.
    pub fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |cause| Self::Io { what, cause }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoExec { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Signal(_)
            | Self::Join { .. }
            | Self::Sysctl(_)
            | Self::Spec(_)
            | Self::Mount(_)
            | Self::Stdio(StdioError::Name(_)) => Code::INVALID_ARGUMENT,
            Self::Device(_) | Self::Users(UsersError::None) => Code::FAILED_PRECONDITION,
            Self::Users(UsersError::Nobody { .. }) => Code::INVALID_ARGUMENT,
            Self::Users(_) => Code::INTERNAL,
            Self::HugePages(error) => match error {
                HugePagesError::Limit { .. } | HugePagesError::Volume { .. } => Code::INVALID_ARGUMENT,
                HugePagesError::Kernel { .. } | HugePagesError::Size { .. } => Code::FAILED_PRECONDITION,
                HugePagesError::Memory { .. } => Code::RESOURCE_EXHAUSTED,
                HugePagesError::Io { .. } => Code::INTERNAL,
            },
            Self::Resources(error) => match error {
                ResourcesError::Value { .. } => Code::INVALID_ARGUMENT,
                ResourcesError::NoFile { .. } | ResourcesError::Unsupported(_) => Code::FAILED_PRECONDITION,
                ResourcesError::Refused { .. } | ResourcesError::Halfway { .. } => Code::INTERNAL,
            },
            Self::Stdio(_) | Self::Io { .. } => Code::INTERNAL,
            Self::Launch(LaunchError::Refused(_)) => Code::UNKNOWN,
            Self::Launch(_) => Code::INTERNAL,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signal_to_the_dead_is_not_found() {
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(TaskError::Finished) else {
            panic!("a status");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "process already finished");
    }
}
