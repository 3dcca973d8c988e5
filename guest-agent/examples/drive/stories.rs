//! What a container's user can expect, told as short stories. Each begins with a fresh container and leaves nothing.

use std::time::{Duration, Instant};

use agent_api::sandbox::{InfoRequest, SetupRequest};
use agent_api::task::{CloseIORequest, PidsRequest, ResizePtyRequest, StateRequest, Status};
use agent_api::ttrpc::{self, Code};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::shim::{Shim, process, read_all, read_until, rpc, shell, spec};

/// Runs the stories whose names are in `only`, or all; says how each ended and how many failed.
pub async fn run_all(shim: &Shim, only: &[String]) -> Result<usize> {
    setup(shim).await.context("setup")?;
    let mut failed = 0;
    macro_rules! tell {
        ($($story:ident),* $(,)?) => {$(
            let name = stringify!($story);
            if only.is_empty() || only.iter().any(|wanted| wanted == name) {
                let since = Instant::now();
                let told = tokio::time::timeout(Duration::from_secs(300), $story(shim)).await;
                let took = since.elapsed().as_millis();
                let told = told.unwrap_or_else(|_| Err(anyhow!("no end after 300 s")));
                let told = match told {
                    Ok(()) => nothing_left(shim).await,
                    error => error,
                };
                match told {
                    Ok(()) => println!("ok   {name} ({took} ms)"),
                    Err(error) => {
                        clean(shim).await;
                        failed += 1;
                        println!("FAIL {name}: {error:#}");
                    }
                }
            }
        )*};
    }
    tell!(
        steps,
        output_and_exit_code,
        input_of_64_mib,
        much_output_with_a_slow_reader,
        ten_execs_at_once,
        ten_containers_at_once,
        killed_and_terminated,
        kill_all,
        thousand_orphans,
        orphans_without_pid_namespace,
        user_and_capabilities,
        exec_has_its_own_user,
        seccomp_of_init_and_exec,
        masked_and_read_only_paths,
        limits,
        environment_and_directory,
        standard_streams_reopen_by_name,
        broken_pipe_ends_a_writer,
        terminal,
        terminal_of_exec,
        close_io,
        daemon_keeps_its_stdout,
        missing_programs,
        life_of_a_task,
        wrong_requests,
        created_and_deleted,
        read_only_root,
        devices,
    );
    println!("{}", info(shim).await?);
    if only.iter().any(|name| name == "shutdown") {
        shim.sandbox.shutdown(rpc(), &agent_api::sandbox::ShutdownRequest::new()).await?;
    }
    println!("{failed} failed");
    Ok(failed)
}

async fn info(shim: &Shim) -> Result<String> {
    Ok(shim.sandbox.info(rpc(), &InfoRequest::new()).await?.to_string())
}

async fn setup(shim: &Shim) -> Result<()> {
    let request = SetupRequest { hostname: "driven".into(), entropy: vec![7; 64], ..Default::default() };
    let answer = shim.sandbox.setup(rpc(), &request).await?;
    println!("{answer}");
    ensure!(answer.dialled_us >= answer.started_us);
    let again = shim.sandbox.setup(rpc(), &request).await?;
    ensure!(again == answer, "a second setup answers the same");
    Ok(())
}

async fn nothing_left(shim: &Shim) -> Result<()> {
    let info = shim.sandbox.info(rpc(), &InfoRequest::new()).await?;
    ensure!(info.containers == 0, "{} containers left", info.containers);
    ensure!(info.agent_threads == 1, "{} threads: fork is not safe", info.agent_threads);
    Ok(())
}

/// After a failure: makes room for the next story.
async fn clean(shim: &Shim) {
    let ids = ["c".to_owned(), "d".to_owned()].into_iter().chain((0..10).map(|n| format!("c{n}")));
    for id in ids {
        if shim.kill(&id, "", 9, true).await.is_ok() {
            let _ = shim.wait(&id, "").await;
        }
        let _ = shim.delete(&id, "").await;
    }
}

