//! A container's counters in the shape of cgroup v1, for clients on a host that has it.
//!
//! The guest has cgroup v2 alone. What a client expects is what runc's shim would tell it: `io.containerd.cgroups.v2.Metrics`
//! where v2 is mounted at `/sys/fs/cgroup`, else, on v1 and hybrid hosts, `io.containerd.cgroups.v1.Metrics`.

use agent_api::metrics::{self as v2, Metrics};
use agent_api::{METRICS_TYPE_URL, protobuf};
use containerd_shim_protos::cgroups::metrics as v1;
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};

/// `type_url` of v1's message, as containerd writes it.
pub const V1_TYPE_URL: &str = "io.containerd.cgroups.v1.Metrics";

/// What v1 says where there is no limit of memory, in bytes (`PAGE_COUNTER_MAX` pages).
const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// Counters as a client on this host expects them.
pub fn for_host(stats: Any) -> Any {
    if is_v2_host() { stats } else { of_v2(stats) }
}

fn is_v2_host() -> bool {
    const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
    rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(|found| found.f_type == CGROUP2_SUPER_MAGIC)
}

/// The message of v1 with the same counters; what is no message of v2 as it came.
fn of_v2(stats: Any) -> Any {
    if stats.type_url != METRICS_TYPE_URL {
        return stats;
    }
    let Ok(metrics) = Metrics::parse_from_bytes(&stats.value) else { return stats };
    let value = convert(&metrics).write_to_bytes().expect("our own messages serialise");
    Any { type_url: V1_TYPE_URL.to_owned(), value, ..Any::default() }
}

fn convert(metrics: &Metrics) -> v1::Metrics {
    let oom_kill = metrics.memory_events.oom_kill;
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: metrics.pids.current,
            // None, in v1's words.
            limit: Some(metrics.pids.limit).filter(|limit| *limit != u64::MAX).unwrap_or(0),
            ..v1::PidsStat::default()
        }),
        cpu: MessageField::some(cpu(&metrics.cpu)),
        memory: MessageField::some(memory(&metrics.memory, metrics.memory_events.max)),
        blkio: MessageField::some(blkio(&metrics.io)),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill,
            ..v1::MemoryOomControl::default()
        }),
        ..v1::Metrics::default()
    }
}

/// Microseconds become nanoseconds.
fn cpu(cpu: &v2::CPUStat) -> v1::CPUStat {
    let ns = |us: u64| us.saturating_mul(1000);
    v1::CPUStat {
        usage: MessageField::some(v1::CPUUsage {
            total: ns(cpu.usage_usec),
            kernel: ns(cpu.system_usec),
            user: ns(cpu.user_usec),
            ..v1::CPUUsage::default()
        }),
        throttling: MessageField::some(v1::Throttle {
            periods: cpu.nr_periods,
            throttled_periods: cpu.nr_throttled,
            throttled_time: ns(cpu.throttled_usec),
            ..v1::Throttle::default()
        }),
        ..v1::CPUStat::default()
    }
}

/// A container's group has no groups below it, so what is its own is also the total.
fn memory(memory: &v2::MemoryStat, failures: u64) -> v1::MemoryStat {
    let limit = memory.usage_limit.min(UNLIMITED);
    let swap_limit = memory.swap_limit.min(UNLIMITED);
    let entry = |usage, limit, max, failcnt| {
        MessageField::some(v1::MemoryEntry { usage, limit, max, failcnt, ..v1::MemoryEntry::default() })
    };
    v1::MemoryStat {
        cache: memory.file,
        total_cache: memory.file,
        rss: memory.anon,
        total_rss: memory.anon,
        rss_huge: memory.anon_thp,
        total_rss_huge: memory.anon_thp,
        mapped_file: memory.file_mapped,
        total_mapped_file: memory.file_mapped,
        dirty: memory.file_dirty,
        total_dirty: memory.file_dirty,
        writeback: memory.file_writeback,
        total_writeback: memory.file_writeback,
        pg_fault: memory.pgfault,
        total_pg_fault: memory.pgfault,
        pg_maj_fault: memory.pgmajfault,
        total_pg_maj_fault: memory.pgmajfault,
        inactive_anon: memory.inactive_anon,
        total_inactive_anon: memory.inactive_anon,
        active_anon: memory.active_anon,
        total_active_anon: memory.active_anon,
        inactive_file: memory.inactive_file,
        total_inactive_file: memory.inactive_file,
        active_file: memory.active_file,
        total_active_file: memory.active_file,
        unevictable: memory.unevictable,
        total_unevictable: memory.unevictable,
        hierarchical_memory_limit: limit,
        // v1 counts memory and swap together.
        hierarchical_swap_limit: limit.saturating_add(swap_limit).min(UNLIMITED),
        usage: entry(memory.usage, limit, memory.max_usage, failures),
        swap: entry(
            memory.usage.saturating_add(memory.swap_usage),
            limit.saturating_add(swap_limit).min(UNLIMITED),
            memory.max_usage.saturating_add(memory.swap_max_usage),
            0,
        ),
        kernel: entry(memory.kernel_stack.saturating_add(memory.slab), UNLIMITED, 0, 0),
        kernel_tcp: entry(memory.sock, UNLIMITED, 0, 0),
        ..v1::MemoryStat::default()
    }
}

