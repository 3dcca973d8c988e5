//! Memory that comes and goes while the guest runs.
#![cfg(feature = "lab")]

use std::fs;
use std::os::fd::AsFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use e2e::command;
use e2e::tiny::{self, RESET};
use e2e::vm::{Guest, GuestSpec, SHELL};
use vmm_api::{Ending, ExitReason, MemoryConfig, Op, Reply, Resized};

const MIB: u64 = 1 << 20;
/// How long a guest in an emulated machine may take over a few GiB.
const PATIENCE: Duration = Duration::from_secs(240);

/// `mem` says `MemTotal` in KiB, `until_mem OPERATOR KIB` waits for it.
const TOOLS: &str = "mem() { awk '/^MemTotal/ {print $2}' /proc/meminfo; }\n\
                     until_mem() { while ! [ $(mem) $1 $2 ]; do sleep 0.1; done; }\n";

fn growable(size_mib: u32, max_mib: u32, script: &str) -> GuestSpec {
    GuestSpec {
        memory: MemoryConfig { max_mib: Some(max_mib), ..MemoryConfig::new(size_mib) },
        script: format!("{TOOLS}{script}\n"),
        ..GuestSpec::default()
    }
}

/// Asks for so much memory in all; what came of it, and how long that took.
fn ask(guest: &mut Guest, mib: u32) -> Result<(Resized, Duration)> {
    let start = Instant::now();
    let op = Op::Resize { vcpus: None, memory_mib: Some(mib), timeout_ms: 200_000 };
    let (Reply::Resized(resized), _) = guest.client().call(op, &[], PATIENCE)? else { bail!("no resize") };
    // The answer is what the device counts.
    let size = guest.stats()?.size.context("no size")?;
    let reached = resized.memory_mib.and_then(|memory| memory.reached);
    ensure!(reached == Some(size.memory_mib), "{resized}, of {size:?}");
    Ok((resized, start.elapsed()))
}

/// As [`ask`], where nothing else will do.
fn resize(guest: &mut Guest, mib: u32) -> Result<Duration> {
    let (resized, took) = ask(guest, mib)?;
    ensure!(resized.ending == Ending::Done, "{resized}");
    Ok(took)
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
    let script = "start=$(mem)\n\
        dd if=/dev/urandom of=/tmp/before bs=1M count=32 2>/dev/null; echo before=$(md5sum < /tmp/before)\n\
        echo ready\n\
        until_mem -eq $((start+3840*1024))\n\
        mount -t tmpfs -o size=3800M fill /mnt; dd if=/dev/urandom of=/mnt/after bs=1M count=64 2>/dev/null\n\
        echo after=$(md5sum < /mnt/after)\n\
        dd if=/dev/zero of=/mnt/fill bs=1M count=3500 2>/dev/null; echo used\n\
        until_mem -lt $((start+3840*1024)); until_mem -eq $((start+3840*1024)); rm /mnt/fill; echo freed\n\
        until_mem -eq $((start+256*1024)); echo shrunk\n\
        echo before_now=$(md5sum < /tmp/before); echo after_now=$(md5sum < /mnt/after)\n\
        dd if=/dev/zero of=/mnt/fill bs=1M count=100 2>/dev/null; echo usable=$(tr -d '\\000' < /mnt/fill | wc -c)\n\
        echo last\n";
    let mut guest = growable(256, 4096, script).boot()?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    let grown = resize(&mut guest, 4096)?;
    guest.wait_for_line("use", |line| line == "used")?;
    let used = resident(&guest)?;
    // Nearly all is in use: what can be had is had, and the guest lives.
    let (partial, _) = ask(&mut guest, 512)?;
    ensure!(partial.ending == Ending::Partial, "{partial}");
    let partial = mem(&mut guest, "plugged_bytes")?;
    ensure!((3400 * MIB..3840 * MIB).contains(&partial), "{} MiB are plugged", partial / MIB);
    let again = resize(&mut guest, 4096)?;
    guest.wait_for_line("the end of the use", |line| line == "freed")?;
    let shrunk = resize(&mut guest, 512)?;
    guest.wait_for_line("the smaller size", |line| line == "shrunk")?;
    let left = resident(&guest)?;
    let stats = guest.stats()?;
    let output = guest.script()?;
    assert_eq!(output.status, 0, "{output:#?}");
    assert_eq!(output.value("before_now")?, output.value("before")?);
    assert_eq!(output.value("after_now")?, output.value("after")?);
    assert_eq!(output.value("usable")?, "0");
    assert_eq!(guest.exit_reason()?, ExitReason::GuestReset);

    // Of the 3,584 MiB that went, what the guest had never touched could not be given back.
    let (unplugged, untouched) = (3584 * MIB, 4096 * MIB - used);
    let (could, fell) = (unplugged - untouched, used - left);
    println!(
        "grown in {grown:?}, {} MiB while all was in use, grown again in {again:?}, shrunk in {shrunk:?}; resident {} MiB in use, {} after; {:.3} of {} MiB came back",
        partial / MIB + 256,
        used / MIB,
        left / MIB,
        fell as f64 / could as f64,
        could / MIB
    );
    ensure!(fell as f64 >= 0.95 * could as f64, "{} of {} MiB came back", fell / MIB, could / MIB);
    assert_eq!(stats.devices["mem"]["bytes_given_back"], unplugged + 3840 * MIB - partial);
    for nothing in ["errors", "busy", "breakages"] {
        assert_eq!(stats.devices["mem"][nothing], 0, "{nothing}");
    }
    Ok(())
}

