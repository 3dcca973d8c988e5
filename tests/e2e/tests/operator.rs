//! What an operator sees of sandboxes that run under a real containerd: `ctvm` and each sandbox's own socket.
#![cfg(feature = "lab")]

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use e2e::containerd::{kill_9, pids_of};
use e2e::{BIN, Census, Containerd, Finished, Status, run};
use serde_json::Value;

/// One test at a time: they count what the node has.
static NODE: Mutex<()> = Mutex::new(());

fn ctvm(arguments: &[&str]) -> Result<Finished> {
    run(Command::new(Path::new(BIN).join("ctvm")).args(arguments))
}

/// The sandboxes of `ctvm ps --json` by id.
fn ps() -> Result<HashMap<String, Value>> {
    let list: Vec<Value> = serde_json::from_str(&ctvm(&["ps", "--json"])?.ok()?)?;
    Ok(list.into_iter().map(|row| (row["sandbox"].as_str().unwrap_or_default().to_owned(), row)).collect())
}

/// Metrics as a scraper reads them: sample without its value to its value. Every family has one `HELP` and one `TYPE`,
/// before its samples.
struct Metrics(HashMap<String, f64>);

impl Metrics {
    fn read(text: &str) -> Result<Metrics> {
        let (mut heads, mut samples) = (HashMap::new(), HashMap::new());
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                let words: Vec<&str> = comment.splitn(3, ' ').collect();
                let &[word @ ("HELP" | "TYPE"), name, rest] = words.as_slice() else {
                    anyhow::bail!("{line}");
                };
                ensure!(word == "HELP" || matches!(rest, "counter" | "gauge" | "histogram"), "{line}");
                ensure!(heads.insert((word, name), ()).is_none(), "a second time: {line}");
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            let name = sample.split('{').next().unwrap_or_default();
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let name = histogram.filter(|name| heads.contains_key(&("TYPE", *name))).unwrap_or(name);
            ensure!(
                ["HELP", "TYPE"].iter().all(|word| heads.contains_key(&(*word, name))),
                "no head: {line}"
            );
            let value = value.parse().with_context(|| line.to_owned())?;
            ensure!(samples.insert(sample.to_owned(), value).is_none(), "a second time: {line}");
        }
        Ok(Metrics(samples))
    }

    /// Of a sandbox of the test's namespace.
    fn of(&self, sandbox: &str, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut sample = format!("{name}{{namespace=\"test\",sandbox=\"{sandbox}\"");
        for (label, value) in labels {
            sample += &format!(",{label}=\"{value}\"");
        }
        sample += "}";
        let value = self.0.get(&sample).copied();
        value.with_context(|| format!("no {sample} in {:#?}", self.0.keys()))
    }
}

fn metrics() -> Result<Metrics> {
    Metrics::read(&ctvm(&["metrics"])?.ok()?)
}

const MIB: f64 = 1024.0 * 1024.0;