fn code(error: &anyhow::Error) -> Code {
    match error.downcast_ref::<ttrpc::Error>() {
        Some(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("no status: {other:?}"),
    }
}

/// Not a check: what the steps of a container's life take, for a lab in exact time.
async fn steps(shim: &Shim) -> Result<()> {
    for _ in 0..3 {
        let begin = Instant::now();
        let streams = shim.create("c", &spec("c", process(&["true"])), false).await?;
        let created = Instant::now();
        shim.start("c", "").await?;
        let started = Instant::now();
        shim.wait("c", "").await?;
        let ended = Instant::now();
        shim.delete("c", "").await?;
        let deleted = Instant::now();
        drop(streams);
        println!(
            "     create {} us, start {} us, to exit {} us, delete {} us",
            (created - begin).as_micros(),
            (started - created).as_micros(),
            (ended - started).as_micros(),
            (deleted - ended).as_micros()
        );
    }
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    for n in 0..3 {
        let begin = Instant::now();
        let _exec = shim.add_exec("c", &format!("e{n}"), &process(&["true"]), false).await?;
        let added = Instant::now();
        shim.start("c", &format!("e{n}")).await?;
        let started = Instant::now();
        shim.wait("c", &format!("e{n}")).await?;
        let ended = Instant::now();
        println!(
            "     exec: add {} us, start {} us, to exit {} us",
            (added - begin).as_micros(),
            (started - added).as_micros(),
            (ended - started).as_micros()
        );
        shim.delete("c", &format!("e{n}")).await?;
    }
    let begin = Instant::now();
    info(shim).await?;
    println!("     info {} us", begin.elapsed().as_micros());
    stop(shim, "c").await
}

async fn output_and_exit_code(shim: &Shim) -> Result<()> {
    for status in [0, 1, 42, 255] {
        let line = format!("echo out; echo err >&2; exit {status}");
        let outcome = shim.run("c", &shell("c", &line), b"").await?;
        ensure!(outcome.status == status, "{outcome:?}");
        ensure!(outcome.stdout == "out\n" && outcome.stderr == "err\n", "{outcome:?}");
    }
    Ok(())
}

async fn input_of_64_mib(shim: &Shim) -> Result<()> {
    let input: Vec<u8> =
        (0..64 * 1024 * 1024u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut streams = shim.create("c", &spec("c", process(&["cat"])), false).await?;
    shim.start("c", "").await?;
    let (mut stdin, stdout) = (streams.stdin.take().unwrap(), streams.stdout.take().unwrap());
    let feed = async {
        stdin.write_all(&input).await?;
        stdin.shutdown().await
    };
    let (fed, echoed) = tokio::join!(feed, read_all(stdout));
    fed?;
    ensure!(echoed? == input, "what came back differs");
    ensure!(shim.wait("c", "").await? == 0);
    shim.delete("c", "").await?;
    Ok(())
}

async fn much_output_with_a_slow_reader(shim: &Shim) -> Result<()> {
    let size = std::env::var("DRIVE_OUTPUT_MIB").map_or(Ok(256), |mib| mib.parse::<usize>())? << 20;
    let before = shim.sandbox.info(rpc(), &InfoRequest::new()).await?.agent_rss_kib;
    let line = format!(
        "yes 0123456 | head -c 1048576 > /tmp/1; i=0; while [ $i -lt {} ]; do cat /tmp/1; i=$((i+1)); done",
        size >> 20
    );
    let mut streams = shim.create("c", &shell("c", &line), false).await?;
    shim.start("c", "").await?;
    let mut stdout = streams.stdout.take().unwrap();
    let mut buf = vec![0; 1 << 20];
    let pattern = b"0123456\n".repeat(buf.len() / 8 + 1);
    let mut seen = 0;
    let mut peak = 0;
    loop {
        let n = stdout.read(&mut buf).await?;
        if n == 0 {
            break;
        }
        ensure!(buf[..n] == pattern[seen % 8..][..n], "a byte from {seen} to {} differs", seen + n);
        if seen / (32 << 20) != (seen + n) / (32 << 20) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            peak = peak.max(shim.sandbox.info(rpc(), &InfoRequest::new()).await?.agent_rss_kib);
        }
        seen += n;
    }
    ensure!(seen == size, "{seen} bytes of {size}");
    println!("     agent resident {before} KiB before, {peak} KiB at most");
    ensure!(peak < before + 2048, "memory is not bounded: {before} KiB before, {peak} KiB at most");
    ensure!(shim.wait("c", "").await? == 0);
    shim.delete("c", "").await?;
    Ok(())
}

/// Starts a container that sleeps; to be ended by `stop`.
async fn sleeper(shim: &Shim, id: &str, line: &str) -> Result<crate::shim::Streams> {
    let streams = shim.create(id, &shell(id, line), false).await?;
    shim.start(id, "").await?;
    Ok(streams)
}

async fn stop(shim: &Shim, id: &str) -> Result<()> {
    shim.kill(id, "", 9, false).await?;
    ensure!(shim.wait(id, "").await? == 137);
    ensure!(shim.delete(id, "").await? == 137);
    Ok(())
}

async fn ten_execs_at_once(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let runs = (0..10).map(|n| async move {
        let process = process(&["/bin/sh", "-c", &format!("cat; echo exec {n}; exit {n}")]);
        let outcome = shim.exec("c", &format!("e{n}"), &process, format!("in {n}\n").as_bytes()).await?;
        ensure!(outcome.status == n, "{outcome:?}");
        ensure!(outcome.stdout == format!("in {n}\nexec {n}\n"), "{outcome:?}");
        Ok(())
    });
    futures::future::try_join_all(runs).await?;
    stop(shim, "c").await
}

async fn ten_containers_at_once(shim: &Shim) -> Result<()> {
    let runs = (0..10).map(|n| async move {
        let id = format!("c{n}");
        let outcome = shim.run(&id, &shell(&id, &format!("hostname; exit {n}")), b"").await?;
        ensure!(outcome.status == n && outcome.stdout == format!("{id}\n"), "{outcome:?}");
        Ok(())
    });
    futures::future::try_join_all(runs).await?;
    Ok(())
}

async fn killed_and_terminated(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    stop(shim, "c").await?;
    let mut streams =
        sleeper(shim, "c", "trap 'exit 143' TERM; echo up; while :; do sleep 0.01; done").await?;
    read_until(streams.stdout.as_mut().unwrap(), "up").await?;
    shim.kill("c", "", 15, false).await?;
    ensure!(shim.wait("c", "").await? == 143);
    let late = shim.kill("c", "", 9, false).await.expect_err("killing the dead");
    ensure!(code(&late) == Code::NOT_FOUND, "{late:#}");
    shim.delete("c", "").await?;
    // An exec ended by a signal of its own.
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let _exec = shim.add_exec("c", "e", &process(&["sleep", "1000"]), false).await?;
    shim.start("c", "e").await?;
    shim.kill("c", "e", 15, false).await?;
    ensure!(shim.wait("c", "e").await? == 143);
    shim.delete("c", "e").await?;
    stop(shim, "c").await
}

async fn kill_all(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000 & sleep 1000 & sleep 1000").await?;
    let _exec = shim.add_exec("c", "e", &process(&["sleep", "1000"]), false).await?;
    let exec_pid = shim.start("c", "e").await?;
    let pids = shim.tasks.pids(rpc(), &PidsRequest { id: "c".into(), ..Default::default() }).await?;
    ensure!(pids.processes.iter().any(|process| process.pid == exec_pid), "{pids}");
    shim.kill("c", "", 9, true).await?;
    ensure!(shim.wait("c", "").await? == 137);
    ensure!(shim.wait("c", "e").await? == 137);
    shim.delete("c", "e").await?;
    shim.delete("c", "").await?;
    Ok(())
}

async fn thousand_orphans(shim: &Shim) -> Result<()> {
    let line = "i=0; while [ $i -lt 1000 ]; do (sleep 1000 &); i=$((i+1)); done; exit 5";
    let outcome = shim.run("c", &shell("c", line), b"").await?;
    ensure!(outcome.status == 5, "{outcome:?}");
    Ok(())
}

async fn orphans_without_pid_namespace(shim: &Shim) -> Result<()> {
    let line = "i=0; while [ $i -lt 200 ]; do (sleep 1000 &); (exec true &); i=$((i+1)); done; exit 6";
    let mut spec = shell("c", line);
    without_namespace(&mut spec, "pid");
    let outcome = shim.run("c", &spec, b"").await?;
    ensure!(outcome.status == 6, "{outcome:?}");
    // Nobody is left of it, alive or dead, in the guest's own pid namespace.
    let mut look = shell(
        "d",
        "cat /proc/[0-9]*/stat | grep -E ' \\((sleep|true|sh)\\) ' | grep -v ' (sh) [RS] ' | wc -l",
    );
    without_namespace(&mut look, "pid");
    let outcome = shim.run("d", &look, b"").await?;
    ensure!(outcome.stdout == "0\n", "{outcome:?}");
    Ok(())
}

fn without_namespace(spec: &mut Value, kind: &str) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != kind);
}

