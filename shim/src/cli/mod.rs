//! `ctvm`, the operator's command line: shows the sandboxes of this node and runs commands in them, boots a VM by hand, and
//! says what a host lacks.
//!
//! Every failure is one line on standard error and an exit status that tells its class:
//!
//! | status | class |
//! | --- | --- |
//! | 0 | the guest powered off or was asked to; every check passed |
//! | 1 | a check failed, a resize was not done, or a defect of ours |
//! | 2 | the command line is wrong |
//! | 3 | a file cannot be opened |
//! | 4 | the VM asked for cannot be made (not a kernel, too little memory, …) |
//! | 5 | this host cannot (no KVM, no permission) |
//! | 6 | the host has not enough of something |
//! | 7 | the VMM cannot be found or started |
//! | 8 | the VMM did not answer, or went away before the VM ran |
//! | 9 | no such sandbox or container, or several of that name |
//! | 10 | the sandbox is dead or does not answer |
//! | 11 | the guest's kernel panicked |
//! | 12 | KVM could not go on running a vCPU |
//! | 13 | the VMM failed |
//! | 14 | the VMM was killed or crashed |
//!
//! `ctvm exec` ends with the status of its command; a failure of its own is 125.

use std::path::PathBuf;
use std::process::ExitStatus;

use vmm_api::{ClientError, ErrorCode, ExitReason};

use crate::cli::node::NodeError;
use crate::error::chain;
use crate::vmm::VmmError;

pub mod check;
pub mod console;
pub mod exec;
pub mod image;
pub mod logs;
pub mod merge;
pub mod metrics;
pub mod node;
pub mod ps;
pub mod resize;
pub mod run;
pub mod table;
pub mod top;

/// A failure of `ctvm`: a line and an exit status.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A file of the VM.
    #[error("{what} {path}")]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it cannot be opened.
        #[source]
        source: std::io::Error,
    },
    /// The VMM could not be started.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// It refused or did not answer.
    #[error("{0}")]
    Client(ClientError),
    /// The VM ended badly.
    #[error("{0}")]
    Ended(ExitReason),
    /// The VMM ended without a word.
    #[error("the VMM crashed or was killed ({status}){}", said(.last_line))]
    Crashed {
        /// What the kernel says of its end.
        status: ExitStatus,
        /// The last line it logged.
        last_line: String,
    },
    /// No such sandbox, or no answer from it.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A resize that could not be tried.
    #[error("not resized: {0}")]
    NotResized(String),
    /// The terminal, or another part of this process.
    #[error("{what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

fn said(last_line: &str) -> String {
    if last_line.is_empty() { String::new() } else { format!(": {last_line}") }
}

impl Failure {
    /// The exit status for it: the table above.
    pub fn exit_status(&self) -> u8 {
        match self {
            Failure::File { .. } => 3,
            Failure::Vmm(_) => 7,
            Failure::Client(ClientError::Api(error)) => match error.code {
                ErrorCode::InvalidArgument | ErrorCode::NotFound | ErrorCode::AlreadyExists => 4,
                ErrorCode::FailedPrecondition => 5,
                ErrorCode::ResourceExhausted => 6,
                ErrorCode::Unavailable | ErrorCode::DeadlineExceeded => 8,
                ErrorCode::Internal => 13,
            },
            Failure::Client(_) => 8,
            Failure::Ended(reason) => reason.exit_status(),
            Failure::Crashed { .. } => 14,
            Failure::Node(error) => error.exit_status(),
            Failure::Local { .. } | Failure::NotResized(_) => 1,
        }
    }

    /// The failure and its causes, one line.
    pub fn line(&self) -> String {
        let text = match self {
            // Its own text says what its sources say.
            Failure::Client(ClientError::Api(error)) => error.to_string(),
            Failure::Client(error) => chain(error),
            other => chain(other),
        };
        text.replace('\n', " ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::ApiError;

    #[test]
    fn classes_have_their_own_status_and_one_line() {
        let api = |code| Failure::Client(ApiError::msg(code, "kernel:\nnot an ELF").into());
        assert_eq!(api(ErrorCode::InvalidArgument).exit_status(), 4);
        assert_eq!(api(ErrorCode::InvalidArgument).line(), "kernel: not an ELF");
        assert_eq!(api(ErrorCode::FailedPrecondition).exit_status(), 5);
        assert_eq!(api(ErrorCode::ResourceExhausted).exit_status(), 6);
        let missing =
            Failure::File { what: "kernel", path: "/x".into(), source: std::io::Error::from_raw_os_error(2) };
        assert_eq!(missing.exit_status(), 3);
        assert_eq!(missing.line(), "kernel /x: No such file or directory (os error 2)");
        let panic = Failure::Ended(ExitReason::GuestPanic { last_words: "a\nKernel panic: x\n".into() });
        assert_eq!(panic.exit_status(), 11);
        assert_eq!(panic.line(), "guest kernel panic: Kernel panic: x");
    }
}
