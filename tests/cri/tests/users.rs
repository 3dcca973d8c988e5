//! Pods with users of their own (`hostUsers: false`), as containerd 2.1 hands them over: with id-mapped mounts.
#![cfg(feature = "lab")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown};
use std::path::Path;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use cri::pod::{id_mappings, mount, own_users, security};
use cri::{Cri, Daemon, Pod, harm};
use e2e::command::{LIMIT, wait_until};
use e2e::{Census, LoopDevice, SmallFs};
use k8s_cri::v1::{Capability, ContainerConfig, Device, Int64Value, Mount, NamespaceMode, NamespaceOption};
use tempfile::TempDir;

/// The host's id of the containers' root.
const FIRST: u32 = 200_000;
/// The runtimes: with a pause container, and by the Sandbox API.
const HANDLERS: [&str; 2] = ["ctvm", "ctvm-pod"];

/// Where files can be that have other owners on another mount.
static DISK: LazyLock<SmallFs> = LazyLock::new(|| SmallFs::ext4(1 << 30).expect("ext4 is mounted"));

/// One containerd for all tests of this file.
static DAEMON: LazyLock<Daemon> =
    LazyLock::new(|| Daemon::start_release_in("2.1", DISK.path()).expect("containerd 2.1 starts"));

/// One test at a time: they count what is left.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cri() -> &'static Cri {
    &DAEMON.cri
}

fn pod(handler: &str) -> Result<Pod> {
    Pod::run_with(cri(), handler, |config| own_users(config, FIRST))
}

/// A folder of the host, as the kubelet gives one to such a pod.
fn mapped(host: &Path, container: &str) -> Mount {
    let (uid_mappings, gid_mappings) = (id_mappings(FIRST), id_mappings(FIRST));
    Mount { uid_mappings, gid_mappings, ..mount(host, container) }
}

/// A folder of the host for volumes.
fn folder() -> Result<TempDir> {
    Ok(TempDir::new_in(DISK.path())?)
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let found = path.symlink_metadata().with_context(|| path.display().to_string())?;
    Ok((found.uid(), found.gid()))
}

fn write_owned(path: &Path, id: u32) -> Result<()> {
    std::fs::write(path, "content\n")?;
    Ok(chown(path, Some(id), Some(id))?)
}

fn run(pod: &Pod, change: impl FnOnce(&mut ContainerConfig), script: &str) -> Result<String> {
    let mut config = pod.container(&["sh", "-c", script]);
    change(&mut config);
    pod.finish(&config)?.ok()
}

#[test]
fn files_have_the_owners_that_the_container_expects() -> Result<()> {
    let _alone = alone();
    for handler in HANDLERS {
        let pod = pod(handler)?;
        let (volume, plain) = (folder()?, folder()?);
        let (volume, plain) = (volume.path(), plain.path());
        let (hosts, secret) = (volume.join("hosts"), plain.join("secret"));
        write_owned(&hosts, 0)?;
        write_owned(&volume.join("webs"), 33)?;
        write_owned(&plain.join("ours"), FIRST + 7)?;
        write_owned(&secret, 0)?;
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600))?;
        std::fs::set_permissions(volume, PermissionsExt::from_mode(0o755))?;
        std::fs::set_permissions(plain, PermissionsExt::from_mode(0o777))?;
        let give = |config: &mut ContainerConfig| {
            config.mounts = vec![mapped(volume, "/volume"), mapped(&hosts, "/one"), mount(plain, "/plain")];
        };
        let said = run(
            &pod,
            give,
            "set -e; cat /proc/self/uid_map /proc/self/gid_map; \
             stat -c %u:%g / /bin/sh /etc/passwd /tmp /volume /volume/webs /one /plain/ours /plain/secret; \
             echo more >> /one; touch /volume/new /plain/new /new; mkdir /volume/dir; chown 1000:1001 /volume/dir; \
             ln -s new /volume/link; chown -h 5:6 /volume/link; stat -c %u:%g /new /volume/dir; \
             cat /plain/secret 2>/dev/null || echo refused; chown 70000 /new 2>/dev/null || echo nobody",
        )?;
        let map = format!("0 {FIRST} 65536");
        let expected = [
            map.as_str(),
            &map,
            "0:0",
            "0:0",
            "0:0",
            "0:0",
            "0:0",
            "33:33",
            "0:0",
            "7:7",
            "65534:65534",
            "0:0",
            "1000:1001",
            "refused",
            "nobody",
        ];
        let said: Vec<String> =
            said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        ensure!(said == expected, "{handler}: {said:?}");
        ensure!(std::fs::read_to_string(&hosts)? == "content\nmore\n", "{handler}: the file is another");
        let found = ["new", "dir", "link"].map(|name| owner(&volume.join(name)).ok());
        ensure!(found == [Some((0, 0)), Some((1000, 1001)), Some((5, 6))], "{handler}: {found:?}");
        ensure!(owner(&plain.join("new"))? == (FIRST, FIRST), "{handler}: an unmapped folder shifts owners");
        pod.end()?;
    }
    Ok(())
}

