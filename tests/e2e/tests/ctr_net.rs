//! A pod's network in its VM: what a CNI plugin would have made on the host, seen from the container.
#![cfg(feature = "lab")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::command::wait_until;
use e2e::{Containerd, run};

/// One containerd for all tests of this file.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

/// A pod's network namespace with a veth to the host, numbered so that tests do not meet.
struct Pod {
    number: u8,
}

impl Pod {
    fn make(number: u8) -> Result<Pod> {
        let pod = Pod { number };
        let (name, host) = (pod.name(), pod.host());
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {host} mtu 1430 type veth peer name eth0 mtu 1430 netns {name}"))?;
        ip(&format!("addr add 10.99.{number}.1/24 dev {host}"))?;
        ip(&format!("addr add fd99:{number}::1/64 dev {host} nodad"))?;
        ip(&format!("link set {host} up"))?;
        pod.ip(&format!("addr add 10.99.{number}.2/24 dev eth0"))?;
        pod.ip(&format!("addr add fd99:{number}::2/64 dev eth0 nodad"))?;
        pod.ip("link set lo up")?;
        pod.ip("link set eth0 up")?;
        pod.ip(&format!("route add default via 10.99.{number}.1"))?;
        pod.ip(&format!("route add default via fd99:{number}::1"))?;
        Ok(pod)
    }

    fn name(&self) -> String {
        format!("pod{}", self.number)
    }

    fn host(&self) -> String {
        format!("veth{}", self.number)
    }

    /// `ip` in the pod's namespace.
    fn ip(&self, arguments: &str) -> Result<String> {
        ip(&format!("-n {} {arguments}", self.name()))
    }

    fn namespace(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.name()))
    }

    /// The command of a container in it.
    fn container(&self, options: &[&str], id: &str, script: &str) -> Command {
        let namespace = format!("network:{}", self.namespace().display());
        let options: Vec<&str> = ["--with-ns", &namespace].iter().chain(options).copied().collect();
        CONTAINERD.run_command(&options, id, &["sh", "-c", script])
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.name())); // takes the veth along
    }
}

fn ip(arguments: &str) -> Result<String> {
    run(Command::new("ip").args(arguments.split(' ')))?.ok().with_context(|| format!("ip {arguments}"))
}

#[test]
fn the_container_has_the_pods_interface_addresses_and_routes() -> Result<()> {
    let pod = Pod::make(1)?;
    let mac = pod.ip("-br link show eth0")?;
    let mac = mac.split_whitespace().nth(2).context("no address in `ip -br link`")?;
    let script = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -4 addr show eth0; ip -6 addr show eth0; \
                  ip route; ip -6 route; ls /sys/class/net";
    let output = run(&mut pod.container(&["--rm"], "interface", script))?;
    let text = output.text();
    assert_eq!(output.code, 0, "{}", output.errors());
    let mut lines = text.lines();
    assert_eq!((lines.next(), lines.next()), (Some(mac), Some("1430")), "{text}");
    for wanted in
        ["inet 10.99.1.2/24", "inet6 fd99:1::2/64", "default via 10.99.1.1", "default via fd99:1::1", "lo"]
    {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}");
    }
    // The one that the kernel gives itself (`scope link`) may still be on its way.
    let not_yet = |line: &&str| line.contains("scope global") && line.contains("tentative");
    assert_eq!(text.lines().find(not_yet), None, "an address that is not to be used yet: {text}");
    Ok(())
}

#[test]
fn packets_pass_both_ways_and_streams_byte_for_byte() -> Result<()> {
    const SIZE: usize = 8 << 20;
    let pod = Pod::make(2)?;
    let listener = TcpListener::bind("10.99.2.1:0")?;
    let port = listener.local_addr()?.port();
    let data: Vec<u8> = (0..251_u8).cycle().take(SIZE).collect();
    let sent = data.clone();
    let serve = std::thread::spawn(move || -> Result<Vec<u8>> {
        listener.accept()?.0.write_all(&sent)?;
        let mut got = Vec::new();
        listener.accept()?.0.read_to_end(&mut got)?;
        Ok(got)
    });
    let script = format!(
        "ping -c 2 -W 20 10.99.2.1 >&2 && ping -c 2 -W 20 fd99:2::1 >&2 && nc 10.99.2.1 {port} > /dev/shm/data && \
         md5sum < /dev/shm/data && nc 10.99.2.1 {port} < /dev/shm/data"
    );
    let output = run(&mut pod.container(&["--rm"], "packets", &script))?;
    assert_eq!(output.code, 0, "{}{}", output.text(), output.errors());
    let got = serve.join().expect("no panic")?;
    assert_eq!(got.len(), SIZE);
    assert!(got == data, "bytes changed on the way to the guest and back");
    let sum = e2e::run_with_input(&mut Command::new("md5sum"), data)?.ok()?;
    assert_eq!(output.text(), sum);
    Ok(())
}

