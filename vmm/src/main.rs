//! `ctvm-vmm`: the monitor process of one microVM.
//!
//! Started by its owner with a control socket as descriptor 3. It opens `/dev/kvm` and no other path.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::exit;

use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use vmm::kvm::Kvm;
use vmm::monitor::{Monitor, Outcome};
use vmm::seccomp::{self, Mode};
use vmm_api::CONTROL_FD;

const USAGE: &str = "usage: ctvm-vmm [--log LEVEL] [--seccomp enforce|log|off] [--version]\n\
    Descriptor 3 must be the control socket of its owner (SOCK_SEQPACKET).";

fn main() {
    let main_us = vmm::clock::monotonic_us();
    parse_arguments();
    let socket = adopt_control_socket();
    let kvm = Kvm::open();
    if let Err(e) = &kvm {
        eprintln!("ctvm-vmm: {e}");
    }
    let outcome = Monitor::new(socket, kvm, main_us).expect("epoll on a socket").run();
    match outcome {
        Outcome::Ended(reason) => exit(reason.exit_status().into()),
        Outcome::NeverStarted(error) => {
            eprintln!("ctvm-vmm: {error}");
            exit(24);
        }
    }
}

fn parse_arguments() {
    let mut arguments = std::env::args().skip(1);
    let mut level = "warn".to_owned();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--version" => {
                println!("ctvm-vmm {}", env!("CARGO_PKG_VERSION"));
                exit(0);
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
    eprintln!("ctvm-vmm: {what}\n{USAGE}");
    exit(2);
}

fn adopt_control_socket() -> OwnedFd {
    // SAFETY: nothing of ours has opened or closed a descriptor yet, so number 3 is our owner's or closed; it is only
    // asked what it is.
    let inherited = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    if socket_type(inherited.as_fd()) != Ok(SocketType::SEQPACKET) {
        eprintln!("ctvm-vmm: descriptor 3 is not a control socket (SOCK_SEQPACKET)");
        exit(20);
    }
    // SAFETY: it is open, as just seen, and nothing else in this process knows it.
    unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }
}
