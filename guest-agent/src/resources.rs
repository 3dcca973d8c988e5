//! A running container's limits, changed: OCI's resources (in the words of cgroup v1) become writes to the files of the
//! container's control group.
//!
//! ```text
//! resources ─ plan: every value checked ─> writes ─ apply: old values kept ─┬─> all written
//!             └ nothing is touched on error                                 └─> one refused: the old ones put back
//! ```
//!
//! What libcontainer would write at a container's creation is what is written here. Beside it: a value that this guest
//! or its kernel cannot have is refused with the limit before anything is written, and an update is done whole or not at
//! all. Device rules, swappiness and the limits of kernel memory are ignored as they are there, and a limit of swap is
//! where the guest's kernel has none.

use std::path::Path;
use std::{fmt, io};

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

/// Why limits were not changed.
#[derive(Debug, thiserror::Error)]
pub enum ResourcesError {
    /// No guest could have it.
    #[error("{field} is {value}, must be {allowed}")]
    Value { field: &'static str, value: String, allowed: String },
    /// This guest's kernel has no such limit.
    #[error("{field} is {value}, but this guest's kernel has no {file:?}")]
    NoFile { field: &'static str, value: String, file: String },
    /// Control groups v2 have no such limit.
    #[error("{0} cannot be limited in this guest")]
    Unsupported(&'static str),
    /// The kernel refused; all is as it was.
    #[error("cannot set {file} to {value:?}; nothing was changed")]
    Refused {
        file: String,
        value: String,
        #[source]
        cause: io::Error,
    },
    /// The kernel refused, and then refused its own old value.
    #[error("cannot set {file} to {value:?}; of what was changed before, {kept} could not be put back")]
    Halfway {
        file: String,
        value: String,
        kept: String,
        #[source]
        cause: io::Error,
    },
}

/// One write to a group's file.
#[derive(Debug, PartialEq, Eq)]
struct Write {
    file: String,
    value: String,
}

/// Text of one of a group's files, if it is there.
type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Limits of the kernel: kernel/sched/core.c (`tg_set_cfs_bandwidth`), include/linux/threads.h (`PID_MAX_LIMIT`).
const PERIOD_US: std::ops::RangeInclusive<u64> = 1000..=1_000_000;
const MIN_QUOTA_US: i64 = 1000;
const MAX_PIDS: i64 = 4_194_304;
/// OCI's range of block I/O weights.
const IO_WEIGHT: std::ops::RangeInclusive<u16> = 10..=1000;

/// What there is of CPUs and of memory nodes. The parent group's `cpuset.cpus.effective` is no place to look: the kernel brings
/// it up to date some time after a CPU has come, or when a group's `cpuset.cpus` is written (kernel/cgroup/cpuset.c,
/// `cpuset_write_resmask`).
const CPUS_THERE: &str = "/sys/devices/system/cpu/online";
const MEMS_THERE: &str = "../cpuset.mems.effective";

/// Changes the limits of the group at `dir`.
///
/// # Errors
/// See [`ResourcesError`]: nothing is changed then, save in [`ResourcesError::Halfway`].
pub fn update(dir: &Path, resources: &LinuxResources) -> Result<(), ResourcesError> {
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).ok();
    let writes = plan(resources, &read)?;
    apply(&writes, &read, &|file, value| std::fs::write(dir.join(file), value))
}

fn apply(
    writes: &[Write],
    read: Read<'_>,
    write: &dyn Fn(&str, &str) -> io::Result<()>,
) -> Result<(), ResourcesError> {
    let mut undo: Vec<Write> = Vec::new();
    for Write { file, value } in writes {
        let old = read(file).unwrap_or_default();
        if let Err(cause) = write(file, value) {
            let kept: Vec<_> =
                undo.iter().rev().filter(|old| write(&old.file, &old.value).is_err()).collect();
            let (file, value) = (file.clone(), value.clone());
            if kept.is_empty() {
                return Err(ResourcesError::Refused { file, value, cause });
            }
            let kept: Vec<&str> = kept.iter().map(|old| old.file.as_str()).collect();
            return Err(ResourcesError::Halfway { file, value, kept: kept.join(", "), cause });
        }
        undo.push(Write { file: file.clone(), value: previous(file, value, &old) });
    }
    Ok(())
}

/// What to write to `file`, which held `old`, to take the write of `value` back.
fn previous(file: &str, value: &str, old: &str) -> String {
    let key = value.split(' ').next().unwrap_or_default();
    let line = |key: &str| old.lines().find(|line| line.split(' ').next() == Some(key)).map(str::to_owned);
    if file == "io.max" {
        return line(key).unwrap_or_else(|| format!("{key} rbps=max wbps=max riops=max wiops=max"));
    }
    if file.starts_with("io.") {
        // A weight without a device is shown as "default", and that of a device is taken back by this word.
        let (key, otherwise) =
            if key.contains(':') { (key, format!("{key} default")) } else { ("default", old.to_owned()) };
        return line(key).unwrap_or(otherwise);
    }
    // An empty list of CPUs, which means the parent's, is written as an empty line.
    old.lines().next().filter(|line| !line.is_empty()).unwrap_or("\n").to_owned()
}

fn plan(resources: &LinuxResources, read: Read<'_>) -> Result<Vec<Write>, ResourcesError> {
    let mut plan = Plan { writes: Vec::new(), read };
    if let Some(cpu) = resources.cpu() {
        plan.cpu(cpu)?;
        plan.cpuset("cpu.cpus", "cpuset.cpus", CPUS_THERE, cpu.cpus().as_deref())?;
        plan.cpuset("cpu.mems", "cpuset.mems", MEMS_THERE, cpu.mems().as_deref())?;
    }
    if let Some(memory) = resources.memory() {
        plan.memory(memory)?;
    }
    if let Some(pids) = resources.pids() {
        plan.pids(pids.limit())?;
    }
    if let Some(io) = resources.block_io() {
        plan.block_io(io)?;
    }
    for pages in resources.hugepage_limits().iter().flatten() {
        let size = pages.page_size();
        if !size.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(bad("hugepageLimits.pageSize", &size, "a size such as 2MB".into()));
        }
        plan.write("hugepageLimits", &format!("hugetlb.{size}.max"), pages.limit().to_string())?;
    }
    if resources.network().as_ref().is_some_and(|net| net.class_id().is_some_and(|id| id > 0)) {
        return Err(ResourcesError::Unsupported("network.classID"));
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(ResourcesError::Unsupported("rdma"));
    }
    for (file, value) in resources.unified().iter().flatten() {
        // The group's core files start, stop and move processes.
        if file.contains('/') || file.starts_with("cgroup.") {
            return Err(bad("unified", &file, "the name of a controller's file".into()));
        }
        plan.write("unified", file, value.clone())?;
    }
    Ok(plan.writes)
}

fn bad(field: &'static str, value: &dyn fmt::Display, allowed: String) -> ResourcesError {
    ResourcesError::Value { field, value: value.to_string(), allowed }
}

struct Plan<'a> {
    writes: Vec<Write>,
    read: Read<'a>,
}

