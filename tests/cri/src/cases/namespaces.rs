use std::collections::HashMap;

use anyhow::{Result, ensure};
use k8s_cri::v1::{NamespaceMode, NamespaceOption, PodSandboxConfig};

use super::{Case, Ground, case, host_only};
use crate::Pod;
use crate::pod::security;

const HOST: &str =
    "the host's processes and memory belong to another kernel; refused with an error that says so";

pub(super) const CASES: &[Case] = &[
    case("a container has process numbers of its own", own_pids),
    case("containers of a pod share process numbers where asked", pod_pids),
    case("a container joins the process numbers of another", target_pids),
    case("containers of a pod share IPC", ipc),
    host_only("a pod uses the host's process numbers", host_pids, HOST),
    host_only("a pod uses the host's IPC", host_ipc, HOST),
    host_only(
        "a pod uses the host's network",
        host_network,
        "the host's interfaces are not the VM's; refused with an error that says so",
    ),
    case("safe sysctls of the pod", safe_sysctls),
    case("network sysctls of the pod", network_sysctls),
    case("unsafe sysctls of the pod", unsafe_sysctls),
];

fn pod_options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default()
}

fn own_pids(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let id = pod.start(&pod.container(&["sleep", "600"]))?;
    let got = on.cri.exec(&id, &["cat", "/proc/1/cmdline"], 0)?.ok()?;
    ensure!(got.starts_with("sleep"), "process 1 is {got:?}");
    let count = on.cri.exec(&id, &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"], 0)?.ok()?;
    ensure!(count.parse::<u32>().is_ok_and(|count| count <= 5), "{count} processes");
    pod.end()
}

fn pod_pids(on: &Ground) -> Result<()> {
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        pod_options(config).pid = NamespaceMode::Pod.into();
    })?;
    let start = |seconds: &str| {
        let mut config = pod.container(&["sleep", seconds]);
        security(&mut config).namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
        pod.start(&config)
    };
    let (first, second) = (start("611")?, start("612")?);
    for id in [&first, &second] {
        let processes = on.cri.exec(id, &["ps"], 0)?.ok()?;
        ensure!(processes.contains("sleep 611") && processes.contains("sleep 612"), "{processes}");
    }
    on.cri.stop(&first, 0)?;
    let processes = on.cri.exec(&second, &["ps"], 0)?.ok()?;
    ensure!(!processes.contains("sleep 611") && processes.contains("sleep 612"), "{processes}");
    pod.end()
}

fn target_pids(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let target = pod.start(&pod.container(&["sleep", "613"]))?;
    let mut config = pod.container(&["ps"]);
    let options = security(&mut config).namespace_options.get_or_insert_default();
    options.pid = NamespaceMode::Target.into();
    options.target_id = target;
    let got = pod.finish(&config)?.ok()?;
    ensure!(got.contains("sleep 613"), "{got}");
    pod.end()
}

fn ipc(on: &Ground) -> Result<()> {
    let pod = on.pod()?;
    let read = |id: &str| on.cri.exec(id, &["readlink", "/proc/self/ns/ipc"], 0)?.ok();
    let (first, second) = (pod.start_forever()?, pod.start_forever()?);
    ensure!(read(&first)? == read(&second)?, "each has its own");
    pod.end()
}

/// A pod and a container in it that both use something of the host.
fn of_the_host(on: &Ground, set: impl Fn(&mut NamespaceOption), script: &str) -> Result<String> {
    let pod = Pod::run_with(&on.cri, &on.handler, |config| set(pod_options(config)))?;
    let mut config = pod.container(&["sh", "-c", script]);
    set(security(&mut config).namespace_options.get_or_insert_default());
    let got = pod.finish(&config)?.ok()?;
    pod.end()?;
    Ok(got)
}

fn host_pids(on: &Ground) -> Result<()> {
    let got = of_the_host(on, |options| options.pid = NamespaceMode::Node.into(), "ps")?;
    ensure!(got.contains("containerd"), "{got}");
    Ok(())
}

fn host_ipc(on: &Ground) -> Result<()> {
    let set = |options: &mut NamespaceOption| options.ipc = NamespaceMode::Node.into();
    let got = of_the_host(on, set, "readlink /proc/self/ns/ipc")?;
    let own = std::fs::read_link("/proc/self/ns/ipc")?;
    ensure!(got == own.to_string_lossy(), "{got}");
    Ok(())
}

fn host_network(on: &Ground) -> Result<()> {
    let set = |options: &mut NamespaceOption| options.network = NamespaceMode::Node.into();
    let got = of_the_host(on, set, "ip addr")?;
    ensure!(got.contains("10.0.2.15"), "{got}");
    Ok(())
}

fn sysctls(on: &Ground, wanted: &[(&str, &str)]) -> Result<()> {
    let sysctls: HashMap<String, String> =
        wanted.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        config.linux.get_or_insert_default().sysctls = sysctls;
    })?;
    for (name, value) in wanted {
        let got = pod.script(&format!("cat /proc/sys/{}", name.replace('.', "/")))?;
        ensure!(got.split_whitespace().eq(value.split_whitespace()), "{name} is {got:?}, not {value:?}");
    }
    pod.end()
}

fn safe_sysctls(on: &Ground) -> Result<()> {
    sysctls(on, &[("kernel.shm_rmid_forced", "1")])
}

fn network_sysctls(on: &Ground) -> Result<()> {
    sysctls(on, &[("net.ipv4.ip_local_port_range", "30000 40000"), ("net.ipv4.tcp_syncookies", "0")])
}

fn unsafe_sysctls(on: &Ground) -> Result<()> {
    sysctls(on, &[("kernel.msgmax", "12345"), ("fs.mqueue.msg_max", "123"), ("net.core.somaxconn", "1234")])
}
