//! Pods with users of their own under containerd 1.7, which has the runtime make the network namespace of such a pod and
//! has its CNI plugins work between the task's creation and its start. Files have their owners by copies there.
#![cfg(feature = "lab")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use cri::pod::own_users;
use cri::{Daemon, Pod, harm};
use e2e::Census;
use e2e::command::{LIMIT, wait_until};

/// The host's id of the containers' root.
const FIRST: u32 = 300_000;

/// One containerd for all tests of this file.
static DAEMON: LazyLock<Daemon> =
    LazyLock::new(|| Daemon::start(Some("1.7")).expect("containerd 1.7 starts"));

/// One test at a time: they count what is left.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pod() -> Result<Pod> {
    Pod::run_with(&DAEMON.cri, "ctvm", |config| own_users(config, FIRST))
}

fn census() -> Result<Census> {
    // What stays after the first pod of all, and its first container, is not another's.
    ensure!(pod_says_yes()?);
    Census::take_with(&[DAEMON.containerd.folder().join("state")])
}

#[test]
fn the_pod_has_its_users_and_the_network_that_came_late() -> Result<()> {
    let _alone = alone();
    let before = census()?;
    let pod = pod()?;
    let said = pod.script(
        "cat /proc/self/uid_map; stat -c %u:%g / /bin/sh; touch /new; stat -c %u:%g /new; \
         ip -o -4 addr show dev eth0; ip route",
    )?;
    let lines: Vec<String> =
        said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    ensure!(lines[..4] == [&format!("0 {FIRST} 65536"), "0:0", "0:0", "0:0"], "{said}");
    let address = pod.address()?;
    ensure!(lines[4].contains(&format!("inet {address}/24")), "not {address}: {said}");
    ensure!(said.contains("default via"), "no route: {said}");

    let id = pod.start(&pod.container(&["nc", "-ll", "-p", "80", "-e", "cat"]))?;
    // Another container sees it in the network that they share.
    let other = pod.start_forever()?;
    wait_until("the server listens", || {
        let tables = DAEMON.cri.exec(&other, &["sh", "-c", "cat /proc/net/tcp /proc/net/tcp6"], 0)?;
        Ok(tables.stdout.contains(":0050 "))
    })?;
    let mut stream = TcpStream::connect((address.as_str(), 80)).context("the pod's address")?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"hello", "{answer:?}");
    drop(stream);
    let url = DAEMON.cri.port_forward_url(&pod.id, 80)?;
    let mut channels = cri::websocket::Channels::open(&format!("{url}?port=80"))?;
    for _ in 0..2 {
        channels.receive()?;
    }
    channels.send(0, b"forwarded")?;
    channels.read_until(0, "forwarded")?;
    drop(channels);
    ensure!(DAEMON.cri.exec(&id, &["id", "-u"], 0)?.ok()? == "0");
    pod.end()?;
    before.settle()
}

#[test]
fn a_pod_that_gets_no_network_is_given_up_whole() -> Result<()> {
    let _alone = alone();
    let before = census()?;
    // Every address is somebody's.
    let folder = DAEMON.containerd.folder();
    let network: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("cni/10-bridge.conflist"))?)?;
    let name = network["name"].as_str().context("the network has no name")?;
    let subnet = network["plugins"][0]["ipam"]["ranges"][0][0]["subnet"].as_str().context("no subnet")?;
    let prefix = subnet.strip_suffix("0/24").context("another kind of subnet")?;
    let files = (2..255).map(|host| folder.join("ipam").join(name).join(format!("{prefix}{host}")));
    let taken: Vec<_> = files.filter(|file| !file.exists()).collect();
    for file in &taken {
        fs::write(file, "nobody\neth0")?;
    }
    let refused = pod().map(|_| ());
    for file in &taken {
        fs::remove_file(file)?;
    }
    let refused = format!("{:?}", refused.err().context("it has a network")?);
    ensure!(refused.contains("no IP addresses available"), "{refused}");
    before.settle()?;
    ensure!(pod_says_yes()?, "the next pod does not work");
    before.settle()
}

fn pod_says_yes() -> Result<bool> {
    let pod = pod()?;
    let said = pod.script("echo yes")?;
    pod.end()?;
    Ok(said == "yes")
}

#[test]
fn nothing_is_left_of_such_a_pod_whose_shim_or_vmm_is_killed() -> Result<()> {
    let _alone = alone();
    let before = census()?;
    for victim in ["shim", "vmm"] {
        let doomed = pod()?;
        doomed.start_forever()?;
        harm::kill(&doomed.id, victim)?;
        doomed.end_within(LIMIT)?;
        before.settle().with_context(|| format!("{victim} was killed"))?;
    }
    ensure!(pod_says_yes()?);
    Ok(())
}
