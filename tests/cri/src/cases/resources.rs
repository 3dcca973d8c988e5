use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use k8s_cri::v1::{ContainerConfig, LinuxContainerResources};

use super::{Case, Ground, case};
use crate::Pod;

pub(super) const CASES: &[Case] = &[
    case("a container's memory, CPU and pids limits hold in its control group", limits),
    case("a container over its memory limit ends with 137 and OOMKilled", oom),
    case("a process that is killed for memory beside the first one leaves the container alive", oom_of_child),
    case("limits of a running container are changed", update),
    case("a pod is resized in place, up and down, and has the CPUs behind its limits", resize),
    case("statistics of a container", stats),
    case("statistics of all containers of a pod", stats_of_pod),
    case("a pod's processes are in the control group asked for", cgroup_parent),
    case("a large memory limit has the memory behind it", large_limit),
];

const MIB: i64 = 1 << 20;

fn with(config: &mut ContainerConfig, limits: LinuxContainerResources) {
    config.linux.get_or_insert_default().resources = Some(limits);
}

/// The value of a control group's file in the container, under both layouts.
fn group_file(on: &Ground, id: &str, v2: &str, v1: &str) -> Result<String> {
    let script = format!("cat /sys/fs/cgroup/{v2} 2>/dev/null || cat /sys/fs/cgroup/{v1}");
    on.cri.exec(id, &["sh", "-c", &script], 0)?.ok()
}

fn limits(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut config = pod.forever();
    let unified = [("pids.max".to_owned(), "77".to_owned())].into();
    with(
        &mut config,
        LinuxContainerResources {
            memory_limit_in_bytes: 64 * MIB,
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            unified,
            ..LinuxContainerResources::default()
        },
    );
    let id = pod.start(&config)?;
    let memory = group_file(on, &id, "memory.max", "memory/memory.limit_in_bytes")?;
    ensure!(memory == (64 * MIB).to_string(), "memory limit {memory}");
    let cpu = group_file(on, &id, "cpu.max", "cpu/cpu.cfs_quota_us")?;
    ensure!(cpu.starts_with("50000"), "CPU quota {cpu}");
    let weight = group_file(on, &id, "cpu.weight", "cpu/cpu.shares")?;
    ensure!(["20", "59", "512"].contains(&weight.as_str()), "CPU weight {weight}");
    let pids = group_file(on, &id, "pids.max", "pids/pids.max")?;
    ensure!(pids == "77", "pids limit {pids}");
    Ok(())
}

/// A command that uses so much memory for a moment.
fn eat(mib: u32) -> String {
    format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1")
}

fn oom(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let mut config = pod.container(&["sh", "-c", "exec tail /dev/zero"]);
    with(
        &mut config,
        LinuxContainerResources {
            memory_limit_in_bytes: 32 * MIB,
            memory_swap_limit_in_bytes: 32 * MIB,
            ..LinuxContainerResources::default()
        },
    );
    let id = pod.start(&config)?;
    let code = pod.exit_code(&id)?;
    ensure!(code == 137, "exit code {code}");
    // The event and the exit take separate ways.
    wait_until("the reason is OOMKilled", || Ok(on.cri.status(&id)?.reason == "OOMKilled"))?;
    pod.end()
}

fn oom_of_child(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let mut config = pod.forever();
    with(
        &mut config,
        LinuxContainerResources {
            memory_limit_in_bytes: 64 * MIB,
            memory_swap_limit_in_bytes: 64 * MIB,
            ..LinuxContainerResources::default()
        },
    );
    let id = pod.start(&config)?;
    let done = on.cri.exec(&id, &["sh", "-c", "tail /dev/zero; echo $?"], 0)?;
    ensure!(done.stdout.trim() == "137", "{done:?}");
    ensure!(on.cri.exec(&id, &["echo", "alive"], 0)?.ok()? == "alive", "the container has ended");
    pod.end()
}

