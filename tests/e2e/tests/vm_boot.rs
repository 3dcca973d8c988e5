//! Boots: every entry, sizes from the smallest to above the 32-bit hole, and ways to end.
#![cfg(feature = "lab")]

use anyhow::Result;
use e2e::vm::{GuestSpec, start_vmm};
use vmm_api::config::MAX_VCPUS;
use vmm_api::{ClientError, ErrorCode, Event, ExitReason, GuestMemoryBacking, MemoryConfig, Op, Reply};

const LOOK: &str = "echo cpus=$(grep -c ^processor /proc/cpuinfo)\n\
                    echo mem_kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)\n\
                    echo release=$(uname -r)\n";

fn memory(size_mib: u32) -> MemoryConfig {
    MemoryConfig::new(size_mib)
}

fn boots_with(spec: GuestSpec) -> Result<()> {
    let (vcpus, size_mib) = (spec.vcpus, spec.memory.size_mib);
    let output = GuestSpec { script: LOOK.into(), ..spec }.run()?;
    assert_eq!(output.status, 0, "{output:#?}");
    assert_eq!(output.value("cpus")?, vcpus.to_string());
    let seen: u32 = output.value("mem_kib")?.parse()?;
    // The kernel keeps its own text, page structs and tables out of MemTotal.
    let (most, least) = (size_mib * 1024, size_mib * 1024 * 9 / 10 - 24 * 1024);
    assert!((least..=most).contains(&seen), "{seen} KiB of {size_mib} MiB");
    Ok(())
}

#[test]
fn one_vcpu_and_the_least_memory() -> Result<()> {
    boots_with(GuestSpec { memory: memory(64), ..GuestSpec::default() })
}

#[test]
fn two_vcpus_with_256_mib() -> Result<()> {
    boots_with(GuestSpec { vcpus: 2, memory: memory(256), ..GuestSpec::default() })
}

#[test]
fn four_vcpus_with_memory_above_the_32_bit_hole() -> Result<()> {
    boots_with(GuestSpec { vcpus: 4, memory: memory(4096), ..GuestSpec::default() })
}

#[test]
fn the_most_vcpus() -> Result<()> {
    boots_with(GuestSpec { vcpus: MAX_VCPUS, memory: memory(512), ..GuestSpec::default() })
}

#[test]
fn one_vcpu_with_3_gib() -> Result<()> {
    boots_with(GuestSpec { memory: memory(3072), ..GuestSpec::default() })
}

#[test]
fn elf_kernel_at_its_64_bit_entry() -> Result<()> {
    boots_with(GuestSpec { pvh: false, ..GuestSpec::default() })
}

#[test]
fn bzimage_kernel() -> Result<()> {
    boots_with(GuestSpec { kernel: "bzImage", ..GuestSpec::default() })
}

#[test]
fn initial_ram_disk_and_prefaulted_memory() -> Result<()> {
    let memory = MemoryConfig { prefault: true, ..memory(128) };
    boots_with(GuestSpec { initrd: true, memory, ..GuestSpec::default() })
}

#[test]
fn hugetlbfs_pages_are_used_or_the_lack_of_them_is_said() -> Result<()> {
    let pages = "/proc/sys/vm/nr_hugepages";
    let hugetlb = || MemoryConfig { backing: GuestMemoryBacking::Hugetlbfs, ..memory(128) };
    std::fs::write(pages, "0")?;
    let refused = GuestSpec { memory: hugetlb(), ..GuestSpec::default() }.boot().unwrap_err();
    let Some(ClientError::Api(error)) = refused.downcast_ref() else { panic!("{refused:#}") };
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{error}");
    std::fs::write(pages, "64")?;
    let booted = boots_with(GuestSpec { memory: hugetlb(), ..GuestSpec::default() });
    std::fs::write(pages, "0")?;
    booted
}

#[test]
fn a_guest_panic_is_the_reason_of_exit_with_its_last_words() -> Result<()> {
    // The script closes the subshell it runs in and ends PID 1, which is what a broken agent would do.
    let spec = GuestSpec { script: "true\n)\nexit 7\n(".into(), ..GuestSpec::default() };
    match spec.boot()?.exit_reason()? {
        ExitReason::GuestPanic { last_words } => {
            assert!(
                last_words.contains("Kernel panic - not syncing: Attempted to kill init"),
                "{last_words}"
            );
        }
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn pause_stops_the_guest_and_resume_lets_it_go_on() -> Result<()> {
    let script = "i=0; while [ $i -lt 100000 ]; do echo tick=$i; i=$((i+1)); usleep 20000; done";
    let mut guest = GuestSpec { vcpus: 2, script: script.into(), ..GuestSpec::default() }.boot()?;
    guest.wait_for_line("first tick", |l| l.starts_with("tick="))?;
    for _ in 0..5 {
        assert_eq!(guest.call(Op::Pause)?, Reply::Done);
        assert_eq!(guest.call(Op::Pause)?, Reply::Done, "paused already");
        let paused = guest.stats()?;
        assert_eq!(paused.state, "paused");
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert_eq!(guest.stats()?.exits, paused.exits, "a paused guest does nothing");
        assert_eq!(guest.call(Op::Resume)?, Reply::Done);
        let mut more = 0;
        guest.wait_for_line("ten more ticks", |l| {
            more += u32::from(l.starts_with("tick="));
            more > 10
        })?;
    }
    guest.call(Op::Shutdown)?;
    assert_eq!(guest.exit_reason()?, ExitReason::Shutdown);
    Ok(())
}

#[test]
fn the_end_of_the_lease_is_the_end_of_the_vm() -> Result<()> {
    let (client, mut vmm) = start_vmm()?;
    drop(client);
    assert_eq!(vmm.wait()?.code(), Some(ExitReason::LeaseLost.exit_status().into()));
    Ok(())
}

#[test]
fn a_port_nobody_listens_on_is_refused() -> Result<()> {
    let script = "echo up=1; sleep 1000";
    let mut guest = GuestSpec { script: script.into(), ..GuestSpec::default() }.boot()?;
    guest.wait_for_line("script", |l| l == "up=1")?;
    // Nothing listens in the guest: the kernel answers with a reset.
    let error = guest.call(Op::VsockConnect { port: 77, timeout_ms: 30_000 }).unwrap_err();
    let Some(ClientError::Api(error)) = error.downcast_ref() else { panic!("{error:#}") };
    assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
    guest.call(Op::Shutdown)?;
    assert!(matches!(guest.event()?.0, Event::Exiting { .. }));
    Ok(())
}
