//! Frames, buffers and commands for a network device, between sockets that take and send frames: no chain makes it send what
//! is no frame, no command makes it use a pair that is not there, and the main loop never spins.
#![no_main]

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::device::{Activation, VirtioDevice};
use virtio::net::{HEADER, Net, Taps};
use virtio::testing::{Buffer, Guest};

const PAIRS: usize = 2;
const QUEUES: usize = 2 * PAIRS + 1;
/// More than any frame.
const ROOM: usize = 70_000;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::of(&net(&[]).0, true));
}

/// A device with pairs of sockets for taps, and the host's ends. Those of `old` are used again.
fn net(old: &[UnixDatagram]) -> (Net, Vec<UnixDatagram>, Vec<UnixDatagram>) {
    let (mut ours, mut hosts) = (vec![], vec![]);
    for old in old {
        ours.push(old.try_clone().expect("a descriptor"));
    }
    while ours.len() < PAIRS {
        let (near, far) = UnixDatagram::pair().expect("two descriptors");
        far.set_nonblocking(true).expect("a socket");
        ours.push(near);
        hosts.push(far);
    }
    let fds = ours.iter().map(|end| OwnedFd::from(end.try_clone().expect("a descriptor"))).collect();
    let net = Net::new(Taps::of_sockets(fds).expect("sockets"), [2, 0, 0, 0, 0, 1], 1500);
    (net, ours, hosts)
}

/// What a driver set up that agreed to these of the features.
fn activation(guest: &Guest, net: &Net, features: u64) -> Activation {
    let states: Vec<_> = match net.queues() {
        none if none.is_empty() => guest.queues.iter().map(|queue| queue.state()).collect(),
        states => states,
    };
    guest.activation_from::<Net>(&states, features)
}

fuzz_target!(|data: &[u8]| {
    GUEST.with(|guest| {
        let guest = &mut *guest.borrow_mut();
        let mut input = Input(data);
        let (mut net, ours, hosts) = net(&[]);
        guest.restart(&net.queue_sizes());
        let features = net.features() & if input.u8() % 2 == 0 { u64::MAX } else { input.u64() };
        let set_up = activation(guest, &net, features);
        net.activate(set_up).expect("rings are in memory");

        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            match input.u8() % 12 {
                0 => disturb(guest, usize::from(input.u8()) % QUEUES, &mut input),
                1..=3 => send(guest, &mut input),
                4 | 5 => offer(guest, &mut input),
                6 => command(guest, &mut input),
                7 | 8 => host(&hosts, &mut input),
                9 => {
                    net.pause();
                    if input.u8() % 2 == 0 {
                        let (mut other, ..) = self::net(&ours);
                        let set_up = activation(guest, &net, features);
                        other.restore(&net.save(), Some(set_up)).expect("what was saved fits");
                        net = other;
                    }
                    net.resume();
                }
                10 => net.on_backend(),
                _ => drop(guest.pump(&mut net)),
            }
            net.on_queue(usize::from(input.u8()) % QUEUES);
            check_sent(&hosts, input.u8() % 4 != 0);
        }

        // A guest that does nothing more, and a host that takes everything.
        let mut turns = 0;
        while guest.pump(&mut net) {
            check_sent(&hosts, true);
            turns += 1;
            assert!(turns < 10_000, "the main loop spins");
        }
        net.reset();
        assert!(!guest.pump(&mut net));
    });
});

/// The host takes what was sent, or only the first.
fn check_sent(hosts: &[UnixDatagram], all: bool) {
    let mut frame = [0; ROOM];
    for host in hosts {
        while let Ok(len) = host.recv(&mut frame) {
            assert!((HEADER + 14..=HEADER + 65_562).contains(&len), "{len} bytes are no frame");
            if !all {
                break;
            }
        }
    }
}

/// A frame, most of the time.
fn send(guest: &mut Guest, input: &mut Input<'_>) {
    let queue = 2 * (usize::from(input.u8()) % PAIRS) + 1;
    let mut buffers = vec![];
    for _ in 0..input.u8() % 4 {
        buffers.push(Buffer::Out(vec![7; length(input)]));
    }
    if input.u8() >= 0xf0 {
        buffers.push(Buffer::In(length(input)));
    }
    add(guest, queue, &buffers);
}

/// Receive buffers of one size.
fn offer(guest: &mut Guest, input: &mut Input<'_>) {
    let queue = 2 * (usize::from(input.u8()) % PAIRS);
    let len = match input.u8() {
        small @ 0..8 => usize::from(small) + 8,
        8..128 => 1536,
        _ => length(input),
    };
    for _ in 0..input.u8() % 64 {
        add(guest, queue, &[Buffer::In(len)]);
    }
}

/// A command, sensible more often than not.
fn command(guest: &mut Guest, input: &mut Input<'_>) {
    let mut bytes = vec![4, 0, input.u8() % 4, 0];
    if input.u8() % 4 == 0 {
        bytes = input.bytes(6).to_vec();
    }
    let mut buffers = vec![Buffer::Out(bytes)];
    if input.u8() < 0xf8 {
        buffers.push(Buffer::In(1));
    }
    add(guest, 2 * PAIRS, &buffers);
}

/// What the host may send: frames, longer ones than the guest asked for, and less than a header.
fn host(hosts: &[UnixDatagram], input: &mut Input<'_>) {
    let host = &hosts[usize::from(input.u8()) % PAIRS];
    for _ in 0..input.u8() % 4 {
        // A full socket takes nothing.
        let _ = host.send(&vec![9; length(input)]);
    }
}

fn length(input: &mut Input<'_>) -> usize {
    usize::try_from(input.len()).expect("32 bits") % ROOM
}

fn add(guest: &mut Guest, queue: usize, buffers: &[Buffer]) {
    if !buffers.is_empty() && guest.queues[queue].free() >= buffers.len() {
        guest.send(queue, buffers);
    }
}
