//! A guest whose end of the upcall channel does one thing wrong. Each resize it spoils ends as what it was, in numbers, and
//! the next one works. `exerciser upcall` (`tests/exerciser/src/upcall.rs`) poses as the guest's driver, which is off.
#![cfg(feature = "lab")]

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use e2e::vm::{Guest, GuestSpec};
use vmm_api::{Ending, Op, Reply, Resized, Vcpus};

const PROGRAM: &str = "/opt/ctvm/tests/exerciser";

fn boot(fault: &str) -> Result<Guest> {
    let spec = GuestSpec {
        max_vcpus: Some(8),
        cmdline: "ctvm_upcall.off=1",
        programs: vec![PROGRAM.into()],
        script: format!("exerciser upcall {fault} || sleep 1000"),
        ..GuestSpec::default()
    };
    let mut guest = spec.boot()?;
    guest.wait_for_line("open channel", |line| line == "upcall open")?;
    Ok(guest)
}

fn resize(guest: &mut Guest, vcpus: u8, timeout_ms: u32) -> Result<Resized> {
    match guest.call(Op::Resize { vcpus: Some(Vcpus::Count(vcpus)), memory_mib: None, timeout_ms })? {
        Reply::Resized(resized) => Ok(resized),
        other => bail!("resize answered {other:?}"),
    }
}

/// A resize to four vCPUs ends as `ending` with so many reached, and the next one, to three, is whole.
fn spoilt(fault: &str, ending: Ending, reached: Option<u32>, word: &str) -> Result<()> {
    let mut guest = boot(fault)?;
    let resized = resize(&mut guest, 4, 2000)?;
    ensure!(resized.ending == ending, "{fault}: {resized}");
    ensure!(resized.vcpus.is_some_and(|vcpus| vcpus.reached == reached), "{fault}: {resized}");
    ensure!(resized.detail.contains(word), "{fault}: {resized} is without {word:?}");
    let next = resize(&mut guest, 3, 20_000)?;
    ensure!(next.ending == Ending::Done, "{fault}, then {next}");
    let size = guest.stats()?.size;
    ensure!(size.is_some_and(|size| size.vcpus == Some(3)), "{fault}: {size:?}");
    Ok(())
}

#[test]
fn a_guest_that_refuses_one_vcpu() -> Result<()> {
    spoilt("refuse", Ending::Partial, Some(3), "CPU 2: Device or resource busy")
}

#[test]
fn a_guest_that_answers_late() -> Result<()> {
    spoilt("late", Ending::TimedOut, None, "")
}

#[test]
fn a_guest_that_answers_twice_or_out_of_order() -> Result<()> {
    spoilt("twice", Ending::Done, Some(4), "")?;
    spoilt("disorder", Ending::Done, Some(4), "")
}

#[test]
fn a_guest_that_breaks_the_protocol() -> Result<()> {
    for (fault, word) in [
        ("length", "bytes behind a header"),
        ("magic", "magic"),
        ("epoch", "another epoch"),
        ("short", "too short"),
        ("cpus", "CPU 0 is not online"),
    ] {
        spoilt(fault, Ending::Reset, None, word)?;
    }
    Ok(())
}

#[test]
fn a_guest_that_resets_the_channel() -> Result<()> {
    spoilt("reset", Ending::Reset, None, "hung up")
}

/// Nobody is there any more: the resize is a reset, later ones wait in vain, and the VM goes on.
#[test]
fn a_guest_whose_driver_dies() -> Result<()> {
    let mut guest = boot("die")?;
    let resized = resize(&mut guest, 4, 20_000)?;
    ensure!(resized.ending == Ending::Reset, "{resized}");
    let next = resize(&mut guest, 2, 1000)?;
    ensure!(next.ending == Ending::TimedOut, "{next}");
    ensure!(next.detail.contains("has not opened the upcall channel"), "{next}");
    let stats = guest.stats()?;
    ensure!(stats.state == "running" && stats.size.is_some_and(|size| size.vcpus.is_none()), "{stats:?}");
    Ok(())
}

/// The host serves one channel, to the kernel that opened it: a user-space process gets none beside it.
#[test]
fn a_process_that_poses_as_the_driver_is_turned_away() -> Result<()> {
    let spec = GuestSpec {
        max_vcpus: Some(2),
        programs: vec![PROGRAM.into()],
        script: "exerciser upcall late || echo posed=$?; sleep 1000".into(),
        ..GuestSpec::default()
    };
    let mut guest = spec.boot()?;
    let posed = guest.wait_for_line("end of the process", |line| line.starts_with("posed="))?;
    ensure!(posed == "posed=1", "{posed}");
    std::thread::sleep(Duration::from_millis(10));
    let resized = resize(&mut guest, 2, 20_000)?;
    ensure!(resized.ending == Ending::Done, "{resized}");
    let turned_away = guest.stats()?.resizes["upcall_turned_away"];
    ensure!(turned_away == 1, "{turned_away} dials were turned away");
    Ok(())
}
