//! Guests of a few instructions under the real binary: whole lives without Linux. They run on software KVMs too.

mod common;

use std::io::Read;
use std::os::fd::OwnedFd;

use common::{Vmm, config, configure, kernel, kvm_or_skip};
use vmm_api::{ExitReason, FdIndex, Op, Reply, Stats, VmConfig, VsockConfig};

/// `mov al, 0xfe; out 0x64, al; hlt; jmp $-1`: the keyboard controller's reset.
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// Writes to a port without end: `inc eax; out 0x80, al; jmp $-3`.
const COUNT: &[u8] = &[0x40, 0xe6, 0x80, 0xeb, 0xfb];
/// `jmp $`.
const SPIN: &[u8] = &[0xeb, 0xfe];

fn boot(config: VmConfig, fds: &[OwnedFd]) -> Vmm {
    let mut vmm = Vmm::start();
    vmm.call(configure(config), fds).unwrap();
    let Reply::Booted { timeline: t } = vmm.call(Op::Boot, &[]).unwrap() else { panic!() };
    let stages = [t.main_us, t.configure_us, t.kvm_ready_us, t.loaded_us, t.running_us];
    assert!(stages.is_sorted() && stages[0] > 0, "{t:?}");
    vmm
}

fn stats(vmm: &mut Vmm) -> Stats {
    match vmm.call(Op::Stats, &[]).unwrap() {
        Reply::Stats(stats) => *stats,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_keyboard_reset_is_a_guest_reset() {
    if !kvm_or_skip("a_keyboard_reset_is_a_guest_reset") {
        return;
    }
    let mut vmm = boot(config(), &[kernel(RESET)]);
    assert_eq!(vmm.exit_reason(), ExitReason::GuestReset);
    let end = vmm.end();
    assert_eq!((end.status.code(), end.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_triple_fault_is_a_failure_with_its_place() {
    if !kvm_or_skip("a_triple_fault_is_a_failure_with_its_place") {
        return;
    }
    // lidt of six zero bytes behind the code, then ud2: no handler for it, nor for the faults that follow.
    let at = (common::ENTRY + 9).to_le_bytes();
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend(at);
    code.extend([0x0f, 0x0b]);
    code.extend([0; 6]);
    let mut vmm = boot(config(), &[kernel(&code)]);
    let ExitReason::VcpuFailed { vcpu: 0, detail, .. } = vmm.exit_reason() else { panic!("not a failure") };
    assert!(detail.starts_with("triple fault") && detail.contains("rip 0x"), "{detail}");
    assert_eq!(vmm.end().status.code(), Some(12));
}

#[test]
fn bytes_on_the_serial_port_come_out() {
    if !kvm_or_skip("bytes_on_the_serial_port_come_out") {
        return;
    }
    // mov dx, 0x3f8; mov al, 'o'; out dx, al; mov al, 'k'; out dx, al; then reset.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'o', 0xee, 0xb0, b'k', 0xee];
    code.extend(RESET);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut config = config();
    config.serial = Some(FdIndex(1));
    let mut vmm = boot(config, &[kernel(&code), writer.into()]);
    assert_eq!(vmm.exit_reason(), ExitReason::GuestReset);
    vmm.end();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ok");
}

#[test]
fn a_device_answers_at_its_address() {
    if !kvm_or_skip("a_device_answers_at_its_address") {
        return;
    }
    // mov eax, [0xd0000000]; mov dx, 0x3f8; four times: out dx, al; shr eax, 8. Then reset.
    let mut code = vec![0xa1, 0x00, 0x00, 0x00, 0xd0, 0x66, 0xba, 0xf8, 0x03];
    for _ in 0..4 {
        code.extend([0xee, 0xc1, 0xe8, 0x08]);
    }
    code.extend(RESET);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut config = config();
    config.serial = Some(FdIndex(1));
    config.rng = true;
    let mut vmm = boot(config, &[kernel(&code), writer.into()]);
    assert_eq!(vmm.exit_reason(), ExitReason::GuestReset);
    vmm.end();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "virt");
}

#[test]
fn a_guest_stands_still_while_paused() {
    if !kvm_or_skip("a_guest_stands_still_while_paused") {
        return;
    }
    let mut vmm = boot(config(), &[kernel(COUNT)]);
    let outs = |vmm: &mut Vmm| stats(vmm).exits["io_out"];
    while outs(&mut vmm) < 10 {}
    for _ in 0..20 {
        assert_eq!(vmm.call(Op::Pause, &[]), Ok(Reply::Done));
        assert_eq!(vmm.call(Op::Pause, &[]), Ok(Reply::Done));
        assert_eq!(stats(&mut vmm).state, "paused");
        let stood = outs(&mut vmm);
        assert_eq!(outs(&mut vmm), stood);
        assert_eq!(vmm.call(Op::Resume, &[]), Ok(Reply::Done));
        while outs(&mut vmm) == stood {}
    }
    assert_eq!(vmm.call(Op::Shutdown, &[]), Ok(Reply::Done));
    assert_eq!(vmm.exit_reason(), ExitReason::Shutdown);
    assert_eq!(vmm.end().status.code(), Some(0));
}

#[test]
fn the_end_of_the_lease_ends_a_guest_that_spins() {
    if !kvm_or_skip("the_end_of_the_lease_ends_a_guest_that_spins") {
        return;
    }
    let mut config = config();
    config.vcpus = 4;
    let mut vmm = boot(config, &[kernel(SPIN)]);
    assert_eq!(stats(&mut vmm).state, "running");
    let end = vmm.end();
    assert_eq!(end.status.code(), Some(ExitReason::LeaseLost.exit_status().into()), "{end:?}");
}

#[test]
fn a_guest_without_a_driver_cannot_be_dialled() {
    if !kvm_or_skip("a_guest_without_a_driver_cannot_be_dialled") {
        return;
    }
    let mut config = config();
    config.vsock = Some(VsockConfig { cid: 3, ports: vec![] });
    let mut vmm = boot(config, &[kernel(SPIN)]);
    let dial = |timeout_ms| Op::VsockConnect { port: 1, timeout_ms };
    assert_eq!(vmm.call(dial(0), &[]).unwrap_err().message, "timeout_ms is 0, must be 1 to 60000");
    let error = vmm.call(dial(10), &[]).unwrap_err();
    assert_eq!(error.code, vmm_api::ErrorCode::Unavailable, "{error}");
}

#[test]
fn every_thread_is_filtered() {
    if !kvm_or_skip("every_thread_is_filtered") {
        return;
    }
    let mut vmm = boot(config(), &[kernel(COUNT)]);
    // A vCPU that has left the guest once has been filtered before.
    while stats(&mut vmm).exits["io_out"] == 0 {}
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap();
    let mut names = vec![];
    for task in tasks {
        let task = task.unwrap().path();
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        // The host kernel's own, which it puts into the process that made the VM.
        if field("Name:").starts_with("kvm-") {
            continue;
        }
        assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), ("2".into(), "1".into()), "{status}");
        names.push(field("Name:"));
    }
    names.sort();
    assert_eq!(names, ["ctvm-vmm", "vcpu0"]);
    vmm.end();
}
