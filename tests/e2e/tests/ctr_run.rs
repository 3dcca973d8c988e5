//! Containers through a real containerd: `ctr` asks, our shim, VMM, kernel and agent answer.
#![cfg(feature = "lab")]

use std::sync::LazyLock;

use anyhow::Result;
use e2e::command::wait_until;
use e2e::{Containerd, Status, run};

/// One containerd for all tests of this file; they use different container ids.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

fn sh(id: &str, options: &[&str], script: &str) -> Result<e2e::Finished> {
    let options: Vec<&str> = ["--rm"].iter().chain(options).copied().collect();
    CONTAINERD.run(&options, id, &["sh", "-c", script])
}

/// A container that sleeps, with what a test does to it in between; removed at the end.
fn with_sleeper(id: &str, options: &[&str], test: impl FnOnce() -> Result<()>) -> Result<()> {
    let options: Vec<&str> = ["-d"].iter().chain(options).copied().collect();
    CONTAINERD.run(&options, id, &["sleep", "1000"])?.ok()?;
    let outcome = test();
    CONTAINERD.remove(id)?;
    outcome
}

#[test]
fn the_container_runs_under_our_kernel() -> Result<()> {
    let output = sh("kernel", &[], "uname -r; hostname; cat /proc/1/comm; echo to-stderr >&2")?;
    assert_eq!(output.code, 0, "{}", output.errors());
    let host = run(std::process::Command::new("uname").arg("-r"))?.ok()?;
    let text = output.text();
    let guest = text.lines().next().unwrap_or_default();
    assert!(guest.starts_with("6.") || guest.starts_with("5."), "{text}");
    assert_ne!(guest, host, "this is the host's kernel");
    assert_eq!(output.errors().trim(), "to-stderr");
    assert!(!text.contains("to-stderr"), "the streams are apart");
    Ok(())
}

#[test]
fn exit_codes_come_back() -> Result<()> {
    for code in [0, 1, 42, 255] {
        assert_eq!(sh(&format!("exit-{code}"), &[], &format!("exit {code}"))?.code, code);
    }
    Ok(())
}

#[test]
fn signals_are_exit_codes_above_128() -> Result<()> {
    for (signal, code) in [("KILL", 137), ("TERM", 143)] {
        let id = format!("signal-{signal}");
        // PID 1 of a namespace gets no signal it has no handler for, except from outside.
        let mut ctr = CONTAINERD.run_command(
            &["--rm"],
            &id,
            &["sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"],
        );
        let waiting = std::thread::spawn(move || run(&mut ctr));
        CONTAINERD.wait_for(&id, Status::Running)?;
        CONTAINERD.task(&["kill", "--signal", signal, &id])?.ok()?;
        let finished = waiting.join().expect("no panic")?;
        assert_eq!(finished.code, code, "{}", finished.errors());
    }
    Ok(())
}

#[test]
fn a_detached_container_is_listed_killed_and_removed() -> Result<()> {
    with_sleeper("detached", &[], || {
        let ps = CONTAINERD.task(&["ps", "detached"])?.ok()?;
        assert!(ps.lines().count() >= 2, "{ps}");
        CONTAINERD.task(&["kill", "--signal", "KILL", "detached"])?.ok()?;
        CONTAINERD.wait_for("detached", Status::Stopped)?;
        // `ctr` warns of a task's exit code when it is not 0.
        let deleted = CONTAINERD.task(&["rm", "detached"])?;
        assert!(deleted.errors().contains("137"), "{deleted:?}");
        assert_eq!(CONTAINERD.status("detached")?, None);
        Ok(())
    })
}

#[test]
fn ten_execs_at_once_each_get_their_own_streams_and_code() -> Result<()> {
    with_sleeper("execs", &[], || {
        std::thread::scope(|scope| {
            let execs: Vec<_> = (0..10)
                .map(|i| {
                    scope.spawn(move || {
                        let script = format!("echo out-{i}; echo err-{i} >&2; exit {i}");
                        (i, CONTAINERD.exec("execs", &format!("e{i}"), &["sh", "-c", &script]))
                    })
                })
                .collect();
            for exec in execs {
                let (i, finished) = exec.join().expect("no panic");
                let finished = finished?;
                assert_eq!(finished.code, i, "{}", finished.errors());
                assert_eq!(finished.text(), format!("out-{i}"));
                assert_eq!(finished.errors().trim_end(), format!("err-{i}"));
            }
            Ok(())
        })
    })
}

#[test]
fn an_exec_of_a_missing_command_fails_and_the_container_lives() -> Result<()> {
    with_sleeper("noexec", &[], || {
        let finished = CONTAINERD.exec("noexec", "x", &["/no/such/command"])?;
        assert_ne!(finished.code, 0);
        assert!(finished.errors().contains("/no/such/command"), "{}", finished.errors());
        CONTAINERD.exec("noexec", "y", &["true"])?.ok()?;
        Ok(())
    })
}

