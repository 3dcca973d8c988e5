//! Packets on the control socket: whatever an owner sends, each packet gets one answer that names it, and what passes the
//! checks keeps within the limits.
#![no_main]

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};

use fuzz::Input;
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use vmm::config::{Fds, NewDevice, ValidConfig, cmdline_with_devices};
use vmm::control::{Control, Incoming};
use vmm::vm::lifecycle::{Permit, State, permit};
use vmm_api::config::{MAX_CMDLINE, MAX_DISKS, MAX_VCPUS};
use vmm_api::{ApiError, ErrorCode, Message, Op, Outcome, Reply, Request, frame};

thread_local! {
    /// The owner's end and ours. A run leaves nothing in them.
    static SOCKETS: RefCell<(OwnedFd, Control)> = RefCell::new(sockets());
}

fn sockets() -> (OwnedFd, Control) {
    let (owner, vmm) = frame::pair().expect("a few descriptors");
    (owner, Control::new(vmm).expect("a socket"))
}

fuzz_target!(|data: &[u8]| {
    SOCKETS.with(|sockets| {
        let (owner, control) = &mut *sockets.borrow_mut();
        let mut input = Input(data);
        let mut state = State::Created;
        while !input.is_empty() {
            let packet = packet(&mut input);
            if packet.is_empty() {
                continue;
            }
            let count = usize::from(input.u8() % 5);
            let fds = vec![owner.as_fd(); count];
            frame::send(&*owner, &packet, &fds).expect("one packet fits");
            match control.receive() {
                Incoming::Request(request, fds) => {
                    assert_eq!(fds.len(), count);
                    let id = request.id;
                    control.reply(id, carry_out(&mut state, *request, fds));
                    assert_eq!(answer(owner).0, id);
                }
                Incoming::Refused => assert!(answer(owner).1, "a refusal is an error"),
                other => panic!("{other:?}"),
            }
        }
    });
});

/// The answer's id, and whether it is an error.
fn answer(owner: &OwnedFd) -> (u64, bool) {
    let packet = frame::recv(owner).expect("each packet is answered");
    match serde_json::from_slice(&packet.bytes).expect("answers are messages") {
        Message::Reply { id, outcome } => (id, matches!(outcome, Outcome::Err(_))),
        Message::Event(event) => panic!("{event:?}"),
    }
}

fn carry_out(
    state: &mut State,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<(Reply, Vec<OwnedFd>), ApiError> {
    let error = |e: &dyn std::error::Error| ApiError::msg(ErrorCode::InvalidArgument, e.to_string());
    let next = match permit(*state, &request.op) {
        Ok(Permit::Go(next)) => next,
        Ok(Permit::Already) => *state,
        Err(denied) => return Err(error(&denied)),
    };
    let mut fds = Fds::new(fds);
    match request.op {
        Op::Configure(config) => {
            let taken = std::mem::replace(&mut fds, Fds::new(vec![]));
            let valid = ValidConfig::check(*config, taken.into_all()).map_err(|e| error(&e))?;
            assert!(
                (1..=MAX_VCPUS).contains(&valid.vcpus)
                    && (valid.vcpus..=MAX_VCPUS).contains(&valid.max_vcpus)
            );
            assert!(valid.disks.len() <= MAX_DISKS);
            assert!(valid.memory_bytes.is_multiple_of(2 << 20) && valid.memory_bytes >= 64 << 20);
            if let Ok(line) = cmdline_with_devices(&valid.cmdline, &[(0xd000_0000, 5); 12], 4096) {
                assert!(line.len() < MAX_CMDLINE && !line.contains('\0'));
            }
        }
        Op::Attach { device, .. } => drop(NewDevice::take(device, &mut fds).map_err(|e| error(&e))?),
        Op::FsMount { dir, .. } => drop(fds.take("dir", dir).map_err(|e| error(&e))?),
        _ => {}
    }
    fds.done().map_err(|e| error(&e))?;
    *state = next;
    Ok((Reply::Done, vec![]))
}

/// Bytes as they are, or something that looks like a request.
fn packet(input: &mut Input<'_>) -> Vec<u8> {
    let wild = input.u8();
    if wild % 4 == 0 {
        let len = usize::from(input.u16() % 512);
        return input.bytes(len).to_vec();
    }
    let mut request = json!({ "id": number(input), "op": op(input) });
    if wild % 16 == 1 {
        request["more"] = json!(1);
    }
    let mut bytes = serde_json::to_vec(&request).expect("a value");
    if wild % 16 == 2 {
        // A byte somewhere that is not what it was.
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] = input.u8();
    }
    bytes
}

