use anyhow::{Result, ensure};
use k8s_cri::v1::security_profile::ProfileType;
use k8s_cri::v1::{Capability, Int64Value, LinuxContainerSecurityContext, SecurityProfile};

use super::{Case, Ground, case, host_only};
use crate::Pod;
use crate::pod::{own_users, security};

pub(super) const CASES: &[Case] = &[
    case("a container runs as a user", user),
    case("a container runs as a user by name", user_name),
    case("a container runs as a user and a group", group),
    case("a container's supplementary groups", groups),
    case("a read-only root refuses writes, a usual one takes them", root),
    case("a privileged container may mount, a usual one may not", privileged),
    case("capabilities are added", add_capabilities),
    case("capabilities are dropped", drop_capabilities),
    case("all capabilities are added, all are dropped", all_capabilities),
    case("masked and read-only paths", paths),
    case("no new privileges", no_new_privileges),
    case("seccomp: unconfined", unconfined),
    case("seccomp: the runtime's default", runtime_default),
    case("seccomp: a profile of the host", localhost),
    case("a container in a user namespace", user_namespace),
    case("the process's limits and OOM score", oom_score),
    host_only(
        "a privileged container sees the host's devices",
        host_devices,
        "the devices of the VM are those of a privileged container; `privileged_without_host_devices` is asked for",
    ),
];

fn run(on: &Ground, change: impl FnOnce(&mut LinuxContainerSecurityContext), script: &str) -> Result<String> {
    let pod = on.usual()?;
    let mut config = pod.container(&["sh", "-c", script]);
    change(security(&mut config));
    let done = pod.finish(&config)?;
    done.ok()
}

fn number(value: i64) -> Option<Int64Value> {
    Some(Int64Value { value })
}

fn user(on: &Ground) -> Result<()> {
    let got = run(on, |s| s.run_as_user = number(1234), "id -u; id -g")?;
    ensure!(got == "1234\n0", "{got:?}");
    Ok(())
}

fn user_name(on: &Ground) -> Result<()> {
    let got = run(on, |s| s.run_as_username = "nobody".into(), "id -u; id -g")?;
    ensure!(got == "65534\n65534", "{got:?}");
    Ok(())
}

fn group(on: &Ground) -> Result<()> {
    let change = |s: &mut LinuxContainerSecurityContext| {
        s.run_as_user = number(1234);
        s.run_as_group = number(5678);
    };
    let got = run(on, change, "id -u; id -g; touch /tmp/f; stat -c %u:%g /tmp/f")?;
    ensure!(got == "1234\n5678\n1234:5678", "{got:?}");
    Ok(())
}

fn groups(on: &Ground) -> Result<()> {
    let got = run(on, |s| s.supplemental_groups = vec![1111, 2222], "grep Groups /proc/self/status")?;
    ensure!(got.contains("1111") && got.contains("2222"), "{got:?}");
    Ok(())
}

fn root(on: &Ground) -> Result<()> {
    let script = "touch /f 2>/dev/null && echo written || echo refused";
    let got = [true, false].map(|read_only| run(on, |s| s.readonly_rootfs = read_only, script));
    let [refused, written] = got;
    let (refused, written) = (refused?, written?);
    ensure!((refused.as_str(), written.as_str()) == ("refused", "written"), "{refused:?} {written:?}");
    Ok(())
}

/// The pod has to be privileged too.
fn run_privileged(on: &Ground, script: &str) -> Result<String> {
    let pod = Pod::run_with(&on.cri, &on.handler, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    })?;
    let mut config = pod.container(&["sh", "-c", script]);
    security(&mut config).privileged = true;
    let done = pod.finish(&config)?;
    pod.end()?;
    done.ok()
}

fn privileged(on: &Ground) -> Result<()> {
    let script = "mount -t tmpfs none /mnt 2>/dev/null || mkdir /mnt && mount -t tmpfs none /mnt 2>/dev/null \
                  && echo may || echo may not";
    let got = run_privileged(on, script)?;
    ensure!(got == "may", "privileged: {got:?}");
    let got = run(on, |_| (), script)?;
    ensure!(got == "may not", "usual: {got:?}");
    Ok(())
}

/// The effective capabilities of a container as bits.
fn capabilities(on: &Ground, add: &[&str], drop: &[&str]) -> Result<u64> {
    let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
    let change = |s: &mut LinuxContainerSecurityContext| {
        s.capabilities = Some(Capability {
            add_capabilities: names(add),
            drop_capabilities: names(drop),
            ..Capability::default()
        });
    };
    let got = run(on, change, "grep CapEff /proc/self/status")?;
    Ok(u64::from_str_radix(got.split_whitespace().last().unwrap_or_default(), 16)?)
}

