//! Block devices of the host in pods: their VM runs already, so they come while it does, and go with their containers.
#![cfg(feature = "lab")]

use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Result, ensure};
use cri::{Daemon, Pod, harm};
use e2e::command::{LIMIT, wait_until};
use e2e::{LoopDevice, node, run};
use k8s_cri::v1::{ContainerConfig, Device};

/// One containerd for all tests of this file.
static DAEMON: LazyLock<Daemon> = LazyLock::new(|| Daemon::start(None).expect("containerd starts"));

/// A MiB that differs from block to block.
fn pattern(seed: u32) -> Vec<u8> {
    (0..1 << 20).map(|at: u32| ((at / 512 + at + seed) % 251) as u8).collect()
}

fn give(config: &mut ContainerConfig, disk: &LoopDevice, path: &str, permissions: &str) {
    config.devices.push(Device {
        container_path: path.into(),
        host_path: disk.name().to_owned(),
        permissions: permissions.into(),
    });
}

/// A container with this disk at `/dev/xvda` that runs until it is stopped.
fn forever_with(pod: &Pod, disk: &LoopDevice) -> ContainerConfig {
    let mut config = pod.forever();
    give(&mut config, disk, "/dev/xvda", "rwm");
    config
}

/// How many descriptors the processes of this machine have of a block device.
fn holders(node: &Path) -> usize {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let descriptors = processes.flat_map(|process| std::fs::read_dir(process.path().join("fd")));
    let descriptors = descriptors.flatten().flatten();
    descriptors.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == node)).count()
}

fn nobody_holds(disk: &LoopDevice) -> Result<()> {
    wait_until("the host's block device is free", || Ok(holders(disk.node()) == 0))
}

fn remove(id: &str) -> Result<()> {
    DAEMON.cri.stop(id, 1)?;
    DAEMON.cri.remove(id)
}

#[test]
fn a_pods_containers_have_disks_that_go_with_them() -> Result<()> {
    let cri = &DAEMON.cri;
    let pod = Pod::run(cri, "ctvm")?;
    let bystander = pod.start_forever()?;
    let (first, second) = (LoopDevice::with(&pattern(0))?, LoopDevice::with(&pattern(9))?);
    for round in 0..4 {
        let mut config = forever_with(&pod, &first);
        give(&mut config, &second, "/dev/data/second", "r");
        let id = pod.start(&config)?;
        pod.wait_until_ready(&config)?;
        ensure!((holders(first.node()), holders(second.node())) == (1, 1), "not the VMM alone has them");
        let script = format!(
            "set -e; stat -c %F /dev/xvda; blockdev --getsize64 /dev/data/second; \
             dd if=/dev/data/second of=/dev/xvda bs=64k count={round} conv=fsync,notrunc 2>/dev/null; \
             cmp -n $(({round} * 65536)) /dev/xvda /dev/data/second && echo same; \
             dd if=/dev/zero of=/dev/data/second bs=512 count=1 conv=fsync 2>/dev/null || echo read-only"
        );
        let said = cri.exec(&id, &["sh", "-c", &script], 0)?.ok()?;
        ensure!(said == "block special file\n1048576\nsame\nread-only", "round {round}: {said}");
        // Of those that have none nobody sees it.
        let seen =
            cri.exec(&bystander, &["sh", "-c", "ls /dev/xvda /dev/data 2>/dev/null | wc -l"], 0)?.ok()?;
        ensure!(seen == "0", "round {round}: {seen}");
        remove(&id)?;
        nobody_holds(&first)?;
        nobody_holds(&second)?;
        let expected = [&pattern(9)[..round * 65536], &pattern(0)[round * 65536..]].concat();
        ensure!(first.content()? == expected, "round {round}: the host sees something else");
        ensure!(second.content()? == pattern(9), "round {round}: it was written to");
    }
    let metrics = run(node::program("ctvm").arg("metrics"))?.ok()?;
    for result in ["attached", "detached"] {
        let (pod, result) = (format!("sandbox=\"{}\"", pod.id), format!("result=\"{result}\"}} 8"));
        let mut plugs = metrics.lines().filter(|line| line.starts_with("ctvm_device_plugs_total"));
        ensure!(plugs.any(|line| line.contains(&pod) && line.ends_with(&result)), "no {result}: {metrics}");
    }
    pod.end()
}

