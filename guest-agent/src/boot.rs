//! What PID 1 owes the guest before and after it is ready.
//!
//! Order is everything here: the host waits for the connection, so it comes first and needs nothing mounted. The
//! mounts follow while the host prepares its first request.

use std::io::{self, Write};
use std::path::Path;

use nix::sys::reboot::{RebootMode, reboot};
use nix::time::{ClockId, clock_gettime};

use crate::{cgroup, mounts, sys};

/// Where the library keeps its state of each container.
pub const CONTAINERS: &str = "/run/ctvm/containers";
/// Where each container's configuration is.
pub const BUNDLES: &str = "/run/ctvm/bundles";

/// The two moments of the guest's start that the host asks for, microseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
pub struct Timeline {
    pub started_us: u64,
    pub dialled_us: u64,
}

/// Now, as the guest's CLOCK_MONOTONIC has it, in microseconds.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has this clock");
    let seconds = now.tv_sec().cast_unsigned();
    seconds * 1_000_000 + now.tv_nsec().cast_unsigned() / 1000
}

/// Writes `line` to the console if the kernel command line asked for marks (`ctvm_mark=1`, which the kernel hands
/// to PID 1 as environment).
pub fn mark(line: &str) {
    if std::env::var_os("ctvm_mark").is_some() {
        // Without a console there is nobody to see the mark.
        let _ = io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush());
    }
}

/// Makes the empty image a place where containers can be made. What is mounted already (the kernel mounts /dev)
/// is left alone. A mount that fails is reported and does without: what needs it will say so.
pub fn furnish() {
    const HARDENED: &str = "nosuid,nodev,noexec";
    for (source, target, kind, options) in [
        ("proc", "/proc", "proc", HARDENED),
        ("sysfs", "/sys", "sysfs", HARDENED),
        ("devtmpfs", "/dev", "devtmpfs", "nosuid,mode=0755"),
        ("devpts", "/dev/pts", "devpts", "nosuid,noexec,gid=5,mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "tmpfs", "nosuid,nodev,noexec,mode=1777"),
        ("mqueue", "/dev/mqueue", "mqueue", HARDENED),
        ("tmpfs", "/run", "tmpfs", "nosuid,nodev,mode=0755"),
        ("tmpfs", "/tmp", "tmpfs", "nosuid,nodev,mode=1777"),
        ("cgroup2", cgroup::ROOT, "cgroup2", HARDENED),
    ] {
        let target = Path::new(target);
        if kind == "devtmpfs" && target.join("null").exists() {
            continue;
        }
        let options: Vec<String> = options.split(',').map(str::to_owned).collect();
        if let Err(error) = mounts::make(source, target, kind, &options) {
            log::error!("{}", crate::launch::chain(&error));
        }
    }
    let rest = [
        ("make the runtime's folders", make_dirs as fn() -> io::Result<()>),
        ("enable cgroup controllers", cgroup::prepare),
        ("bring loopback up", sys::loopback_up),
        ("let programs reserve memory", overcommit),
    ];
    for (what, step) in rest {
        if let Err(error) = step() {
            log::error!("cannot {what}: {error}");
        }
    }
}

/// On a host, a container may reserve more than its limit and is killed for what it uses. A VM that is hardly larger than
/// the limit would refuse the reservation, by the kernel's guess at what is too much.
fn overcommit() -> io::Result<()> {
    std::fs::write("/proc/sys/vm/overcommit_memory", "1")
}

fn make_dirs() -> io::Result<()> {
    std::fs::create_dir_all(CONTAINERS)?;
    std::fs::create_dir_all(BUNDLES)
}

/// Kills every other process, writes everything back and resets the machine, which the VMM takes for a stop.
pub fn power_off() -> ! {
    // -1: every process but this one (kill(2)). None to kill is an error that means "done".
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL);
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_AUTOBOOT).expect_err("a reboot that succeeds does not return");
    // The kernel turns the end of PID 1 into a panic, which resets as well.
    panic!("cannot reset the machine: {error}");
}
