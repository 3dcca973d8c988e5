//! Bytes: all of them, in order, never more of them here than promised.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::pattern;
use super::peer::{PORT, Peer, RX_PAYLOAD, Socket};
use crate::device::VirtioDevice;
use crate::vsock::packet::{NO_SEND, Op};

/// A small generator of chunk sizes: deterministic, from 1 byte to `max`, with many small ones.
struct Chunks(u64);

impl Chunks {
    fn next(&mut self, max: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let random = usize::try_from(self.0 >> 33).unwrap();
        match random % 4 {
            0 => 1 + (random >> 2) % 16.min(max),
            1 => 1 + (random >> 2) % 4096.min(max),
            2 => max,
            _ => 1 + (random >> 2) % max,
        }
    }
}

fn read_some(host: &mut UnixStream, got: &mut Vec<u8>, max: usize) {
    let start = got.len();
    got.resize(start + max, 0);
    let count = match host.read(&mut got[start..]) {
        Ok(count) => count,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::WouldBlock);
            0
        }
    };
    got.truncate(start + count);
}

fn to_host(total: usize, seed: u64) {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    let mut chunks = Chunks(seed);
    let (mut sent, mut received) = (0, 0);
    let mut got = Vec::new();
    while received < total {
        let room = socket.credit().min(total - sent).min(64 << 10);
        if room > 0 {
            let len = chunks.next(room);
            peer.post_data(&mut socket, &pattern(seed, sent, len));
            sent += len;
        }
        peer.run_once();
        peer.take_data(&mut socket);
        got.clear();
        read_some(&mut host, &mut got, chunks.next(128 << 10));
        assert!(got == pattern(seed, received, got.len()), "near byte {received}");
        received += got.len();
    }
    peer.say(&socket, Op::Shutdown, NO_SEND);
    assert_eq!(host.read(&mut [0; 1]).unwrap(), 0, "nothing but the end follows");
    assert_eq!(peer.metric("bytes_to_host"), total as u64);
}

fn to_guest(total: usize, seed: u64) {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    let mut chunks = Chunks(seed);
    let (mut sent, mut received) = (0, 0);
    while received < total {
        let len = chunks.next(200 << 10).min(total - sent);
        match host.write(&pattern(seed, sent, len)) {
            Ok(count) => sent += count,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        peer.run();
        let got = peer.take_data(&mut socket);
        assert!(got == pattern(seed, received, got.len()), "near byte {received}");
        received += got.len();
        // The guest's program has read it; the device learns of it now and then.
        if chunks.next(3) == 1 {
            peer.say(&socket, Op::CreditUpdate, 0);
        }
    }
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let last = peer.next();
    assert_eq!((last.op(), last.flags()), (Op::Shutdown, NO_SEND));
    assert_eq!(peer.metric("bytes_to_guest"), total as u64);
}

#[test]
fn guest_to_host_byte_for_byte() {
    for (total, seed) in [(1, 1), (2, 2), (4095, 3), (65_537, 4), (1 << 20, 5)] {
        to_host(total, seed);
    }
}

#[test]
fn host_to_guest_byte_for_byte() {
    for (total, seed) in [(1, 1), (2, 2), (RX_PAYLOAD, 3), (RX_PAYLOAD + 1, 4), (1 << 20, 5)] {
        to_guest(total, seed);
    }
}

#[test]
fn sixty_four_mib_to_the_host() {
    to_host(64 << 20, 6);
}

#[test]
fn sixty_four_mib_to_the_guest() {
    to_guest(64 << 20, 7);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_no_more_than_the_window_waits_here() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    let mut sent = 0;
    // A guest that sends all it may.
    loop {
        peer.run();
        peer.take_data(&mut socket);
        let len = socket.credit().min(50_000);
        if len == 0 {
            break;
        }
        peer.post_data(&mut socket, &pattern(1, sent, len));
        sent += len;
    }
    let passed_on = usize::try_from(peer.metric("bytes_to_host")).unwrap();
    assert!(sent - passed_on <= socket.peer_buf_alloc as usize);
    assert!(sent > passed_on, "the host's socket has taken all: nothing was tested");
    assert_eq!(peer.metric("host_stalls"), 1);
    peer.expect_silence();

    // The host reads a little: the guest need not be told yet, and is not.
    let mut got = Vec::new();
    read_some(&mut host, &mut got, 1000);
    peer.expect_silence();
    // It goes on: the guest may go on too.
    while got.len() < sent {
        read_some(&mut host, &mut got, 30_000);
        peer.run();
    }
    assert!(got == pattern(1, 0, sent));
    peer.take_data(&mut socket);
    assert!(socket.credit() > socket.peer_buf_alloc as usize / 2);
    peer.post_data(&mut socket, b"on");
    peer.run();
    got.clear();
    read_some(&mut host, &mut got, 10);
    assert_eq!(got, b"on");
}

#[test]
fn a_guest_that_does_not_read_stops_the_host_without_a_busy_loop() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    socket.buf_alloc = 10_000;
    peer.say(&socket, Op::CreditUpdate, 0);
    let mut sent = 0;
    loop {
        match host.write(&pattern(3, sent, 40_000)) {
            Ok(count) => sent += count,
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
        peer.run();
    }
    // `run` returned, so nothing spins. The guest got what it has room for, and was asked for more, once.
    let got: Vec<_> = peer.inbox.drain(..).collect();
    let bytes: usize = got.iter().map(|g| g.payload.len()).sum();
    assert_eq!(bytes, 10_000);
    let asked = got.iter().filter(|g| g.op() == Op::CreditRequest).count();
    assert_eq!((asked, got.last().unwrap().op()), (1, Op::CreditRequest));
    assert_eq!(peer.metric("credit_stalls"), 1);

    let mut all: Vec<u8> = got.into_iter().flat_map(|g| g.payload).collect();
    socket.fwd_cnt = 10_000;
    peer.say(&socket, Op::CreditUpdate, 0);
    while all.len() < sent {
        peer.run();
        let more = peer.take_data(&mut socket);
        all.extend(more);
        peer.say(&socket, Op::CreditUpdate, 0);
    }
    assert!(all == pattern(3, 0, sent));
    assert!(peer.metric("credit_stalls") > 5, "each time that it stalled, the guest was asked");
}

#[test]
fn a_guest_that_gives_no_buffers_stops_the_host_without_a_busy_loop() {
    let mut peer = Peer::with_buffers(1, true);
    peer.refill = false;
    let (mut socket, mut host) = peer.dial(7);
    host.write_all(&pattern(4, 0, 3 * RX_PAYLOAD)).unwrap();
    peer.expect_silence();
    assert!(peer.metric("buffer_stalls") > 0);
    let mut got = Vec::new();
    for round in 1..=3 {
        peer.give_buffers(1);
        peer.run();
        got.extend(peer.take_data(&mut socket));
        assert_eq!(got.len(), round * RX_PAYLOAD);
    }
    assert!(got == pattern(4, 0, 3 * RX_PAYLOAD));
}

#[test]
fn a_flood_fills_many_buffers_with_one_read_and_a_message_takes_one() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    host.write_all(&pattern(5, 0, 150_000)).unwrap();
    peer.run();
    let got: Vec<usize> = peer.inbox.iter().map(|g| g.payload.len()).collect();
    assert!(got.len() <= 150_000 / RX_PAYLOAD + 3, "buffers are filled: {got:?}");
    assert!(peer.take_data(&mut socket) == pattern(5, 0, 150_000));
    for _ in 0..10 {
        host.write_all(b"message").unwrap();
        peer.run();
        assert_eq!(peer.inbox.len(), 1);
        assert_eq!(peer.take_data(&mut socket), b"message");
    }
}