async fn user_and_capabilities(shim: &Shim) -> Result<()> {
    let mut process = process(&["/bin/sh", "-c", "id; grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status"]);
    process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [10, 20], "umask": 18});
    let caps = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
    process["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps, "inheritable": [], "ambient": []});
    let outcome = shim.run("c", &spec("c", process.clone()), b"").await?;
    let out = &outcome.stdout;
    ensure!(
        out.contains("uid=1000") && out.contains("gid=1001") && out.contains("Groups:\t10 20 "),
        "{outcome:?}"
    );
    // Bits 5 (KILL) and 10 (NET_BIND_SERVICE); a user's exec empties the others.
    ensure!(out.contains("CapBnd:\t0000000000000420"), "{outcome:?}");
    ensure!(out.contains("CapEff:\t0000000000000000"), "{outcome:?}");
    ensure!(out.contains("NoNewPrivs:\t1"), "{outcome:?}");
    let caps_given = json!(["CAP_KILL"]);
    process["capabilities"] = json!({"bounding": caps_given, "effective": caps_given, "permitted": caps_given, "inheritable": caps_given, "ambient": caps_given});
    process["noNewPrivileges"] = json!(false);
    let outcome = shim.run("c", &spec("c", process.clone()), b"").await?;
    ensure!(outcome.stdout.contains("CapEff:\t0000000000000020"), "{outcome:?}");
    ensure!(outcome.stdout.contains("NoNewPrivs:\t0"), "{outcome:?}");
    process.as_object_mut().unwrap().remove("capabilities");
    process["user"] = json!({"uid": 0, "gid": 0});
    let outcome = shim.run("c", &spec("c", process), b"").await?;
    ensure!(outcome.stdout.contains("CapBnd:\t0000000000000000"), "no section means none: {outcome:?}");
    Ok(())
}

