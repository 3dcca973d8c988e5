//! A guest that breaks the rules: it loses its connection, or gets no answer, and nothing else happens.

use std::io::Read;

use zerocopy::IntoBytes;

use super::peer::{CID, PORT, Peer, Socket};
use crate::testing::Buffer;
use crate::vsock::VsockEvent;
use crate::vsock::packet::{HEADER_LEN, Header, NO_SEND, Op};

#[test]
fn a_packet_that_is_for_nobody_is_answered_with_a_reset_if_it_can_be() {
    let mut peer = Peer::new();
    let socket = Socket::new(7, PORT);
    let good = socket.header(Op::Request, 0, 0);

    for (header, from, kind) in [
        (Header { dst_cid: 5.into(), ..good }, 5, 1),
        (Header { dst_cid: u64::MAX.into(), ..good }, u64::MAX, 1),
        (Header { kind: 2.into(), ..good }, 2, 2),
        (Header { kind: 0.into(), ..good }, 2, 0),
        (Header { op: 0.into(), ..good }, 2, 1),
        (Header { op: 8.into(), ..good }, 2, 1),
    ] {
        peer.post(&header, &[]);
        let got = peer.next();
        assert_eq!((got.op(), got.key()), (Op::Reset, socket.key));
        assert_eq!((got.header.src_cid.get(), got.header.kind.get()), (from, kind));
    }
    for header in [
        Header { src_cid: 4.into(), ..good },
        Header { src_cid: (u64::from(CID) | 1 << 32).into(), ..good },
        Header { dst_cid: 5.into(), op: (Op::Reset as u16).into(), ..good },
    ] {
        peer.post(&header, &[]);
        peer.expect_silence();
    }
    assert_eq!(peer.metric("malformed"), 9);
    assert_eq!(peer.device.connections(), 0);
}

#[test]
fn a_packet_without_a_connection_is_answered_with_a_reset() {
    let mut peer = Peer::new();
    let mut socket = Socket::new(7, PORT);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        peer.say(&socket, op, 0);
        peer.expect(&mut socket, Op::Reset, 0);
    }
    peer.say(&socket, Op::Reset, 0);
    peer.expect_silence();
    assert_eq!(peer.metric("strays"), 5);
}

#[test]
fn a_short_header_is_dropped() {
    let mut peer = Peer::new();
    for len in [1, HEADER_LEN - 1] {
        peer.post_raw(&[Buffer::Out(vec![0; len])]);
    }
    peer.post_raw(&[Buffer::In(100)]);
    peer.expect_silence();
    assert_eq!(peer.metric("malformed"), 3);
    peer.dial(7);
}

#[test]
fn a_header_in_pieces_is_as_good_as_one_in_one() {
    let mut peer = Peer::new();
    let (socket, mut host) = peer.dial(7);
    let mut bytes = socket.header(Op::Data, 0, 5).as_bytes().to_vec();
    bytes.extend(b"hello");
    let pieces: Vec<Buffer> = bytes.chunks(9).map(|piece| Buffer::Out(piece.to_vec())).collect();
    peer.post_raw(&pieces);
    peer.run();
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 5);
    assert_eq!(&got[..5], b"hello");
}

/// What breaks a connection, and how often it counts.
#[test]
fn a_violation_ends_the_connection() {
    type Break = fn(&mut Peer, &mut Socket);
    let cases: &[(&str, Break)] = &[
        ("second request", |peer, s| peer.post(&s.header(Op::Request, 0, 0), &[])),
        ("unasked response", |peer, s| peer.post(&s.header(Op::Response, 0, 0), &[])),
        ("payload longer than the chain", |peer, s| peer.post(&s.header(Op::Data, 0, 10), &[0; 9])),
        ("payload of 4 GiB", |peer, s| {
            peer.post(&Header { len: u32::MAX.into(), ..s.header(Op::Data, 0, 0) }, &[0; 9]);
        }),
        ("data after the end", |peer, s| {
            peer.post(&s.header(Op::Shutdown, NO_SEND, 0), &[]);
            peer.post(&s.header(Op::Data, 0, 1), &[0]);
        }),
        ("more than its credit", |peer, s| {
            for _ in 0..20 {
                peer.post(&s.header(Op::Data, 0, 60_000), &[0; 60_000]);
            }
        }),
    ];
    for (at, (name, break_it)) in cases.iter().enumerate() {
        let mut peer = Peer::new();
        let (mut socket, host) = peer.dial(7);
        break_it(&mut peer, &mut socket);
        peer.run();
        let resets = peer.inbox.iter().filter(|g| g.op() == Op::Reset && g.key() == socket.key).count();
        assert!(resets >= 1, "{name}");
        assert_eq!(peer.metric("violations"), 1, "{name}");
        assert_eq!(peer.device.connections(), 0, "{name}");
        drop(host);
        peer.inbox.clear();
        peer.dial(u32::try_from(at).unwrap());
    }
}

