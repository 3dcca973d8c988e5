//! Everything a request can fail with, and the one table from there to the codes containerd understands.

use std::sync::Arc;

use ttrpc::Code;
use vmm_api::{Ending, ErrorCode};

use crate::agent::AgentError;
use crate::container::hooks::HookError;
use crate::container::io::IoError;
use crate::container::logger::LoggerError;
use crate::container::rootfs::RootfsError;
use crate::container::spec::SpecError;
use crate::sandbox::boot::{BootCause, BootError};
use crate::sandbox::disks::DiskError;
use crate::sandbox::images::OpenError;
use crate::sandbox::net::NetError;
use crate::sandbox::resize::ResizeError;
use crate::vmm::VmmError;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No container of that name.
    #[error("container {0:?} not found")]
    NoContainer(String),
    /// No exec of that name.
    #[error("exec {exec:?} not found in container {container:?}")]
    NoExec {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
    },
    /// The name is taken.
    #[error("{0:?} already exists")]
    Exists(String),
    /// The name cannot be one.
    #[error("{0:?} is not a name for a container or an exec")]
    BadName(String),
    /// Not in this phase.
    #[error("cannot {what} a process that is {phase}")]
    Phase {
        /// What was asked.
        what: &'static str,
        /// The phase it is in.
        phase: &'static str,
    },
    /// It has ended already; containerd takes "not found" for that.
    #[error("process already finished")]
    Finished,
    /// A request of another kind than Task v2 defines for us.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// The request lacks something or has what we cannot take.
    #[error("{0}")]
    Request(&'static str),
    /// The bundle's configuration cannot be read.
    #[error("reading {path}")]
    Bundle {
        /// The file.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The guest did not dial a stream it was told of.
    #[error("the guest did not open stream {0}")]
    Stream(&'static str),
    /// A descriptor could not be watched.
    #[error("watching the process's streams")]
    Watch(#[source] std::io::Error),
    /// A task of ours broke down.
    #[error("the request's task failed: {0}")]
    Task(String),
    /// A pod that cannot be made as asked.
    #[error("sandbox: {0}")]
    Pod(String),
    /// The sandbox is on its way out.
    #[error("the sandbox shuts down")]
    Closing,
    /// The VM cannot be as large as is needed.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// The VM did not come up.
    #[error(transparent)]
    Boot(#[from] Arc<BootError>),
    /// The configuration cannot be run.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The root file system or a bind.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// A block device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// An image.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The standard streams.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

impl TaskError {
    /// The table.
    pub fn code(&self) -> Code {
        match self {
            TaskError::NoContainer(_) | TaskError::NoExec { .. } | TaskError::Finished => Code::NOT_FOUND,
            TaskError::Exists(_) => Code::ALREADY_EXISTS,
            TaskError::Phase { .. } => Code::FAILED_PRECONDITION,
            TaskError::Unimplemented(_) => Code::UNIMPLEMENTED,
            TaskError::BadName(_) | TaskError::Request(_) | TaskError::Pod(_) | TaskError::Spec(_) => {
                Code::INVALID_ARGUMENT
            }
            TaskError::Bundle { source, .. } => os(source),
            TaskError::Stream(_) => Code::DEADLINE_EXCEEDED,
            TaskError::Watch(_) | TaskError::Task(_) => Code::INTERNAL,
            TaskError::Closing => Code::UNAVAILABLE,
            TaskError::Resize(error) => resize(error),
            TaskError::Boot(error) => boot(&error.cause),
            TaskError::Rootfs(error) => match error {
                RootfsError::Os { source, .. } => os(source),
                _ => Code::INVALID_ARGUMENT,
            },
            TaskError::Disk(error) => disk(error),
            TaskError::Image(error) => image(error),
            TaskError::Hook(error) => match error {
                HookError::Late { .. } => Code::DEADLINE_EXCEEDED,
                HookError::NoNetwork { .. } => Code::INVALID_ARGUMENT,
                HookError::Start { .. } | HookError::Failed { .. } => Code::FAILED_PRECONDITION,
            },
            TaskError::Io(error) => match error {
                IoError::Open { source, .. } => os(source),
                IoError::Scheme { .. } => Code::UNIMPLEMENTED,
                IoError::Logger { source, .. } => match source {
                    LoggerError::Path | LoggerError::Encoding(_) => Code::INVALID_ARGUMENT,
                    LoggerError::Start { source, .. } => os(source),
                    LoggerError::NotReady { .. } => Code::FAILED_PRECONDITION,
                    LoggerError::Late { .. } => Code::DEADLINE_EXCEEDED,
                },
                IoError::NotFifo { .. } | IoError::Loggers { .. } => Code::INVALID_ARGUMENT,
            },
            TaskError::Vmm(error) => vmm(error),
            TaskError::Agent(error) => agent(error),
        }
    }

    /// The error with all its causes on one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

fn os(error: &std::io::Error) -> Code {
    match error.kind() {
        // "Not found" would mean the container to containerd.
        std::io::ErrorKind::NotFound => Code::FAILED_PRECONDITION,
        std::io::ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
        std::io::ErrorKind::InvalidInput => Code::INVALID_ARGUMENT,
        std::io::ErrorKind::OutOfMemory | std::io::ErrorKind::StorageFull => Code::RESOURCE_EXHAUSTED,
        _ => Code::INTERNAL,
    }
}

fn disk(error: &DiskError) -> Code {
    match error {
        DiskError::Missing { .. } | DiskError::TooMany { .. } => Code::INVALID_ARGUMENT,
        DiskError::Open { source, .. } => os(source),
        DiskError::ReadOnly { .. } => Code::FAILED_PRECONDITION,
        DiskError::Attach { source, .. } | DiskError::Leaving { source, .. } => vmm(source),
    }
}

fn image(error: &OpenError) -> Code {
    match error {
        OpenError::Absent { .. } | OpenError::Connection { .. } => Code::UNAVAILABLE,
        OpenError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        OpenError::Refused { .. } | OpenError::Version { .. } => Code::FAILED_PRECONDITION,
        OpenError::Answer { .. } => Code::INTERNAL,
        OpenError::Attach { source, .. } => vmm(source),
        OpenError::TooMany { .. } => Code::INVALID_ARGUMENT,
    }
}

fn boot(cause: &BootCause) -> Code {
    match cause {
        BootCause::Disk(error) => disk(error),
        BootCause::File { .. } => Code::FAILED_PRECONDITION,
        BootCause::Network(NetError::Tap { .. } | NetError::Netlink { .. }) => Code::INTERNAL,
        BootCause::Network(_) => Code::FAILED_PRECONDITION,
        BootCause::Vmm(error) => vmm(error),
        BootCause::Agent(error) => agent(error),
        BootCause::Deadline(_) => Code::DEADLINE_EXCEEDED,
        BootCause::Os { .. } => Code::INTERNAL,
    }
}

fn resize(error: &ResizeError) -> Code {
    match error {
        ResizeError::Beyond { .. } => Code::OUT_OF_RANGE,
        ResizeError::Held { .. } => Code::FAILED_PRECONDITION,
        ResizeError::Busy(_) => Code::DEADLINE_EXCEEDED,
        ResizeError::Ended { resized, .. } => match resized.ending {
            // Never an error; were it one, it would be ours.
            Ending::Done => Code::INTERNAL,
            Ending::Partial => Code::RESOURCE_EXHAUSTED,
            Ending::Refused => Code::FAILED_PRECONDITION,
            Ending::Replaced => Code::ABORTED,
            Ending::TimedOut => Code::DEADLINE_EXCEEDED,
            Ending::Reset => Code::UNAVAILABLE,
        },
    }
}

fn vmm(error: &VmmError) -> Code {
    match error {
        VmmError::NotFound(_) | VmmError::Spawn { .. } | VmmError::SlotTaken => Code::FAILED_PRECONDITION,
        VmmError::Refused { source, .. } => match source.code {
            ErrorCode::InvalidArgument => Code::INVALID_ARGUMENT,
            // A share or a disk, not a container.
            ErrorCode::NotFound | ErrorCode::AlreadyExists | ErrorCode::FailedPrecondition => {
                Code::FAILED_PRECONDITION
            }
            ErrorCode::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
            ErrorCode::Unavailable => Code::UNAVAILABLE,
            ErrorCode::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            ErrorCode::Internal => Code::INTERNAL,
        },
        VmmError::Gone(_) => Code::UNAVAILABLE,
        VmmError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        VmmError::Socket(_) | VmmError::Packet(_) | VmmError::Answer { .. } => Code::INTERNAL,
    }
}

fn agent(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => *code,
        AgentError::Gone { .. } => Code::UNAVAILABLE,
        AgentError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        AgentError::Connection(_) => Code::INTERNAL,
    }
}

/// An error with all its causes on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |e| e.source()) {
        text.push_str(": ");
        text.push_str(&cause.to_string());
    }
    text
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.chain()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::size::Size;
    use crate::sandbox::boot::Stage;
    use vmm_api::{ApiError, Reached, Resized};

    #[test]
    fn what_is_dead_is_not_found_and_what_is_not_there_too() {
        assert_eq!(TaskError::Finished.code(), Code::NOT_FOUND);
        assert_eq!(TaskError::NoContainer("x".into()).code(), Code::NOT_FOUND);
        let agents = AgentError::Refused { call: "Kill", code: Code::NOT_FOUND, message: "x".into() };
        assert_eq!(TaskError::from(agents).code(), Code::NOT_FOUND);
    }

    #[test]
    fn a_missing_kernel_is_not_a_missing_container() {
        let cause = BootCause::File {
            what: "kernel",
            path: "/usr/share/ctvm/vmlinux".into(),
            source: std::io::ErrorKind::NotFound.into(),
        };
        let error = BootError::early(Stage::Files, cause);
        let error = TaskError::from(Arc::new(error));
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        assert_eq!(
            error.chain(),
            "boot failed while opening the guest's files: kernel /usr/share/ctvm/vmlinux: entity not found"
        );
    }

    #[test]
    fn a_resize_that_was_not_done_says_how_far_it_came() {
        let codes = Ending::ALL.map(|ending| {
            let resized = Resized {
                ending,
                vcpus: Some(Reached { asked: 4, reached: Some(3) }),
                memory_mib: None,
                detail: "CPU 3: Cannot allocate memory".into(),
            };
            let error =
                TaskError::from(ResizeError::Ended { resized, limits: "the limits are as they were" });
            assert!(error.chain().contains("vCPUs 3 of 4: CPU 3: Cannot"), "{error}");
            assert!(error.chain().ends_with("; the limits are as they were"), "{error}");
            error.code()
        });
        let expected = [
            Code::INTERNAL,
            Code::RESOURCE_EXHAUSTED,
            Code::FAILED_PRECONDITION,
            Code::ABORTED,
            Code::DEADLINE_EXCEEDED,
            Code::UNAVAILABLE,
        ];
        assert_eq!(codes, expected);
        let (needed, max) = (Size { vcpus: 9, memory_mib: 512 }, Size { vcpus: 8, memory_mib: 1024 });
        let error = TaskError::from(ResizeError::Beyond { needed, max });
        assert_eq!(error.code(), Code::OUT_OF_RANGE);
        assert!(
            error.to_string().contains("needs 9 vCPUs and 512 MiB, and its VM can have 8 vCPUs and 1024 MiB")
        );
    }

    #[test]
    fn the_vmms_words_arrive_with_their_causes() {
        let source = ApiError {
            code: ErrorCode::ResourceExhausted,
            message: "guest memory of 4096 MiB".into(),
            causes: vec!["out of memory".into()],
        };
        let error = TaskError::from(VmmError::Refused { op: "configure", source });
        assert_eq!(error.code(), Code::RESOURCE_EXHAUSTED);
        let ttrpc::Error::RpcStatus(status) = error.into() else { panic!("not a status") };
        assert_eq!(status.message, "the VMM refused configure: guest memory of 4096 MiB: out of memory");
    }
}
