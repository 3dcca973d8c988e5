//! The VM follows its containers' limits while they run, through a real containerd: what the guest itself sees, and
//! what the operator is told. The guest's kernel has the upcall driver.
#![cfg(feature = "lab")]

mod task;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use e2e::{BIN, Containerd, Finished, run};
use serde_json::{Value, json};

/// One containerd for all tests of this file; they use different container ids.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

const MIB: u64 = 1 << 20;
/// What the guest's kernel keeps of its memory for itself, in MiB, and of memory that comes.
const KERNEL_MIB: u64 = 40;

fn ctvm(arguments: &[&str]) -> Result<Finished> {
    run(Command::new(Path::new(BIN).join("ctvm")).args(arguments))
}

/// The usual configuration, with `keys` and then `tables`.
fn config(name: &str, keys: &str, tables: &str) -> Result<PathBuf> {
    let path = CONTAINERD.folder().join(format!("{name}.toml"));
    let usual = fs::read_to_string("/etc/ctvm/config.toml")?;
    fs::write(&path, format!("{keys}\n{usual}\n{tables}"))?;
    Ok(path)
}

/// A container of one CPU and 128 MiB that waits, with what a test does to it in between; removed at the end.
fn with_container(id: &str, tables: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    with_vcpus(id, 1, tables, test)
}

/// The same for one that may use so many vCPUs.
fn with_vcpus(id: &str, vcpus: u32, tables: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let config = config(id, "max_vcpus = 4\nmax_memory_mib = 1024", tables)?.display().to_string();
    let quota = (vcpus * 100_000).to_string();
    let limits = ["--cpu-quota", &quota, "--cpu-period", "100000", "--memory-limit", "134217728"];
    let options = [&["-d", "--runtime-config-path", &config][..], &limits].concat();
    CONTAINERD.run(&options, id, &["sleep", "10000"])?.ok()?;
    let outcome = test();
    if outcome.is_err() {
        eprintln!("{}", ctvm(&["logs", id])?.text());
        eprintln!("{}", ctvm(&["console", id])?.text());
    }
    CONTAINERD.remove(id)?;
    outcome
}

fn update(id: &str, resources: &Value) -> Result<()> {
    task::update(&CONTAINERD, id, resources)
}

fn limits(quota: u32, mib: u64) -> Value {
    json!({"cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": mib * MIB}})
}

/// CPUs online and memory in MiB as a process of the container sees them, when it may use all of these CPUs: the
/// guest's kernel lets a control group have a new one a moment after it is online.
fn seen(id: &str) -> Result<(u32, u64)> {
    static EXEC: AtomicU32 = AtomicU32::new(0);
    let script = "nproc; grep -c ^processor /proc/cpuinfo; awk '/MemTotal/ {print $2}' /proc/meminfo";
    let mut seen = (0, 0);
    wait_until("every CPU can be used", || {
        let exec = format!("e{}", EXEC.fetch_add(1, Ordering::Relaxed));
        let text = CONTAINERD.exec(id, &exec, &["sh", "-c", script])?.ok()?;
        let numbers: Vec<u64> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
        let &[usable, online, kib] = numbers.as_slice() else { anyhow::bail!("{text}") };
        seen = (u32::try_from(online)?, kib / 1024);
        Ok(usable == online)
    })?;
    Ok(seen)
}

/// vCPUs and MiB of a sandbox, that the guest has and that were asked for.
fn sizes(id: &str) -> Result<[u64; 4]> {
    let list: Vec<Value> = serde_json::from_str(&ctvm(&["ps", "--json"])?.ok()?)?;
    let rows: HashMap<_, _> =
        list.iter().map(|row| (row["sandbox"].as_str().unwrap_or_default(), row)).collect();
    let row = rows.get(id).with_context(|| format!("{list:?}"))?;
    let number = |key: &str| row[key].as_u64().with_context(|| format!("{key} in {row}"));
    Ok([number("vcpus")?, number("vcpus_asked")?, number("memory_mib")?, number("memory_asked_mib")?])
}