fn op(input: &mut Input<'_>) -> Value {
    match input.u8() % 15 {
        0..3 => json!({ "configure": config(input) }),
        3 => json!("boot"),
        4 => json!("pause"),
        5 => json!("resume"),
        6 => json!({ "attach": { "device": device(input), "timeout_ms": number(input) } }),
        7 => {
            json!({ "fs_mount": { "at": text(input), "dir": number(input), "read_only": true, "cache": text(input) } })
        }
        8 => json!({ "fs_unmount": { "at": text(input) } }),
        9 => json!({ "vsock_connect": { "port": number(input), "timeout_ms": number(input) } }),
        10 => json!("stats"),
        11 => {
            json!({ "resize": { "vcpus": { "count": number(input) }, "memory_mib": number(input), "timeout_ms": number(input) } })
        }
        12 => {
            json!({ "fs_mount": { "share": text(input), "at": text(input), "dir": number(input) } })
        }
        13 => json!({ "detach": { "device": { "disk": text(input) }, "timeout_ms": number(input) } }),
        _ => json!("shutdown"),
    }
}

fn device(input: &mut Input<'_>) -> Value {
    match input.u8() % 3 {
        0 => json!({ "disk": disk(input) }),
        1 => json!({ "net": { "taps": [number(input)], "mac": input.bytes(6).to_vec(), "mtu": number(input) } }),
        _ => json!({ "fs": { "tag": text(input), "threads": number(input) } }),
    }
}

fn config(input: &mut Input<'_>) -> Value {
    let mut config = Map::new();
    config.insert("version".into(), json!(if input.u8() > 8 { 1 } else { 2 }));
    config.insert("vcpus".into(), number(input));
    if input.u8() & 1 == 1 {
        config.insert("max_vcpus".into(), number(input));
    }
    config.insert("memory".into(), json!({ "size_mib": number(input), "prefault": input.u8() & 1 == 1, "max_mib": number(input) }));
    config.insert("kernel".into(), json!({ "image": number(input), "cmdline": text(input) }));
    let parts = input.u8();
    if parts & 1 != 0 {
        let count = input.u8() % 10;
        config.insert("disks".into(), (0..count).map(|_| disk(input)).collect());
    }
    if parts & 2 != 0 {
        config
            .insert("vsock".into(), json!({ "cid": number(input), "ports": [number(input), number(input)] }));
    }
    if parts & 4 != 0 {
        config.insert("fs".into(), json!({ "tag": text(input), "threads": number(input) }));
    }
    if parts & 8 != 0 {
        config.insert("console".into(), json!({ "output": number(input) }));
    }
    if parts & 16 != 0 {
        config.insert(text(input), number(input));
    }
    Value::Object(config)
}

fn disk(input: &mut Input<'_>) -> Value {
    json!({ "file": number(input), "id": text(input), "queues": number(input) })
}

/// Mostly small, at times at an edge.
fn number(input: &mut Input<'_>) -> Value {
    match input.u8() {
        0..8 => json!(input.u64()),
        8 => json!(u64::MAX),
        9 => json!(-1),
        10 => json!(0.5),
        11 => json!(null),
        12..20 => json!(input.u32()),
        20..40 => json!(128),
        n => json!(n % 5),
    }
}

fn text(input: &mut Input<'_>) -> String {
    let len = match input.u8() {
        255 => 2048,
        n => usize::from(n % 40),
    };
    String::from_utf8_lossy(input.bytes(len)).into_owned()
}