async fn exec_has_its_own_user(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let mut exec = process(&[
        "/bin/sh",
        "-c",
        "id -u; pwd; echo $WHO; grep CapBnd /proc/self/status; cat /proc/1/comm; cat /proc/self/cgroup",
    ]);
    exec["user"] = json!({"uid": 33, "gid": 33});
    exec["cwd"] = json!("/tmp");
    exec["env"] = json!(["PATH=/bin:/usr/bin", "WHO=me"]);
    exec["capabilities"] = json!({"bounding": ["CAP_KILL"]});
    let outcome = shim.exec("c", "e", &exec, b"").await?;
    ensure!(outcome.stdout == "33\n/tmp\nme\nCapBnd:\t0000000000000020\nsleep\n0::/\n", "{outcome:?}");
    stop(shim, "c").await
}

async fn seccomp_of_init_and_exec(shim: &Shim) -> Result<()> {
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    });
    let line = "mkdir /tmp/x 2>&1; grep -E '^(Seccomp|CapEff|CapPrm|CapBnd):' /proc/self/status";
    for nnp in [true, false] {
        for uid in [0, 1000] {
            let mut program = process(&["/bin/sh", "-c", line]);
            program["noNewPrivileges"] = json!(nnp);
            program["user"] = json!({"uid": uid, "gid": uid});
            let mut filtered = spec("c", program.clone());
            filtered["linux"]["seccomp"] = filter.clone();
            let outcome = shim.run("c", &filtered, b"").await?;
            ensure!(outcome.stdout.contains("not implemented"), "nnp {nnp} uid {uid}: {outcome:?}");
            ensure!(outcome.stdout.contains("Seccomp:\t2"), "nnp {nnp} uid {uid}: {outcome:?}");

            let mut main = shell("c", "sleep 1000");
            main["linux"]["seccomp"] = filter.clone();
            let _streams = shim.create("c", &main, false).await?;
            shim.start("c", "").await?;
            let exec = shim.exec("c", "e", &program, b"").await?;
            ensure!(exec.stdout == outcome.stdout, "nnp {nnp} uid {uid}: exec {exec:?}, init {outcome:?}");
            stop(shim, "c").await?;
        }
    }
    Ok(())
}