#[test]
fn every_connection_gets_its_turn() {
    let mut peer = Peer::new();
    let mut ends: Vec<(Socket, UnixStream)> = (0..8).map(|port| peer.dial(port)).collect();
    for (_, host) in &mut ends {
        host.write_all(&[1; 100_000]).unwrap();
    }
    // As much as one connection has to send.
    peer.refill = false;
    peer.run();
    let mut served: Vec<u32> = peer.inbox.iter().map(|g| g.key().guest_port).collect();
    served.sort_unstable();
    served.dedup();
    assert_eq!(served.len(), 8, "somebody waits while another one goes on");
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut peer = Peer::new();
    let (mut socket, _host) = peer.dial(7);
    peer.post_data(&mut socket, b"12345");
    peer.expect_silence();
    peer.say(&socket, Op::CreditRequest, 0);
    peer.expect(&mut socket, Op::CreditUpdate, 0);
    assert_eq!(socket.peer_fwd_cnt, 5);
}

#[test]
fn counters_pass_two_to_the_32() {
    // Four GiB would take long: a window and a credit that start near the end of their range are in `credit`; here,
    // that a guest whose count starts there is understood.
    let mut peer = Peer::new();
    let mut socket = Socket::new(7, PORT);
    socket.fwd_cnt = 0;
    peer.say(&socket, Op::Request, 0);
    peer.expect(&mut socket, Op::Response, 0);
    socket.fwd_cnt = u32::MAX;
    peer.say(&socket, Op::CreditUpdate, 0);
    // It claims one byte less than nothing was read: it gets nothing, and we go on.
    let crate::vsock::VsockEvent::Accepted { socket: host, .. } = peer.next_event() else { panic!() };
    let mut host = UnixStream::from(host);
    host.write_all(b"x").unwrap();
    peer.run();
    socket.fwd_cnt = 0;
    peer.say(&socket, Op::CreditUpdate, 0);
    let got: Vec<u8> = peer.inbox.drain(..).flat_map(|g| g.payload).collect();
    assert_eq!(got, b"x");
}

#[test]
fn works_without_event_index() {
    let mut peer = Peer::with_buffers(100, false);
    let (mut socket, mut host) = peer.dial(7);
    host.write_all(&pattern(6, 0, 150_000)).unwrap();
    peer.run();
    assert!(peer.take_data(&mut socket) == pattern(6, 0, 150_000));
    peer.post_data(&mut socket, b"back");
    peer.run();
    let mut got = Vec::new();
    read_some(&mut host, &mut got, 10);
    assert_eq!(got, b"back");
    assert!(!peer.guest.interrupt.needs_reset());
    assert_eq!(peer.device.queues().len(), 3);
}