/// Whether the guest has what the operator is told, and as much as it should.
fn is(id: &str, vcpus: u32, mib: u64) -> Result<()> {
    assert_eq!(sizes(id)?, [vcpus.into(), vcpus.into(), mib, mib]);
    let (cpus, total) = seen(id)?;
    assert_eq!(cpus, vcpus);
    ensure!(total <= mib && total + KERNEL_MIB >= mib, "MemTotal is {total} of {mib} MiB");
    Ok(())
}

#[test]
fn a_container_has_the_vm_that_its_limits_need() -> Result<()> {
    with_container("grow", "", || {
        is("grow", 1, 192)?;
        update("grow", &limits(250_000, 448))?;
        is("grow", 3, 512)?;
        // The memory is there, and the container may use it.
        let eat = "dd if=/dev/zero of=/dev/null bs=380M count=1 2>/dev/null; echo $?";
        assert_eq!(CONTAINERD.exec("grow", "eat", &["sh", "-c", eat])?.ok()?, "0");
        update("grow", &json!({"cpu": {"quota": 150_000}}))?;
        is("grow", 2, 512)?;
        update("grow", &limits(100_000, 128))?;
        is("grow", 1, 192)?;
        let error = format!("{:#}", update("grow", &limits(500_000, 128)).expect_err("more than 4"));
        ensure!(
            error.contains("needs 5 vCPUs and 192 MiB, and its VM can have 4 vCPUs and 1024 MiB"),
            "{error}"
        );
        update("grow", &limits(400_000, 960))?;
        is("grow", 4, 1024)
    })
}

#[test]
fn a_further_container_of_a_pod_has_room_and_leaves_it() -> Result<()> {
    with_container("pod", "", || {
        let annotation = ["--annotation", "io.kubernetes.cri.sandbox-id=pod"];
        let limits = ["--cpu-quota", "150000", "--cpu-period", "100000", "--memory-limit", "268435456"];
        let options = [&["-d"][..], &annotation, &limits].concat();
        CONTAINERD.run(&options, "pod-app", &["sleep", "10000"])?.ok()?;
        is("pod", 3, 448)?;
        CONTAINERD.remove("pod-app")?;
        wait_until("its room is gone", || Ok(sizes("pod")? == [1, 1, 192, 192]))?;
        is("pod", 1, 192)
    })
}

#[test]
fn an_operator_resizes_a_vm() -> Result<()> {
    with_container("op", "", || {
        let text = ctvm(&["resize", "--cpus", "4", "--memory", "640", "op"])?.ok()?;
        ensure!(text.contains("done after"), "{text}");
        is("op", 4, 640)?;
        let refused = ctvm(&["resize", "--cpus", "5", "op"])?;
        ensure!(refused.code == 1, "{refused:?}");
        let text = ctvm(&["resize", "--cpus", "2", "--memory", "192", "op"])?.ok()?;
        eprintln!("{text}");
        is("op", 2, 192)?;
        let metrics = ctvm(&["metrics"])?.ok()?;
        let done = "ctvm_resizes_total{namespace=\"test\",sandbox=\"op\",result=\"done\"} 2";
        ensure!(metrics.lines().any(|line| line == done), "{metrics}");
        let given = metrics.lines().find(|line| {
            line.starts_with("ctvm_guest_memory_given_back_bytes_total{namespace=\"test\",sandbox=\"op\"}")
        });
        let given: u64 = given.and_then(|line| line.split(' ').next_back()).context("given back")?.parse()?;
        assert_eq!(given, 448 * MIB);
        Ok(())
    })
}

#[test]
fn a_vm_that_boots_small_is_as_large_as_its_limits_need() -> Result<()> {
    for small in ["vcpus", "all"] {
        with_vcpus("small", 2, &format!("[resize]\nboot_small = \"{small}\"\n"), || {
            is("small", 2, 192)?;
            let stages = ctvm(&["timeline", "small"])?.ok()?;
            ensure!(stages.contains("vm grown"), "{stages}");
            // Memory that it booted with is there to stay.
            if small == "all" {
                let text = ctvm(&["resize", "--memory", "128", "small"])?.ok()?;
                ensure!(text.contains("done after"), "{text}");
            }
            Ok(())
        })?;
    }
    Ok(())
}