async fn masked_and_read_only_paths(shim: &Shim) -> Result<()> {
    let line = "cat /proc/keys | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/vm/drop_caches; \
                echo 1 > /proc/sys/kernel/domainname; touch /sys/fs/cgroup/x; echo done";
    let outcome = shim.run("c", &shell("c", line), b"").await?;
    ensure!(outcome.stdout == "0\n0\ndone\n", "{outcome:?}");
    ensure!(outcome.stderr.matches("Read-only file system").count() == 3, "{outcome:?}");
    Ok(())
}

async fn limits(shim: &Shim) -> Result<()> {
    let mut limited = shell(
        "c",
        "ulimit -n; cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight; cat /proc/self/oom_score_adj",
    );
    limited["process"]["oomScoreAdj"] = json!(500);
    limited["linux"]["resources"] = json!({
        "memory": {"limit": 67_108_864, "swap": 67_108_864},
        "pids": {"limit": 50},
        "cpu": {"quota": 50_000, "period": 100_000, "shares": 1024}
    });
    let outcome = shim.run("c", &limited, b"").await?;
    ensure!(
        outcome.stdout == "1024\n67108864\n50\n50000 100000\n100\n500\n"
            || outcome.stdout == "1024\n67108864\n50\n50000 100000\n39\n500\n",
        "{outcome:?}"
    );
    // The agent's own score is untouched, so the next container's is.
    let outcome = shim.run("c", &shell("c", "cat /proc/self/oom_score_adj"), b"").await?;
    ensure!(outcome.stdout == "0\n", "{outcome:?}");
    // More than the limit: killed.
    let mut greedy =
        shell("c", "head -c 200000000 /dev/zero | tail -c 199999999 | wc -c; echo ${PIPESTATUS:-}; exit 3");
    greedy["linux"]["resources"] = json!({"memory": {"limit": 33_554_432}});
    let outcome = shim.run("c", &greedy, b"").await?;
    ensure!(!outcome.stdout.starts_with("199999999"), "{outcome:?}");
    Ok(())
}

async fn environment_and_directory(shim: &Shim) -> Result<()> {
    let mut program = process(&["/bin/sh", "-c", "pwd; env | sort"]);
    program["cwd"] = json!("/tmp");
    program["env"] = json!(["PATH=/bin:/usr/bin", "A=1", "B=two words", "EMPTY="]);
    let outcome = shim.run("c", &spec("c", program), b"").await?;
    let wanted = "/tmp\nA=1\nB=two words\nEMPTY=\nHOME=/root\nPATH=/bin:/usr/bin\nPWD=/tmp\n";
    let shlvl = outcome
        .stdout
        .lines()
        .filter(|line| !line.starts_with("SHLVL=") && !line.starts_with("HOME="))
        .collect::<Vec<_>>()
        .join("\n");
    let wanted = wanted.lines().filter(|line| !line.starts_with("HOME=")).collect::<Vec<_>>().join("\n");
    ensure!(shlvl == wanted, "{outcome:?}");
    Ok(())
}

async fn standard_streams_reopen_by_name(shim: &Shim) -> Result<()> {
    let mut program =
        process(&["/bin/sh", "-c", "echo out > /dev/stdout; echo err > /proc/self/fd/2; cat < /dev/stdin"]);
    for uid in [0, 1000] {
        program["user"] = json!({"uid": uid, "gid": uid});
        let outcome = shim.run("c", &spec("c", program.clone()), b"in\n").await?;
        ensure!(outcome.stdout == "out\nin\n" && outcome.stderr == "err\n", "uid {uid}: {outcome:?}");
    }
    Ok(())
}

async fn broken_pipe_ends_a_writer(shim: &Shim) -> Result<()> {
    let outcome = shim.run("c", &shell("c", "yes | head -n 1"), b"").await?;
    ensure!(outcome.stdout == "y\n", "{outcome:?}");
    let outcome = shim.run("c", &spec("c", process(&["grep", "SigIgn", "/proc/self/status"])), b"").await?;
    ensure!(outcome.stdout == "SigIgn:\t0000000000000000\n", "{outcome:?}");
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let outcome = shim.exec("c", "e", &process(&["grep", "SigIgn", "/proc/self/status"]), b"").await?;
    ensure!(outcome.stdout == "SigIgn:\t0000000000000000\n", "{outcome:?}");
    stop(shim, "c").await
}

