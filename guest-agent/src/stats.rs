//! What a container has used, in containerd's words: reads the files of its control group into
//! `io.containerd.cgroups.v2.Metrics`.
//!
//! A file that the guest's kernel does not have (swap, pressure stall information) counts as zeros, or as absent where
//! the message can say so; a limit of "max" is the largest number, as containerd has it. Huge pages and RDMA are not
//! read: the guest's kernel has no such controllers.

use std::path::Path;

use agent_api::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use protobuf::MessageField;

use crate::cgroup::value_of;

/// Text of one of a group's files, if it is there.
type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the group at `dir`.
pub fn of(dir: &Path) -> Metrics {
    metrics(&|file| std::fs::read_to_string(dir.join(file)).ok())
}

fn metrics(read: Read<'_>) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: single(read, "pids.current"),
            limit: single(read, "pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(read)),
        memory: MessageField::some(memory(read)),
        memory_events: MessageField::some(memory_events(read)),
        io: MessageField::some(io(read)),
        ..Metrics::default()
    }
}

fn cpu(read: Read<'_>) -> CPUStat {
    let text = read("cpu.stat").unwrap_or_default();
    let of = |key| value_of(&text, key).unwrap_or(0);
    CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        nr_bursts: of("nr_bursts"),
        burst_usec: of("burst_usec"),
        psi: pressure(read, "cpu.pressure"),
        ..CPUStat::default()
    }
}

fn memory(read: Read<'_>) -> MemoryStat {
    let text = read("memory.stat").unwrap_or_default();
    let of = |key| value_of(&text, key).unwrap_or(0);
    // Since 5.9 in two lines, one for anonymous memory and one for files.
    let both = |key: &str| {
        let part = |kind: &str| value_of(&text, &format!("{key}_{kind}")).unwrap_or(0);
        value_of(&text, key).unwrap_or_else(|| part("anon") + part("file"))
    };
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: single(read, "memory.current"),
        usage_limit: single(read, "memory.max"),
        max_usage: single(read, "memory.peak"),
        swap_usage: single(read, "memory.swap.current"),
        swap_limit: single(read, "memory.swap.max"),
        swap_max_usage: single(read, "memory.swap.peak"),
        psi: pressure(read, "memory.pressure"),
        ..MemoryStat::default()
    }
}

fn memory_events(read: Read<'_>) -> MemoryEvents {
    let text = read("memory.events").unwrap_or_default();
    let of = |key| value_of(&text, key).unwrap_or(0);
    MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

fn io(read: Read<'_>) -> IOStat {
    let text = read("io.stat").unwrap_or_default();
    IOStat {
        usage: text.lines().filter_map(device).collect(),
        psi: pressure(read, "io.pressure"),
        ..IOStat::default()
    }
}

/// `<major>:<minor> rbytes=… wbytes=… …`; a device without traffic may have no counters.
fn device(line: &str) -> Option<IOEntry> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IOEntry::default() };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let counter = match key {
            "rbytes" => &mut entry.rbytes,
            "wbytes" => &mut entry.wbytes,
            "rios" => &mut entry.rios,
            "wios" => &mut entry.wios,
            _ => continue,
        };
        *counter = value.parse().unwrap_or(0);
    }
    Some(entry)
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same of `full`.
fn pressure(read: Read<'_>, file: &str) -> MessageField<PSIStats> {
    let Some(text) = read(file) else { return MessageField::none() };
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let word =
            |key: &str| words.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let average = |key| word(key).and_then(percent).unwrap_or(0.0);
        Some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: word("total").and_then(|number| number.parse().ok()).unwrap_or(0),
            ..PSIData::default()
        })
    };
    MessageField::some(PSIStats {
        some: line("some").into(),
        full: line("full").into(),
        ..PSIStats::default()
    })
}

/// `12.34`, as the kernel prints it. The library's way to read any such number is 15 KB of program and tables.
fn percent(text: &str) -> Option<f64> {
    let (whole, hundredths) = text.split_once('.').filter(|(_, hundredths)| hundredths.len() == 2)?;
    let (whole, hundredths) = (whole.parse::<u16>().ok()?, hundredths.parse::<u8>().ok()?);
    Some(f64::from(u32::from(whole) * 100 + u32::from(hundredths)) / 100.0)
}

