//! vCPUs and memory come and go while the guest runs, and the guest's own view is the VMM's.
#![cfg(feature = "lab")]

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::vm::{Guest, GuestSpec, SHELL};
use vmm_api::resize::MAX_RESIZE_MS;
use vmm_api::{ClientError, Ending, ErrorCode, MemoryConfig, Op, Reply, Resized, Vcpus};

/// The VMM's answer comes a while after the guest's time is over.
const LIMIT: Duration = Duration::from_secs(180);

/// How long a resize may take, in milliseconds.
fn within() -> u32 {
    u32::try_from(e2e::patience(Duration::from_secs(30)).as_millis()).expect("minutes")
}

fn vcpus(wanted: Vcpus) -> Op {
    Op::Resize { vcpus: Some(wanted), memory_mib: None, timeout_ms: within() }
}

fn count(wanted: u8) -> Op {
    vcpus(Vcpus::Count(wanted))
}

fn resize(guest: &mut Guest, op: Op) -> Result<Resized> {
    match guest.call(op)? {
        Reply::Resized(resized) => Ok(resized),
        other => bail!("resize answered {other:?}"),
    }
}

/// Resizes and checks that all was reached, by the VMM and as the guest sees itself.
fn resize_whole(guest: &mut Guest, wanted: Vcpus, online: &str) -> Result<()> {
    let resized = resize(guest, vcpus(wanted))?;
    ensure!(resized.ending == Ending::Done, "{resized}; the guest: {}", guest.ask("dmesg | tail -n 20")?);
    is_online(guest, online)
}

fn is_online(guest: &mut Guest, online: &str) -> Result<()> {
    let seen = guest.ask("cat /sys/devices/system/cpu/online; grep -c ^processor /proc/cpuinfo; nproc")?;
    let seen: Vec<_> = seen.lines().collect();
    let size = guest.stats()?.size.context("no size")?;
    let count = size.vcpus.context("not known")?.to_string();
    ensure!(seen == [online, &count, &count], "{seen:?}, the VMM says {count}");
    Ok(())
}

fn spec(max_vcpus: u8) -> GuestSpec {
    GuestSpec { max_vcpus: Some(max_vcpus), script: SHELL.into(), ..GuestSpec::default() }
}

#[test]
fn vcpus_come_and_go_while_all_of_them_work() -> Result<()> {
    let mut guest = spec(8).boot()?;
    is_online(&mut guest, "0")?;
    guest.ask("dmesg -c > /dev/null")?;
    // More workers than there will be vCPUs, each with a sum that a lost or doubled step would spoil.
    guest.ask("work() { i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); done; echo $i > /tmp/done.$1; }")?;
    guest.ask("for n in 1 2 3 4 5 6 7 8 9 10; do work $n & done")?;
    for (wanted, online) in [(2, "0-1"), (8, "0-7"), (3, "0-2"), (1, "0"), (4, "0-3")] {
        resize_whole(&mut guest, Vcpus::Count(wanted), online)?;
    }
    guest.ask("touch /tmp/stop; wait")?;
    let done = guest.ask("cat /tmp/done.* | grep -c '[1-9]'")?;
    ensure!(done == "10", "{done} of 10 workers ended");
    let complaints = guest.ask("dmesg | grep -iE 'warn|bug|stall|lockup|call trace' || true")?;
    ensure!(complaints.is_empty(), "{complaints}");
    Ok(())
}