async fn terminal(shim: &Shim) -> Result<()> {
    let mut streams = shim.create("c", &shell("c", "tty; id -u; exec sh"), true).await?;
    shim.start("c", "").await?;
    let mut tty = streams.stdout.take().unwrap();
    read_until(&mut tty, "/dev/pts/0\r\n").await?;
    resize(shim, "c", "", 100, 30).await?;
    tty.write_all(b"stty size; echo > /dev/tty; test -t 2 && echo y'e's\n").await?;
    read_until(&mut tty, "30 100\r\n").await?;
    read_until(&mut tty, "yes\r\n").await?;
    tty.write_all(b"exit 9\n").await?;
    ensure!(shim.wait("c", "").await? == 9);
    let rest = read_all(tty).await?;
    ensure!(String::from_utf8_lossy(&rest).contains("exit 9"), "{rest:?}");
    shim.delete("c", "").await?;
    Ok(())
}

async fn resize(shim: &Shim, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
    let request =
        ResizePtyRequest { id: id.into(), exec_id: exec_id.into(), width, height, ..Default::default() };
    shim.tasks.resize_pty(rpc(), &request).await?;
    Ok(())
}

async fn terminal_of_exec(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let mut exec = process(&["/bin/sh", "-c", "tty; echo by name > $(tty); read line; echo got $line"]);
    exec["user"] = json!({"uid": 1000, "gid": 1000});
    let mut streams = shim.add_exec("c", "e", &exec, true).await?;
    shim.start("c", "e").await?;
    let mut tty = streams.stdout.take().unwrap();
    read_until(&mut tty, "by name\r\n").await?;
    resize(shim, "c", "e", 80, 24).await?;
    tty.write_all(b"hello\n").await?;
    read_until(&mut tty, "got hello\r\n").await?;
    ensure!(shim.wait("c", "e").await? == 0);
    shim.delete("c", "e").await?;
    stop(shim, "c").await
}

async fn close_io(shim: &Shim) -> Result<()> {
    let mut streams = shim.create("c", &spec("c", process(&["cat"])), false).await?;
    shim.start("c", "").await?;
    let (mut stdin, mut stdout) = (streams.stdin.take().unwrap(), streams.stdout.take().unwrap());
    stdin.write_all(b"some input\n").await?;
    read_until(&mut stdout, "some input").await?;
    shim.tasks.close_io(rpc(), &CloseIORequest { id: "c".into(), stdin: true, ..Default::default() }).await?;
    ensure!(shim.wait("c", "").await? == 0);
    shim.delete("c", "").await?;
    Ok(())
}

async fn daemon_keeps_its_stdout(shim: &Shim) -> Result<()> {
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    let line = "(sleep 0.5; echo late) & echo early";
    let mut streams = shim.add_exec("c", "e", &process(&["/bin/sh", "-c", line]), false).await?;
    shim.start("c", "e").await?;
    ensure!(shim.wait("c", "e").await? == 0, "the exit does not wait for the daemon");
    let all = read_all(streams.stdout.take().unwrap()).await?;
    ensure!(all == b"early\nlate\n", "{}", String::from_utf8_lossy(&all));
    shim.delete("c", "e").await?;
    stop(shim, "c").await
}

async fn missing_programs(shim: &Shim) -> Result<()> {
    let error = shim.run("c", &spec("c", process(&["no-such-program"])), b"").await.expect_err("no program");
    ensure!(error.to_string().contains("no-such-program"), "{error:#}");
    let mut nowhere = process(&["true"]);
    nowhere["cwd"] = json!("/no/such/dir");
    let error = shim.run("c", &spec("c", nowhere), b"").await.expect_err("no directory");
    ensure!(error.to_string().contains("chdir"), "{error:#}");
    let _streams = sleeper(shim, "c", "sleep 1000").await?;
    for (n, program) in ["no-such-program", "/etc"].into_iter().enumerate() {
        let error =
            shim.exec("c", &format!("e{n}"), &process(&[program]), b"").await.expect_err("no program");
        ensure!(error.to_string().contains(program), "{error:#}");
        ensure!(shim.wait("c", &format!("e{n}")).await? == 255, "waiting for what never was ends, too");
        shim.delete("c", &format!("e{n}")).await?;
    }
    stop(shim, "c").await
}

