//! What containers do to files, done on a container's root and in a volume, under the VMM's filters; and no system call
//! of the VMM that they do not list.
#![cfg(feature = "lab")]

mod canary;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cri::{Daemon, Pod, harm};
use e2e::SmallFs;
use k8s_cri::v1::Mount;

/// The program (`tests/exerciser`), in the lab and in the container.
const PROGRAM: &str = "/opt/ctvm/tests/exerciser";

/// What does not end in `ok` on the container's root, an overlay, and in the volume, with the reason.
const EXPECTED: &[(&str, &str, &str, &str)] = &[
    ("xattr trusted", "EPERM", "EPERM", "for CAP_SYS_ADMIN only; in a share not even then"),
    (
        "xattr posix acl",
        "EOPNOTSUPP",
        "EOPNOTSUPP",
        "the guest's kernel would store lists and not enforce them",
    ),
    ("rename whiteout", "EINVAL", "ok", "overlays have whiteouts of their own"),
    ("whiteout node", "EPERM", "ok", "the same"),
    ("device node", "EPERM", "EPERM", "would be a device of the host"),
    ("name of 256 bytes", "ENAMETOOLONG", "ENAMETOOLONG", "the limit is 255"),
    ("flags of a file (lsattr)", "ENOTTY", "ENOTTY", "a file server has no ioctls"),
    ("fallocate collapse range", "EOPNOTSUPP", "EOPNOTSUPP", "FUSE has none"),
    ("O_TMPFILE", "EOPNOTSUPP", "EOPNOTSUPP", "FUSE has it from Linux 6.2 on"),
    ("preadv2 without waiting", "EOPNOTSUPP", "EOPNOTSUPP", "FUSE may always wait"),
    ("reflink", "EOPNOTSUPP", "EOPNOTSUPP", "FUSE has none; copy_file_range is the host's"),
];

/// Operations whose outcome is not the one of the table.
fn surprises(report: &str) -> Vec<String> {
    let is_surprise = |line: &&str| {
        // OUTCOME FOLDER NAME[: MORE]
        let mut words = line.splitn(3, ' ');
        let (Some(outcome), Some(folder), Some(rest)) = (words.next(), words.next(), words.next()) else {
            return true;
        };
        let name = rest.split(": ").next().unwrap_or(rest);
        let expected = EXPECTED.iter().find(|row| row.0 == name);
        outcome != expected.map_or("ok", |row| if folder == "/" { row.1 } else { row.2 })
    };
    report.lines().filter(is_surprise).map(str::to_owned).collect()
}

fn exercise(daemon: &Daemon, handler: &str) -> Result<()> {
    let pod = Pod::run(&daemon.cri, handler)?;
    let mut config = pod.container(&["/exerciser", "/", "/data"]);
    let folder = daemon.containerd.folder().join("data");
    let many = folder.join("many");
    std::fs::create_dir_all(&many)?;
    for number in 0..10_000 {
        std::fs::File::create(many.join(number.to_string()))?;
    }
    config.mounts = vec![cri::pod::mount(&folder, "/data"), program()];
    let done = pod.finish(&config)?;
    eprintln!("{}", done.stdout);
    ensure!(done.code == 0, "{done:?}");
    let surprises = surprises(&done.stdout);
    ensure!(surprises.is_empty(), "{}", surprises.join("\n"));
    ensure!(std::fs::read_dir(folder)?.count() == 1, "something is left in the volume");
    network(&pod)?;
    pod.end()
}

fn program() -> Mount {
    Mount { readonly: true, ..cri::pod::mount(Path::new(PROGRAM), "/exerciser") }
}

/// 4 MiB to the host and back, and a datagram, through the pod's interface.
fn network(pod: &Pod) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let address = pod.address()?;
    let gateway = address.rsplit_once('.').map(|(net, _)| format!("{net}.1")).context("an address")?;
    let (tcp, udp) = (TcpListener::bind((gateway.as_str(), 0))?, UdpSocket::bind((gateway.as_str(), 0))?);
    let (tcp_port, udp_port) = (tcp.local_addr()?.port(), udp.local_addr()?.port());
    let server = std::thread::spawn(move || -> Result<()> {
        let (mut connection, _) = tcp.accept()?;
        let mut bytes = vec![0; BYTES];
        connection.read_exact(&mut bytes)?;
        connection.write_all(&bytes)?;
        drop(connection);
        let mut room = [0; 100];
        let (count, from) = udp.recv_from(&mut room)?;
        udp.send_to(&room[..count], from)?;
        Ok(())
    });
    let mut config = pod.container(&[
        "/exerciser",
        "network",
        &format!("{gateway}:{tcp_port}"),
        &format!("{gateway}:{udp_port}"),
    ]);
    config.mounts = vec![program()];
    let done = pod.finish(&config)?;
    ensure!(done.code == 0, "{done:?}");
    server.join().expect("the server does not panic")
}

#[test]
fn containers_do_what_they_do_under_the_filters() -> Result<()> {
    // As on a disk: the lab's own file systems are in memory.
    let disk = SmallFs::ext4(1 << 30)?;
    exercise(&Daemon::start_in(disk.path())?, "ctvm")
}

#[test]
fn nothing_is_missing_in_the_filters() -> Result<()> {
    let disk = SmallFs::ext4(1 << 30)?;
    let daemon = Daemon::start_in(disk.path())?;
    let logged = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_logged")?;
    ensure!(logged.split_whitespace().any(|action| action == "log"), "the kernel logs {logged}");
    let before = breaches()?;
    exercise(&daemon, "ctvm-logged")?;
    let after = breaches()?;
    ensure!(before == after, "system calls that no filter lists: {:?}", &after[before.len()..]);
    Ok(())
}

#[test]
fn what_no_filter_lists_would_show() -> Result<()> {
    let daemon = Daemon::start(None)?;
    let pod = Pod::run(&daemon.cri, "ctvm-logged")?;
    let vmm = harm::pid(&pod.id, "vmm").context("a pod has a VMM")?;
    let before = breaches()?;
    let answer = canary::call(vmm, CANARY)?;
    let parent = harm::pid(&pod.id, "shim").context("a pod has a shim")?;
    ensure!(answer == i64::from(parent), "the call was not carried out: {answer}");
    let new = breaches()?.split_off(before.len());
    let syscall = format!("syscall={CANARY} ");
    ensure!(new.len() == 1 && new[0].contains(&syscall), "{new:?} in place of one line with {syscall}");
    pod.script("true")?;
    pod.end()
}

/// A harmless call that a VMM has no use for: `getppid`.
const CANARY: i64 = libc::SYS_getppid;

/// What the kernel has logged of system calls that a filter does not list (`audit: type=1326 … syscall=N`).
fn breaches() -> Result<Vec<String>> {
    let log = e2e::run(Command::new("dmesg").arg("--notime"))?.ok()?;
    Ok(log
        .lines()
        .filter(|line| line.contains("type=1326") && line.contains("ctvm-vmm"))
        .map(str::to_owned)
        .collect())
}
