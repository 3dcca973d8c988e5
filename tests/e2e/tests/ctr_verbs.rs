//! What is done to a container while it runs, through a real containerd: pause and resume, counters, changed limits, and
//! the news of a process that was killed for want of memory.
#![cfg(feature = "lab")]

mod task;

use std::fs;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use e2e::{Containerd, Events, Status};
use serde_json::{Value, json};

/// One containerd for all tests of this file; they use different container ids.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

/// Time in which a process that is not paused would have counted on.
const A_WHILE: Duration = Duration::from_secs(2);

/// A container that runs `script`, with what a test does to it in between; removed at the end.
fn with_container(id: &str, options: &[&str], script: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let options: Vec<&str> = ["-d"].iter().chain(options).copied().collect();
    CONTAINERD.run(&options, id, &["sh", "-c", script])?.ok()?;
    let outcome = test();
    CONTAINERD.remove(id)?;
    outcome
}

#[test]
fn a_paused_container_makes_no_progress_until_it_is_resumed() -> Result<()> {
    let events = Events::follow(&CONTAINERD)?;
    let shared = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", shared.path().display());
    let script = "i=0; while :; do i=$((i+1)); echo $i > /shared/next; mv /shared/next /shared/count; done";
    with_container("pause", &["--mount", &mount], script, || {
        let count = || -> Result<u64> {
            let text = fs::read_to_string(shared.path().join("count")).unwrap_or_default();
            Ok(text.trim().parse().unwrap_or(0))
        };
        wait_until("it counts", || Ok(count()? > 3))?;
        let refused = CONTAINERD.task(&["resume", "pause"])?;
        ensure!(refused.code != 0 && refused.errors().contains("running"), "{refused:?}");

        CONTAINERD.task(&["pause", "pause"])?.ok()?;
        assert_eq!(CONTAINERD.status("pause")?, Some(Status::Paused));
        let stopped_at = count()?;
        std::thread::sleep(A_WHILE);
        assert_eq!(count()?, stopped_at, "it counts while it is paused");
        let refused = CONTAINERD.task(&["pause", "pause"])?;
        ensure!(refused.code != 0 && refused.errors().contains("paused"), "{refused:?}");
        let refused = CONTAINERD.exec("pause", "e", &["true"])?;
        ensure!(refused.code != 0 && refused.errors().contains("paused"), "{refused:?}");

        CONTAINERD.task(&["resume", "pause"])?.ok()?;
        assert_eq!(CONTAINERD.status("pause")?, Some(Status::Running));
        wait_until("it counts on", || Ok(count()? > stopped_at))?;
        CONTAINERD.exec("pause", "e", &["true"])?.ok()?;

        CONTAINERD.task(&["pause", "pause"])?.ok()?;
        CONTAINERD.kill_task("pause")?;
        CONTAINERD.wait_for("pause", Status::Stopped)
    })?;
    let execs = ["exec-added", "exec-started", "exit"];
    let first = ["create", "start", "paused", "resumed"];
    events.expect("pause", &[&first[..], &execs[..], &["paused", "exit", "delete"][..]].concat())
}

