//! What is left after a sandbox ended, well or badly: nothing.
#![cfg(feature = "lab")]

mod task;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::LazyLock;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Result, ensure};
use e2e::command::{Finished, LIMIT, wait_until};
use e2e::containerd::{SHIM, kill_9, pids_of};
use e2e::{Census, Containerd, Netns, SmallFs, run};
use serde_json::json;

const VMM: &str = "ctvm-vmm";

/// For all tests but that of a full disk. Its first container makes what containerd keeps for good, folders of its own.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| {
    let containerd = Containerd::start().expect("containerd");
    containerd.run(&["--rm"], "first", &["true"]).and_then(Finished::ok).expect("a first container");
    containerd
});

/// Starts a container that sleeps, does `harm` while it runs, and checks that all counts come back.
fn survives(containerd: &Containerd, id: &str, harm: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = Census::take()?;
    containerd.run(&["-d"], id, &["sleep", "1000"])?.ok()?;
    assert_eq!(pids_of(VMM)?.len(), 1);
    harm()?;
    containerd.wait_until_over(id)?;
    containerd.remove(id)?;
    assert_eq!(containerd.status(id)?, None);
    before.settle()?;
    // And the next one works.
    assert_eq!(containerd.run(&["--rm"], &format!("{id}-next"), &["true"])?.code, 0);
    before.settle()
}

#[test]
fn every_count_comes_back() -> Result<()> {
    let containerd = &*CONTAINERD;
    let before = Census::take()?;
    for round in 0..3 {
        containerd.run(&["--rm"], &format!("again-{round}"), &["true"])?.ok()?;
    }
    before.settle()?;
    survives(containerd, "killed", || containerd.kill_task("killed"))?;
    survives(containerd, "vmm-killed", || kill_9(pids_of(VMM)?[0]))?;
    survives(containerd, "shim-killed", || pids_of(SHIM)?.into_iter().try_for_each(kill_9))?;
    survives(containerd, "both-killed", || {
        pids_of(SHIM)?.into_iter().chain(pids_of(VMM)?).try_for_each(kill_9)
    })
}

#[test]
fn a_host_without_room_for_a_sandbox_says_so_and_nothing_is_left() -> Result<()> {
    let containerd = &*CONTAINERD;
    let before = Census::take()?;
    {
        let small = SmallFs::mount(64 << 10)?;
        let _mount = Bind::over(small.path(), "/run/ctvm")?;
        small.fill()?;
        let full = Census::take()?;
        let finished = containerd.run(&["--rm"], "full", &["true"])?;
        assert_ne!(finished.code, 0);
        assert!(finished.errors().contains("No space left on device"), "{}", finished.errors());
        assert!(finished.errors().contains("/run/ctvm/"), "which place is full: {}", finished.errors());
        containerd.remove_record("full")?;
        full.settle()?;
    }
    before.settle()?;
    assert_eq!(containerd.run(&["--rm"], "room-again", &["true"])?.code, 0);
    before.settle()
}

#[test]
fn a_container_that_fills_its_root_gets_an_error_and_others_go_on() -> Result<()> {
    let before = Census::take()?;
    {
        let small = SmallFs::mount(32 << 20)?;
        let containerd = Containerd::start_in(small.path())?;
        let script =
            "dd if=/dev/zero of=/fill bs=1M; echo code=$?; echo lives > /dev/shm/x && cat /dev/shm/x";
        let finished = containerd.run(&["--rm"], "fills", &["sh", "-c", script])?;
        assert_eq!(finished.text(), "code=1\nlives", "{}", finished.errors());
        assert!(finished.errors().contains("No space left on device"), "{}", finished.errors());
        assert_eq!(containerd.run(&["--rm"], "after", &["true"])?.code, 0);
    }
    before.settle()
}