async fn life_of_a_task(shim: &Shim) -> Result<()> {
    let state = async |exec_id: &str| {
        let request = StateRequest { id: "c".into(), exec_id: exec_id.into(), ..Default::default() };
        shim.tasks.state(rpc(), &request).await
    };
    let mut streams = shim.create("c", &spec("c", process(&["cat"])), false).await?;
    let created = state("").await?;
    ensure!(created.status == Status::CREATED.into() && created.pid > 1, "{created}");
    ensure!(created.stdin.starts_with("stream:"), "{created}");
    let early =
        shim.add_exec("c", "e", &process(&["true"]), false).await.err().context("exec before start")?;
    ensure!(code(&early) == Code::FAILED_PRECONDITION, "{early:#}");
    shim.start("c", "").await?;
    ensure!(state("").await?.status == Status::RUNNING.into());
    let again = shim.start("c", "").await.expect_err("a second start");
    ensure!(code(&again) == Code::FAILED_PRECONDITION, "{again:#}");
    let busy = shim.delete("c", "").await.expect_err("deleting what runs");
    ensure!(code(&busy) == Code::FAILED_PRECONDITION, "{busy:#}");
    let taken = shim.create("c", &spec("c", process(&["cat"])), false).await.err().context("the same id")?;
    ensure!(code(&taken) == Code::ALREADY_EXISTS, "{taken:#}");
    let _exec = shim.add_exec("c", "e", &process(&["true"]), false).await?;
    ensure!(state("e").await?.status == Status::CREATED.into());
    shim.start("c", "e").await?;
    ensure!(shim.wait("c", "e").await? == 0);
    ensure!(state("e").await?.status == Status::STOPPED.into());
    shim.delete("c", "e").await?;
    drop(streams.stdin.take());
    ensure!(shim.wait("c", "").await? == 0);
    let stopped = state("").await?;
    ensure!(stopped.status == Status::STOPPED.into() && stopped.exited_at.is_some(), "{stopped}");
    shim.delete("c", "").await?;
    let gone = state("").await.expect_err("state of what is gone");
    ensure!(matches!(gone, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND));
    Ok(())
}

async fn wrong_requests(shim: &Shim) -> Result<()> {
    for (id, spec, part) in [
        ("../c", shell("c", "true"), "id"),
        ("c", json!({"ociVersion": "1.1.0"}), "root"),
        ("c", json!("nonsense"), "configuration"),
        ("c", spec("c", process(&[])), "process.args"),
    ] {
        let error = shim.create(id, &spec, false).await.err().context("a wrong request")?;
        ensure!(code(&error) == Code::INVALID_ARGUMENT && error.to_string().contains(part), "{error:#}");
    }
    let mut unknown = shell("c", "true");
    unknown["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/x", "type": "nofs", "source": "none"}));
    let error = shim.create("c", &unknown, false).await.err().context("a wrong mount")?;
    ensure!(error.to_string().contains("nofs"), "{error:#}");
    let none = shim.kill("none", "", 9, false).await.expect_err("no container");
    ensure!(code(&none) == Code::NOT_FOUND, "{none:#}");
    let none = shim.delete("none", "").await.expect_err("no container");
    ensure!(code(&none) == Code::NOT_FOUND, "{none:#}");
    // The agent is none the worse for it.
    ensure!(shim.run("c", &shell("c", "exit 4"), b"").await?.status == 4);
    Ok(())
}

async fn created_and_deleted(shim: &Shim) -> Result<()> {
    for _ in 0..3 {
        let _streams = shim.create("c", &shell("c", "true"), false).await?;
        ensure!(shim.delete("c", "").await? == 137, "never started, so killed");
    }
    Ok(())
}

async fn read_only_root(shim: &Shim) -> Result<()> {
    let mut spec = shell("c", "touch /x; touch /tmp/y && echo tmp");
    spec["root"]["readonly"] = json!(true);
    let outcome = shim.run("c", &spec, b"").await?;
    ensure!(outcome.stdout == "tmp\n" && outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    Ok(())
}

async fn devices(shim: &Shim) -> Result<()> {
    let mut spec =
        shell("c", "echo x > /dev/null && head -c 4 /dev/zero | wc -c; ls -l /dev/mine; cat /dev/stdin");
    spec["linux"]["devices"] = json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 7, "gid": 8}]);
    let outcome = shim.run("c", &spec, b"in").await?;
    ensure!(outcome.stdout.starts_with("4\n"), "{outcome:?}");
    if !outcome.stdout.contains("1,   3") || !outcome.stdout.contains("rw-rw-rw-") {
        bail!("{outcome:?}");
    }
    Ok(())
}