fn single(read: Read<'_>, file: &str) -> u64 {
    let text = read(file).unwrap_or_default();
    match text.trim_end() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a container in the guest, Linux 6.1, shortened; a pressure file from a kernel that has it.
    fn group(file: &str) -> Option<String> {
        let text = match file {
            "pids.current" => "3\n",
            "pids.max" | "memory.max" => "max\n",
            "cpu.stat" => {
                "usage_usec 41230\nuser_usec 10307\nsystem_usec 30922\nnr_periods 7\nnr_throttled 2\n\
                 throttled_usec 51000\nnr_bursts 0\nburst_usec 0\n"
            }
            "cpu.pressure" => "some avg10=1.53 avg60=0.40 avg300=0.00 total=177\n",
            "memory.current" => "1368064\n",
            "memory.peak" => "2035712\n",
            "memory.stat" => {
                "anon 147456\nfile 0\nkernel 1220608\nkernel_stack 32768\npagetables 49152\nsock 0\nshmem 0\n\
                 file_mapped 0\nfile_dirty 0\nfile_writeback 0\ninactive_anon 126976\nactive_anon 20480\n\
                 slab_reclaimable 300000\nslab_unreclaimable 50000\nslab 350000\nworkingset_refault_anon 2\n\
                 workingset_refault_file 40\nworkingset_activate_anon 0\nworkingset_activate_file 9\n\
                 pgscan 5\npgscan_kswapd 1\npgfault 2105\npgmajfault 1\n"
            }
            "memory.events" => "low 0\nhigh 0\nmax 21\noom 1\noom_kill 1\noom_group_kill 0\n",
            "io.stat" => "7:0 \n254:16 rbytes=1269760 wbytes=4096 rios=47 wios=1 dbytes=0 dios=0\ngarbage\n",
            _ => return None,
        };
        Some(text.to_owned())
    }

    #[test]
    fn counters_are_those_of_the_files() {
        let metrics = metrics(&group);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        let cpu = &metrics.cpu;
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec), (41_230, 10_307, 30_922));
        assert_eq!((cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec), (7, 2, 51_000));
        let memory = &metrics.memory;
        assert_eq!((memory.usage, memory.usage_limit, memory.max_usage), (1_368_064, u64::MAX, 2_035_712));
        assert_eq!((memory.anon, memory.inactive_anon, memory.kernel_stack), (147_456, 126_976, 32_768));
        assert_eq!((memory.slab, memory.pgscan, memory.pgfault), (350_000, 5, 2105), "whole keys");
        let events = &metrics.memory_events;
        assert_eq!((events.max, events.oom, events.oom_kill), (21, 1, 1));
    }

    #[test]
    fn what_newer_kernels_split_is_added_up() {
        let memory = memory(&group);
        assert_eq!((memory.workingset_refault, memory.workingset_activate), (42, 9));
        let before_5_9 = |file: &str| (file == "memory.stat").then(|| "workingset_refault 7\n".to_owned());
        assert_eq!(super::memory(&before_5_9).workingset_refault, 7);
    }

    #[test]
    fn devices_are_told_apart() {
        let io = io(&group);
        let numbers = |entry: &IOEntry| (entry.major, entry.minor, entry.rbytes, entry.wbytes, entry.rios);
        let all: Vec<_> = io.usage.iter().map(numbers).collect();
        assert_eq!(all, [(7, 0, 0, 0, 0), (254, 16, 1_269_760, 4096, 47)]);
    }

    #[test]
    fn pressure_is_there_where_the_kernel_has_it() {
        let metrics = metrics(&group);
        let some = &metrics.cpu.psi.some;
        assert_eq!((some.avg10, some.avg60, some.total), (1.53, 0.4, 177));
        assert!(metrics.cpu.psi.full.is_none() && metrics.memory.psi.is_none());
    }

    #[test]
    fn percents_are_the_kernels() {
        assert_eq!(percent("0.07"), Some(0.07));
        assert_eq!(percent("100.00"), Some(100.0));
        for other in ["", "1", "1.5", ".50", "-1.00", "x.00"] {
            assert_eq!(percent(other), None, "{other}");
        }
    }

    #[test]
    fn a_group_without_files_has_used_nothing() {
        let metrics = metrics(&|_| None);
        assert_eq!((metrics.pids.current, metrics.memory.usage, metrics.cpu.usage_usec), (0, 0, 0));
    }
}