const CHOWN: u64 = 1 << 0;
const NET_ADMIN: u64 = 1 << 12;
const SYS_ADMIN: u64 = 1 << 21;

fn add_capabilities(on: &Ground) -> Result<()> {
    let got = capabilities(on, &["NET_ADMIN"], &[])?;
    ensure!(got & NET_ADMIN != 0 && got & CHOWN != 0 && got & SYS_ADMIN == 0, "{got:x}");
    Ok(())
}

fn drop_capabilities(on: &Ground) -> Result<()> {
    let got = capabilities(on, &[], &["CHOWN"])?;
    ensure!(got & CHOWN == 0 && got != 0, "{got:x}");
    Ok(())
}

fn all_capabilities(on: &Ground) -> Result<()> {
    let got = capabilities(on, &["ALL"], &[])?;
    ensure!(got & SYS_ADMIN != 0 && got & CHOWN != 0, "added: {got:x}");
    let got = capabilities(on, &[], &["ALL"])?;
    ensure!(got == 0, "dropped: {got:x}");
    Ok(())
}

fn paths(on: &Ground) -> Result<()> {
    let change = |s: &mut LinuxContainerSecurityContext| {
        s.masked_paths = vec!["/proc/kcore".into(), "/proc/cpuinfo".into(), "/proc/acpi".into()];
        s.readonly_paths = vec!["/proc/sys".into()];
    };
    let script = "wc -c < /proc/cpuinfo; echo x > /proc/sys/kernel/hostname 2>/dev/null && echo written || echo refused";
    let got = run(on, change, script)?;
    ensure!(got == "0\nrefused", "{got:?}");
    Ok(())
}

fn no_new_privileges(on: &Ground) -> Result<()> {
    for (asked, expected) in [(true, "1"), (false, "0")] {
        let got = run(on, |s| s.no_new_privs = asked, "grep NoNewPrivs /proc/self/status")?;
        ensure!(got.ends_with(expected), "asked {asked}: {got:?}");
    }
    Ok(())
}

fn seccomp(on: &Ground, kind: ProfileType, file: &str, script: &str) -> Result<String> {
    let profile = SecurityProfile { profile_type: kind.into(), localhost_ref: file.into() };
    run(on, |s| s.seccomp = Some(profile), script)
}

const MODE: &str = "grep Seccomp: /proc/self/status | tr -dc 0-9";

fn unconfined(on: &Ground) -> Result<()> {
    let got = seccomp(on, ProfileType::Unconfined, "", MODE)?;
    ensure!(got == "0", "seccomp mode {got}");
    Ok(())
}

fn runtime_default(on: &Ground) -> Result<()> {
    let got = seccomp(on, ProfileType::RuntimeDefault, "", &format!("{MODE}; unshare -U true 2>&1 || true"))?;
    ensure!(got.starts_with('2') && got.contains("ermitted"), "seccomp mode {got}");
    Ok(())
}

fn localhost(on: &Ground) -> Result<()> {
    let file = tempfile::NamedTempFile::new_in("/var/tmp")?;
    let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["chmod","fchmodat","fchmod"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(file.path(), profile)?;
    let script = "touch /tmp/f; chmod 600 /tmp/f 2>/dev/null && echo may || echo may not";
    let got = seccomp(on, ProfileType::Localhost, &file.path().display().to_string(), script)?;
    ensure!(got == "may not", "{got:?}");
    Ok(())
}

fn user_namespace(on: &Ground) -> Result<()> {
    let pod = Pod::run_with(&on.cri, &on.handler, |config| own_users(config, 100_000))?;
    let got =
        pod.script("id -u; cat /proc/self/uid_map; stat -c %u:%g /bin/sh; touch /made; stat -c %u:%g /made")?;
    let expected = ["0", "0", "100000", "65536", "0:0", "0:0"];
    ensure!(got.split_whitespace().eq(expected), "{got:?}");
    pod.end()
}

fn oom_score(on: &Ground) -> Result<()> {
    let pod = on.usual()?;
    let mut config = pod.container(&["cat", "/proc/self/oom_score_adj"]);
    let limits = k8s_cri::v1::LinuxContainerResources { oom_score_adj: 321, ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(limits);
    let got = pod.finish(&config)?.ok()?;
    ensure!(got == "321", "{got:?}");
    Ok(())
}

fn host_devices(on: &Ground) -> Result<()> {
    let got = run_privileged(on, "ls /dev")?;
    ensure!(got.contains("kmsg"), "{got}");
    Ok(())
}
