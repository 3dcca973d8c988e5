//! The pod's network in the VM.
//!
//! ```text
//!  pod's network namespace                       VM
//!    eth0 ── ingress: redirect ──> tap0 ── fd ──> virtio-net ── eth0: the same MAC, MTU, addresses, routes
//!      ^ <── redirect :ingress ─────┘
//! ```
//!
//! What a CNI plugin made is looked at, not changed: each interface gets a tap beside it, and everything that comes in
//! at the one goes out at the other (`tc`'s mirred action), so that the namespace's own stack sees nothing of it any
//! more. The guest is told what was found as the rtnetlink requests that make it so there. Interfaces are found once,
//! when the sandbox boots.
//!
//! Taps end with the VM. The redirections of an interface that outlives the sandbox are taken away at its end, also by
//! `delete` after the shim was killed: they are in the state file.

mod guest;
mod namespace;
mod redirect;
mod scan;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use agent_api::sandbox::NetworkStep;
use serde::{Deserialize, Serialize};
use vmm_api::config::MAX_NET_PAIRS;

pub use namespace::{in_new, within};
pub use scan::Interface;

/// Most interfaces of a pod, the loopback apart (as many as a VM has network devices).
pub const MAX_INTERFACES: usize = 8;

/// A network that the VM cannot have.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There is no namespace to connect the VM to.
    #[error(
        "the host's network is asked for, which a VM cannot share: give the pod a network namespace (no hostNetwork, no --net-host)"
    )]
    Host,
    /// The pod, or its VMM, ended before its network was there.
    #[error("the pod was given up before it had a network")]
    Abandoned,
    /// The namespace cannot be entered.
    #[error("network namespace {path}")]
    Namespace {
        /// Where it should be.
        path: PathBuf,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a request, or its answer makes no sense.
    #[error("{what}")]
    Netlink {
        /// What was tried.
        what: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// There is no way to connect the VM to it.
    #[error(
        "interface {name} is of kind {kind}; a VM can be connected to veth, macvlan, ipvlan, vlan, bond and tap"
    )]
    Kind {
        /// Its name.
        name: String,
        /// What it is.
        kind: String,
    },
    /// Too much of a good thing.
    #[error("{count} interfaces are in the pod's network namespace; a VM has {MAX_INTERFACES} at most")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// No tap.
    #[error("tap {name}")]
    Tap {
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What is to be undone on the host when the sandbox ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The pod's namespace.
    pub namespace: PathBuf,
    /// Names of the interfaces that are redirected.
    pub interfaces: Vec<String>,
}

/// One network device of the VM.
#[derive(Debug)]
pub struct Device {
    /// The queues of its tap, one for each pair of queues of the guest.
    pub taps: Vec<OwnedFd>,
    /// Its address.
    pub mac: [u8; 6],
    /// Its largest packet, bytes.
    pub mtu: u16,
}

/// A pod's network, ready for a VM.
#[derive(Debug, Default)]
pub struct Network {
    /// Devices in the guest's order.
    pub devices: Vec<Device>,
    /// What the guest's agent has to do.
    pub steps: Vec<NetworkStep>,
}

/// Looks at the namespace at `path`: its interfaces, without the loopback.
///
/// # Errors
/// See [`NetError`].
pub fn look(path: &Path) -> Result<Vec<Interface>, NetError> {
    namespace::within(path, async |handle| scan::interfaces(&handle).await)
}

/// Connects the interfaces that [`look`] found in the namespace at `path`, each with a pair of queues for each of
/// `vcpus`, as far as a device has them.
///
/// # Errors
/// See [`NetError`]; what was done is to be undone by [`leave`].
pub fn join(path: &Path, interfaces: &[Interface], vcpus: u8) -> Result<Network, NetError> {
    let queues = usize::from(vcpus).clamp(1, MAX_NET_PAIRS);
    let devices = namespace::within(path, async |handle| {
        let mut devices = Vec::new();
        for (number, interface) in interfaces.iter().enumerate() {
            let name = format!("tap{number}_ctvm");
            let taps = redirect::through_tap(&handle, interface, &name, queues).await?;
            devices.push(Device { taps, mac: interface.mac, mtu: interface.mtu });
        }
        Ok(devices)
    })?;
    Ok(Network { devices, steps: guest::steps(interfaces) })
}

/// Takes the redirections away. A namespace or an interface that is gone took them along.
///
/// # Errors
/// See [`NetError`].
pub fn leave(joined: &Joined) -> Result<(), NetError> {
    if joined.interfaces.is_empty() || !joined.namespace.exists() {
        return Ok(());
    }
    namespace::within(&joined.namespace, async |handle| {
        for name in &joined.interfaces {
            redirect::undo(&handle, name).await?;
        }
        Ok(())
    })
}