#[test]
fn data_before_the_response_is_a_violation() {
    let mut peer = Peer::with_buffers(0, true);
    let mut socket = Socket::new(7, PORT);
    peer.post(&socket.header(Op::Request, 0, 0), &[]);
    peer.post(&socket.header(Op::Data, 0, 3), b"abc");
    peer.run();
    peer.give_buffers(3);
    peer.expect(&mut socket, Op::Reset, 0);
    assert_eq!(peer.metric("violations"), 1);
    let VsockEvent::Accepted { socket: host, .. } = peer.next_event() else { panic!() };
    assert_eq!(std::fs::File::from(host).read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn unknown_flags_and_payload_where_there_should_be_none_are_ignored() {
    let mut peer = Peer::new();
    let (socket, _host) = peer.dial(7);
    peer.post(&socket.header(Op::Shutdown, 0xffff_fffc, 0), &[]);
    peer.post(&socket.header(Op::CreditUpdate, 0, 5), b"12345");
    peer.expect_silence();
    assert_eq!(peer.device.connections(), 1);
}

#[test]
fn a_storm_without_receive_buffers_stops_at_a_limit_and_is_answered_later() {
    let mut peer = Peer::with_buffers(0, true);
    // Each packet needs a reset; none can be sent.
    let mut posted = 0_u32;
    while peer.guest.queues[1].in_flight() < 100 && posted < 10_000 {
        let stray = Socket::new(posted, PORT).header(Op::Data, 0, 0);
        peer.post_raw(&[Buffer::Out(stray.as_bytes().to_vec())]);
        peer.run();
        posted += 1;
    }
    assert!((256..1000).contains(&posted), "{posted}");
    assert_eq!(u64::from(posted) - 100, peer.metric("packets_from_guest"));

    peer.give_buffers(100);
    peer.run();
    for port in 0..posted {
        let got = peer.inbox.pop_front().expect("all are answered");
        assert_eq!((got.op(), got.key().guest_port), (Op::Reset, port));
    }
    peer.expect_silence();
    peer.dial(7);
}

#[test]
fn dialling_and_resetting_for_ever_without_receive_buffers_costs_nothing() {
    let mut peer = Peer::with_buffers(0, true);
    let socket = Socket::new(7, PORT);
    for _ in 0..3000 {
        peer.post(&socket.header(Op::Request, 0, 0), &[]);
        peer.post(&socket.header(Op::Reset, 0, 0), &[]);
        peer.run();
        peer.events.clear();
    }
    assert_eq!(peer.device.connections(), 0);
    assert_eq!(peer.metric("reset_by_guest"), 3000);
    peer.give_buffers(10);
    peer.expect_silence();
}

#[test]
fn dials_are_held_back_until_their_events_are_collected() {
    let mut peer = Peer::new();
    for port in 0..100 {
        let request = Socket::new(port, PORT).header(Op::Request, 0, 0);
        peer.post_raw(&[Buffer::Out(request.as_bytes().to_vec())]);
    }
    // Nothing spins while they wait, and nothing is lost.
    while peer.guest.pump(&mut peer.device) {}
    assert_eq!(peer.device.take_events().len(), 64);
    while peer.guest.pump(&mut peer.device) {}
    assert_eq!(peer.device.take_events().len(), 36);
}

#[test]
fn receive_buffers_without_room_are_given_back_empty() {
    let mut peer = Peer::with_buffers(0, true);
    peer.refill = false;
    peer.give_buffer(HEADER_LEN - 1);
    peer.give_buffer(HEADER_LEN);
    let socket = Socket::new(7, PORT);
    peer.post_raw(&[Buffer::Out(socket.header(Op::Request, 0, 0).as_bytes().to_vec())]);
    while peer.guest.pump(&mut peer.device) {}
    let first = peer.guest.queues[0].take_used().unwrap();
    assert_eq!((first.len, &first.data[..]), (0, &[0xa5; HEADER_LEN - 1][..]));
    // A bare header is room for control packets.
    assert_eq!(peer.guest.queues[0].take_used().unwrap().len, 44);

    let VsockEvent::Accepted { socket: host, .. } = peer.next_event() else { panic!() };
    let mut host = std::os::unix::net::UnixStream::from(host);
    std::io::Write::write_all(&mut host, &[1; 9000]).unwrap();
    // Not for data; and one between good ones does not mix them up.
    peer.give_buffer(HEADER_LEN);
    peer.give_buffers(1);
    peer.give_buffer(HEADER_LEN - 1);
    peer.give_buffers(2);
    while peer.guest.pump(&mut peer.device) {}
    let mut lens = Vec::new();
    while let Some(used) = peer.guest.queues[0].take_used() {
        lens.push(used.len);
    }
    assert_eq!(lens, [0, 3776, 0, 3776, 44 + 9000 - 2 * 3732]);
    assert_eq!(peer.metric("malformed"), 3);
}
