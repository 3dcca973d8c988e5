use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use k8s_cri::v1::{DnsConfig, PortMapping};

use super::{Case, Ground, case};
use crate::Pod;

pub(super) const CASES: &[Case] = &[
    case("DNS servers, searches and options of the pod", dns),
    case("the pod's host name", hostname),
    case("a server in the container is reached at the pod's address", pod_address),
    case("a server in the container is reached at a port of the host", host_port),
    case("containers of a pod reach each other on localhost", localhost),
    case("two pods reach each other", pod_to_pod),
    case("IPv4 and IPv6 addresses are those that the pod is said to have", addresses),
];

fn dns(on: &Ground) -> Result<()> {
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.10.10.10".into(), "fd00::10".into()],
            searches: vec!["example.com".into()],
            options: vec!["ndots:8".into()],
        });
    })?;
    let text = pod.script("cat /etc/resolv.conf")?;
    for line in ["nameserver 10.10.10.10", "nameserver fd00::10", "search example.com", "options ndots:8"] {
        ensure!(text.lines().any(|l| l == line), "{line:?} is not in {text:?}");
    }
    pod.end()
}

fn hostname(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let got = pod.script("hostname; cat /etc/hostname; cat /proc/sys/kernel/hostname")?;
    let name = &pod.config.hostname;
    ensure!(got.lines().all(|line| line == name) && got.lines().count() == 3, "{got:?} instead of {name}");
    pod.end()
}

/// Starts a server that says `text` to everyone.
fn serve(pod: &Pod, port: u16, text: &str) -> Result<()> {
    let script = format!("nc -ll -p {port} -e echo {text}");
    pod.start(&pod.container(&["sh", "-c", &script])).map(drop)
}

/// What a server says, once it is there.
fn ask(address: &str, port: u16) -> Result<String> {
    let mut text = String::new();
    wait_until("the server answers", || {
        let Ok(mut stream) = TcpStream::connect((address, port)) else { return Ok(false) };
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.flush()?;
        text.clear();
        Ok(stream.read_to_string(&mut text).is_ok() && !text.is_empty())
    })?;
    Ok(text.trim().to_owned())
}

fn pod_address(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    serve(&pod, 80, "at-the-pod")?;
    let got = ask(&pod.address()?, 80)?;
    ensure!(got == "at-the-pod", "{got:?}");
    pod.end()
}

fn host_port(on: &Ground) -> Result<()> {
    const PORT: u16 = 12_080;
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        config.port_mappings.push(PortMapping {
            container_port: 80,
            host_port: i32::from(PORT),
            ..PortMapping::default()
        });
    })?;
    serve(&pod, 80, "at-the-host")?;
    let got = ask("10.0.2.15", PORT)?;
    ensure!(got == "at-the-host", "{got:?}");
    pod.end()
}

fn localhost(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    serve(&pod, 80, "next-door")?;
    let got = pod.script("until nc 127.0.0.1 80; do sleep 0.2; done")?;
    ensure!(got == "next-door", "{got:?}");
    pod.end()
}

fn pod_to_pod(on: &Ground) -> Result<()> {
    let (server, client) = (on.pod()?, on.pod()?);
    serve(&server, 80, "from-the-other")?;
    let got = client.script(&format!("until nc {} 80; do sleep 0.2; done", server.address()?))?;
    ensure!(got == "from-the-other", "{got:?}");
    server.end()?;
    client.end()
}

fn addresses(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let network = on.cri.pod_status(&pod.id)?.network.context("no network status")?;
    let more = network.additional_ips.first().map(|ip| ip.ip.clone()).context("no second address")?;
    let got = pod.script("ip -4 addr show eth0; ip -6 addr show eth0; ip route; ip -6 route")?;
    for address in [&network.ip, &more] {
        ensure!(got.contains(&format!("{address}/")), "{address} is not in {got}");
    }
    ensure!(got.matches("default via").count() >= 2, "no default routes in {got}");
    pod.end()
}
