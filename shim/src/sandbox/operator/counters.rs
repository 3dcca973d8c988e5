//! What happened in a sandbox, counted: ends of processes by kind, containers that were made again, and resizes asked for.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::sandbox::resize::By;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExitKind {
    /// With code 0.
    Success,
    /// With another code.
    Error,
    /// By a signal, or with a code that looks like one (above 128).
    Signal,
    /// By the kernel, for want of memory.
    Oom,
    /// With its VM.
    VmLost,
}

impl ExitKind {
    /// All of them: a counter that is not there yet cannot be told from one that is not kept.
    pub const ALL: [ExitKind; 5] =
        [ExitKind::Success, ExitKind::Error, ExitKind::Signal, ExitKind::Oom, ExitKind::VmLost];

    /// The kind of an end that the agent told.
    pub fn of(status: u32, oom: bool) -> Self {
        match status {
            0 => ExitKind::Success,
            _ if oom => ExitKind::Oom,
            1..=128 => ExitKind::Error,
            _ => ExitKind::Signal,
        }
    }

    /// As a label.
    pub fn as_str(self) -> &'static str {
        match self {
            ExitKind::Success => "success",
            ExitKind::Error => "error",
            ExitKind::Signal => "signal",
            ExitKind::Oom => "oom",
            ExitKind::VmLost => "vm_lost",
        }
    }
}

/// Names of containers that are remembered; a pod has few.
const MAX_NAMES: usize = 64;

/// The counters of one sandbox.
#[derive(Debug, Default)]
pub struct Counters(Mutex<Counts>);

/// Their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Ends of containers' first processes and, under `true`, of execs.
    pub exits: BTreeMap<(bool, ExitKind), u64>,
    /// How often a container of that name was made again.
    pub restarts: BTreeMap<String, u64>,
    /// How often the VM was asked to have another size.
    pub resizes: BTreeMap<By, u64>,
}

impl Counters {
    /// A process has ended.
    pub fn exited(&self, is_exec: bool, kind: ExitKind) {
        let mut counts = self.0.lock().expect("no code panics while it holds this lock");
        *counts.exits.entry((is_exec, kind)).or_default() += 1;
    }

    /// A container of that name was made.
    pub fn made(&self, name: &str) {
        let mut counts = self.0.lock().expect("no code panics while it holds this lock");
        if let Some(restarts) = counts.restarts.get_mut(name) {
            *restarts += 1;
        } else if counts.restarts.len() < MAX_NAMES {
            counts.restarts.insert(name.to_owned(), 0);
        }
    }

    /// The VM is asked to have another size.
    pub fn resized(&self, by: By) {
        let mut counts = self.0.lock().expect("no code panics while it holds this lock");
        *counts.resizes.entry(by).or_default() += 1;
    }

    /// The values now.
    pub fn read(&self) -> Counts {
        self.0.lock().expect("no code panics while it holds this lock").clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_a_kind() {
        for (status, oom, kind) in [
            (0, false, "success"),
            (0, true, "success"),
            (3, false, "error"),
            (128, false, "error"),
            (137, false, "signal"),
            (137, true, "oom"),
            (1, true, "oom"),
        ] {
            assert_eq!(ExitKind::of(status, oom).as_str(), kind);
        }
    }

    #[test]
    fn the_second_of_a_name_is_a_restart_and_names_are_bounded() {
        let counters = Counters::default();
        counters.made("app");
        assert_eq!(counters.read().restarts["app"], 0);
        counters.made("app");
        for n in 0..2 * MAX_NAMES {
            counters.made(&format!("other-{n}"));
        }
        let counts = counters.read();
        assert_eq!((counts.restarts["app"], counts.restarts.len()), (1, MAX_NAMES));
        counters.exited(true, ExitKind::Signal);
        counters.exited(true, ExitKind::Signal);
        assert_eq!(counters.read().exits[&(true, ExitKind::Signal)], 2);
    }
}
