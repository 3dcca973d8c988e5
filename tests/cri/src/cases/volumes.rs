use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use e2e::command::wait_until;
use e2e::{LoopDevice, run};
use k8s_cri::v1::{Device, HugepageLimit, Mount, MountPropagation};

use super::{Case, Ground, case, host_only};
use crate::Pod;
use crate::pod::mount;

const PEERS: &str = "mounts of another kernel: a mount made in one does not appear in the other";

pub(super) const CASES: &[Case] = &[
    case("a folder of the host, written from both sides", folder),
    case("a folder of the host by a symbolic link", by_link),
    case("a folder that does not exist is made", made),
    case("a single file of the host", file),
    case("a read-only volume refuses writes", read_only),
    case("a recursively read-only volume refuses writes below too", recursive_read_only),
    case("a part of a volume (subPath)", sub_path),
    case("projected files change under the pod", projected),
    case("an emptyDir on memory holds its size limit, for all containers", memory_dir),
    case("a disk emptyDir of the host's size limit is full for the container too", disk_dir),
    case("/dev/shm is shared by the pod's containers", shm),
    case("a volume's owner, modes and links are as on the host", attributes),
    case("mounts in a private volume stay on either side", propagation_private),
    case("a mount the host makes later shows in an rslave volume", propagation_slave),
    host_only(
        "a mount the container makes shows on the host of an rshared volume",
        propagation_shared,
        PEERS,
    ),
    case("an rshared volume is usable", shared_usable),
    case("a block device of the host (raw block volume)", block_device),
    case("an emptyDir of huge pages, within its limit", huge_pages),
];

fn with(pod: &Pod, mounts: Vec<Mount>, script: &str) -> Result<String> {
    let mut config = pod.container(&["sh", "-c", script]);
    config.mounts = mounts;
    pod.finish(&config)?.ok()
}

fn read_only_mount(host: &Path, container: &str) -> Mount {
    Mount { readonly: true, ..mount(host, container) }
}

fn folder(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?;
    fs::write(host.join("from-host"), "host")?;
    let got = with(pod, vec![mount(&host, "/data")], "cat /data/from-host; echo -n pod > /data/from-pod")?;
    ensure!(got == "host" && fs::read_to_string(host.join("from-pod"))? == "pod", "{got:?}");
    Ok(())
}

fn by_link(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?;
    fs::write(host.join("f"), "x")?;
    let link = host.with_file_name("link");
    symlink(&host, &link)?;
    ensure!(with(pod, vec![mount(&link, "/data")], "cat /data/f")? == "x", "not the folder's file");
    Ok(())
}

fn made(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?.join("not/there");
    with(pod, vec![mount(&host, "/data")], "echo x > /data/f")?;
    ensure!(host.join("f").exists(), "the file is not on the host");
    Ok(())
}

fn file(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?.join("file");
    fs::write(&host, "one\n")?;
    let got = with(pod, vec![mount(&host, "/etc/one-file")], "cat /etc/one-file; echo two > /etc/one-file")?;
    ensure!(got == "one" && fs::read_to_string(&host)? == "two\n", "{got:?}");
    Ok(())
}

fn read_only(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?;
    let got = with(
        pod,
        vec![read_only_mount(&host, "/data")],
        "touch /data/f 2>/dev/null || echo refused; mkdir /data/d 2>/dev/null || echo refused",
    )?;
    ensure!(got == "refused\nrefused" && fs::read_dir(&host)?.next().is_none(), "{got:?}");
    Ok(())
}

