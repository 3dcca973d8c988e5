//! Memory that comes and goes while the guest runs.
#![cfg(feature = "lab")]

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use e2e::vm::{Guest, GuestSpec};
use vmm_api::config::MEMORY_ONLINE_POLICY;
use vmm_api::{MemoryConfig, Op};

const MIB: u64 = 1 << 20;
/// How long a guest in an emulated machine may take over a few GiB.
const PATIENCE: Duration = Duration::from_secs(240);

/// `mem` says MemTotal in KiB, `until CONDITION` waits until it fulfils one.
const TOOLS: &str = "mem() { awk '/^MemTotal/ {print $2}' /proc/meminfo; }\n\
                     until_mem() { while ! [ $(mem) $1 $2 ]; do sleep 0.1; done; }\n";

fn growable(size_mib: u32, max_mib: u32, script: &str) -> GuestSpec {
    GuestSpec {
        memory: MemoryConfig {
            max_mib: Some(max_mib),
            size_mib,
            backing: Default::default(),
            prefault: false,
        },
        cmdline: MEMORY_ONLINE_POLICY.into(),
        script: format!("{TOOLS}{script}\n"),
        ..GuestSpec::default()
    }
}

/// Asks for so much memory in all, and waits until the guest has plugged or unplugged all it was asked for.
fn resize(guest: &mut Guest, boot_mib: u32, mib: u32) -> Result<Duration> {
    let start = Instant::now();
    guest.call(Op::SetMemory { mib })?;
    let wanted = u64::from(mib - boot_mib) * MIB;
    loop {
        let plugged = mem(guest, "plugged_bytes")?;
        if plugged == wanted {
            return Ok(start.elapsed());
        }
        if start.elapsed() > PATIENCE {
            bail!("{} of {} MiB are plugged", plugged / MIB, wanted / MIB);
        }
        sleep(Duration::from_millis(20));
    }
}

fn mem(guest: &mut Guest, counter: &str) -> Result<u64> {
    Ok(guest.stats()?.devices["mem"][counter])
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
    let grown = resize(&mut guest, 256, 4096)?;
    guest.wait_for_line("use", |line| line == "used")?;
    let used = resident(&guest)?;
    assert!(used > small + 2624 * MIB, "{used} bytes resident after {small}");
    // A first step, with nearly all of it in use: what can be had is had.
    guest.call(Op::SetMemory { mib: 3584 })?;
    guest.wait_for_line("the guest's end of the use", |line| line == "freed")?;
    let shrunk = resize(&mut guest, 256, 512)?;
    let output = guest.script()?;
    let left = resident(&guest);
    let stats = guest.stats();
    assert_eq!(output.status, 0, "{output:#?}");
    println!("grown in {grown:?}, shrunk in {shrunk:?}; {small} {used} {left:?}; {stats:?}");
    Ok(())
}