#[test]
fn the_guests_view_follows_each_size_to_the_block() -> Result<()> {
    let script = "start=$(mem); last=$start; echo ready\n\
        while :; do now=$(mem); [ $now = $last ] || echo plus=$((now-start)); last=$now\n\
        [ $now = $((start+164*1024)) ] && break; sleep 0.2; done; sleep 1000\n";
    let mut guest = growable(128, 1100, script).boot()?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    // Odd sizes, and the largest, which is no multiple of the guest's memory blocks. Linux 6.1 works in steps of 4 MiB.
    for mib in [1100, 200, 400, 404, 384, 1096, 192, 900, 256, 1100, 292] {
        resize(&mut guest, mib)?;
        let line = format!("plus={}", (mib - 128) * 1024);
        guest.wait_for_line(&line, |said| said == line)?;
    }
    // Back to what it was booted with, but for what its running processes sit on.
    let (shrunk, took) = ask(&mut guest, 128)?;
    let left = mem(&mut guest, "plugged_bytes")?;
    println!("{shrunk}; {} MiB plugged after {took:?}, of 164", left / MIB);
    ensure!(left <= 64 * MIB, "{} MiB are left: {shrunk}", left / MIB);
    Ok(())
}

#[test]
fn a_vm_without_room_to_grow_and_sizes_that_cannot_be_are_refused_with_the_numbers() -> Result<()> {
    let refused = |guest: &mut Guest, mib| ask(guest, mib).unwrap_err().to_string();
    let mut guest = GuestSpec { script: "sleep 1000".into(), ..GuestSpec::default() }.boot()?;
    let said = refused(&mut guest, 256);
    assert!(
        said.contains("memory_mib is 256, must be 128 (size_mib, which cannot go) to 128 (max_mib)"),
        "{said}"
    );
    let mut guest = growable(128, 256, "sleep 1000").boot()?;
    for (mib, text) in [
        (126, "memory_mib is 126, must be 128"),
        (258, "to 256 (max_mib)"),
        (129, "memory_mib is 129, must be a multiple of 2"),
    ] {
        let said = refused(&mut guest, mib);
        assert!(said.contains(text), "{said}");
    }
    Ok(())
}

/// A guest of a few instructions with 64 MiB and room for 64 more, none of it plugged.
fn tiny(code: &[u8]) -> Result<ExitReason> {
    let (mut client, mut vmm) = e2e::vm::start_vmm()?;
    let mut config = tiny::config();
    config.memory.max_mib = Some(128);
    config.rng = true;
    let kernel = tiny::kernel(code)?;
    client.call(Op::Configure(Box::new(config)), &[kernel.as_fd()], PATIENCE)?;
    client.call(Op::Boot, &[], PATIENCE)?;
    let event = client.next_event(PATIENCE)?;
    let Some((vmm_api::Event::Exiting { reason }, _)) = event else { bail!("{event:?}") };
    let status = vmm.wait()?;
    ensure!(status.code() == Some(reason.exit_status().into()), "{status} after {reason:?}");
    Ok(reason)
}

