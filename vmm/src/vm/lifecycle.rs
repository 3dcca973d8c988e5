//! Which operation is legal in which state: a table, no more. What an operation does is elsewhere.
//!
//! ```text
//!         configure              boot              pause
//! Created ─────────> Configured ──────> Running <────────> Paused
//!    │                   │                 │      resume     │
//!    └───────────────────┴──── end ────────┴─────────────────┘──> Stopped
//! ```
//!
//! An operation changes the state only after it was done: one that fails leaves it as it was.

use vmm_api::Op;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    /// There is a process, but no VM.
    #[default]
    Created,
    /// The VM is made and its kernel loaded.
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// Over.
    Stopped,
}

impl State {
    /// Name for stats and messages.
    pub fn name(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Configured => "configured",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        }
    }
}

/// What an operation may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// Do it; when it is done the VM is in this state.
    Go(State),
    /// It is so already: answer success and do nothing.
    Already,
}

/// An operation is not legal now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// There is no VM yet.
    #[error("{op} needs a configured VM; this one is created")]
    NotConfigured {
        /// Operation.
        op: &'static str,
    },
    /// It can be done once.
    #[error("the VM has been configured; it is {state}")]
    AlreadyConfigured {
        /// State.
        state: &'static str,
    },
    /// It can be done once.
    #[error("the VM has been booted; it is {state}")]
    AlreadyBooted {
        /// State.
        state: &'static str,
    },
    /// It needs running vCPUs.
    #[error("{op} needs a running VM; this one is {state}")]
    NotRunning {
        /// Operation.
        op: &'static str,
        /// State.
        state: &'static str,
    },
    /// It is over.
    #[error("the VM has stopped")]
    Stopped,
}

/// Name of an operation, as it is on the wire.
pub fn name(op: &Op) -> &'static str {
    match op {
        Op::Configure(_) => "configure",
        Op::Boot => "boot",
        Op::Pause => "pause",
        Op::Resume => "resume",
        Op::Attach { .. } => "attach",
        Op::Detach { .. } => "detach",
        Op::ImageChannel { .. } => "image_channel",
        Op::FsMount { .. } => "fs_mount",
        Op::FsUnmount { .. } => "fs_unmount",
        Op::VsockConnect { .. } => "vsock_connect",
        Op::Resize { .. } => "resize",
        Op::Balloon { .. } => "balloon",
        Op::Stats => "stats",
        Op::Shutdown => "shutdown",
    }
}