fn blkio(io: &v2::IOStat) -> v1::BlkIOStat {
    let entry = |device: &v2::IOEntry, op: &str, value| v1::BlkIOEntry {
        op: op.to_owned(),
        major: device.major,
        minor: device.minor,
        value,
        ..v1::BlkIOEntry::default()
    };
    let both = |read: fn(&v2::IOEntry) -> u64, write: fn(&v2::IOEntry) -> u64| {
        let of = |device| [entry(device, "Read", read(device)), entry(device, "Write", write(device))];
        io.usage.iter().flat_map(of).collect()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: both(|device| device.rbytes, |device| device.wbytes),
        io_serviced_recursive: both(|device| device.rios, |device| device.wios),
        ..v1::BlkIOStat::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats() -> Any {
        let mut metrics = Metrics::new();
        let cpu = metrics.cpu.mut_or_insert_default();
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec) = (41_230, 10_307, 30_922);
        (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec) = (7, 2, 51_000);
        let memory = metrics.memory.mut_or_insert_default();
        (memory.anon, memory.file, memory.inactive_file) = (147_456, 8192, 4096);
        (memory.usage, memory.usage_limit, memory.max_usage) = (1_368_064, u64::MAX, 2_035_712);
        (memory.kernel_stack, memory.slab) = (32_768, 350_000);
        (metrics.pids.mut_or_insert_default().current, metrics.pids.mut_or_insert_default().limit) =
            (3, u64::MAX);
        let events = metrics.memory_events.mut_or_insert_default();
        (events.max, events.oom_kill) = (21, 1);
        let mut disk = v2::IOEntry::new();
        (disk.major, disk.minor, disk.rbytes, disk.wbytes, disk.rios) = (254, 16, 1_269_760, 4096, 47);
        metrics.io.mut_or_insert_default().usage.push(disk);
        let value = metrics.write_to_bytes().unwrap();
        Any { type_url: METRICS_TYPE_URL.to_owned(), value, ..Any::default() }
    }

    #[test]
    fn counters_are_those_of_v2_in_v1s_units() {
        let any = of_v2(stats());
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        let usage = &metrics.cpu.usage;
        assert_eq!((usage.total, usage.user, usage.kernel), (41_230_000, 10_307_000, 30_922_000));
        let throttling = &metrics.cpu.throttling;
        assert_eq!((throttling.periods, throttling.throttled_periods), (7, 2));
        assert_eq!(throttling.throttled_time, 51_000_000);
        let memory = &metrics.memory;
        assert_eq!((memory.total_rss, memory.cache, memory.total_inactive_file), (147_456, 8192, 4096));
        assert_eq!((memory.usage.usage, memory.usage.max, memory.usage.failcnt), (1_368_064, 2_035_712, 21));
        assert_eq!(memory.kernel.usage, 382_768);
        assert_eq!(metrics.memory_oom_control.oom_kill, 1);
        let bytes = &metrics.blkio.io_service_bytes_recursive;
        let entries: Vec<_> = bytes.iter().map(|e| (e.op.as_str(), e.major, e.minor, e.value)).collect();
        assert_eq!(entries, [("Read", 254, 16, 1_269_760), ("Write", 254, 16, 4096)]);
        assert_eq!(metrics.blkio.io_serviced_recursive[0].value, 47);
    }

    #[test]
    fn no_limit_is_said_in_v1s_words() {
        let metrics = v1::Metrics::parse_from_bytes(&of_v2(stats()).value).unwrap();
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!(metrics.memory.usage.limit, 9_223_372_036_854_771_712);
        assert_eq!(metrics.memory.hierarchical_memory_limit, 9_223_372_036_854_771_712);
        assert_eq!(metrics.memory.swap.limit, 9_223_372_036_854_771_712);
    }

    #[test]
    fn what_is_no_message_of_v2_stays_as_it_is() {
        let other = Any { type_url: "other".into(), value: vec![1], ..Any::default() };
        assert_eq!(of_v2(other.clone()), other);
        let broken = Any { value: vec![0xff], ..stats() };
        assert_eq!(of_v2(broken.clone()), broken);
    }

    #[test]
    fn this_host_gets_its_own_shape() {
        let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let expected = if v2 { METRICS_TYPE_URL } else { V1_TYPE_URL };
        assert_eq!(for_host(stats()).type_url, expected);
    }
}