#[test]
fn root_of_the_container_is_root_of_its_pod_and_no_more() -> Result<()> {
    let _alone = alone();
    for handler in HANDLERS {
        let pod = Pod::run_with(cri(), handler, |config| {
            own_users(config, FIRST);
            harm::privileged(config);
        })?;
        let said = run(
            &pod,
            |config| security(config).privileged = true,
            "try() { name=$1; shift; \"$@\" 2>/dev/null && echo $name || echo no $name; }; \
             try pid_max sh -c 'echo 4194304 > /proc/sys/kernel/pid_max'; \
             try panic sh -c 'echo 5 > /proc/sys/kernel/panic'; \
             try core sh -c 'echo /x > /proc/sys/kernel/core_pattern'; \
             try forward sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'; \
             try shm sh -c 'echo 4097 > /proc/sys/kernel/shmmni'; \
             try hostname hostname other; try link ip link set lo mtu 1400; \
             mkdir -p /mnt; try mount mount -t tmpfs none /mnt; try mknod mknod /dev/mem c 1 1; \
             grep CapEff /proc/self/status",
        )?;
        let lines: Vec<&str> = said.lines().collect();
        let expected =
            ["no pid_max", "no panic", "no core", "forward", "shm", "hostname", "link", "mount", "no mknod"];
        ensure!(lines[..lines.len() - 1] == expected, "{handler}: {said}");
        // All that there are, and yet.
        ensure!(lines[lines.len() - 1].ends_with("1ffffffffff"), "{handler}: {said}");
        pod.end()?;
    }
    Ok(())
}

#[test]
fn containers_of_a_pod_share_their_users_and_what_belongs_to_them() -> Result<()> {
    let _alone = alone();
    let cri = cri();
    for handler in HANDLERS {
        let pod = pod(handler)?;
        let (first, second) = (pod.start_forever()?, pod.start_forever()?);
        let names = ["user", "net", "ipc", "uts", "pid", "mnt"];
        let links = |id: &str| -> Result<Vec<String>> {
            let files = names.map(|name| format!("readlink /proc/self/ns/{name}")).join("; ");
            let said = cri.exec(id, &["sh", "-c", &files], 0)?.ok()?;
            Ok(said.lines().map(str::to_owned).collect())
        };
        let (of_first, of_second) = (links(&first)?, links(&second)?);
        ensure!(of_first[..4] == of_second[..4], "{handler}: {of_first:?} {of_second:?}");
        ensure!(of_first[4] != of_second[4] && of_first[5] != of_second[5], "{handler}: {of_first:?}");
        cri.exec(&first, &["sh", "-c", "echo shared > /dev/shm/x"], 0)?.ok()?;
        let said = cri.exec(&second, &["sh", "-c", "cat /dev/shm/x; stat -c %u:%g /dev/shm/x"], 0)?.ok()?;
        ensure!(said == "shared\n0:0", "{handler}: {said:?}");
        pod.end()?;
        // The pod's process numbers, too, where it asks for that.
        let pod = Pod::run_with(cri, handler, |config| {
            own_users(config, FIRST);
            let linux = config.linux.get_or_insert_default();
            let context = linux.security_context.get_or_insert_default();
            context.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        })?;
        let mut config = pod.forever();
        let shared = |config: &mut ContainerConfig| {
            let options: &mut NamespaceOption = security(config).namespace_options.get_or_insert_default();
            options.pid = NamespaceMode::Pod.into();
        };
        shared(&mut config);
        let first = pod.start(&config)?;
        pod.wait_until_ready(&config)?;
        let said = run(&pod, shared, "ps -o user,args | grep -c '[t]rap'; cat /proc/self/uid_map | wc -l")?;
        ensure!(said.starts_with('1') || said.starts_with('2'), "{handler}: {said:?}");
        cri.exec(&first, &["true"], 0)?.ok()?;
        pod.end()?;
    }
    Ok(())
}