/// Maps 4 MiB from guest physical 4 GiB, where what comes and goes begins, at 0x0200_0000; then `code`. The pages
/// are of 4 MiB, whose entries have bits 32 to 39 of the address in their bits 13 to 20 (PSE-36).
fn with_paging(code: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    // The code itself, the devices, and the place in question.
    for (entry, value) in [(4, 0x0100_0083), (0x340, 0xd000_0093), (8, 0x0000_2083)] {
        all.extend(store(0x20_0000 + 4 * entry, value));
    }
    all.extend([0xb8, 0x00, 0x00, 0x20, 0x00, 0x0f, 0x22, 0xd8]); // mov eax, 0x200000; mov cr3, eax
    all.extend([0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x10, 0x0f, 0x22, 0xe0]); // mov eax, cr4; or eax, PSE; mov cr4, eax
    all.extend([0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0]); // cr0 |= PG
    all.extend(code);
    all
}

/// `mov dword [at], value`
fn store(at: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
}

#[test]
fn a_guest_that_touches_what_is_not_plugged_ends_alone_and_the_end_says_so() -> Result<()> {
    let read = [0xa1, 0, 0, 0, 2]; // mov eax, [0x02000000]
    let write = store(0x0200_1000, 1);
    for touch in [&read[..], &write] {
        let code = with_paging(&[touch, RESET].concat());
        let ExitReason::VcpuFailed { vcpu: 0, detail, .. } = tiny(&code)? else { bail!("it went on") };
        assert!(detail.contains("the guest touched memory"), "{detail}");
        assert!(detail.contains("not plugged in") && detail.contains("rip 0x"), "{detail}");
    }
    // The same guest that does not.
    assert_eq!(tiny(&with_paging(RESET))?, ExitReason::GuestReset);
    Ok(())
}

/// Sets up queue 0 of the entropy device with its rings at these addresses and one buffer, notifies it, and resets the
/// machine when the device asks for a reset.
fn drive_rng(rings: [u64; 3], buffer: u64) -> Vec<u8> {
    const DEVICE: u32 = 0xd000_0000;
    let table = u32::try_from(0x30_0000).expect("low memory");
    let low = |address: u64| u32::try_from(address & 0xffff_ffff).expect("masked");
    let high = |address: u64| u32::try_from(address >> 32).expect("shifted");
    let mut code = Vec::new();
    let mut set = |register: u32, value: u32| code.extend(store(DEVICE + register, value));
    for status in [0, 1, 3] {
        set(0x70, status);
    }
    for (register, value) in [(0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, 16)] {
        set(register, value); // VIRTIO_F_VERSION_1 and no other feature; 16 descriptors
    }
    for (part, address) in [(0x80, rings[0]), (0x90, rings[1]), (0xa0, rings[2])] {
        set(part, low(address));
        set(part + 4, high(address));
    }
    set(0x44, 1);
    set(0x70, 15);
    // One writable descriptor of 64 bytes, in the first entry of the available ring, whose index is 1.
    for (at, value) in [(0, low(buffer)), (4, high(buffer)), (8, 64), (12, 2), (0x1000, 1 << 16), (0x1004, 0)]
    {
        code.extend(store(table + at, value));
    }
    code.extend(store(DEVICE + 0x50, 0));
    // mov eax, [STATUS]; test al, NEEDS_RESET; jz back
    code.extend([0xa1, 0x70, 0x00, 0x00, 0xd0, 0xa8, 0x40, 0x74, 0xf7]);
    code.extend(RESET);
    code
}

#[test]
fn rings_and_buffers_in_what_is_not_plugged_cost_the_guest_its_device() -> Result<()> {
    const GONE: u64 = 0x1_0000_0000;
    let good = [0x30_0000, 0x30_1000, 0x30_2000];
    for (what, code) in [
        ("buffer", drive_rng(good, GONE)),
        ("buffer at the end of the region", drive_rng(good, GONE + 128 * MIB - 64)),
        ("descriptor table", drive_rng([GONE, good[1], good[2]], 0x31_0000)),
        ("available ring", drive_rng([good[0], GONE, good[2]], 0x31_0000)),
        ("used ring", drive_rng([good[0], good[1], GONE], 0x31_0000)),
    ] {
        assert_eq!(tiny(&code)?, ExitReason::GuestReset, "{what}");
    }
    Ok(())
}

