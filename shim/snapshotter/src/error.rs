//! What containerd is told, by gRPC's codes, which it maps back to its own errors.

use std::io;
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No such snapshot.
    #[error("no snapshot {0:?}")]
    NotFound(String),
    /// One of this name is there, or, for a layer that is not unpacked, containerd is told so.
    #[error("snapshot {0:?} exists")]
    Exists(String),
    /// A parent has to be committed.
    #[error("the parent {0:?} is not committed")]
    ParentNotCommitted(String),
    /// Only active snapshots can be committed, and only what is not committed has mounts.
    #[error("snapshot {name:?} is {is}, not {wanted}")]
    Kind {
        /// Its name.
        name: String,
        /// What it is.
        is: &'static str,
        /// What it has to be.
        wanted: &'static str,
    },
    /// Others stand on it.
    #[error("snapshot {name:?} is the parent of {child:?}")]
    HasChild {
        /// Its name.
        name: String,
        /// One of them.
        child: String,
    },
    /// A filter, a field or a label cannot be understood.
    #[error("{0}")]
    Invalid(String),
    /// The disk.
    #[error("{}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What.
        #[source]
        source: io::Error,
    },
}

impl SnapshotError {
    /// For `map_err`.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
        let path = path.to_owned();
        move |source| SnapshotError::Io { path, source }
    }
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Status {
        let code = match &error {
            SnapshotError::NotFound(_) => Code::NotFound,
            SnapshotError::Exists(_) => Code::AlreadyExists,
            SnapshotError::HasChild { .. } | SnapshotError::Kind { .. } => Code::FailedPrecondition,
            SnapshotError::ParentNotCommitted(_) | SnapshotError::Invalid(_) => Code::InvalidArgument,
            SnapshotError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Code::ResourceExhausted
            }
            SnapshotError::Io { .. } => Code::Internal,
        };
        let mut text = error.to_string();
        if let SnapshotError::Io { source, .. } = &error {
            text = format!("{text}: {source}");
        }
        Status::new(code, text)
    }
}