#[test]
fn nothing_is_left_of_a_port_forward() -> Result<()> {
    let containerd = &*CONTAINERD;
    for (id, victim) in [("forward-ends", None), ("forward-shim", Some(SHIM)), ("forward-vmm", Some(VMM))] {
        let namespace = Netns::make(id)?;
        // As CNI leaves it. The shim would do so too, and that stays; it is the pod's namespace.
        namespace.run("ip link set lo up")?;
        let before = Census::take()?;
        let options = ["-d", "--with-ns", &namespace.option()];
        containerd.run(&options, id, &["nc", "-ll", "-p", "7", "-e", "cat"])?.ok()?;
        let mut connection = None;
        wait_until("the server echoes", || {
            let dialled = namespace.within(|| Ok(TcpStream::connect("127.0.0.1:7")?));
            let Ok(mut dialled) = dialled else { return Ok(false) };
            dialled.set_read_timeout(Some(LIMIT))?;
            let echoed = dialled.write_all(b"x").and_then(|()| dialled.read_exact(&mut [0])).is_ok();
            connection = Some(dialled);
            Ok(echoed)
        })?;
        assert_eq!(namespace.run("ss -Htln")?.lines().count(), 2, "a listener for each family");
        match victim {
            Some(victim) => pids_of(victim)?.into_iter().try_for_each(kill_9)?,
            None => containerd.kill_task(id)?,
        }
        // The client is told, whatever ended it.
        let end = connection.expect("the last one that was dialled").read(&mut [0]);
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
        containerd.wait_until_over(id)?;
        containerd.remove(id)?;
        before.settle()?;
        wait_until("no listener is left", || Ok(namespace.run("ss -Htln")?.is_empty()))?;
        // Nobody steers any more: the kernel itself says that nobody listens.
        let refused = namespace.within(|| Ok(TcpStream::connect("127.0.0.1:7")))?;
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    Ok(())
}

/// Whoever is killed while vCPUs come: the caller is told, nothing is left, and the next one is resized.
#[test]
fn nothing_is_left_of_a_resize_in_the_middle() -> Result<()> {
    const MOST: u8 = 8;
    let containerd = &*CONTAINERD;
    let config = containerd.folder().join("resize.toml");
    fs::write(&config, format!("max_vcpus = {MOST}\n{}", fs::read_to_string("/etc/ctvm/config.toml")?))?;
    let config = config.display().to_string();
    let options = ["-d", "--runtime-config-path", &config, "--cpu-quota", "100000", "--cpu-period", "100000"];
    let all = json!({"cpu": {"quota": u32::from(MOST) * 100_000, "period": 100_000}});
    for (id, victim) in [("resize-vmm", Some(VMM)), ("resize-shim", Some(SHIM)), ("resize-next", None)] {
        let before = Census::take()?;
        containerd.run(&options, id, &["sleep", "1000"])?.ok()?;
        let vmm = pids_of(VMM)?[0];
        let vcpus = || -> Result<usize> {
            let links =
                fs::read_dir(format!("/proc/{vmm}/fd"))?.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
            Ok(links.filter(|link| link.to_string_lossy().contains("kvm-vcpu")).count())
        };
        assert_eq!(vcpus()?, 1, "made when the guest is to have them");
        let updated = thread::scope(|scope| -> Result<Result<()>> {
            let update = scope.spawn(|| task::update(containerd, id, &all));
            if let Some(victim) = victim {
                while vcpus()? < 3 {
                    ensure!(!update.is_finished(), "no vCPU came");
                    thread::sleep(Duration::from_millis(1));
                }
                pids_of(victim)?.into_iter().try_for_each(kill_9)?;
            }
            Ok(update.join().expect("no panic"))
        })?;
        assert_eq!(updated.is_ok(), victim.is_none(), "{id}: {updated:?}");
        if victim.is_none() {
            assert_eq!(vcpus()?, usize::from(MOST));
            containerd.kill_task(id)?;
        }
        containerd.wait_until_over(id)?;
        containerd.remove(id)?;
        before.settle()?;
    }
    Ok(())
}

/// A bind mount over an existing folder; unmounted when dropped.
struct Bind(&'static str);

impl Bind {
    fn over(source: &std::path::Path, target: &'static str) -> Result<Bind> {
        run(std::process::Command::new("mount").arg("--bind").arg(source).arg(target))?.ok()?;
        Ok(Bind(target))
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = run(std::process::Command::new("umount").args(["-l", self.0])); // a lazy unmount always succeeds
    }
}