#[test]
fn what_a_process_freed_goes_back_without_being_asked_for() -> Result<()> {
    let memory = MemoryConfig::new(768);
    let spec = GuestSpec { memory, balloon: true, script: SHELL.into(), ..GuestSpec::default() };
    let mut guest = spec.boot()?;
    let fill = "dd if=/dev/zero of=/mnt/fill bs=1M count=512 2>/dev/null";
    guest.ask(&format!("mount -t tmpfs -o size=700M fill /mnt; {fill}"))?;
    let used = resident(&guest)?;
    guest.ask("rm /mnt/fill")?;
    // Linux reports every two seconds, a sixteenth of what is free.
    let start = Instant::now();
    let fell = loop {
        let fell = used.saturating_sub(resident(&guest)?);
        if fell > 487 * MIB || start.elapsed() > Duration::from_secs(90) {
            break fell;
        }
        sleep(Duration::from_millis(50));
    };
    // What the guest's kernel says comes by the next time.
    guest.stats()?;
    sleep(Duration::from_secs(1));
    let stats = guest.stats()?;
    println!("{} of 512 MiB came back in {:?}", fell / MIB, start.elapsed());
    ensure!(fell as f64 >= 0.95 * (512 * MIB) as f64, "{} MiB came back", fell / MIB);
    let balloon = &stats.devices["balloon"];
    assert!(balloon["bytes_given_back"] >= fell, "{balloon:#?}");
    assert!(balloon.contains_key("guest_available_bytes"), "{balloon:#?}");
    for nothing in ["bad_pages", "bad_requests", "host_errors", "poisoned_bytes", "breakages"] {
        assert_eq!(balloon[nothing], 0, "{nothing} in {balloon:#?}");
    }
    let others = guest.ask(&format!("{fill}; tr -d '\\000' < /mnt/fill | wc -c"))?;
    assert_eq!(others, "0", "bytes that are not zero in what came back");
    Ok(())
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back() -> Result<()> {
    let memory = MemoryConfig::new(512);
    let spec = GuestSpec { memory, balloon: true, script: SHELL.into(), ..GuestSpec::default() };
    let mut guest = spec.boot()?;
    let inflate = |guest: &mut Guest, mib: u32| -> Result<()> {
        guest.call(Op::Balloon { mib })?;
        command::wait_until(&format!("a balloon of {mib} MiB"), || {
            let balloon = guest.stats()?.devices["balloon"].clone();
            ensure!(balloon["target_bytes"] == u64::from(mib) * MIB, "{balloon:#?}");
            Ok(balloon["actual_bytes"] == u64::from(mib) * MIB)
        })
    };
    // Touched and free again: what a balloon is for.
    let fill = "dd if=/dev/zero of=/mnt/fill bs=1M count=380 2>/dev/null";
    guest.ask(&format!("mount -t tmpfs -o size=400M fill /mnt; {fill}"))?;
    let touched = resident(&guest)?;
    ensure!(touched > 380 * MIB, "{} MiB are resident", touched / MIB);
    guest.ask("rm /mnt/fill")?;
    let available = |guest: &mut Guest| -> Result<u64> {
        let said = guest.ask("awk '/^MemAvailable/ {print $2}' /proc/meminfo")?;
        Ok(said.trim().parse::<u64>()? << 10)
    };
    let free = available(&mut guest)?;
    inflate(&mut guest, 256)?;
    let left = available(&mut guest)?;
    ensure!(left + 240 * MIB < free, "{} of {} MiB are available", left / MIB, free / MIB);
    // All that is not in the balloon, and some of the VMM's own.
    let now = resident(&guest)?;
    ensure!(now < 264 * MIB, "{} MiB are resident", now / MIB);

    let error = guest.call(Op::Balloon { mib: 513 }).expect_err("more than there is");
    ensure!(format!("{error:#}").contains("mib is 513, must be 0 to 512 (max_mib)"), "{error:#}");
    inflate(&mut guest, 0)?;
    command::wait_until("all of it is available", || Ok(available(&mut guest)? + 16 * MIB > free))?;
    let others = guest.ask(&format!("{fill}; tr -d '\\000' < /mnt/fill | wc -c"))?;
    assert_eq!(others, "0", "bytes that are not zero in what came back");
    Ok(())
}