/// A file system of its own below a folder, until dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, options: &str) -> Result<Mounted> {
        fs::create_dir_all(at)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at))?.ok()?;
        Ok(Mounted(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

fn recursive_read_only(on: &Ground) -> Result<()> {
    ensure!(
        on.handler == "runc" || on.release != "2.1",
        "not tried: containerd 2.1.9 reads the features of runc alone, and panics where others are asked for this"
    );
    let pod = on.usual()?;
    let host = pod.host_folder("data")?;
    let _below = Mounted::tmpfs(&host.join("below"), "size=1m")?;
    let mut volume = read_only_mount(&host, "/data");
    volume.recursive_read_only = true;
    volume.propagation = MountPropagation::PropagationPrivate.into();
    let got = with(pod, vec![volume], "touch /data/below/f 2>/dev/null || echo refused")?;
    ensure!(got == "refused", "{got:?}");
    Ok(())
}

fn sub_path(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data/a/b")?;
    fs::write(host.join("f"), "deep")?;
    fs::write(host.with_file_name("secret"), "s")?;
    let got = with(pod, vec![mount(&host, "/data")], "cat /data/f; ls /data; ls /data/..")?;
    ensure!(got.starts_with("deepf\n") && !got.contains("secret"), "{got:?}");
    Ok(())
}

fn projected(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    // As the kubelet writes a ConfigMap: files are links by way of a link that is swapped.
    let host = pod.host_folder("config")?;
    let write = |version: &str| -> Result<()> {
        fs::create_dir_all(host.join(version))?;
        fs::write(host.join(version).join("key"), version)?;
        symlink(version, host.join("..tmp"))?;
        Ok(fs::rename(host.join("..tmp"), host.join("..data"))?)
    };
    write("v1")?;
    symlink("..data/key", host.join("key"))?;
    let mut config = pod.forever();
    config.mounts.push(read_only_mount(&host, "/config"));
    let id = pod.start(&config)?;
    ensure!(on.cri.exec(&id, &["cat", "/config/key"], 0)?.ok()? == "v1", "not the first version");
    write("v2")?;
    wait_until("the new version shows", || Ok(on.cri.exec(&id, &["cat", "/config/key"], 0)?.ok()? == "v2"))?;
    Ok(())
}

fn full_at_limit(on: &Ground, host: &Path) -> Result<()> {
    let pod = on.usual()?;
    let script = "head -c 3m /dev/zero > /data/a; head -c 9m /dev/zero > /data/b 2>/dev/null || echo full; \
                  rm /data/b; head -c 1m /dev/zero > /data/c && echo room";
    let got = with(pod, vec![mount(host, "/data")], script)?;
    ensure!(got == "full\nroom", "{got:?}");
    let seen = with(pod, vec![mount(host, "/data")], "wc -c < /data/a")?;
    ensure!(seen == (3 << 20).to_string(), "the second container sees {seen:?}");
    Ok(())
}

fn memory_dir(on: &Ground) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let host = Mounted::tmpfs(&folder.path().join("memory"), "size=8m")?;
    full_at_limit(on, &host.0)
}

fn disk_dir(on: &Ground) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let (image, host) = (folder.path().join("image"), folder.path().join("disk"));
    fs::File::create(&image)?.set_len(10 << 20)?;
    run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&image))?.ok()?;
    fs::create_dir(&host)?;
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&host))?.ok()?;
    let _disk = Mounted(host.clone());
    full_at_limit(on, &host)
}

fn shm(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let first = pod.start_forever()?;
    let second = pod.start_forever()?;
    on.cri.exec(&first, &["sh", "-c", "echo shared > /dev/shm/f"], 0)?.ok()?;
    ensure!(on.cri.exec(&second, &["cat", "/dev/shm/f"], 0)?.ok()? == "shared", "it is not shared");
    let size = on.cri.exec(&first, &["sh", "-c", "df -k /dev/shm | tail -n 1"], 0)?.ok()?;
    ensure!(size.split_whitespace().nth(1) == Some("65536"), "/dev/shm is {size:?}");
    pod.end()
}

fn attributes(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let host = pod.host_folder("data")?;
    let script = "cd /data; echo x > f; chown 12:34 f; chmod 2640 f; ln f hard; ln -s f soft; mkfifo p; \
                  stat -c '%u:%g %a %h' f; readlink soft";
    let got = with(pod, vec![mount(&host, "/data")], script)?;
    ensure!(got == "12:34 2640 2\nf", "{got:?}");
    let stat = run(Command::new("stat").args(["-c", "%u:%g %a %h"]).arg(host.join("f")))?.ok()?;
    ensure!(stat == "12:34 2640 2", "on the host: {stat:?}");
    Ok(())
}