/// Whether `op` may be done in `state`.
pub fn permit(state: State, op: &Op) -> Result<Permit, Denied> {
    use State::{Configured, Created, Paused, Running, Stopped};
    let not_running = Denied::NotRunning { op: name(op), state: state.name() };
    let not_configured = Denied::NotConfigured { op: name(op) };
    match (op, state) {
        (Op::Stats, _) => Ok(Permit::Go(state)),
        (Op::Shutdown, _) => Ok(Permit::Go(Stopped)),
        (_, Stopped) => Err(Denied::Stopped),

        (Op::Configure(_), Created) => Ok(Permit::Go(Configured)),
        (Op::Configure(_), _) => Err(Denied::AlreadyConfigured { state: state.name() }),

        (Op::Boot, Configured) => Ok(Permit::Go(Running)),
        (Op::Boot, Running | Paused) => Err(Denied::AlreadyBooted { state: state.name() }),

        (Op::Pause, Running) => Ok(Permit::Go(Paused)),
        (Op::Pause, Paused) | (Op::Resume, Running) => Ok(Permit::Already),
        (Op::Resume, Paused) => Ok(Permit::Go(Running)),
        (Op::Pause | Op::Resume, Configured) => Err(not_running),

        (Op::Attach { .. }, Configured) => Ok(Permit::Go(Configured)),
        (Op::Attach { .. }, Running) => Ok(Permit::Go(Running)),
        (Op::Attach { .. }, Paused) => Err(not_running),

        (
            Op::FsMount { .. } | Op::FsUnmount { .. } | Op::ImageChannel { .. } | Op::Balloon { .. },
            Configured | Running | Paused,
        ) => Ok(Permit::Go(state)),

        // A paused guest cannot answer.
        (Op::VsockConnect { .. } | Op::Resize { .. } | Op::Detach { .. }, Running) => Ok(Permit::Go(Running)),
        (Op::VsockConnect { .. } | Op::Resize { .. } | Op::Detach { .. }, Configured | Paused) => {
            Err(not_running)
        }

        (_, Created) => Err(not_configured),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_api::{DeviceName, DiskConfig, FdIndex, FsCache, NewDevice};

    use super::*;

    fn ops() -> Vec<Op> {
        let config: vmm_api::VmConfig = serde_json::from_value(serde_json::json!({
            "version": 1, "vcpus": 1, "memory": {"size_mib": 64}, "kernel": {"image": 0, "cmdline": ""}
        }))
        .unwrap();
        let disk = DiskConfig::read_only(FdIndex(0), "");
        vec![
            Op::Configure(Box::new(config)),
            Op::Boot,
            Op::Pause,
            Op::Resume,
            Op::Attach { device: NewDevice::Disk(disk), timeout_ms: 1 },
            Op::Detach { device: DeviceName::Disk("a".into()), timeout_ms: 1 },
            Op::ImageChannel { disk: "i".into(), channel: FdIndex(0), blobs: vec![] },
            Op::FsMount {
                share: None,
                at: "a".into(),
                dir: FdIndex(0),
                read_only: true,
                cache: FsCache::Shared,
                layer: false,
            },
            Op::FsUnmount { share: None, at: "a".into() },
            Op::VsockConnect { port: 1, timeout_ms: 1 },
            Op::Resize { vcpus: None, memory_mib: Some(64), timeout_ms: 1 },
            Op::Balloon { mib: 1 },
            Op::Stats,
            Op::Shutdown,
        ]
    }

    proptest! {
        /// Whatever an owner asks for, in whatever order: the VM is configured once, boots once, and is over once.
        #[test]
        fn life_goes_one_way(asked in prop::collection::vec(any::<prop::sample::Index>(), 0..40)) {
            let ops = ops();
            let (mut state, mut past) = (State::Created, vec![]);
            for op in asked.iter().map(|i| i.get(&ops)) {
                match permit(state, op) {
                    Ok(Permit::Go(next)) => {
                        past.push((name(op), state, next));
                        state = next;
                    }
                    Ok(Permit::Already) => prop_assert!(matches!(state, State::Running | State::Paused)),
                    Err(Denied::Stopped) => prop_assert_eq!(state, State::Stopped),
                    Err(Denied::NotConfigured { .. }) => prop_assert_eq!(state, State::Created),
                    Err(_) => prop_assert_ne!(state, State::Stopped),
                }
            }
            for once in ["configure", "boot"] {
                prop_assert!(past.iter().filter(|(op, ..)| *op == once).count() <= 1);
            }
            for (op, from, to) in past {
                prop_assert!(from != State::Stopped || to == State::Stopped, "{} left stopped", op);
                let runs = |s| matches!(s, State::Running | State::Paused);
                prop_assert!(runs(from) || !runs(to) || op == "boot");
            }
        }
    }

    #[test]
    fn denials_say_what_is_missing() {
        let ops = ops();
        let said = |state, op: &str| {
            let op = ops.iter().find(|o| name(o) == op).unwrap();
            permit(state, op).unwrap_err().to_string()
        };
        assert_eq!(said(State::Created, "boot"), "boot needs a configured VM; this one is created");
        assert_eq!(
            said(State::Paused, "vsock_connect"),
            "vsock_connect needs a running VM; this one is paused"
        );
        assert_eq!(said(State::Running, "boot"), "the VM has been booted; it is running");
        assert_eq!(said(State::Stopped, "pause"), "the VM has stopped");
        assert_eq!(said(State::Paused, "attach"), "attach needs a running VM; this one is paused");
        assert_eq!(said(State::Configured, "detach"), "detach needs a running VM; this one is configured");
    }
}
