//! System call filters, one for each kind of thread. The lists are data, `seccomp/*.json`; `build.rs` compiles them.
//!
//! Threads inherit the filter of the thread that makes them, so the main thread confines itself last.

mod breach;

use std::sync::OnceLock;

pub use breach::report_breaches;
use seccompiler::{apply_filter, sock_filter};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What happens to a call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The process ends, and says which call it was.
    Enforce,
    /// The call is carried out; the host's kernel writes it to its log.
    Log,
    /// There are no filters.
    Off,
}

impl Mode {
    /// The mode called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "enforce" => Some(Mode::Enforce),
            "log" => Some(Mode::Log),
            "off" => Some(Mode::Off),
            _ => None,
        }
    }
}

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The main thread.
    Vmm,
    /// A vCPU's.
    Vcpu,
    /// The file server's.
    Fs,
}

static MODE: OnceLock<Mode> = OnceLock::new();

/// Sets the mode of all filters to come. Without it they are enforced.
pub fn set_mode(mode: Mode) {
    // The first one holds.
    let _ = MODE.set(mode);
}

impl Role {
    /// Name of its list.
    fn list(self) -> &'static str {
        match self {
            Role::Vmm => "vmm",
            Role::Vcpu => "vcpu",
            Role::Fs => "fs",
        }
    }
}

/// Confines the calling thread for good.
pub fn confine(role: Role) -> Result<(), seccompiler::Error> {
    let filter: &[sock_filter] = match (MODE.get().copied().unwrap_or(Mode::Enforce), role) {
        (Mode::Off, _) => return Ok(()),
        (Mode::Enforce, Role::Vmm) => &VMM_ENFORCE,
        (Mode::Enforce, Role::Vcpu) => &VCPU_ENFORCE,
        (Mode::Enforce, Role::Fs) => &FS_ENFORCE,
        (Mode::Log, Role::Vmm) => &VMM_LOG,
        (Mode::Log, Role::Vcpu) => &VCPU_LOG,
        (Mode::Log, Role::Fs) => &FS_LOG,
    };
    breach::name_list(role.list());
    apply_filter(filter)
}