/// Defect 4 of the field: only the last one in could be the first one out.
#[test]
fn any_vcpu_but_the_first_can_go_and_come_back() -> Result<()> {
    let mut guest = GuestSpec { vcpus: 4, ..spec(6) }.boot()?;
    is_online(&mut guest, "0-3")?;
    resize_whole(&mut guest, Vcpus::These(vec![0, 2, 3]), "0,2-3")?;
    resize_whole(&mut guest, Vcpus::These(vec![0, 5]), "0,5")?;
    resize_whole(&mut guest, Vcpus::Count(3), "0-1,5")?;
    resize_whole(&mut guest, Vcpus::Count(2), "0-1")?;
    resize_whole(&mut guest, Vcpus::Count(6), "0-5")?;
    // Each of them really works.
    for cpu in 0..6 {
        let ran = guest.ask(&format!("taskset -c {cpu} grep Cpus_allowed_list /proc/self/status"))?;
        ensure!(ran.ends_with(&format!("\t{cpu}")), "{ran}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_is_refused_with_the_numbers() -> Result<()> {
    let mut guest = spec(4).boot()?;
    let refused = |guest: &mut Guest, op| match guest.client().call(op, &[], LIMIT) {
        Err(ClientError::Api(error)) => Ok(error),
        other => bail!("{other:?}"),
    };
    for (op, word) in [
        (count(5), "vcpus is 5, must be 1 to 4"),
        (count(0), "vcpus is 0, must be 1 to 4"),
        (vcpus(Vcpus::These(vec![0, 4])), "names 4, must be 0 to 3"),
        (vcpus(Vcpus::These(vec![1])), "without 0"),
        (Op::Resize { vcpus: None, memory_mib: None, timeout_ms: 1 }, "neither"),
        (Op::Resize { vcpus: Some(Vcpus::Count(1)), memory_mib: None, timeout_ms: 0 }, "timeout_ms is 0"),
        (Op::Resize { vcpus: None, memory_mib: Some(1 << 30), timeout_ms: 1 }, "memory_mib is 1073741824"),
    ] {
        let error = refused(&mut guest, op)?;
        ensure!(error.code == ErrorCode::InvalidArgument, "{error:?}");
        ensure!(error.message.contains(word), "{} is without {word}", error.message);
    }
    guest.call(Op::Pause)?;
    let error = refused(&mut guest, count(2))?;
    ensure!(error.code == ErrorCode::FailedPrecondition, "{error:?}");
    ensure!(error.message.contains("running"), "{}", error.message);
    guest.call(Op::Resume)?;
    resize_whole(&mut guest, Vcpus::Count(2), "0-1")
}

/// A resize that comes before the guest's kernel is there waits for it; one that the VM's end meets is told so.
#[test]
fn a_resize_during_boot_waits_and_during_shutdown_ends() -> Result<()> {
    let mut guest = spec(4).boot()?;
    let resized = resize(&mut guest, count(3))?;
    ensure!(resized.ending == Ending::Done, "{resized}");
    is_online(&mut guest, "0-2")?;
    // Stopped, the guest cannot answer; then it is over.
    let begun = guest.client().begin(count(1), &[])?;
    guest.call(Op::Shutdown)?;
    match guest.client().finish(begun, LIMIT) {
        Ok((Reply::Resized(resized), _)) => ensure!(resized.ending == Ending::Done, "{resized}"),
        Err(ClientError::Api(error)) => ensure!(error.code == ErrorCode::Unavailable, "{error:?}"),
        other => bail!("{other:?}"),
    }
    guest.exit_reason()?;
    Ok(())
}

#[test]
fn of_several_callers_the_last_one_counts() -> Result<()> {
    let mut guest = spec(4).boot()?;
    is_online(&mut guest, "0")?;
    let begun: Vec<_> =
        [2, 3, 4].into_iter().map(|n| guest.client().begin(count(n), &[])).collect::<Result<_, _>>()?;
    let mut endings = vec![];
    for call in begun {
        match guest.client().finish(call, LIMIT)? {
            (Reply::Resized(resized), _) => endings.push(resized.ending),
            other => bail!("{other:?}"),
        }
    }
    ensure!(endings[0] == Ending::Done && endings[2] == Ending::Done, "{endings:?}");
    // The middle one began if the first was fast.
    ensure!(matches!(endings[1], Ending::Done | Ending::Replaced), "{endings:?}");
    is_online(&mut guest, "0-3")
}

/// Pausing in the middle is no harm: the answer comes when the guest goes on.
#[test]
fn a_pause_in_the_middle_delays_and_no_more() -> Result<()> {
    let mut guest = spec(4).boot()?;
    is_online(&mut guest, "0")?;
    for round in 0..10u8 {
        let wanted = if round % 2 == 0 { 4 } else { 1 };
        let begun = guest.client().begin(count(wanted), &[])?;
        guest.call(Op::Pause)?;
        guest.call(Op::Resume)?;
        let (Reply::Resized(resized), _) = guest.client().finish(begun, LIMIT)? else { bail!("no resize") };
        ensure!(resized.ending == Ending::Done, "round {round}: {resized}");
    }
    is_online(&mut guest, "0")
}

/// Both kinds at random, each followed by a look at what the guest has.
#[test]
fn random_resizes_leave_both_sides_of_one_mind() -> Result<()> {
    let rounds = if e2e::long() { 1000 } else { 40 };
    let memory = MemoryConfig { max_mib: Some(1024), ..MemoryConfig::new(256) };
    let mut guest = GuestSpec { memory, ..spec(8) }.boot()?;
    let at_boot = total_kib(&mut guest)?;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..rounds {
        let set: Vec<u8> = (0..8).filter(|cpu| *cpu == 0 || random() & 1 == 1).collect();
        let mib = 256 + 4 * u32::try_from(random() % 193)?;
        let vcpus = (round % 3 != 1).then(|| Vcpus::These(set.clone()));
        let memory_mib = (round % 3 != 0).then_some(mib);
        let resized =
            resize(&mut guest, Op::Resize { vcpus: vcpus.clone(), memory_mib, timeout_ms: within() })?;
        // A page that cannot be moved may keep a block, and then the answer says how many.
        let partly = memory_mib.is_some() && resized.ending == Ending::Partial;
        ensure!(resized.ending == Ending::Done || partly, "round {round}, {set:?}, {mib} MiB: {resized}");
        let size = guest.stats()?.size.context("no size")?;
        let total = total_kib(&mut guest)?;
        let came = u64::from(size.memory_mib - 256) * 1024;
        ensure!(total == at_boot + came, "round {round}: {total} KiB, {at_boot} at boot, {came} came");
        if vcpus.is_some() {
            let online = guest.ask("for c in /sys/devices/system/cpu/cpu[0-9]*; do [ -e $c/online ] && [ $(cat $c/online) = 0 ] || echo ${c##*cpu}; done")?;
            let online: Vec<u8> = online.lines().map(str::parse).collect::<Result<_, _>>()?;
            ensure!(online == set, "round {round}: {online:?} in place of {set:?}");
        }
    }
    let stats = guest.stats()?;
    let ended: u64 = ["done", "partial"].iter().filter_map(|ending| stats.resizes.get(*ending)).sum();
    ensure!(ended == rounds, "{:?}", stats.resizes);
    Ok(())
}

fn total_kib(guest: &mut Guest) -> Result<u64> {
    Ok(guest.ask("awk '/^MemTotal/ {print $2}' /proc/meminfo")?.parse()?)
}

/// The driver needs nothing of user space, and of memory only what the guest's kernel keeps for itself.
#[test]
fn a_guest_whose_processes_are_killed_for_want_of_memory_is_resized() -> Result<()> {
    if e2e::debug_kernel() {
        return Ok(()); // its own shadow of memory leaves too little to fill
    }
    let memory = MemoryConfig { max_mib: Some(512), ..MemoryConfig::new(128) };
    let mut guest = GuestSpec { memory, ..spec(4) }.boot()?;
    // The shell itself is spared; its children are not.
    guest.ask("echo -1000 > /proc/self/oom_score_adj")?;
    guest.ask("eat() { while [ ! -e /tmp/stop ]; do sh -c 'echo 1000 > /proc/self/oom_score_adj; head -c 90000000 /dev/zero | tail -c 90000000 > /dev/null' 2> /dev/null; done; }")?;
    guest.ask("for n in 1 2 3; do eat & done; sleep 1")?;
    for (cpus, mib) in [(4u8, 128), (2, 160), (1, 128), (3, 192)] {
        let vcpus = Some(Vcpus::Count(cpus));
        let resized = resize(&mut guest, Op::Resize { vcpus, memory_mib: Some(mib), timeout_ms: within() })?;
        // What is in use cannot go, and that is an answer too.
        let fits = matches!(resized.ending, Ending::Done | Ending::Partial);
        let reached = resized.vcpus.as_ref().and_then(|vcpus| vcpus.reached);
        ensure!(fits && reached == Some(cpus.into()), "{cpus} vCPUs, {mib} MiB: {resized}");
    }
    guest.ask("touch /tmp/stop; wait")?;
    let killed = guest.ask("dmesg | grep 'Killed process' | wc -l")?.parse::<u32>()?;
    ensure!(killed > 0, "nothing was killed");
    is_online(&mut guest, "0-2")
}

/// Threads of the highest real-time priority that never sleep, one more than there are vCPUs: all else that runs in the guest,
/// its kernel's threads too, has what the scheduler keeps for those that are not real-time.
#[test]
fn a_guest_whose_user_space_hangs_is_resized() -> Result<()> {
    let mut guest = GuestSpec { programs: vec!["/opt/ctvm/tests/exerciser".into()], ..spec(4) }.boot()?;
    guest.ask("{ exerciser spin 5 & }")?;
    // By itself: there is little time left for a shell that looks.
    guest.wait_for_line("word of the spinning", |line| line == "spinning")?;
    for cpus in [2, 4, 1, 3] {
        // All that a resize takes happens in the twentieth part of the time: 5 s or so.
        let vcpus = Some(Vcpus::Count(cpus));
        let resized = resize(
            &mut guest,
            Op::Resize { vcpus, memory_mib: None, timeout_ms: (4 * within()).min(MAX_RESIZE_MS) },
        )?;
        ensure!(resized.ending == Ending::Done, "{cpus} vCPUs: {resized}");
    }
    Ok(())
}