/// What `ctr task metrics` says.
fn metrics(id: &str) -> Result<Value> {
    let text = CONTAINERD.task(&["metrics", "--format", "json", id])?.ok()?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

fn number(metrics: &Value, group: &str, name: &str) -> Result<u64> {
    metrics[group][name].as_u64().with_context(|| format!("{group}.{name} in {metrics}"))
}

#[test]
fn counters_are_plausible_and_follow_what_the_container_does() -> Result<()> {
    const FILL: u64 = 16 << 20;
    with_container("metrics", &["--memory-limit", "67108864"], "sleep 1000; exit", || {
        let table = CONTAINERD.task(&["metrics", "metrics"])?.ok()?;
        ensure!(table.contains("pids.current") && table.contains("memory.usage_limit"), "{table}");
        let before = metrics("metrics")?;
        assert_eq!(number(&before, "pids", "current")?, 2, "the shell and its child: {before}");
        assert_eq!(number(&before, "memory", "usage_limit")?, 64 << 20);
        let used = number(&before, "memory", "usage")?;
        ensure!(used > 64 << 10 && used < 32 << 20, "{used} bytes in use");

        let script = format!(
            "sleep 1000 >/dev/null 2>&1 & sleep 1000 >/dev/null 2>&1 & \
             dd if=/dev/zero of=/dev/shm/fill bs={FILL} count=1"
        );
        CONTAINERD.exec("metrics", "work", &["sh", "-c", &script])?.ok()?;
        let after = metrics("metrics")?;
        assert_eq!(number(&after, "pids", "current")?, 4, "{after}");
        let grown = number(&after, "memory", "usage")?.saturating_sub(used);
        ensure!((FILL..2 * FILL).contains(&grown), "grown by {grown} bytes: {after}");
        ensure!(number(&after, "memory", "shmem")? >= FILL, "{after}");
        ensure!(number(&after, "memory", "max_usage")? >= used + FILL, "{after}");
        let time = |metrics| number(metrics, "cpu", "usage_usec");
        ensure!(time(&after)? > time(&before)?, "{before} {after}");
        Ok(())
    })
}

fn update(id: &str, resources: &Value) -> Result<()> {
    task::update(&CONTAINERD, id, resources)
}

#[test]
fn limits_of_a_running_container_change_together_or_not_at_all() -> Result<()> {
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    with_container("update", &["--memory-limit", "67108864", "--mount", mount], "sleep 1000; exit", || {
        let limits = || {
            let script = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && \
                          cat memory.max memory.low pids.max cpu.max cpu.weight cpuset.cpus";
            CONTAINERD.exec("update", "limits", &["sh", "-c", script])?.ok()
        };
        assert_eq!(limits()?, "67108864\n0\nmax\nmax 100000\n100");
        let all = json!({
            "memory": {"limit": 50_331_648, "reservation": 8_388_608, "swap": 100_663_296},
            "pids": {"limit": 20},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0", "mems": "0"}
        });
        update("update", &all)?;
        let changed = "50331648\n8388608\n20\n50000 100000\n59\n0";
        assert_eq!(limits()?, changed);
        let metrics = metrics("update")?;
        assert_eq!(number(&metrics, "memory", "usage_limit")?, 50_331_648);
        assert_eq!(number(&metrics, "pids", "limit")?, 20);

        for (resources, words) in [
            (json!({"memory": {"limit": 33_554_432}, "cpu": {"cpus": "0-63"}}), "cpu.cpus is 0-63"),
            (json!({"memory": {"limit": 33_554_432}, "pids": {"limit": 5_000_000}}), "at most 4194304"),
            (json!({"memory": {"limit": 33_554_432}, "blockIO": {"weight": 500}}), "io.weight"),
            // Every value is one that could be, and the kernel refuses the last of them.
            (
                json!({"memory": {"limit": 33_554_432}, "unified": {"pids.max": "many"}}),
                "nothing was changed",
            ),
        ] {
            let error = format!("{:#}", update("update", &resources).expect_err("refused"));
            ensure!(error.contains(words), "{error}");
            assert_eq!(limits()?, changed, "after {error}");
        }
        Ok(())
    })
}

#[test]
fn a_container_that_takes_too_much_memory_is_killed_and_containerd_is_told() -> Result<()> {
    let events = Events::follow(&CONTAINERD)?;
    let hungry = ["dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1"];
    let finished = CONTAINERD.run(&["--rm", "--memory-limit", "33554432"], "oom", &hungry)?;
    assert_eq!(finished.code, 137, "{}", finished.errors());
    events.expect("oom", &["create", "start", "oom", "exit", "delete"])
}

#[test]
fn a_child_that_takes_too_much_memory_is_told_while_the_container_lives() -> Result<()> {
    let events = Events::follow(&CONTAINERD)?;
    let script = "dd if=/dev/zero of=/dev/null bs=128M count=1; echo $? > /dev/shm/code; sleep 1000; exit";
    with_container("oom-child", &["--memory-limit", "33554432"], script, || {
        events.expect("oom-child", &["create", "start", "oom"])?;
        wait_until("the child has ended", || {
            Ok(CONTAINERD.exec("oom-child", "code", &["cat", "/dev/shm/code"])?.text() == "137")
        })?;
        assert_eq!(CONTAINERD.status("oom-child")?, Some(Status::Running));
        let told = events.of("oom-child").iter().filter(|topic| *topic == "oom").count();
        assert_eq!(told, 1, "once for one kill");
        Ok(())
    })
}