#[test]
fn a_server_in_the_pod_is_reached_from_the_host() -> Result<()> {
    let pod = Pod::make(3)?;
    let script = "mkdir /dev/shm/w && echo hello from the pod > /dev/shm/w/index.html && httpd -f -p 8080 -h /dev/shm/w";
    run(&mut pod.container(&["-d"], "server", script))?.ok()?;
    for address in ["10.99.3.2:8080", "[fd99:3::2]:8080"] {
        let mut answer = String::new();
        wait_until("the pod's server answers", || {
            let Ok(mut connection) = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(10))
            else {
                return Ok(false);
            };
            answer.clear();
            connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            connection.read_to_string(&mut answer)?;
            Ok(true)
        })?;
        assert!(answer.ends_with("hello from the pod\n"), "{address}: {answer}");
    }
    CONTAINERD.remove("server")
}

#[test]
fn a_pod_without_interfaces_has_its_loopback_and_the_hosts_network_is_refused() -> Result<()> {
    let output =
        CONTAINERD.run(&["--rm"], "alone", &["sh", "-c", "ls /sys/class/net; ping -c 1 127.0.0.1"])?;
    assert_eq!(output.code, 0, "{}", output.errors());
    assert_eq!(output.text().lines().next(), Some("lo"));
    let output = CONTAINERD.run(&["--rm", "--net-host"], "host-net", &["true"])?;
    assert_ne!(output.code, 0);
    assert!(output.errors().contains("the host's network is asked for"), "{}", output.errors());
    CONTAINERD.remove_record("host-net")?;
    Ok(())
}

#[test]
fn a_pod_of_two_cpus_has_two_queues_for_each() -> Result<()> {
    let pod = Pod::make(6)?;
    let script = "ls -d /sys/class/net/eth0/queues/*; ping -c 2 -W 20 10.99.6.1";
    let output = run(&mut pod.container(
        &["--rm", "--cpu-quota", "200000", "--cpu-period", "100000"],
        "queues",
        script,
    ))?;
    assert_eq!(output.code, 0, "{}{}", output.text(), output.errors());
    for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
        assert!(output.text().contains(queue), "no {queue} in {}", output.text());
    }
    Ok(())
}

/// Interfaces over a parent: `ip link add … type KIND`, and whether the other end needs one of the kind as well.
const KINDS: [(u8, &str, bool); 4] = [
    (20, "macvlan mode bridge", false),
    (21, "ipvlan mode l2", false),
    (22, "vlan id 7", true),
    (23, "bond mode active-backup", false),
];

/// A pod whose `eth0` is of this kind, over one end of a veth; the other end has the address that pods call.
fn pod_of_kind(number: u8, kind: &str, both: bool) -> Result<Pod> {
    let pod = Pod { number };
    let (name, host, parent) = (pod.name(), pod.host(), format!("par{number}"));
    ip(&format!("netns add {name}"))?;
    ip(&format!("link add {host} type veth peer name {parent}"))?;
    ip(&format!("link set {host} up"))?;
    let mut called = host.clone();
    if both {
        called = format!("{host}v");
        ip(&format!("link add {called} link {host} type {kind}"))?;
        ip(&format!("link set {called} up"))?;
    }
    ip(&format!("addr add 10.99.{number}.1/24 dev {called}"))?;
    if kind.starts_with("bond") {
        ip(&format!("link set {parent} netns {name}"))?;
        pod.ip(&format!("link add eth0 type {kind}"))?;
        pod.ip(&format!("link set {parent} master eth0"))?;
        pod.ip(&format!("link set {parent} up"))?;
    } else {
        ip(&format!("link set {parent} up"))?;
        ip(&format!("link add kind{number} link {parent} type {kind}"))?;
        ip(&format!("link set kind{number} netns {name} name eth0"))?;
    }
    pod.ip(&format!("addr add 10.99.{number}.2/24 dev eth0"))?;
    pod.ip("link set eth0 up")?;
    Ok(pod)
}

