//! The cases that cri-tools' validation suite (`critest`) names, and what Kubernetes users ask of a runtime beyond them.
//!
//! Each is a sequence of CRI calls that ends in an error where the runtime does not do what is asked. They run under
//! any runtime; what cannot have a meaning in a VM says why.

use std::cell::OnceCell;

use anyhow::{Context, Result};

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
#[derive(Debug)]
pub struct Ground {
    /// The daemon's CRI.
    pub cri: Cri,
    /// Name of the runtime in its configuration.
    pub handler: String,
    /// Release of containerd: `1.7`.
    pub release: String,
    usual: OnceCell<Pod>,
}

impl Ground {
    /// What cases under a runtime of the daemon's run on.
    pub fn new(cri: &Cri, handler: &str, release: &str) -> Ground {
        Ground {
            cri: cri.clone(),
            handler: handler.to_owned(),
            release: release.to_owned(),
            usual: OnceCell::new(),
        }
    }

    /// A pod with usual settings, for cases about the pod.
    pub fn pod(&self) -> Result<Pod> {
        Pod::run(&self.cri, &self.handler)
    }

    /// A pod with usual settings that one case after the other has, for cases about a container in it.
    pub fn usual(&self) -> Result<&Pod> {
        if self.usual.get().is_none() {
            let _ = self.usual.set(self.pod()?);
        }
        self.usual.get().context("a pod was just set")
    }

    /// Runs a case. What it leaves in the usual pod goes, and after a failure the pod.
    pub fn run(&mut self, case: &Case) -> Result<()> {
        let mut result = (case.run)(self);
        if let Some(pod) = self.usual.get() {
            result = result.and_then(|()| pod.remove_containers());
        }
        if result.is_err() {
            self.usual.take();
        }
        result
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
