//! What an owner may do wrong, said to the real binary: each is one clear answer, and the process lives on or ends
//! with a status of its own.

mod common;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use common::{LIMIT, Vmm, config, configure, file, kernel, kvm_or_skip};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vmm_api::{
    ApiError, DeviceName, DiskConfig, ErrorCode, ExitReason, FdIndex, Message, NewDevice, Op, Outcome, Reply,
    exit,
};

fn status_of(command: &mut Command) -> (Option<i32>, String) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn vmm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_ctvm-vmm"))
}

/// The next packet, which must be a refusal.
fn refusal(vmm: &mut Vmm) -> (u64, ApiError) {
    let packet = vmm_api::frame::recv(vmm.client().as_fd()).unwrap();
    match serde_json::from_slice(&packet.bytes).unwrap() {
        Message::Reply { id, outcome: Outcome::Err(error) } => (id, error),
        other => panic!("{other:?}"),
    }
}

fn send(vmm: &mut Vmm, bytes: &[u8]) -> (u64, ApiError) {
    vmm_api::frame::send(vmm.client().as_fd(), bytes, &[]).unwrap();
    refusal(vmm)
}

fn state(vmm: &mut Vmm) -> String {
    match vmm.call(Op::Stats, &[]).unwrap() {
        Reply::Stats(stats) => stats.state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_control_socket_it_says_so() {
    let (status, said) = status_of(&mut vmm());
    assert_eq!(status, Some(exit::NO_CONTROL_SOCKET.into()), "{said}");
    assert!(said.contains("descriptor 3 is not a control socket"), "{said}");
}

#[test]
fn arguments_it_does_not_know_are_usage_errors() {
    for (argument, word) in [("--explode", "--explode"), ("--log", "error, warn"), ("--seccomp", "enforce")] {
        let (status, said) = status_of(vmm().arg(argument));
        assert_eq!(status, Some(exit::USAGE.into()), "{said}");
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn what_is_no_request_is_refused_and_the_next_one_is_served() {
    let mut vmm = Vmm::start();
    let (id, error) = send(&mut vmm, b"{\"id\":3,");
    assert_eq!((id, error.code), (0, ErrorCode::InvalidArgument));
    let (id, error) = send(&mut vmm, br#"{"id":3,"op":{"pause":{"hard":true}}}"#);
    assert_eq!((id, error.code), (3, ErrorCode::InvalidArgument));
    let (id, error) = send(&mut vmm, br#"{"id":4,"op":"stats","extra":0}"#);
    assert_eq!(id, 4);
    assert!(error.message.contains("extra"), "{error}");
    assert_eq!(state(&mut vmm), "created");
}

#[test]
fn packets_beyond_the_limits_are_refused() {
    let mut vmm = Vmm::start();
    let long = vec![b' '; vmm_api::frame::MAX_PACKET + 1];
    rustix::net::send(vmm.client(), &long, SendFlags::empty()).unwrap();
    assert!(refusal(&mut vmm).1.message.contains("65536 bytes"));

    let fd = file(b"");
    let fds = [fd.as_fd(); vmm_api::frame::MAX_FDS + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(vmm_api::frame::MAX_FDS + 1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let packet = [IoSlice::new(br#"{"id":1,"op":"stats"}"#)];
    sendmsg(vmm.client(), &packet, &mut control, SendFlags::empty()).unwrap();
    let limit = format!("{} file descriptors", vmm_api::frame::MAX_FDS);
    assert!(refusal(&mut vmm).1.message.contains(&limit));
    assert_eq!(state(&mut vmm), "created");
}

#[test]
fn operations_out_of_turn_are_refused_by_name() {
    let mut vmm = Vmm::start();
    for op in [Op::Boot, Op::Pause, Op::Resume, Op::VsockConnect { port: 1, timeout_ms: 1 }] {
        let error = vmm.call(op, &[]).unwrap_err();
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        assert!(error.message.contains("needs a configured VM"), "{error}");
    }
}

#[test]
fn a_lease_that_ends_before_anything_began_is_a_lease_lost() {
    let end = Vmm::start().end();
    assert_eq!(end.status.code(), Some(ExitReason::LeaseLost.exit_status().into()), "{end:?}");
}

#[test]
fn shutdown_answers_then_says_why_it_exits() {
    let mut vmm = Vmm::start();
    assert_eq!(vmm.call(Op::Shutdown, &[]), Ok(Reply::Done));
    assert_eq!(vmm.exit_reason(), ExitReason::Shutdown);
    assert_eq!(vmm.end().status.code(), Some(0));
}

#[test]
fn a_refused_configuration_has_an_exit_status_of_its_own() {
    let mut vmm = Vmm::start();
    let mut small = config();
    small.memory.size_mib = 32;
    let error = vmm.call(configure(small), &[file(b"")]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert_eq!(error.message, "memory.size_mib is 32, must be 64 to 1048576");
    let mut old = config();
    old.version = 99;
    let error = vmm.call(configure(old), &[file(b"")]).unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert_eq!(state(&mut vmm), "created");
    let end = vmm.end();
    assert_eq!(end.status.code(), Some(exit::REFUSED.into()), "{end:?}");
    assert!(end.stderr.contains("protocol version 99"), "{end:?}");
}

#[test]
fn each_descriptor_must_have_its_use() {
    let mut vmm = Vmm::start();
    let error = vmm.call(configure(config()), &[]).unwrap_err();
    assert_eq!(error.message, "kernel.image is descriptor 0 of the packet, which has 0");
    let error = vmm.call(configure(config()), &[file(b""), file(b"")]).unwrap_err();
    assert!(error.message.contains("of which 1 are not named"), "{error}");
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}

#[test]
fn what_is_no_kernel_is_refused() {
    if !kvm_or_skip("what_is_no_kernel_is_refused") {
        return;
    }
    let mut vmm = Vmm::start();
    let directory: OwnedFd = std::fs::File::open("/").unwrap().into();
    let write_only: OwnedFd = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap().into();
    for (image, word) in [
        (file(b""), "it is empty"),
        (file(b"#!/bin/sh\n"), "neither an ELF vmlinux nor a bzImage"),
        (file(b"\x7fELF\x02\x01"), "damaged"),
        (directory, "not a regular file"),
        (write_only, "not a regular file"),
    ] {
        let error = vmm.call(configure(config()), &[image]).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(state(&mut vmm), "created");
    // The owner may try again.
    assert_eq!(vmm.call(configure(config()), &[kernel(&[0xf4])]), Ok(Reply::Done));
    let error = vmm.call(configure(config()), &[kernel(&[0xf4])]).unwrap_err();
    assert_eq!(error.message, "the VM has been configured; it is configured");
    assert_eq!(vmm.end().status.code(), Some(10));
}

#[test]
fn what_is_no_disk_and_what_is_missing_is_refused() {
    if !kvm_or_skip("what_is_no_disk_and_what_is_missing_is_refused") {
        return;
    }
    let mut vmm = Vmm::start();
    let disk = |file| DiskConfig::read_only(FdIndex(file), "");
    let mut odd = config();
    odd.disks = vec![disk(1)];
    let error = vmm.call(configure(odd), &[kernel(&[0xf4]), file(b"odd")]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.to_string().contains("not a multiple of 512"), "{error}");

    vmm.call(configure(config()), &[kernel(&[0xf4])]).unwrap();
    let attach = || Op::Attach { device: NewDevice::Disk(disk(0)), timeout_ms: 1 };
    for slot in 0..vmm_api::config::MAX_DISKS {
        let reply = vmm.call(attach(), &[file(&[0; 512])]);
        let Ok(Reply::Attached(attached)) = reply else { panic!("{reply:?}") };
        assert_eq!(usize::from(attached.slot), slot);
        assert_eq!(attached.registers, 0xd000_0000 + 0x1000 * slot as u64);
    }
    let error = vmm.call(attach(), &[file(&[0; 512])]).unwrap_err();
    assert_eq!(error.message, "disk \"\" would be number 17 of its kind, at most 16 can be");
    let device = DeviceName::Disk("a".into());
    let error = vmm.call(Op::Detach { device, timeout_ms: 1 }, &[]).unwrap_err();
    assert_eq!(error.message, "detach needs a running VM; this one is configured");
    let error = vmm.call(Op::FsUnmount { share: None, at: "x".into() }, &[]).unwrap_err();
    assert_eq!(error.message, "this VM was configured without a file share");
    let error = vmm.call(Op::Stats, &[file(b"")]).unwrap_err();
    assert!(error.message.contains("1 descriptors"), "{error}");
}

#[test]
fn without_kvm_the_reason_is_told_twice() {
    // A private mount namespace with an empty /dev.
    let script = "mount -t tmpfs none /dev && exec \"$0\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(env!("CARGO_BIN_EXE_ctvm-vmm"));
    let mut vmm = Vmm::start_with(command);
    let mut call = || vmm.client().call(configure(config()), &[file(b"").as_fd()], LIMIT);
    let error = match call() {
        Err(vmm_api::ClientError::Api(error)) => error,
        _ => {
            eprintln!("skipped without_kvm_the_reason_is_told_twice: no private mount namespace to be had");
            return;
        }
    };
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(error.message.starts_with("/dev/kvm is not there"), "{error}");
    let end = vmm.end();
    assert_eq!(end.status.code(), Some(exit::NO_KVM.into()), "{end:?}");
    assert!(end.stderr.contains("/dev/kvm is not there"), "{end:?}");
}
