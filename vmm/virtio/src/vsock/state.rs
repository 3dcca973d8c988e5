//! What is saved of a socket device.

use serde::{Deserialize, Serialize};

/// A socket device in a snapshot.
///
/// Connections are not part of it: their other ends are processes which the snapshot does not hold, and a clone
/// must not share them with its origin. A restored device tells the guest so with one
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7) before anything else: the guest ends its connections,
/// keeps its listeners, and reads its context id anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id.
    pub cid: u32,
    /// Host ports that the guest may dial.
    pub ports: Vec<u32>,
}
