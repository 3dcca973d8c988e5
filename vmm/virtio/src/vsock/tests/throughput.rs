//! How fast bytes pass, with a driver that costs nothing and a host end that reads or writes in a thread of its own.
//! Not a test: it prints. `cargo test --release -p virtio vsock::tests::throughput -- --ignored --nocapture
//! --test-threads 1`

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::peer::{Peer, RX_PAYLOAD};
use crate::vsock::packet::Op;

const TOTAL: usize = 1 << 30;

fn report(what: &str, start: Instant, peer: &Peer) {
    let rate = |time: Duration| (TOTAL >> 20) as f64 / time.as_secs_f64();
    println!("{what}: {:.0} MiB/s; the device alone {:.0}", rate(start.elapsed()), rate(peer.in_device));
    for name in ["packets_from_guest", "packets_to_guest", "host_stalls", "credit_stalls", "buffer_stalls"] {
        println!("    {name}: {}", peer.metric(name));
    }
    println!("    interrupts: {}", peer.guest.interrupts());
}

#[test]
#[ignore = "prints a figure"]
fn guest_to_host() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    host.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut total = 0;
        while total < TOTAL {
            total += host.read(&mut buffer).unwrap();
        }
    });
    let start = Instant::now();
    let payload = vec![7; 64 << 10];
    let mut sent = 0;
    while !reader.is_finished() {
        while sent < TOTAL && socket.credit() >= payload.len() && peer.guest.queues[1].in_flight() < 8 {
            peer.post_data(&mut socket, &payload);
            sent += payload.len();
        }
        if !peer.run_once() {
            std::thread::yield_now();
        }
        peer.take_data(&mut socket);
    }
    reader.join().unwrap();
    report("guest to host, packets of 64 KiB", start, &peer);
}

#[test]
#[ignore = "prints a figure"]
fn host_to_guest() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    host.set_nonblocking(false).unwrap();
    let writer = std::thread::spawn(move || {
        let buffer = vec![7; 64 << 10];
        for _ in 0..TOTAL / buffer.len() {
            host.write_all(&buffer).unwrap();
        }
        host
    });
    let start = Instant::now();
    let (mut received, mut told) = (0, 0);
    while received < TOTAL {
        if !peer.run_once() {
            std::thread::yield_now();
        }
        received += peer.take_data(&mut socket).len();
        // As Linux does: when less than 64 KiB of its 256 KiB are left.
        if received - told > 192 << 10 {
            told = received;
            peer.post(&socket.header(Op::CreditUpdate, 0, 0), &[]);
        }
    }
    drop(writer.join().unwrap());
    report(&format!("host to guest, buffers of {RX_PAYLOAD} bytes"), start, &peer);
}

#[test]
#[ignore = "prints a figure"]
fn round_trips() {
    const ROUNDS: u32 = 100_000;
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    let start = Instant::now();
    let mut buffer = [0; 256];
    for _ in 0..ROUNDS {
        host.write_all(&[1; 100]).unwrap();
        peer.run();
        assert_eq!(peer.take_data(&mut socket).len(), 100);
        socket.peer_fwd_cnt = socket.sent;
        peer.post_data(&mut socket, &[2; 100]);
        peer.run();
        match host.read(&mut buffer) {
            Ok(100) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            other => panic!("{other:?}"),
        }
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(ROUNDS);
    let (all, device) = (each(start.elapsed()), each(peer.in_device));
    println!("100 bytes there and back: {all:.2} us; in the device {device:.2}");
}
