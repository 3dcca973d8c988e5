//! The last steps in a container's process before its program: what `libcontainer` leaves to its executor.
//!
//! Its default executor is right but for two things, done here:
//! - Signals: the Rust runtime ignores SIGPIPE, and an ignored signal stays ignored across exec; a container's
//!   `yes | head` would never end.
//! - Seccomp of an exec: `libcontainer` 0.7 builds an exec's `linux` section anew (`adapt_spec_for_tenant`) with no
//!   `seccomp` in it, so that exec'd processes run unfiltered. The container's filter is loaded here instead.

use caps::{CapSet, Capability};
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sys::signal::Signal;
use oci_spec::runtime::{Capability as SpecCapability, LinuxSeccomp, Process, Spec};

use crate::sys;

/// How to become the container's program.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    exec_filter: Option<LinuxSeccomp>,
    /// CAP_SYS_ADMIN was added to what the process asked for, to load the filter, and must go again.
    borrowed_admin: bool,
}

impl Payload {
    /// For a container's first process, whose filter `libcontainer` loads.
    pub fn init() -> Self {
        Self::default()
    }

    /// For an exec in a container with `filter`. Without no-new-privileges the kernel lets only CAP_SYS_ADMIN load
    /// a filter (seccomp(2)), and the executor runs after capabilities are dropped; so `process` is given that
    /// capability until then. The bounding set is left as it is.
    pub fn exec(filter: Option<LinuxSeccomp>, process: &mut Process) -> Self {
        let mut borrowed_admin = false;
        if filter.is_some() && process.no_new_privileges() != Some(true) {
            let mut sets = process.capabilities().clone().unwrap_or_default();
            let mut effective = sets.effective().clone().unwrap_or_default();
            let mut permitted = sets.permitted().clone().unwrap_or_default();
            borrowed_admin = effective.insert(SpecCapability::SysAdmin);
            borrowed_admin |= permitted.insert(SpecCapability::SysAdmin);
            sets.set_effective(Some(effective)).set_permitted(Some(permitted));
            process.set_capabilities(Some(sets));
        }
        Self { exec_filter: filter, borrowed_admin }
    }

    fn load_filter(&self) -> Result<(), String> {
        let Some(filter) = &self.exec_filter else { return Ok(()) };
        if initialize_seccomp(filter).map_err(|error| crate::launch::chain(&error))?.is_some() {
            return Err("a seccomp filter that notifies a listener cannot be given to an exec".to_owned());
        }
        Ok(())
    }

    fn return_admin(&self) -> Result<(), caps::errors::CapsError> {
        if self.borrowed_admin {
            caps::drop(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)?;
            caps::drop(None, CapSet::Permitted, Capability::CAP_SYS_ADMIN)?;
        }
        Ok(())
    }
}

impl Executor for Payload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        for signal in Signal::iterator() {
            // Two of them cannot be handled and cannot be ignored either.
            let _ = sys::default_signal(signal);
        }
        self.load_filter().map_err(ExecutorError::Other)?;
        self.return_admin().map_err(|error| ExecutorError::Other(error.to_string()))?;
        DefaultExecutor {}.exec(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        DefaultExecutor {}.validate(spec)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCapabilities, LinuxSeccompBuilder};

    use super::*;

    fn process(no_new_privileges: Option<bool>, caps: &[SpecCapability]) -> Process {
        let mut sets = LinuxCapabilities::default();
        sets.set_effective(Some(caps.iter().copied().collect()));
        sets.set_permitted(Some(caps.iter().copied().collect()));
        let mut process = Process::default();
        process.set_no_new_privileges(no_new_privileges).set_capabilities(Some(sets));
        process
    }

    fn filter() -> Option<LinuxSeccomp> {
        Some(
            LinuxSeccompBuilder::default()
                .default_action(oci_spec::runtime::LinuxSeccompAction::ScmpActAllow)
                .build()
                .unwrap(),
        )
    }

    #[test]
    fn capability_is_borrowed_only_to_load_a_filter() {
        for (nnp, filter, caps, borrowed) in [
            (None, filter(), &[][..], true),
            (Some(true), filter(), &[], false),
            (None, None, &[], false),
            (None, filter(), &[SpecCapability::SysAdmin], false),
        ] {
            let mut process = process(nnp, caps);
            let payload = Payload::exec(filter, &mut process);
            assert_eq!(payload.borrowed_admin, borrowed);
            let permitted = process.capabilities().as_ref().unwrap().permitted().clone().unwrap();
            assert_eq!(permitted.contains(&SpecCapability::SysAdmin), borrowed || !caps.is_empty());
        }
    }
}