#[test]
fn the_operator_sees_two_containers_of_a_pod() -> Result<()> {
    let _node = NODE.lock();
    let containerd = Containerd::start()?;
    let folder = tempfile::tempdir_in("/var/tmp")?;
    // A guest that says something on its console.
    let config = folder.path().join("config.toml");
    let usual = fs::read_to_string("/etc/ctvm/config.toml")?;
    fs::write(&config, format!("cmdline = \"ctvm_mark=1\"\n{usual}"))?;
    let config = config.display().to_string();
    let pod = ["-d", "--annotation", "io.kubernetes.cri.sandbox-id=op-pod"];
    let named = ["--annotation", "io.kubernetes.cri.container-name=app"];
    let first = [&pod[..], &["--runtime-config-path", &config]].concat();
    containerd.run(&first, "op-pod", &["sleep", "1000"])?.ok()?;
    // It ends when it is told to, a while after who tells it is gone.
    let script = "while ! test -e /tmp/end; do sleep 0.2; done; sleep 1; exit 3";
    containerd.run(&[&pod[..], &named].concat(), "op-app", &["sh", "-c", script])?.ok()?;

    let rows = ps()?;
    let row = rows.get("op-pod").with_context(|| format!("{rows:?}"))?;
    assert_eq!((&row["namespace"], &row["state"]), (&"test".into(), &"running".into()), "{row}");
    assert_eq!((&row["vcpus"], &row["memory_mib"]), (&1.into(), &256.into()), "{row}");
    let vmm = i32::try_from(row["vmm_pid"].as_i64().context("vmm_pid")?)?;
    ensure!(pids_of("ctvm-vmm")?.contains(&vmm), "{row}");
    let containers = row["containers"].as_array().context("containers")?;
    assert_eq!(containers.len(), 2, "{row}");
    ensure!(containers.iter().all(|c| c["state"] == "running"), "{row}");
    let table = ctvm(&["ps"])?.ok()?;
    ensure!(table.contains("app running") && table.contains("op-pod"), "{table}");
    let top = ctvm(&["top", "--once"])?.ok()?;
    ensure!(top.lines().any(|l| l.contains("op-pod") && l.contains(" of 256.0 MiB")), "{top}");

    exec_is_like_ctrs(&containerd)?;
    let log = ctvm(&["logs", "op-pod"])?.ok()?;
    let line = |words: &[&str]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(
        log.lines().all(|line| line.contains(" namespace=test ") && line.contains(" sandbox=op-pod")),
        "{log}"
    );
    ensure!(line(&[" component=shim ", "VM runs: guest kernel"]), "{log}");
    // What the container library in the guest complained of.
    ensure!(line(&[" component=guest ", " container=op-app ", " source=container"]), "{log}");
    // The same is in containerd's log.
    wait_until("containerd has the line", || {
        Ok(containerd.log().lines().any(|l| l.contains(" component=guest container=op-app ")))
    })?;
    let console = ctvm(&["console", "op-p"])?.ok()?;
    ensure!(console.contains("CTVM-INIT"), "{console}");
    let stages = ctvm(&["timeline", "op-pod"])?.ok()?;
    ensure!(stages.contains("agent ready") && stages.contains("container running (op-app)"), "{stages}");

    numbers_are_plausible(&metrics()?)?;
    let exits = [("process", "container"), ("kind", "error")];
    assert_eq!(metrics()?.of("op-pod", "ctvm_process_exits_total", &exits)?, 0.0);
    let touched = ctvm(&["exec", "op-pod", "--container", "app", "--", "touch", "/tmp/end"])?;
    assert_eq!(touched.code, 0, "{}", touched.errors());
    containerd.wait_for("op-app", Status::Stopped)?;
    assert_eq!(metrics()?.of("op-pod", "ctvm_process_exits_total", &exits)?, 1.0);
    containerd.remove("op-app")?;
    // Made again under another id, it is the same to the pod.
    containerd.run(&[&pod[..], &named].concat(), "op-app-2", &["sleep", "1000"])?.ok()?;
    let after = metrics()?;
    assert_eq!(after.of("op-pod", "ctvm_container_restarts_total", &[("name", "app")])?, 1.0);
    assert_eq!(after.of("op-pod", "ctvm_containers", &[("state", "running")])?, 2.0);
    containerd.remove("op-app-2")?;
    containerd.remove("op-pod")?;
    wait_until("it is listed no more", || Ok(ps()?.is_empty()))?;
    let (code, errors) = ctvm(&["logs", "op-pod"]).map(|f| (f.code, f.errors()))?;
    ensure!(code == 9 && errors.contains("no sandbox runs on this node"), "{code}: {errors}");
    Ok(())
}

fn exec_is_like_ctrs(containerd: &Containerd) -> Result<()> {
    // The only container beside the pod's own.
    let script = "echo out; echo err >&2; cat /proc/1/comm; exit 42";
    let finished = ctvm(&["exec", "op-pod", "--", "sh", "-c", script])?;
    assert_eq!((finished.code, finished.text().as_str()), (42, "out\nsh"), "{finished:?}");
    assert_eq!(finished.errors().trim_end(), "err");
    let input: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
    let mut cat = Command::new(Path::new(BIN).join("ctvm"));
    let echoed = e2e::run_with_input(cat.args(["exec", "op-pod", "--", "cat"]), input.clone())?;
    ensure!(echoed.code == 0 && echoed.stdout == input, "{} bytes: {}", echoed.stdout.len(), echoed.errors());
    let line = format!("{BIN}/ctvm exec -t op-pod -e A=b --cwd /tmp -- sh -c 'tty; pwd; echo $A; exit 9'");
    let tty = run(Command::new("script").args(["-qec", &line, "/dev/null"]))?;
    ensure!(tty.text().contains("/dev/pts/") && tty.text().contains("/tmp\r\nb"), "{tty:?}");
    assert_eq!(tty.code, 9);
    let missing = ctvm(&["exec", "op-pod", "--", "/no/such/command"])?;
    ensure!(missing.code == 125 && missing.errors().contains("/no/such/command"), "{missing:?}");
    let pause = ctvm(&["exec", "op-pod", "--container", "op-pod", "--", "cat", "/proc/1/comm"])?.ok()?;
    assert_eq!(pause, "sleep");
    // containerd goes on as if nothing had been.
    assert_eq!(containerd.status("op-app")?, Some(Status::Running));
    assert_eq!(containerd.exec("op-app", "after", &["sh", "-c", "exit 5"])?.code, 5);
    Ok(())
}