#[test]
fn a_missing_command_fails_at_start_with_its_name() -> Result<()> {
    let finished = CONTAINERD.run(&["--rm"], "nocommand", &["/no/such/command"])?;
    assert_ne!(finished.code, 0);
    assert!(finished.errors().contains("/no/such/command"), "{}", finished.errors());
    // `ctr` leaves the container's record when its start fails.
    CONTAINERD.remove_record("nocommand")?;
    Ok(())
}

#[test]
fn kill_all_reaches_every_process_of_the_container() -> Result<()> {
    let script = "trap '' TERM; sleep 1000 & sleep 1001 & wait; wait; wait";
    CONTAINERD.run(&["-d"], "killall", &["sh", "-c", script])?.ok()?;
    wait_until("three processes", || Ok(CONTAINERD.api().processes("killall")? >= 3))?;
    CONTAINERD.task(&["kill", "--all", "--signal", "KILL", "killall"])?.ok()?;
    CONTAINERD.wait_for("killall", Status::Stopped)?;
    CONTAINERD.remove("killall")
}

#[test]
fn a_thousand_orphans_are_reaped() -> Result<()> {
    // Each inner shell ends before its child, which then belongs to the container's PID 1. That stays the shell, which
    // reaps: it would give its place to the last command.
    let script = "i=0; while [ $i -lt 1000 ]; do ( sleep 0.2 & ); i=$((i+1)); done; sleep 1000; exit";
    CONTAINERD.run(&["-d"], "orphans", &["sh", "-c", script])?.ok()?;
    let count = || -> Result<usize> {
        Ok(CONTAINERD.exec("orphans", "count", &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"])?.ok()?.parse()?)
    };
    // `sh` as PID 1 of the container reaps them; when it goes, the agent must have nothing left of it.
    wait_until("few processes", || Ok(count()? < 10))?;
    CONTAINERD.kill_task("orphans")?;
    CONTAINERD.wait_for("orphans", Status::Stopped)?;
    CONTAINERD.remove("orphans")
}

#[test]
fn a_read_only_root_refuses_writes() -> Result<()> {
    let output =
        sh("read-only", &["--read-only"], "touch /x 2>&1; echo code=$?; touch /dev/shm/y && echo shm=ok")?;
    assert!(output.text().contains("Read-only file system"), "{output:?}");
    assert!(output.text().contains("code=1"), "{output:?}");
    Ok(())
}

#[test]
fn a_writable_root_keeps_what_is_written() -> Result<()> {
    let output = sh(
        "writable",
        &[],
        "echo kept > /etc/x && cat /etc/x && rm /etc/x && ! test -e /etc/x && echo gone",
    )?;
    assert_eq!(output.text(), "kept\ngone", "{}", output.errors());
    Ok(())
}

#[test]
fn environment_working_directory_and_user_are_as_asked() -> Result<()> {
    let options = ["--env", "COLOUR=blue green", "--cwd", "/usr", "--user", "1234:5678"];
    let output =
        sh("process", &options, "echo $COLOUR; pwd; id -u; id -g; touch /x 2>/dev/null || echo refused")?;
    assert_eq!(output.text(), "blue green\n/usr\n1234\n5678\nrefused", "{}", output.errors());
    Ok(())
}

#[test]
fn capabilities_are_as_asked() -> Result<()> {
    let status = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; chown 1:1 /tmp 2>/dev/null && echo chowned";
    let effective = |text: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix("CapEff:")).expect("CapEff");
        u64::from_str_radix(line.trim(), 16).expect("hex")
    };
    const CHOWN: u64 = 1 << 0;
    const SYS_ADMIN: u64 = 1 << 21;
    let default = sh("caps", &[], status)?.ok()?;
    assert!(effective(&default) & CHOWN != 0 && effective(&default) & SYS_ADMIN == 0, "{default}");
    assert!(default.contains("chowned"));
    let dropped = sh("caps-drop", &["--cap-drop", "CAP_CHOWN", "--cap-add", "CAP_SYS_ADMIN"], status)?;
    let dropped = dropped.text();
    assert!(effective(&dropped) & CHOWN == 0 && effective(&dropped) & SYS_ADMIN != 0, "{dropped}");
    assert!(!dropped.contains("chowned"));
    Ok(())
}

#[test]
fn the_seccomp_profile_is_in_force() -> Result<()> {
    let output = sh(
        "seccomp",
        &["--seccomp"],
        "grep ^Seccomp: /proc/self/status; unshare -m true 2>&1; echo code=$?",
    )?;
    let text = output.text();
    assert!(text.contains("Seccomp:\t2"), "{text}");
    assert!(!text.contains("code=0"), "unshare is not in the default profile: {text}");
    let without = sh("no-seccomp", &[], "grep ^Seccomp: /proc/self/status")?;
    assert!(without.text().contains("Seccomp:\t0"), "{without:?}");
    Ok(())
}

#[test]
fn masked_and_read_only_paths_are_so() -> Result<()> {
    let output = sh("masked", &[], "wc -c < /proc/keys; echo x > /proc/sys/kernel/hostname || echo refused")?;
    assert!(output.text().contains("refused"), "{output:?}");
    assert!(output.text().starts_with('0'), "{output:?}");
    Ok(())
}