/// A container with a volume of this propagation, whose host side is a mount point of its own.
fn propagating(
    on: &Ground,
    kind: MountPropagation,
    check: impl Fn(&Pod, &str, &Path) -> Result<()>,
) -> Result<()> {
    let may = kind == MountPropagation::PropagationBidirectional;
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = may;
    })?;
    let host = pod.host_folder("data")?;
    let _mount = Mounted::tmpfs(&host, "size=1m")?;
    run(Command::new("mount").arg("--make-rshared").arg(&host))?.ok()?;
    let mut config = pod.forever();
    let mut volume = mount(&host, "/data");
    volume.propagation = kind.into();
    config.mounts.push(volume);
    crate::pod::security(&mut config).privileged = may;
    let id = pod.start(&config)?;
    check(&pod, &id, &host)?;
    pod.end()
}

/// Makes a mount on the host and says whether the container sees what is in it.
fn host_mount_shows(on: &Ground, id: &str, host: &Path) -> Result<bool> {
    let late = Mounted::tmpfs(&host.join("late"), "size=1m")?;
    fs::write(late.0.join("f"), "late")?;
    // What shows, shows within the second for which names may be remembered.
    for _ in 0..20 {
        if on.cri.exec(id, &["cat", "/data/late/f"], 0)?.code == 0 {
            return Ok(true);
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(false)
}

fn propagation_private(on: &Ground) -> Result<()> {
    propagating(on, MountPropagation::PropagationPrivate, |_, id, host| {
        ensure!(!host_mount_shows(on, id, host)?, "a mount of the host shows in the container");
        Ok(())
    })
}

fn propagation_slave(on: &Ground) -> Result<()> {
    propagating(on, MountPropagation::PropagationHostToContainer, |_, id, host| {
        ensure!(host_mount_shows(on, id, host)?, "a mount of the host does not show in the container");
        Ok(())
    })
}

fn propagation_shared(on: &Ground) -> Result<()> {
    propagating(on, MountPropagation::PropagationBidirectional, |_, id, host| {
        let script = "mkdir /data/inner && mount -t tmpfs none /data/inner && echo x > /data/inner/f";
        on.cri.exec(id, &["sh", "-c", script], 0)?.ok()?;
        ensure!(host.join("inner/f").exists(), "a mount of the container does not show on the host");
        Ok(())
    })
}

fn shared_usable(on: &Ground) -> Result<()> {
    propagating(on, MountPropagation::PropagationBidirectional, |_, id, host| {
        on.cri.exec(id, &["sh", "-c", "echo x > /data/f"], 0)?.ok()?;
        ensure!(host.join("f").exists(), "the file is not on the host");
        Ok(())
    })
}

fn block_device(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let disk = LoopDevice::with(&[b'x'; 4096])?;
    let script = "head -c 3 /dev/xvda; dd if=/dev/zero of=/dev/xvda bs=512 count=1 conv=fsync 2>/dev/null";
    let mut config = pod.container(&["sh", "-c", script]);
    config.devices.push(Device {
        container_path: "/dev/xvda".into(),
        host_path: disk.name().to_owned(),
        permissions: "rwm".into(),
    });
    let got = pod.finish(&config)?.ok()?;
    let content = disk.content()?;
    ensure!(got == "xxx" && content[..512] == [0; 512] && content[512] == b'x', "{got:?}");
    pod.end()
}

fn huge_pages(on: &Ground) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let host = folder.path().join("pages");
    fs::create_dir(&host)?;
    run(Command::new("mount").args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]).arg(&host))?.ok()?;
    let _pages = Mounted(host.clone());
    // The host's own, for a runtime without another kernel.
    fs::write("/proc/sys/vm/nr_hugepages", "2")?;
    let pod = on.pod()?;
    let script = "grep -q ' /huge hugetlbfs ' /proc/mounts && fallocate -l 4194304 /huge/f && \
                  grep HugePages_Total /proc/meminfo";
    let mut config = pod.container(&["sh", "-c", script]);
    config.mounts = vec![mount(&host, "/huge")];
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default().hugepage_limits =
        vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }];
    let done = pod.finish(&config).and_then(|done| done.ok());
    fs::write("/proc/sys/vm/nr_hugepages", "0")?;
    let total = done?;
    ensure!(total.split_whitespace().last() == Some("2"), "{total:?}");
    pod.end()
}