impl Plan<'_> {
    fn needs(&self, file: &str, field: &'static str, value: &dyn fmt::Display) -> Result<(), ResourcesError> {
        match (self.read)(file) {
            Some(_) => Ok(()),
            None => Err(ResourcesError::NoFile { field, value: value.to_string(), file: file.to_owned() }),
        }
    }

    fn write(&mut self, field: &'static str, file: &str, value: String) -> Result<(), ResourcesError> {
        self.needs(file, field, &value)?;
        self.writes.push(Write { file: file.to_owned(), value });
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), ResourcesError> {
        if cpu.realtime_runtime().is_some_and(|us| us > 0) || cpu.realtime_period().is_some_and(|us| us > 0) {
            return Err(ResourcesError::Unsupported("cpu.realtimeRuntime"));
        }
        if let Some(shares) = cpu.shares().filter(|&shares| shares > 0) {
            self.write("cpu.shares", "cpu.weight", weight_of_shares(shares).to_string())?;
        }
        let period = cpu.period().filter(|&us| us > 0);
        if let Some(us) = period.filter(|us| !PERIOD_US.contains(us)) {
            return Err(bad("cpu.period", &us, "1000 to 1000000 us".into()));
        }
        if let Some(us) = cpu.quota().filter(|us| (1..MIN_QUOTA_US).contains(us)) {
            return Err(bad("cpu.quota", &us, format!("at least {MIN_QUOTA_US} us, or negative for none")));
        }
        let quota = match cpu.quota().filter(|&us| us != 0) {
            Some(us) if us < 0 => Some("max".to_owned()),
            Some(us) => Some(us.to_string()),
            // The kernel takes a quota alone but no period.
            None => period.and_then(|_| {
                let max = (self.read)("cpu.max")?;
                max.split_whitespace().next().map(str::to_owned)
            }),
        };
        let max = match (quota, period) {
            (Some(quota), Some(period)) => Some(format!("{quota} {period}")),
            (None, Some(period)) => Some(format!("max {period}")),
            (quota, None) => quota,
        };
        if let Some(max) = max {
            self.write("cpu.quota", "cpu.max", max)?;
        }
        if let Some(burst) = cpu.burst() {
            if let Some(quota) = cpu.quota().filter(|&us| us > 0)
                && burst > quota.cast_unsigned()
            {
                return Err(bad("cpu.burst", &burst, format!("at most the quota of {quota} us")));
            }
            self.write("cpu.burst", "cpu.max.burst", burst.to_string())?;
        }
        if let Some(idle) = cpu.idle() {
            if !(0..=1).contains(&idle) {
                return Err(bad("cpu.idle", &idle, "0 or 1".into()));
            }
            self.write("cpu.idle", "cpu.idle", idle.to_string())?;
        }
        Ok(())
    }

    fn cpuset(
        &mut self,
        field: &'static str,
        file: &str,
        there: &str,
        list: Option<&str>,
    ) -> Result<(), ResourcesError> {
        let Some(list) = list.filter(|list| !list.is_empty()) else { return Ok(()) };
        let there = (self.read)(there).unwrap_or_default();
        let there = there.trim_end();
        let allowed = || format!("a list of what this guest has: {there}");
        let wanted = ranges(list).ok_or_else(|| bad(field, &list, allowed()))?;
        let has = ranges(there).unwrap_or_default();
        // The kernel joins neighbours in what it shows, so no wanted range spans two of it.
        if !wanted.iter().all(|w| has.iter().any(|h| h.0 <= w.0 && w.1 <= h.1)) {
            return Err(bad(field, &list, allowed()));
        }
        self.write(field, file, list.to_owned())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), ResourcesError> {
        let bytes = |field, value: Option<i64>| match value {
            Some(bytes) if bytes < -1 => {
                Err(bad(field, &bytes, "a number of bytes, or -1 for no limit".into()))
            }
            Some(0) | None => Ok(None),
            Some(bytes) => Ok(Some(bytes)),
        };
        let limit = bytes("memory.limit", memory.limit())?;
        let reservation = bytes("memory.reservation", memory.reservation())?;
        let swap = bytes("memory.swap", memory.swap())?;
        if let Some(limit) = limit.filter(|&limit| limit > 0 && memory.check_before_update() == Some(true)) {
            let usage =
                (self.read)("memory.current").and_then(|text| text.trim_end().parse().ok()).unwrap_or(0);
            if limit < usage {
                return Err(bad("memory.limit", &limit, format!("at least the {usage} bytes in use")));
            }
        }
        // OCI's limit of swap is that of both together, the kernel's that of swap alone.
        if let Some(both) = swap
            && (self.read)("memory.swap.max").is_some()
        {
            let alone = match (both, limit) {
                (-1, _) | (_, Some(-1)) => "max".to_owned(),
                (both, Some(limit)) if both >= limit => (both - limit).to_string(),
                (both, Some(limit)) => {
                    return Err(bad("memory.swap", &both, format!("at least memory.limit, {limit} bytes")));
                }
                (both, None) => return Err(bad("memory.swap", &both, "given with memory.limit".into())),
            };
            self.write("memory.swap", "memory.swap.max", alone)?;
        }
        if let Some(limit) = limit {
            self.write("memory.limit", "memory.max", number_or_max(limit))?;
        }
        if let Some(reservation) = reservation {
            self.write("memory.reservation", "memory.low", number_or_max(reservation))?;
        }
        Ok(())
    }

    fn pids(&mut self, limit: i64) -> Result<(), ResourcesError> {
        if limit > MAX_PIDS {
            return Err(bad("pids.limit", &limit, format!("at most {MAX_PIDS}, or negative for no limit")));
        }
        // 0 becomes 1 as in runc and libcontainer, for systemd's sake.
        self.write("pids.limit", "pids.max", if limit == 0 { "1".into() } else { number_or_max(limit) })
    }

    fn block_io(&mut self, io: &LinuxBlockIo) -> Result<(), ResourcesError> {
        if io.leaf_weight().is_some_and(|weight| weight > 0) {
            return Err(ResourcesError::Unsupported("blockIO.leafWeight"));
        }
        let bfq = (self.read)("io.bfq.weight").is_some();
        let file = if bfq { "io.bfq.weight" } else { "io.weight" };
        let scaled = |weight: u16| {
            if !IO_WEIGHT.contains(&weight) {
                return Err(bad("blockIO.weight", &weight, "10 to 1000".into()));
            }
            // BFQ has OCI's range; io.weight goes from 1 to 10000.
            Ok(if bfq { u32::from(weight) } else { 1 + (u32::from(weight) - 10) * 9999 / 990 })
        };
        if let Some(weight) = io.weight().filter(|&weight| weight > 0) {
            self.needs(file, "blockIO.weight", &weight)?;
            self.write("blockIO.weight", file, scaled(weight)?.to_string())?;
        }
        for device in io.weight_device().iter().flatten() {
            if let Some(weight) = device.weight().filter(|&weight| weight > 0) {
                let value = format!("{}:{} {}", device.major(), device.minor(), scaled(weight)?);
                self.write("blockIO.weightDevice", file, value)?;
            }
        }
        self.throttle("blockIO.throttleReadBpsDevice", "rbps", io.throttle_read_bps_device().as_deref())?;
        self.throttle("blockIO.throttleWriteBpsDevice", "wbps", io.throttle_write_bps_device().as_deref())?;
        self.throttle("blockIO.throttleReadIOPSDevice", "riops", io.throttle_read_iops_device().as_deref())?;
        self.throttle("blockIO.throttleWriteIOPSDevice", "wiops", io.throttle_write_iops_device().as_deref())
    }

    fn throttle(
        &mut self,
        field: &'static str,
        key: &str,
        devices: Option<&[LinuxThrottleDevice]>,
    ) -> Result<(), ResourcesError> {
        for device in devices.into_iter().flatten() {
            // In cgroup v1, in whose words this is, 0 is no limit.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            let value = format!("{}:{} {key}={rate}", device.major(), device.minor());
            self.write(field, "io.max", value)?;
        }
        Ok(())
    }
}

fn number_or_max(number: i64) -> String {
    if number < 0 { "max".to_owned() } else { number.to_string() }
}

/// `0-2,7` as pairs of first and last.
fn ranges(list: &str) -> Option<Vec<(u32, u32)>> {
    list.trim()
        .split(',')
        .map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last).then_some((first, last))
        })
        .collect()
}

/// cgroup v1's shares, 2 to 262144 with 1024 for a fair one, as v2's weight, 1 to 10000 with 100 for a fair one: the
/// curve through these three points that runc (since 1.3.2) and libcontainer use, so that an update and a creation
/// mean the same.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    #[expect(clippy::cast_precision_loss, reason = "at most 262144")]
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "1 to 10000")]
    let weight = 10f64.powf(exponent).ceil() as u64;
    weight.clamp(1, 10_000)
}

#[cfg(test)]
mod tests;