#[test]
fn an_exec_is_who_the_container_is() -> Result<()> {
    let _alone = alone();
    let cri = cri();
    const WHO: &str = "id -u; id -g; id -G; grep -h -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status; \
                       cat /proc/self/uid_map; echo $HOME; readlink /proc/self/ns/user; readlink /proc/self/ns/cgroup";
    for handler in HANDLERS {
        let pod = pod(handler)?;
        for (user, capability) in [(None, "NET_ADMIN"), (Some(1234), "CHOWN")] {
            let mut config =
                pod.container(&["sh", "-c", &format!("({WHO}) > /tmp/who; echo ready; sleep 3600")]);
            let context = security(&mut config);
            context.run_as_user = user.map(|value| Int64Value { value });
            context.supplemental_groups = vec![1111, 2222];
            let add_capabilities = vec![capability.to_owned()];
            context.capabilities = Some(Capability { add_capabilities, ..Capability::default() });
            let id = pod.start(&config)?;
            pod.wait_until_ready(&config)?;
            let of_init = cri.exec(&id, &["cat", "/tmp/who"], 0)?.ok()?;
            let of_exec = cri.exec(&id, &["sh", "-c", WHO], 0)?.ok()?;
            ensure!(of_init == of_exec, "{handler} {user:?}: {of_init}\n{of_exec}");
            let owner =
                cri.exec(&id, &["sh", "-c", "echo x > /dev/stdout; touch /tmp/f; stat -c %u /tmp/f"], 0)?;
            let expected = format!("x\n{}", user.unwrap_or(0));
            let owner = owner.ok()?;
            ensure!(owner == expected, "{handler} {user:?}: {owner:?}");
            let failed = cri.exec(&id, &["sh", "-c", "echo 5 > /proc/sys/kernel/panic"], 0)?;
            ensure!(failed.code != 0, "{handler} {user:?}: {failed:?}");
            let missing = cri.exec(&id, &["/no/such"], 0);
            ensure!(missing.is_err() || missing.is_ok_and(|done| done.code != 0), "{handler}: it ran");
        }
        pod.end()?;
    }
    Ok(())
}

#[test]
fn what_a_container_finds_in_its_file_systems_works() -> Result<()> {
    let _alone = alone();
    let cri = cri();
    for handler in HANDLERS {
        let disk = LoopDevice::with(&[b'd'; 1 << 16])?;
        let pod = Pod::run_with(cri, handler, |config| {
            own_users(config, FIRST);
            let linux = config.linux.get_or_insert_default();
            linux.sysctls.insert("net.ipv4.ip_default_ttl".into(), "77".into());
            linux.sysctls.insert("kernel.shmmni".into(), "5000".into());
        })?;
        let mut config = pod.container(&[
            "sh",
            "-c",
            "set -e; cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmni; ls /sys/class/net | grep -c eth0; \
             touch /dev/mqueue/q; stat -c %u /dev/mqueue/q; stat -c %g $(tty); stat -c %u $(tty); \
             cat /sys/fs/cgroup/cgroup.procs | head -n 1; hostname; cat /dev/zero | head -c 3 | wc -c; \
             echo x > /dev/null; head -c 4 /dev/urandom | wc -c; echo y > /dev/console; \
             stat -c '%F %u' /dev/xvda; head -c 2 /dev/xvda; echo; \
             echo new | dd of=/dev/xvda bs=4 count=1 conv=notrunc,fsync 2>/dev/null; \
             stat -c %u /etc/hosts /etc/resolv.conf; echo '# more' >> /etc/hosts && echo written",
        ]);
        config.tty = true;
        let (container_path, permissions) = ("/dev/xvda".into(), "rwm".into());
        let host_path = disk.name().to_owned();
        config.devices.push(Device { container_path, host_path, permissions });
        let done = pod.finish(&config)?;
        let said = done.ok()?.replace('\r', "");
        let hostname = pod.config.hostname.as_str();
        let expected = [
            "77",
            "5000",
            "1",
            "0",
            "5",
            "0",
            "1",
            hostname,
            "3",
            "4",
            "y",
            "block special file 0",
            "dd",
            "0",
            "0",
            "written",
        ];
        // Files of the pod that containerd makes are the host's root's, and so nobody's.
        let got: Vec<&str> = said.lines().collect();
        ensure!(got == expected || got[..13] == expected[..13], "{handler}: {said}");
        ensure!(disk.content()?.starts_with(b"new\ndd"), "{handler}: nothing is on the disk");
        pod.end()?;
    }
    Ok(())
}

