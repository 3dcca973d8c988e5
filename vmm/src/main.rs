//! `ctvm-vmm`: the monitor process of one microVM.
//!
//! Started by its owner with a control socket as descriptor 3. It opens `/dev/kvm` and what says how much the host has left, and no
//! other path.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process;

use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use vmm::error::Coded;
use vmm::kvm::KvmError;
use vmm::monitor::{Monitor, Outcome};
use vmm::seccomp::{self, Mode};
use vmm::vm::builder::VmError;
use vmm_api::{CONTROL_FD, exit};

const USAGE: &str = "usage: ctvm-vmm [--log LEVEL] [--seccomp enforce|log|off] [--version]\n\
    Descriptor 3 must be the control socket of its owner (SOCK_SEQPACKET).";

fn main() {
    let main_us = vmm::clock::monotonic_us();
    parse_arguments();
    let socket = adopt_control_socket();
    one_arena();
    if let Err(e) = seccomp::report_breaches() {
        fail(exit::KVM_UNUSABLE, &format!("register a handler for SIGSYS: {e}"));
    }
    if let Err(e) = vmm::bus_error::report() {
        fail(exit::KVM_UNUSABLE, &format!("register a handler for SIGBUS: {e}"));
    }
    let monitor = Monitor::new(socket, main_us);
    let outcome = monitor
        .unwrap_or_else(|e| fail(exit::NO_CONTROL_SOCKET, &format!("wait for descriptor 3: {e}")))
        .run();
    match outcome {
        Outcome::Ended(reason) => {
            log::info!("{reason}");
            process::exit(reason.exit_status().into());
        }
        Outcome::NeverStarted(error) => {
            // As the owner was told: one line with all causes.
            fail(exit_status(&error), &error.to_api().to_string());
        }
    }
}

/// Status of a process whose owner left after `error`.
fn exit_status(error: &VmError) -> u8 {
    match error {
        VmError::NoKvm(KvmError::Missing) => exit::NO_KVM,
        VmError::NoKvm(KvmError::Permission { .. }) => exit::KVM_PERMISSION,
        VmError::NoKvm(_) | VmError::Kvm(_) => exit::KVM_UNUSABLE,
        _ => exit::REFUSED,
    }
}

fn fail(status: u8, what: &str) -> ! {
    eprintln!("ctvm-vmm: error: {what}");
    process::exit(status.into());
}

fn parse_arguments() {
    let mut arguments = std::env::args().skip(1);
    let mut level = "warn".to_owned();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--version" => {
                println!("ctvm-vmm {}", env!("CARGO_PKG_VERSION"));
                process::exit(0);
            }
            "--log" => level = arguments.next().unwrap_or_default(),
            "--seccomp" => match Mode::parse(&arguments.next().unwrap_or_default()) {
                Some(mode) => seccomp::set_mode(mode),
                None => usage("--seccomp takes enforce, log or off"),
            },
            other => usage(&format!("unknown argument {other:?}")),
        }
    }
    if vmm::log::start(&level).is_none() {
        usage(&format!("no log level {level:?}: {}", vmm::log::LEVELS));
    }
}

fn usage(what: &str) -> ! {
    fail(exit::USAGE, &format!("{what}\n{USAGE}"));
}

fn adopt_control_socket() -> OwnedFd {
    // SAFETY: nothing of ours has opened or closed a descriptor yet, so number 3 is our owner's or closed; it is only
    // asked what it is.
    let inherited = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    if socket_type(inherited.as_fd()) != Ok(SocketType::SEQPACKET) {
        fail(exit::NO_CONTROL_SOCKET, "descriptor 3 is not a control socket (SOCK_SEQPACKET)");
    }
    // SAFETY: it is open, as just seen, and nothing else in this process knows it.
    unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }
}

/// Keeps the C library from making an allocation arena for each thread: they allocate next to nothing, and an arena
/// costs four calls and some pages.
fn one_arena() {
    // SAFETY: sets a number inside the allocator; there is one thread yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