#[test]
fn interfaces_of_every_kind_reach_the_host() -> Result<()> {
    for (number, kind, both) in KINDS {
        let pod = pod_of_kind(number, kind, both).with_context(|| kind.to_owned())?;
        let id = format!("kind{number}");
        let output = run(&mut pod.container(&["--rm"], &id, &format!("ping -c 2 -W 20 10.99.{number}.1")))?;
        assert_eq!(output.code, 0, "{kind}: {}{}", output.text(), output.errors());
        drop(pod);
        // Goes with its peer where that went with the namespace.
        let _ = ip(&format!("link del veth{number}"));
    }
    Ok(())
}

#[test]
fn who_holds_a_tap_sees_the_vm() -> Result<()> {
    const GUEST: [u8; 4] = [10, 99, 24, 2];
    let pod = Pod { number: 24 };
    ip(&format!("netns add {}", pod.name()))?;
    // Made out here, where this process can hold it, and moved.
    let holder = std::fs::File::from(tap::attach("held24", libc::IFF_TAP | libc::IFF_NO_PI)?);
    ip(&format!("link set held24 netns {}", pod.name()))?;
    pod.ip("addr add 10.99.24.2/24 dev held24")?;
    pod.ip("link set held24 up")?;
    run(&mut pod.container(&["-d"], "held", "sleep 1000"))?.ok()?;
    let address = pod.ip("-br link show held24")?;
    let address = address.split_whitespace().nth(2).context("no address in `ip -br link`")?;
    let guest: Vec<u8> = address.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<_, _>>()?;
    // Who has the guest's address? RFC 826.
    let ours = [2, 0, 0, 0, 24, 1];
    let mut question = [[0xff; 6].as_slice(), &ours, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &ours].concat();
    question.extend([10, 99, 24, 1, 0, 0, 0, 0, 0, 0]);
    question.extend(GUEST);
    let (mut reader, mut writer) = (holder.try_clone()?, holder);
    let answer = std::thread::spawn(move || -> Result<Vec<u8>> {
        let mut frame = [0; 2048];
        loop {
            let length = reader.read(&mut frame)?;
            // An answer (operation 2) of ARP.
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                return Ok(frame[..length].to_vec());
            }
        }
    });
    wait_until("the guest answers", || {
        writer.write_all(&question)?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(answer.is_finished())
    })?;
    let answer = answer.join().expect("no panic")?;
    assert_eq!((&answer[6..12], &answer[28..32]), (guest.as_slice(), GUEST.as_slice()));
    CONTAINERD.remove("held")
}

#[test]
fn an_interface_of_another_kind_is_refused_by_name() -> Result<()> {
    let pod = Pod::make(4)?;
    pod.ip("link add odd0 type dummy")?;
    pod.ip("link set odd0 up")?;
    let output = run(&mut pod.container(&["--rm"], "odd", "true"))?;
    assert_ne!(output.code, 0);
    assert!(output.errors().contains("interface odd0 is of kind dummy"), "{}", output.errors());
    CONTAINERD.remove_record("odd")?;
    Ok(())
}

/// Taps and redirections in the pod's namespace.
fn traces(pod: &Pod) -> Result<String> {
    let links = pod.ip("-br link")?;
    let filters = run(Command::new("tc").args(["-n", &pod.name(), "qdisc", "show", "dev", "eth0"]))?.ok()?;
    let mut found: Vec<&str> = links.lines().filter(|line| line.contains("_ctvm")).collect();
    found.extend(filters.lines().filter(|line| line.contains("ingress")));
    Ok(found.join("\n"))
}

#[test]
fn the_pods_namespace_is_as_before_however_the_sandbox_ends() -> Result<()> {
    let pod = Pod::make(5)?;
    for (id, victim) in [("ends", None), ("shim-dies", Some("shim")), ("vmm-dies", Some("vmm"))] {
        run(&mut pod.container(&["-d"], id, "sleep 1000"))?.ok()?;
        let during = traces(&pod)?;
        assert_eq!(during.lines().count(), 2, "a tap and a redirection: {during}");
        match victim {
            Some(victim) => e2e::containerd::kill_9(process_of(id, victim)?)?,
            None => CONTAINERD.kill_task(id)?,
        }
        CONTAINERD.wait_until_over(id)?;
        CONTAINERD.remove(id)?;
        wait_until("nothing is left in the pod's namespace", || Ok(traces(&pod)?.is_empty()))?;
    }
    Ok(())
}

/// The process number of a sandbox' `shim` or `vmm`.
fn process_of(id: &str, which: &str) -> Result<i32> {
    let state = std::fs::read_to_string(format!("/run/ctvm/test/{id}/state.json"))?;
    let state: serde_json::Value = serde_json::from_str(&state)?;
    Ok(i32::try_from(state[which]["pid"].as_i64().context("no process in the state file")?)?)
}
