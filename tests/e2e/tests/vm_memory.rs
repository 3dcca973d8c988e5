//! Memory that comes and goes while the guest runs.
#![cfg(feature = "lab")]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::vm::{Guest, GuestSpec};
use vmm_api::{Ending, MemoryConfig, Op, Reply, Resized};

const MIB: u64 = 1 << 20;
/// How long a guest in an emulated machine may take over a few GiB.
const PATIENCE: Duration = Duration::from_secs(240);

/// `mem` says MemTotal in KiB, `until CONDITION` waits until it fulfils one.
const TOOLS: &str = "mem() { awk '/^MemTotal/ {print $2}' /proc/meminfo; }\n\
                     until_mem() { while ! [ $(mem) $1 $2 ]; do sleep 0.1; done; }\n";

fn growable(size_mib: u32, max_mib: u32, script: &str) -> GuestSpec {
    GuestSpec {
        memory: MemoryConfig { max_mib: Some(max_mib), ..MemoryConfig::new(size_mib) },
        script: format!("{TOOLS}{script}\n"),
        ..GuestSpec::default()
    }
}

fn ask(guest: &mut Guest, mib: u32) -> Result<Resized> {
    let op = Op::Resize { vcpus: None, memory_mib: Some(mib), timeout_ms: 200_000 };
    match guest.client().call(op, &[], PATIENCE)? {
        (Reply::Resized(resized), _) => Ok(resized),
        other => bail!("resize answered {other:?}"),
    }
}

/// Resizes the guest's memory to so much in all.
fn resize(guest: &mut Guest, mib: u32) -> Result<Duration> {
    let start = Instant::now();
    let resized = ask(guest, mib)?;
    ensure!(resized.ending == Ending::Done, "{resized}");
    Ok(start.elapsed())
}

/// Anonymous memory of the VMM that the host holds, in bytes.
fn resident(guest: &Guest) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", guest.vmm_pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

#[test]
fn a_vm_grows_by_gibibytes_and_gives_them_back_and_what_stays_is_intact() -> Result<()> {
    let script = "echo start=$(mem)\n\
        dd if=/dev/urandom of=/tmp/before bs=1M count=32 2>/dev/null; echo before=$(md5sum < /tmp/before)\n\
        echo ready\n\
        until_mem -gt 3900000; echo grown=$(mem)\n\
        mount -t tmpfs -o size=3200M fill /mnt\n\
        dd if=/dev/zero of=/mnt/fill bs=1M count=2560 2>/dev/null\n\
        dd if=/dev/urandom of=/mnt/after bs=1M count=64 2>/dev/null; echo after=$(md5sum < /mnt/after)\n\
        echo used\n\
        until_mem -lt 3800000; rm /mnt/fill; echo freed\n\
        until_mem -lt 540000; echo shrunk=$(mem)\n\
        echo before_now=$(md5sum < /tmp/before) after_now=$(md5sum < /mnt/after)\n\
        dd if=/dev/zero of=/mnt/fill bs=1M count=100 2>/dev/null && echo usable=$(wc -c < /mnt/fill)\n";
    let mut guest = growable(256, 4096, script).boot()?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    let small = resident(&guest)?;
    let grown = resize(&mut guest, 4096)?;
    guest.wait_for_line("use", |line| line == "used")?;
    let used = resident(&guest)?;
    assert!(used > small + 2624 * MIB, "{used} bytes resident after {small}");
    // A first step, with nearly all of it in use: what can be had is had.
    let partial = ask(&mut guest, 512)?;
    assert_eq!(partial.ending, Ending::Partial, "{partial}");
    guest.wait_for_line("the guest's end of the use", |line| line == "freed")?;
    let shrunk = resize(&mut guest, 512)?;
    let output = guest.script()?;
    let left = resident(&guest);
    let stats = guest.stats();
    assert_eq!(output.status, 0, "{output:#?}");
    println!("grown in {grown:?}, shrunk in {shrunk:?}; {small} {used} {left:?}; {stats:?}");
    Ok(())
}
