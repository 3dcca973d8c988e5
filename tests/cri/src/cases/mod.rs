//! The cases that cri-tools' validation suite (`critest`) names, and what Kubernetes users ask of a runtime beyond them.
//!
//! Each is a sequence of CRI calls that ends in an error where the runtime does not do what is asked. They run under
//! any runtime; what cannot have a meaning in a VM says why.

use anyhow::Result;

use crate::{Cri, Pod};

mod exec;
mod lifecycle;
mod logs;
mod namespaces;
mod network;
mod resources;
mod security;
mod streaming;
mod volumes;

/// What a case runs on.
#[derive(Debug, Clone)]
pub struct Ground {
    /// The daemon's CRI.
    pub cri: Cri,
    /// Name of the runtime in its configuration.
    pub handler: String,
    /// Release of containerd: `1.7`.
    pub release: String,
}

impl Ground {
    /// A pod with usual settings.
    pub fn pod(&self) -> Result<Pod> {
        Pod::run(&self.cri, &self.handler)
    }
}

/// One case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// What it is called in reports, after its group.
    pub name: &'static str,
    /// Runs it.
    pub run: fn(&Ground) -> Result<()>,
    /// Why it has no meaning where the containers have a kernel of their own.
    pub not_in_a_vm: Option<&'static str>,
}

const fn case(name: &'static str, run: fn(&Ground) -> Result<()>) -> Case {
    Case { name, run, not_in_a_vm: None }
}

const fn host_only(name: &'static str, run: fn(&Ground) -> Result<()>, why: &'static str) -> Case {
    Case { name, run, not_in_a_vm: Some(why) }
}

/// All cases in their groups.
pub const GROUPS: [(&str, &[Case]); 9] = [
    ("Pods and containers", lifecycle::CASES),
    ("Commands", exec::CASES),
    ("Streams", streaming::CASES),
    ("Logs", logs::CASES),
    ("Resources and statistics", resources::CASES),
    ("Volumes", volumes::CASES),
    ("Network", network::CASES),
    ("Namespaces and sysctls", namespaces::CASES),
    ("Security", security::CASES),
];