fn numbers_are_plausible(metrics: &Metrics) -> Result<()> {
    let of = |name: &str| metrics.of("op-pod", name, &[]);
    for name in ["ctvm_sandbox_up", "ctvm_vmm_up", "ctvm_agent_up", "ctvm_agent_cpus", "ctvm_vcpus"] {
        assert_eq!(of(name)?, 1.0, "{name}");
    }
    assert_eq!(of("ctvm_guest_memory_configured_bytes")?, 256.0 * MIB);
    for (name, least, most) in [
        ("ctvm_guest_memory_resident_bytes", 4.0 * MIB, 256.0 * MIB),
        ("ctvm_vmm_memory_private_bytes", 0.05 * MIB, 64.0 * MIB),
        ("ctvm_vmm_memory_pss_bytes", 0.05 * MIB, 64.0 * MIB),
        ("ctvm_shim_memory_private_bytes", 0.1 * MIB, 16.0 * MIB),
        ("ctvm_agent_memory_total_bytes", 128.0 * MIB, 256.0 * MIB),
        ("ctvm_agent_memory_available_bytes", 32.0 * MIB, 256.0 * MIB),
        ("ctvm_agent_resident_bytes", 0.5 * MIB, 32.0 * MIB),
        ("ctvm_vmm_cpu_seconds_total", 0.01, 3600.0),
        ("ctvm_sandbox_uptime_seconds", 0.1, 3600.0),
    ] {
        let value = of(name)?;
        ensure!((least..=most).contains(&value), "{name} is {value}");
    }
    for container in ["op-pod", "op-app"] {
        let of = |name: &str| metrics.of("op-pod", name, &[("container", container)]);
        ensure!(of("ctvm_container_pids")? >= 1.0 && of("ctvm_container_cpu_seconds_total")? > 0.0);
        let used = of("ctvm_container_memory_usage_bytes")?;
        ensure!(used > 0.0 && used < 128.0 * MIB, "{container} uses {used} bytes");
    }
    let reads = [("device", "blk0"), ("counter", "reads")];
    ensure!(metrics.of("op-pod", "ctvm_device_counter_total", &reads)? > 10.0);
    let stage = |name: &str| metrics.of("op-pod", "ctvm_start_stage_seconds", &[("stage", name)]);
    let stages = ["shim start", "vmm exec", "vcpu running", "kernel", "agent ready", "sandbox ready"];
    let times = stages.iter().map(|name| stage(name)).collect::<Result<Vec<f64>>>()?;
    ensure!(times[0] == 0.0 && times.is_sorted(), "{stages:?}: {times:?}");
    ensure!(metrics.0.iter().any(|(k, v)| k.starts_with("ctvm_vcpu_exits_total{") && *v > 0.0));
    assert_eq!(metrics.0.get("ctvm_node_sandboxes{state=\"answering\"}"), Some(&1.0));
    Ok(())
}

/// Lets a process stand still while it is held.
struct Stopped(i32);

impl Stopped {
    fn stop(pid: i32) -> Result<Stopped> {
        run(Command::new("kill").args(["-STOP", &pid.to_string()]))?.ok()?;
        Ok(Stopped(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // One that has ended meanwhile needs no more.
        let _ = run(Command::new("kill").args(["-CONT", &self.0.to_string()]));
    }
}

#[test]
fn the_operator_is_told_of_a_dead_shim_and_what_to_do() -> Result<()> {
    let _node = NODE.lock();
    let containerd = Containerd::start()?;
    containerd.run(&["--rm"], "first", &["true"])?.ok()?;
    let before = Census::take()?;
    containerd.run(&["-d"], "op-dead", &["sleep", "1000"])?.ok()?;
    let shim = i32::try_from(ps()?["op-dead"]["shim_pid"].as_i64().context("shim_pid")?)?;
    {
        // A shim that stands still: what the kernel knows is told all the same.
        let _shim = Stopped::stop(shim)?;
        let row = ps()?.remove("op-dead").context("listed")?;
        assert_eq!(row["state"], "silent", "{row}");
        let silent = metrics()?;
        assert_eq!(silent.of("op-dead", "ctvm_sandbox_up", &[])?, 0.0);
        assert_eq!(silent.0.get("ctvm_node_sandboxes{state=\"silent\"}"), Some(&1.0));
    }
    assert_eq!(ps()?["op-dead"]["state"], "running");

    // containerd would clean up at once.
    let folder = containerd.bundle("op-dead").ancestors().nth(4).context("containerd's folder")?.to_owned();
    let is_ours = |pid: &i32| {
        let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        cmdline.contains(&*folder.to_string_lossy())
    };
    let daemon = pids_of("containerd")?.into_iter().find(is_ours).context("containerd's process")?;
    let stopped = Stopped::stop(daemon)?;
    kill_9(shim)?;
    wait_until("the VMM has seen its lease end", || Ok(pids_of("ctvm-vmm")?.is_empty()))?;
    let row = ps()?.remove("op-dead").context("listed")?;
    assert_eq!((&row["state"], &row["vmm_pid"]), (&"dead".into(), &Value::Null), "{row}");
    let table = ctvm(&["ps"])?.ok()?;
    ensure!(
        table.contains("its shim has ended") && table.contains("-namespace test -id op-dead delete"),
        "{table}"
    );
    let refused = ctvm(&["exec", "op-dead", "--", "true"])?;
    ensure!(refused.code == 125 && refused.errors().contains("is dead"), "{refused:?}");
    assert_eq!(metrics()?.of("op-dead", "ctvm_sandbox_up", &[])?, 0.0);
    drop(stopped);

    wait_until("containerd has cleaned up", || Ok(ps()?.is_empty()))?;
    containerd.remove("op-dead")?;
    before.settle()
}
