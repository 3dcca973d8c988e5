//! `ctvm`: what an operator runs.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use shim::cli::{Failure, check, exec, image, logs, metrics, ps, resize, run, top};
use shim::error::chain;
use shim::vmm::ControlSlot;

/// The microVM sandboxes of this node: what they are, use and say; VMs by hand; and whether this host can run them
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 100)]
struct Ctvm {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the sandboxes of this node
    #[command(after_help = PS_EXAMPLES)]
    Ps(ps::Ps),
    /// Show what each sandbox uses of this host, again and again
    #[command(after_help = TOP_EXAMPLES)]
    Top(top::Top),
    /// Print a sandbox's log: lines of its shim, its monitor and its guest, 64 KiB at most
    #[command(after_help = LOGS_EXAMPLES)]
    Logs(logs::Logs),
    /// Print what a sandbox's console said last, 16 KiB at most
    Console(logs::One),
    /// Print when each stage of a sandbox's start was reached
    Timeline(logs::One),
    /// Run a command in a container of a sandbox
    #[command(after_help = EXEC_EXAMPLES)]
    Exec(exec::Exec),
    /// Have a sandbox's VM grow or shrink while it runs
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(resize::Resize),
    /// Print the metrics of all sandboxes, or serve them to Prometheus
    #[command(after_help = METRICS_EXAMPLES)]
    Metrics(metrics::Metrics),
    /// Boot a VM with its console on this terminal; leave with Ctrl-A x
    #[command(after_help = RUN_EXAMPLES)]
    Run(run::Run),
    /// Say what this host has and lacks, and what to do
    Check,
    /// Images that start before they are downloaded: make, check and serve them
    #[command(subcommand, after_help = IMAGE_EXAMPLES)]
    Image(image::Image),
    /// Serve containerd's snapshots, with Nydus images that are not unpacked
    Snapshotter(image::Rest),
}

const EXAMPLES: &str = "\
Examples:
  ctvm check
  ctvm ps
  ctvm exec -t web -- sh
  ctvm resize --cpus 4 --memory 1024 web
  ctvm run --kernel vmlinux --rootfs rootfs.erofs
  ctr run --rm --runtime io.containerd.ctvm.v2 docker.io/library/busybox:latest demo uname -r

Exit status:
  0   the guest powered off; every check passed     7   the VMM cannot be found or started
  1   a check failed, a resize was not done, or     8   the VMM did not answer
      a defect of ours
  2   wrong command line                            11  the guest's kernel panicked
  3   a file cannot be opened                       12  KVM could not go on running a vCPU
  4   the VM asked for cannot be made               13  the VMM failed
  5   this host cannot (no KVM, no permission)      14  the VMM was killed or crashed
  6   the host has not enough of something
  9   no such sandbox or container, or several      10  the sandbox is dead or does not answer
ctvm exec ends with the status of its command, or 125.";

const PS_EXAMPLES: &str = "\
Examples:
  ctvm ps
  Ids of the sandboxes that are not well:
    ctvm ps --json | jq -r '.[] | select(.remedy) | .sandbox'

VCPUS and MEMORY  what the guest has of what was asked for, as 2/4; a ? where it has not said

States: booting, running, failed (the VM did not come up), ended (the VM is gone), closing; silent (the shim does not
answer) and dead (the shim has ended) come with what to do.";

const TOP_EXAMPLES: &str = "\
Examples:
  ctvm top
  One table, for a script:
    ctvm top --once

VM %CPU      of one processor, the guest's work included; 150.0 is one and a half
VMM PRIVATE  the monitor's own pages
GUEST MEMORY what the host has given of it";

const LOGS_EXAMPLES: &str = "\
Examples:
  ctvm logs web
  As it comes, the guest's lines only:
    ctvm logs -f web | grep component=guest
  What is older, or of a sandbox that has ended, is in containerd's log:
    journalctl -u containerd | grep sandbox=ID";

const EXEC_EXAMPLES: &str = "\
Examples:
  ctvm exec web -- ps aux
  A shell in one container of a pod:
    ctvm exec -t 4f0c --container app -- sh
  Data through it:
    tar c . | ctvm exec web -- tar x -C /tmp

The command has the container's user, capabilities, environment and directory. Its exit status is ours; 125 is a failure
before it ran.";

const RESIZE_EXAMPLES: &str = "\
Examples:
  ctvm resize --cpus 4 web
  ctvm resize --cpus 2 --memory 2G --timeout 60 k8s.io/4f0c

The VM can grow to max_vcpus and max_memory_mib of the runtime's configuration, and memory does not go below what it booted
with. It stays so until a container's limits change, or a container is made that needs more or is removed: then the VM has
the size of the pod's limits again. vCPUs that a container's cpuset names stay.

Exit status: 0 when all is done, 1 when it is not; what was reached is told.";

const METRICS_EXAMPLES: &str = "\
Examples:
  ctvm metrics
  For Prometheus, at http://127.0.0.1:9477/metrics:
    ctvm metrics --listen 127.0.0.1:9477
  One sandbox, without ctvm:
    curl --unix-socket /run/ctvm/NAMESPACE/ID/metrics.sock http://ctvm/metrics";

const IMAGE_EXAMPLES: &str = "\
Examples:
  ctvm image convert registry.example/app:1 registry.example/app:1-nydus
  ctvm image check registry.example/app:1-nydus
  ctvm image serve --config /etc/ctvm/images.toml
  ctvm image stat";

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
    let ended = match Ctvm::parse().command {
        Command::Check => {
            let fine = check::report(&check::findings());
            return if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        Command::Exec(options) => {
            return exec::run(&options).unwrap_or_else(|error| {
                eprintln!("ctvm: {}", chain(&error).replace('\n', " "));
                ExitCode::from(exec::FAILED)
            });
        }
        Command::Run(options) => slot.map_err(Failure::from).and_then(|slot| run::run(&options, slot)),
        Command::Resize(options) => match resize::run(&options) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(failure) => Err(failure),
        },
        Command::Image(image) => Err(image::run(image)),
        Command::Snapshotter(rest) => Err(image::snapshotter(rest)),
        Command::Ps(options) => ps::run(&options),
        Command::Top(options) => top::run(&options),
        Command::Logs(options) => logs::logs(&options),
        Command::Console(options) => logs::console(&options),
        Command::Timeline(options) => logs::timeline(&options),
        Command::Metrics(options) => metrics::run(&options),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("ctvm: {}", failure.line());
            ExitCode::from(failure.exit_status())
        }
    }
}
