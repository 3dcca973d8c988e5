//! `ctvm`: what an operator runs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shim::cli::{Failure, check, run};
use shim::vmm::ControlSlot;

/// MicroVM sandboxes by hand, and a look at whether this host can run them
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXAMPLES, max_term_width = 100)]
struct Ctvm {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a VM with its console on this terminal; leave with Ctrl-A x
    #[command(after_help = RUN_EXAMPLES)]
    Run(run::Run),
    /// Say what this host has and lacks, and what to do
    Check,
}

const EXAMPLES: &str = "\
Examples:
  ctvm check
  ctvm run --kernel vmlinux --rootfs rootfs.erofs
  ctr run --rm --runtime io.containerd.ctvm.v2 docker.io/library/busybox:latest demo uname -r

Exit status:
  0   the guest powered off; every check passed     7   the VMM cannot be found or started
  1   a check failed, or a defect of ours           8   the VMM did not answer
  2   wrong command line                            11  the guest's kernel panicked
  3   a file cannot be opened                       12  KVM could not go on running a vCPU
  4   the VM asked for cannot be made               13  the VMM failed
  5   this host cannot (no KVM, no permission)      14  the VMM was killed or crashed
  6   the host has not enough of something";

const RUN_EXAMPLES: &str = "\
Examples:
  A kernel and an image, two CPUs, half a gigabyte:
    ctvm run --kernel vmlinux --rootfs rootfs.erofs --cpus 2 --memory 512M
  A kernel with everything in its initial RAM disk, and a disk it may write to:
    ctvm run --kernel bzImage --initrd initrd.cpio --disk data.img
  A kernel that says nothing: its very first words on the serial port:
    ctvm run --kernel vmlinux --rootfs rootfs.erofs --serial --console none --cmdline 'ignore_loglevel'";

fn main() -> ExitCode {
    // First: the lowest free descriptors are given out from here on.
    let slot = ControlSlot::reserve();
    match Ctvm::parse().command {
        Command::Check => {
            let fine = check::report(&check::findings());
            if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Command::Run(options) => {
            let ended = slot.map_err(Failure::from).and_then(|slot| run::run(&options, slot));
            match ended {
                Ok(()) => ExitCode::SUCCESS,
                Err(failure) => {
                    eprintln!("ctvm: {}", failure.line());
                    ExitCode::from(failure.exit_status())
                }
            }
        }
    }
}
