use std::cell::RefCell;

use super::*;

/// A group in a guest with two CPUs, without swap, io.weight and hugetlb, as the guest's kernel is.
fn guest(file: &str) -> Option<String> {
    let text = match file {
        "cpu.max" => "20000 100000\n",
        "cpu.weight" => "100\n",
        "cpu.max.burst" | "cpu.idle" | "memory.low" => "0\n",
        "/sys/devices/system/cpu/online" => "0-1\n",
        "../cpuset.mems.effective" => "0\n",
        "memory.max" | "pids.max" => "max\n",
        "memory.current" => "8388608\n",
        "cpuset.cpus" | "cpuset.mems" => "\n",
        "io.max" => "254:0 rbps=max wbps=4096 riops=max wiops=max\n",
        _ => return None,
    };
    Some(text.to_owned())
}

fn with_swap_and_weights(file: &str) -> Option<String> {
    match file {
        "memory.swap.max" => Some("max\n".into()),
        "io.weight" => Some("default 100\n254:0 50\n".into()),
        "hugetlb.2MB.max" => Some("max\n".into()),
        _ => guest(file),
    }
}

fn planned_in(read: Read<'_>, json: &str) -> Result<Vec<(String, String)>, String> {
    let resources: LinuxResources = serde_json::from_str(json).unwrap();
    let writes = plan(&resources, read).map_err(|error| error.to_string())?;
    Ok(writes.into_iter().map(|write| (write.file, write.value)).collect())
}

fn planned(json: &str) -> Vec<(String, String)> {
    planned_in(&guest, json).unwrap()
}

fn refused(json: &str) -> String {
    planned_in(&guest, json).unwrap_err()
}

fn one(file: &str, value: &str) -> Vec<(String, String)> {
    vec![(file.to_owned(), value.to_owned())]
}

