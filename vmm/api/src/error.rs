//! Errors that cross the control socket.

use serde::{Deserialize, Serialize};

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}{}", chained(causes))]
pub struct ApiError {
    /// What kind of failure.
    pub code: ErrorCode,
    /// What was tried, with values and limits.
    pub message: String,
    /// The causes below it, outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
}

/// Kinds of failure; the shim maps each to a ttrpc code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request cannot be right in any state.
    InvalidArgument,
    /// It names something that is not there.
    NotFound,
    /// It makes something that is there.
    AlreadyExists,
    /// Not in this state of the VM, or not on this host.
    FailedPrecondition,
    /// The host has not enough of something.
    ResourceExhausted,
    /// The other side is not there (now).
    Unavailable,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// A defect of ours or of the host.
    Internal,
}

impl ApiError {
    /// An error of this kind with `error`'s own text as the message and its sources as causes.
    pub fn new(code: ErrorCode, error: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(error.source(), |e| e.source()).map(ToString::to_string).collect();
        ApiError { code, message: error.to_string(), causes }
    }

    /// An error of this kind that says `message`.
    pub fn msg(code: ErrorCode, message: impl Into<String>) -> Self {
        ApiError { code, message: message.into(), causes: Vec::new() }
    }
}

fn chained(causes: &[String]) -> String {
    causes.iter().map(|c| format!(": {c}")).collect()
}
