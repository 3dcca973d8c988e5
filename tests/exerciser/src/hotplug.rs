//! PID 1 of a guest to which another VMM adds vCPUs and memory: does what udev's rules do, and says what the guest has.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, mount};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketType, bind, recv, socket};

/// The group of events that come from the kernel, not from udev.
const FROM_KERNEL: u32 = 1;
/// Longest event (include/linux/kobject.h, `UEVENT_BUFFER_SIZE`, and the line before it).
const LONGEST: usize = 4096;

/// Brings each CPU that comes online, and after each event that changed something prints `CPUS MEMORY`: how many are online, and
/// `MemTotal` in MiB. Never returns.
pub fn witness() -> Result<()> {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys")] {
        std::fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), None).with_context(|| at.to_owned())?;
    }
    let events = socket(AddressFamily::NETLINK, SocketType::DGRAM, Some(KOBJECT_UEVENT)).context("socket")?;
    bind(&events, &SocketAddrNetlink::new(0, FROM_KERNEL)).context("bind")?;
    let (mut said, mut event) = (String::new(), [0; LONGEST]);
    loop {
        let has = has()?;
        if has != said {
            // One write: each byte is an exit to the VMM.
            std::io::stdout().write_all(has.as_bytes())?;
            std::io::stdout().flush()?;
            said = has;
        }
        let (length, _) = recv(&events, &mut event[..], RecvFlags::empty()).context("an event")?;
        let line = event[..length].split(|byte| *byte == 0).next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        if let Some(device) = line.strip_prefix("add@").filter(|device| is_cpu(device)) {
            let online = Path::new("/sys").join(device.trim_start_matches('/')).join("online");
            // CPU 0 has no such file, and one that is online already says EINVAL to nobody's loss.
            let _ = std::fs::write(online, "1");
        }
    }
}

fn is_cpu(device: &str) -> bool {
    let number = device.strip_prefix("/devices/system/cpu/cpu");
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

fn has() -> Result<String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.split_whitespace().nth(1).context("MemTotal")?.parse::<u64>()? / 1024;
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    let cpus = online.trim().split(',').map(count).sum::<Result<usize>>()?;
    let mut text = String::new();
    writeln!(text, "{cpus} {total}")?;
    Ok(text)
}

/// Of `7` or `0-3`.
fn count(range: &str) -> Result<usize> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    Ok(last.parse::<usize>()? - first.parse::<usize>()? + 1)
}