#[test]
fn cpu_time_is_a_quota_a_period_or_both() {
    assert_eq!(planned(r#"{"cpu":{"quota":50000,"period":100000}}"#), one("cpu.max", "50000 100000"));
    assert_eq!(planned(r#"{"cpu":{"quota":50000}}"#), one("cpu.max", "50000"));
    assert_eq!(planned(r#"{"cpu":{"period":50000}}"#), one("cpu.max", "20000 50000"), "the old quota");
    assert_eq!(planned(r#"{"cpu":{"quota":-1,"period":100000}}"#), one("cpu.max", "max 100000"));
    assert_eq!(planned(r#"{"cpu":{"quota":0,"period":0,"shares":0,"cpus":"","mems":""}}"#), []);
    assert_eq!(refused(r#"{"cpu":{"period":10}}"#), "cpu.period is 10, must be 1000 to 1000000 us");
    assert!(refused(r#"{"cpu":{"quota":999}}"#).contains("at least 1000 us"));
    assert!(refused(r#"{"cpu":{"quota":5000,"burst":6000}}"#).contains("at most the quota of 5000 us"));
    assert_eq!(refused(r#"{"cpu":{"idle":2}}"#), "cpu.idle is 2, must be 0 or 1");
    assert!(refused(r#"{"cpu":{"realtimeRuntime":1}}"#).contains("cannot be limited"));
}

#[test]
fn shares_are_weights_of_the_same_meaning() {
    for (shares, weight) in [(1, 1), (2, 1), (1024, 100), (262_144, 10_000), (u64::MAX, 10_000)] {
        assert_eq!(weight_of_shares(shares), weight, "{shares}");
    }
    assert_eq!(planned(r#"{"cpu":{"shares":1024}}"#), one("cpu.weight", "100"));
}

#[test]
fn cpus_are_the_guests() {
    assert_eq!(planned(r#"{"cpu":{"cpus":"0,1"}}"#), one("cpuset.cpus", "0,1"));
    let text = refused(r#"{"cpu":{"cpus":"1-3"}}"#);
    assert_eq!(text, "cpu.cpus is 1-3, must be a list of what this guest has: 0-1");
    for list in ["x", "1-0", "0-", "-1"] {
        assert!(refused(&format!(r#"{{"cpu":{{"cpus":"{list}"}}}}"#)).contains("0-1"), "{list}");
    }
}

#[test]
fn memory_is_bytes_or_no_limit() {
    assert_eq!(planned(r#"{"memory":{"limit":1048576}}"#), one("memory.max", "1048576"));
    assert_eq!(planned(r#"{"memory":{"limit":-1}}"#), one("memory.max", "max"));
    assert_eq!(planned(r#"{"memory":{"limit":0}}"#), []);
    assert_eq!(planned(r#"{"memory":{"reservation":4096}}"#), one("memory.low", "4096"));
    assert!(refused(r#"{"memory":{"limit":-2}}"#).contains("memory.limit is -2"));
    let text = refused(r#"{"memory":{"limit":4096,"checkBeforeUpdate":true}}"#);
    assert_eq!(text, "memory.limit is 4096, must be at least the 8388608 bytes in use");
}

#[test]
fn swap_is_limited_where_there_is_some() {
    let json = r#"{"memory":{"limit":1000,"swap":3000}}"#;
    assert_eq!(planned(json), one("memory.max", "1000"));
    let both = [one("memory.swap.max", "2000"), one("memory.max", "1000")].concat();
    assert_eq!(planned_in(&with_swap_and_weights, json).unwrap(), both);
    let less = r#"{"memory":{"limit":1000,"swap":999}}"#;
    assert!(planned_in(&with_swap_and_weights, less).unwrap_err().contains("at least memory.limit, 1000"));
}

#[test]
fn processes_have_the_kernels_limit() {
    assert_eq!(planned(r#"{"pids":{"limit":32}}"#), one("pids.max", "32"));
    assert_eq!(planned(r#"{"pids":{"limit":-1}}"#), one("pids.max", "max"));
    assert_eq!(planned(r#"{"pids":{"limit":0}}"#), one("pids.max", "1"));
    assert!(refused(r#"{"pids":{"limit":4194305}}"#).contains("at most 4194304"));
}

#[test]
fn block_io_goes_by_device() {
    let json = r#"{"blockIO":{"throttleReadBpsDevice":[{"major":254,"minor":0,"rate":1024}],
                              "throttleWriteIOPSDevice":[{"major":254,"minor":0,"rate":0}]}}"#;
    let both = [one("io.max", "254:0 rbps=1024"), one("io.max", "254:0 wiops=max")].concat();
    assert_eq!(planned(json), both);
    let weight = r#"{"blockIO":{"weight":1000}}"#;
    assert_eq!(refused(weight), "blockIO.weight is 1000, but this guest's kernel has no \"io.weight\"");
    assert_eq!(planned_in(&with_swap_and_weights, weight).unwrap(), one("io.weight", "10000"));
    let text = planned_in(&with_swap_and_weights, r#"{"blockIO":{"weight":9}}"#).unwrap_err();
    assert_eq!(text, "blockIO.weight is 9, must be 10 to 1000");
}

#[test]
fn huge_pages_and_other_files_must_be_there() {
    let json = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#;
    assert!(refused(json).contains("\"hugetlb.2MB.max\""));
    assert_eq!(planned_in(&with_swap_and_weights, json).unwrap(), one("hugetlb.2MB.max", "4194304"));
    assert_eq!(planned(r#"{"unified":{"memory.low":"max"}}"#), one("memory.low", "max"));
    for file in ["../memory.max", "cgroup.kill", "memory.high"] {
        assert!(refused(&format!(r#"{{"unified":{{"{file}":"1"}}}}"#)).contains(file), "{file}");
    }
}

#[test]
fn fields_that_mean_nothing_here_are_left_out() {
    let json = r#"{"devices":[{"allow":false,"access":"rwm"}],"memory":{"swappiness":10,"kernel":1}}"#;
    assert_eq!(planned(json), []);
}

/// Carries `writes` out in a group whose `broken` files refuse everything but `keep`; the files and the outcome.
fn applied(writes: &[(&str, &str)], broken: &[(&str, &str)]) -> (Vec<(String, String)>, String) {
    let log = RefCell::new(Vec::new());
    let write = |file: &str, value: &str| {
        if broken.contains(&(file, value)) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        log.borrow_mut().push((file.to_owned(), value.to_owned()));
        Ok(())
    };
    let writes: Vec<Write> =
        writes.iter().map(|&(file, value)| Write { file: file.into(), value: value.into() }).collect();
    let outcome = apply(&writes, &with_swap_and_weights, &write);
    (log.take(), outcome.map_or_else(|error| error.to_string(), |()| "done".to_owned()))
}

#[test]
fn a_refused_write_takes_the_others_back() {
    let writes =
        [("cpu.max", "1000 2000"), ("io.max", "254:0 rbps=1"), ("io.max", "8:0 rbps=1"), ("memory.max", "1")];
    assert_eq!(applied(&writes, &[]).1, "done");
    let (log, outcome) = applied(&writes, &[("memory.max", "1")]);
    assert_eq!(outcome, "cannot set memory.max to \"1\"; nothing was changed");
    let undone: Vec<(&str, &str)> = log[3..].iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
    assert_eq!(
        undone,
        [
            ("io.max", "8:0 rbps=max wbps=max riops=max wiops=max"),
            ("io.max", "254:0 rbps=max wbps=4096 riops=max wiops=max"),
            ("cpu.max", "20000 100000"),
        ]
    );
    let (_, outcome) = applied(&writes, &[("memory.max", "1"), ("cpu.max", "20000 100000")]);
    assert!(outcome.ends_with("of what was changed before, cpu.max could not be put back"), "{outcome}");
}

#[test]
fn weights_and_lists_are_taken_back_in_their_own_words() {
    assert_eq!(previous("io.weight", "500", "default 100\n254:0 50\n"), "default 100");
    assert_eq!(previous("io.weight", "254:0 500", "default 100\n254:0 50\n"), "254:0 50");
    assert_eq!(previous("io.weight", "8:0 500", "default 100\n254:0 50\n"), "8:0 default");
    assert_eq!(previous("cpuset.cpus", "0", "\n"), "\n");
    assert_eq!(previous("cpuset.cpus", "0", "1\n"), "1");
}