#[test]
fn two_containers_share_a_disk_and_the_last_one_takes_it_along() -> Result<()> {
    let cri = &DAEMON.cri;
    let pod = Pod::run(cri, "ctvm")?;
    let disk = LoopDevice::with(&pattern(1))?;
    let (writer, reader) = (pod.start(&forever_with(&pod, &disk))?, pod.start(&forever_with(&pod, &disk))?);
    ensure!(holders(disk.node()) == 1, "the VMM has it {} times", holders(disk.node()));
    cri.exec(&writer, &["sh", "-c", "echo shared | dd of=/dev/xvda bs=7 count=1 conv=fsync,notrunc"], 0)?
        .ok()?;
    let read = ["head", "-c", "6", "/dev/xvda"];
    assert_eq!(cri.exec(&reader, &read, 0)?.ok()?, "shared");
    remove(&writer)?;
    assert_eq!(cri.exec(&reader, &read, 0)?.ok()?, "shared", "it went with the first");
    remove(&reader)?;
    nobody_holds(&disk)?;
    // Read-only for one, it becomes writable for the next.
    let mut config = pod.container(&["sh", "-c", "dd if=/dev/zero of=/dev/xvda bs=512 count=1 conv=fsync"]);
    give(&mut config, &disk, "/dev/xvda", "r");
    ensure!(pod.finish(&config)?.code != 0, "it was written to");
    config.devices[0].permissions = "rw".into();
    config.metadata.as_mut().expect("a container has a name").attempt = 1;
    let done = pod.finish(&config)?;
    ensure!(done.code == 0, "{done:?}");
    ensure!(disk.content()?[..512] == [0; 512], "it was not written to");
    pod.end()
}

#[test]
fn a_container_that_cannot_be_leaves_no_disk() -> Result<()> {
    let pod = Pod::run(&DAEMON.cri, "ctvm")?;
    let disk = LoopDevice::with(&pattern(2))?;
    let mut config = forever_with(&pod, &disk);
    config.command = vec!["/no/such/program".into()];
    let error = pod.start(&config).expect_err("there is no such program");
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    nobody_holds(&disk)?;
    // More than there are places for.
    let disks = (0..12).map(|_| LoopDevice::with(&[0; 512])).collect::<Result<Vec<_>>>()?;
    let mut config = pod.forever();
    for (n, disk) in disks.iter().enumerate() {
        give(&mut config, disk, &format!("/dev/disk{n}"), "rwm");
    }
    let error = pod.start(&config).expect_err("a VM has not so many places");
    ensure!(format!("{error:#}").contains("12 block devices, at most 11 become disks of a VM"), "{error:#}");
    for disk in &disks {
        nobody_holds(disk)?;
    }
    // As many as there are, and the next container works.
    config.devices.pop();
    config.metadata.as_mut().expect("a container has a name").attempt = 1;
    let id = pod.start(&config)?;
    pod.wait_until_ready(&config)?;
    let seen = DAEMON.cri.exec(&id, &["sh", "-c", "ls /dev/disk* | wc -l"], 0)?.ok()?;
    assert_eq!(seen, "11");
    remove(&id)?;
    pod.end()
}

#[test]
fn kills_leave_nobody_with_a_disk() -> Result<()> {
    for victim in ["shim", "vmm"] {
        let pod = Pod::run(&DAEMON.cri, "ctvm")?;
        let disk = LoopDevice::with(&pattern(3))?;
        pod.start(&forever_with(&pod, &disk))?;
        harm::kill(&pod.id, victim)?;
        nobody_holds(&disk)?;
        pod.end_within(LIMIT)?;
        // In the middle of it, too.
        let pod = Pod::run(&DAEMON.cri, "ctvm")?;
        std::thread::scope(|scope| {
            let config = forever_with(&pod, &disk);
            let (cri, id, sandbox) = (&DAEMON.cri, &pod.id, &pod.config);
            let making = scope.spawn(move || cri.create(id, &config, sandbox).and_then(|id| cri.start(&id)));
            wait_until("the VMM has the disk", || Ok(holders(disk.node()) > 0 || making.is_finished()))?;
            harm::kill(&pod.id, victim)?;
            // Whether it was made before is a matter of time.
            let _ = making.join().expect("no panic");
            anyhow::Ok(())
        })?;
        nobody_holds(&disk)?;
        pod.end_within(LIMIT)?;
    }
    Ok(())
}