fn update(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut config = pod.forever();
    let limits = LinuxContainerResources {
        memory_limit_in_bytes: 64 * MIB,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..LinuxContainerResources::default()
    };
    with(&mut config, limits.clone());
    let id = pod.start(&config)?;
    on.cri.update(
        &id,
        LinuxContainerResources { memory_limit_in_bytes: 96 * MIB, cpu_quota: 70_000, ..limits },
    )?;
    let memory = group_file(on, &id, "memory.max", "memory/memory.limit_in_bytes")?;
    ensure!(memory == (96 * MIB).to_string(), "memory limit {memory}");
    let cpu = group_file(on, &id, "cpu.max", "cpu/cpu.cfs_quota_us")?;
    ensure!(cpu.starts_with("70000"), "CPU quota {cpu}");
    Ok(())
}

fn resize(on: &Ground) -> Result<()> {
    let limits = |quota| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: quota,
        ..LinuxContainerResources::default()
    };
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        config.linux.get_or_insert_default().resources = Some(limits(100_000));
    })?;
    let mut config = pod.forever();
    with(&mut config, limits(100_000));
    let id = pod.start(&config)?;
    // No more than the host has.
    for quota in [200_000, 150_000, 50_000, 200_000] {
        on.cri.update(&id, limits(quota))?;
        let cpu = group_file(on, &id, "cpu.max", "cpu/cpu.cfs_quota_us")?;
        ensure!(cpu.starts_with(&quota.to_string()), "CPU quota {cpu} instead of {quota}");
        // A control group has a new CPU a moment after it is online.
        wait_until("there are CPUs for the quota", || {
            let cpus: i64 = on.cri.exec(&id, &["nproc"], 0)?.ok()?.parse()?;
            Ok(cpus * 100_000 >= quota)
        })?;
    }
    pod.end()
}

fn stats(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let id = pod.start_forever()?;
    on.cri.exec(&id, &["sh", "-c", &eat(8)], 0)?.ok()?;
    let stats = on.cri.stats(&id)?;
    let cpu = stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref());
    ensure!(cpu.is_some_and(|cpu| cpu.value > 1_000_000), "CPU time {cpu:?}");
    let memory = stats.memory.as_ref().and_then(|memory| memory.working_set_bytes.as_ref());
    ensure!(memory.is_some_and(|memory| memory.value > 4096), "memory {memory:?}");
    let attributes = stats.attributes.context("statistics without attributes")?;
    ensure!(attributes.id == id, "statistics of {}", attributes.id);
    Ok(())
}

fn stats_of_pod(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let mut ids = [pod.start_forever()?, pod.start_forever()?];
    ids.sort();
    let mut got: Vec<_> =
        on.cri.stats_of_pod(&pod.id)?.into_iter().filter_map(|s| Some(s.attributes?.id)).collect();
    got.sort();
    ensure!(got == ids, "statistics of {got:?} instead of {ids:?}");
    pod.end()
}

fn cgroup_parent(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let parent = &pod.config.linux.as_ref().context("no Linux part")?.cgroup_parent;
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"];
    let folder = roots.iter().map(|root| Path::new(root).join(parent.trim_start_matches('/')));
    let folder = folder.into_iter().find(|folder| folder.is_dir());
    let folder = folder.with_context(|| format!("there is no control group {parent}"))?;
    ensure!(processes_below(&folder)? > 0, "nothing runs in {}", folder.display());
    pod.end()
}

fn processes_below(folder: &Path) -> Result<usize> {
    let mut count = std::fs::read_to_string(folder.join("cgroup.procs"))?.lines().count();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            count += processes_below(&entry.path())?;
        }
    }
    Ok(count)
}

fn large_limit(on: &Ground) -> Result<()> {
    // What a pod asks for as a whole is known when it is made.
    let asked =
        LinuxContainerResources { memory_limit_in_bytes: 700 * MIB, ..LinuxContainerResources::default() };
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        config.linux.get_or_insert_default().resources = Some(asked.clone());
    })?;
    let mut config = pod.container(&["sh", "-c", &format!("{}; exit 0", eat(500))]);
    with(&mut config, asked.clone());
    let done = pod.finish(&config)?;
    ensure!(done.code == 0, "{done:?}");
    pod.end()
}