#[test]
fn cgroup_limits_are_set_in_the_guest() -> Result<()> {
    let mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro";
    let options = ["--memory-limit", "33554432", "--cpus", "0.5", "--mount", mount];
    let output = sh(
        "limits",
        &options,
        "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup) && cat memory.max cpu.max",
    )?;
    assert_eq!(output.text(), "33554432\n50000 100000", "{}", output.errors());
    Ok(())
}

#[test]
fn ten_containers_start_at_once() -> Result<()> {
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..10)
            .map(|i| scope.spawn(move || (i, sh(&format!("many-{i}"), &[], &format!("echo {i}; exit {i}")))))
            .collect();
        for run in runs {
            let (i, finished) = run.join().expect("no panic");
            let finished = finished?;
            assert_eq!((finished.code, finished.text()), (i, i.to_string()), "{}", finished.errors());
        }
        Ok(())
    })
}

#[test]
fn a_terminal_is_a_terminal() -> Result<()> {
    // `script` gives `ctr` the terminal it wants.
    let mut command = std::process::Command::new("script");
    let ctr = CONTAINERD.run_command(&["--rm", "--tty"], "tty", &["sh", "-c", "tty; stty size; exit 9"]);
    let line: Vec<String> = std::iter::once(ctr.get_program())
        .chain(ctr.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let finished = run(command.args(["-qec", &line.join(" "), "/dev/null"]))?;
    assert!(finished.text().contains("/dev/pts/"), "{finished:?}");
    assert_eq!(finished.code, 9);
    Ok(())
}

#[test]
fn wrong_oci_specs_are_refused_with_the_reason() -> Result<()> {
    let good = run(CONTAINERD.ctr().args(["oci", "spec"]))?.ok()?;
    /// Name, what makes the good specification a bad one, a word of the answer.
    type Case<'a> = (&'a str, &'a dyn Fn(&mut serde_json::Value), &'a str);
    let cases: &[Case] = &[
        ("no-process", &|s| drop(s.as_object_mut().expect("object").remove("process")), "process"),
        ("no-args", &|s| s["process"]["args"] = serde_json::json!([]), "args"),
        ("bad-cwd", &|s| s["process"]["cwd"] = "relative".into(), "cwd"),
        (
            "bad-mount",
            &|s| s["mounts"] = serde_json::json!([{"destination": "/x", "type": "nosuchfs", "source": "y"}]),
            "nosuchfs",
        ),
        (
            "bad-bind",
            &|s| {
                s["mounts"] = serde_json::json!([
                    {"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}
                ]);
            },
            "/no/such/source",
        ),
    ];
    let rootfs = tempfile::tempdir_in("/var/tmp")?;
    for (name, change, word) in cases {
        let mut spec: serde_json::Value = serde_json::from_str(&good)?;
        spec["process"]["args"] = serde_json::json!(["true"]);
        spec["root"] = serde_json::json!({"path": rootfs.path()});
        change(&mut spec);
        let config = rootfs.path().with_extension("json");
        std::fs::write(&config, spec.to_string())?;
        let id = format!("spec-{name}");
        let mut ctr = CONTAINERD.ctr();
        ctr.args(["run", "--rm", "--runtime", e2e::containerd::RUNTIME, "--config"]).arg(&config).arg(&id);
        let finished = run(&mut ctr)?;
        std::fs::remove_file(config)?;
        CONTAINERD.remove_record(&id)?;
        assert_ne!(finished.code, 0, "{name} was accepted");
        assert!(finished.errors().contains(word), "{name}: {}", finished.errors());
    }
    Ok(())
}

#[test]
fn a_containers_own_hook_runs_in_it_before_its_program() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let (root, file) = (folder.path().join("root"), folder.path().join("config.json"));
    // `ctr` has no option for hooks, but takes a whole configuration: that of another container, changed.
    let mut config = serde_json::Value::Null;
    with_sleeper("hook-model", &[], || {
        let text = std::fs::read(CONTAINERD.bundle("hook-model").join("config.json"))?;
        config = serde_json::from_slice(&text)?;
        Ok(())
    })?;
    let script = "cat > /dev/shm/state; cat /proc/1/comm >> /dev/shm/state";
    config["hooks"]["startContainer"] =
        serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}]);
    config["process"]["args"] = serde_json::json!(["cat", "/dev/shm/state"]);
    config["root"]["path"] = root.display().to_string().into();
    std::fs::write(&file, config.to_string())?;
    std::fs::create_dir(&root)?;
    run(CONTAINERD.ctr().args(["images", "mount", "--rw", e2e::IMAGE]).arg(&root))?.ok()?;
    let mut ctr = CONTAINERD.ctr();
    ctr.args(["run", "--rm", "--runtime", e2e::containerd::RUNTIME, "--config"]).arg(&file).arg("hooked");
    let finished = run(&mut ctr);
    run(CONTAINERD.ctr().args(["images", "unmount", "--rm"]).arg(&root))?.ok()?;
    let said = finished?.ok()?;
    assert!(said.contains("\"id\":\"hooked\""), "{said}");
    Ok(())
}