#[test]
fn servers_of_such_a_pod_are_reached() -> Result<()> {
    let _alone = alone();
    for handler in HANDLERS {
        let pod = pod(handler)?;
        let id = pod.start(&pod.container(&["nc", "-ll", "-p", "80", "-e", "cat"]))?;
        let script = "cat /proc/net/tcp /proc/net/tcp6";
        wait_until("the server listens", || {
            Ok(cri().exec(&id, &["sh", "-c", script], 0)?.stdout.contains(":0050 "))
        })?;
        let mut stream = TcpStream::connect((pod.address()?.as_str(), 80))?;
        stream.write_all(b"hello")?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer)?;
        ensure!(&answer == b"hello", "{answer:?}");
        // On the loopback, by port-forward, which enters the pod's namespace on this host.
        let url = cri().port_forward_url(&pod.id, 80)?;
        let mut channels = cri::websocket::Channels::open(&format!("{url}?port=80"))?;
        for _ in 0..2 {
            channels.receive()?;
        }
        channels.send(0, b"forwarded")?;
        channels.read_until(0, "forwarded")?;
        pod.end()?;
    }
    Ok(())
}

#[test]
fn nothing_is_left_of_such_a_pod() -> Result<()> {
    let _alone = alone();
    for handler in HANDLERS {
        // What stays after the first pod of all, and its first container, is not this one's.
        let earlier = pod(handler)?;
        run(&earlier, |_| (), "true")?;
        earlier.end()?;
        let before = Census::take_with(&[DAEMON.containerd.folder().join("state")])?;
        let first = pod(handler)?;
        let volume = folder()?;
        let volume = volume.path();
        std::fs::write(volume.join("file"), "x")?;
        let give = |config: &mut ContainerConfig| {
            config.mounts = vec![mapped(volume, "/volume"), mapped(&volume.join("file"), "/file")];
        };
        run(&first, give, "cat /file /volume/file")?;
        // A container that cannot be made after its mounts were.
        let mut config = first.container(&["/no/such/program"]);
        give(&mut config);
        ensure!(first.start(&config).is_err(), "{handler}: it started");
        let doomed = pod(handler)?;
        doomed.start_forever()?;
        harm::kill(&doomed.id, "shim")?;
        first.end()?;
        doomed.end_within(LIMIT)?;
        before.settle()?;
    }
    Ok(())
}

#[test]
fn other_users_than_the_pods_are_refused() -> Result<()> {
    let _alone = alone();
    for handler in HANDLERS {
        let with = pod(handler)?;
        let mut config = with.container(&["true"]);
        let options: &mut NamespaceOption = security(&mut config).namespace_options.get_or_insert_default();
        options.userns_options = None;
        ensure!(with.start(&config).is_err(), "{handler}: a container has the guest's users");
        with.end()?;
        let overlapping = Pod::run_with(cri(), handler, |config| {
            own_users(config, FIRST);
            let linux = config.linux.get_or_insert_default();
            let context = linux.security_context.get_or_insert_default();
            let options = context.namespace_options.get_or_insert_default();
            if let Some(users) = &mut options.userns_options {
                users.uids[0].length = 0;
            }
        });
        ensure!(overlapping.is_err(), "{handler}: a map without ids");
    }
    Ok(())
}

#[test]
fn a_container_without_a_pod_has_users_too() -> Result<()> {
    let _alone = alone();
    let map = format!("0:{FIRST}:65536");
    let script = "id -u; cat /proc/self/uid_map; touch /new; stat -c %u:%g /new /bin/sh";
    let said = e2e::run(
        DAEMON
            .containerd
            .ctr()
            .args(["run", "--rm", "--runtime", "io.containerd.ctvm.v2", "--uidmap", &map, "--gidmap", &map])
            .args([e2e::IMAGE, "alone", "sh", "-c", script]),
    )?
    .ok()?;
    let expected = ["0", "0", &FIRST.to_string(), "65536", "0:0", "0:0"].map(str::to_owned);
    ensure!(said.split_whitespace().eq(expected.iter().map(String::as_str)), "{said:?}");
    Ok(())
}
