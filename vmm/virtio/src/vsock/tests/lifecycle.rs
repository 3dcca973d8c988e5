//! Opening, ending and losing connections.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::pattern;
use super::peer::{PORT, Peer, RX_PAYLOAD, Socket};
use crate::device::VirtioDevice;
use crate::vsock::packet::{NO_RECEIVE, NO_SEND, Op};
use crate::vsock::{ConnectError, MAX_CONNECTIONS, Refusal, Vsock, VsockError, VsockEvent};

const BOTH: u32 = NO_RECEIVE | NO_SEND;

fn read_all(host: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).expect("the end has come");
    bytes
}

fn would_block(host: &mut impl Read) -> bool {
    host.read(&mut [0; 16]).is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
}

#[test]
fn guest_dials_and_both_sides_talk() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    peer.post_data(&mut socket, b"ping");
    peer.run();
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 4);
    assert_eq!(&got[..4], b"ping");
    host.write_all(b"pong").unwrap();
    peer.run();
    assert_eq!(peer.take_data(&mut socket), b"pong");
    assert_eq!(peer.metric("accepted"), 1);
}

#[test]
fn host_dials_and_both_sides_talk() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.answer(5000, 77);
    assert_eq!(socket.key.host_port, 1 << 20);
    host.write_all(b"hello").unwrap();
    peer.run();
    assert_eq!(peer.take_data(&mut socket), b"hello");
    peer.post_data(&mut socket, b"hi");
    peer.run();
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 2);
    let (next, _) = peer.answer(5000, 78);
    assert_eq!(next.key.host_port, (1 << 20) + 1);
    assert_eq!(peer.metric("connected"), 2);
}

#[test]
fn a_port_that_is_not_open_is_refused() {
    let mut peer = Peer::new();
    let mut socket = Socket::new(7, PORT + 2);
    peer.say(&socket, Op::Request, 0);
    peer.expect(&mut socket, Op::Reset, 0);
    peer.expect_silence();
    assert_eq!((peer.metric("refused"), peer.device.connections()), (1, 0));
}

#[test]
fn a_dial_ends_once() {
    let mut peer = Peer::new();
    // Refused by the guest.
    peer.device.connect(9, 1).unwrap();
    let request = peer.next();
    let mut socket = Socket::new(9, request.key().host_port);
    peer.say(&socket, Op::Reset, 0);
    let refused = peer.next_event();
    assert!(matches!(refused, VsockEvent::Refused { request: 1, reason: Refusal::ByGuest }), "{refused:?}");
    assert!(!peer.device.cancel(1));

    // Given up before the guest answers: it is told, and a late answer finds nothing.
    peer.device.connect(9, 2).unwrap();
    socket = Socket::new(9, peer.next().key().host_port);
    assert!(peer.device.cancel(2));
    assert!(!peer.device.cancel(2));
    peer.expect(&mut socket, Op::Reset, 0);
    peer.say(&socket, Op::Response, 0);
    peer.expect(&mut socket, Op::Reset, 0);
    peer.expect_silence();

    // Given up too late.
    let (_socket, mut host) = peer.answer(9, 3);
    assert!(!peer.device.cancel(3));
    assert!(would_block(&mut host));

    // Answered with nonsense.
    peer.device.connect(9, 4).unwrap();
    let mut socket = Socket::new(9, peer.next().key().host_port);
    peer.say(&socket, Op::CreditUpdate, 0);
    peer.expect(&mut socket, Op::Reset, 0);
    let refused = peer.next_event();
    assert!(matches!(refused, VsockEvent::Refused { request: 4, reason: Refusal::Protocol }), "{refused:?}");

    // Cut off by a reset of the device.
    peer.device.connect(9, 5).unwrap();
    peer.device.reset();
    let refused = peer.next_event();
    assert!(
        matches!(refused, VsockEvent::Refused { request: 5, reason: Refusal::DeviceReset }),
        "{refused:?}"
    );
    assert!(matches!(peer.device.connect(9, 6), Err(ConnectError::NotActive)));
}

#[test]
fn a_dial_given_up_before_the_guest_heard_of_it_leaves_no_trace() {
    let mut peer = Peer::with_buffers(0, true);
    peer.device.connect(9, 1).unwrap();
    assert!(peer.device.cancel(1));
    peer.give_buffers(10);
    peer.expect_silence();
    assert_eq!(peer.device.connections(), 0);
}

#[test]
fn guest_ends_its_direction_and_still_hears() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    peer.post_data(&mut socket, b"question");
    peer.say(&socket, Op::Shutdown, NO_SEND);
    assert_eq!(read_all(&mut host), b"question");
    host.write_all(b"answer").unwrap();
    peer.run();
    assert_eq!(peer.take_data(&mut socket), b"answer");
    // The host is done too: there is nothing left to wait for.
    drop(host);
    peer.expect(&mut socket, Op::Shutdown, BOTH);
    peer.say(&socket, Op::Reset, 0);
    peer.expect_silence();
    assert_eq!((peer.device.connections(), peer.metric("reset_by_guest")), (0, 0));
}

#[test]
fn guest_hears_no_more_and_still_speaks() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    peer.say(&socket, Op::Shutdown, NO_RECEIVE);
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    // That we will not send is as good as said.
    peer.expect(&mut socket, Op::Shutdown, NO_SEND);
    peer.post_data(&mut socket, b"still here");
    peer.say(&socket, Op::Shutdown, NO_SEND);
    assert_eq!(read_all(&mut host), b"still here");
    peer.expect(&mut socket, Op::Reset, 0);
    assert_eq!(peer.device.connections(), 0);
}

#[test]
fn host_ends_its_direction_and_still_hears() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let question = peer.next();
    assert_eq!((question.op(), &question.payload[..]), (Op::Data, &b"question"[..]));
    peer.expect(&mut socket, Op::Shutdown, NO_SEND);
    peer.post_data(&mut socket, b"answer");
    peer.run();
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 6);
    peer.expect_silence();
    // The guest ends its direction too: then all is over, though the host has not closed its end.
    peer.say(&socket, Op::Shutdown, NO_SEND);
    assert_eq!(read_all(&mut host), b"");
    peer.expect(&mut socket, Op::Shutdown, BOTH);
    peer.say(&socket, Op::Reset, 0);
    assert_eq!(peer.device.connections(), 0);
}

#[test]
fn host_hears_no_more_and_still_speaks() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    host.shutdown(Shutdown::Read).unwrap();
    peer.expect_silence();
    peer.post_data(&mut socket, b"nobody listens");
    peer.expect(&mut socket, Op::Shutdown, NO_RECEIVE);
    assert_eq!(peer.metric("bytes_discarded"), 14);
    // What is thrown away counts as read: the guest may go on throwing it.
    peer.say(&socket, Op::CreditRequest, 0);
    peer.expect(&mut socket, Op::CreditUpdate, 0);
    assert_eq!(socket.credit(), socket.peer_buf_alloc as usize);
    host.write_all(b"listen!").unwrap();
    peer.run();
    assert_eq!(peer.take_data(&mut socket), b"listen!");
    drop(host);
    peer.expect(&mut socket, Op::Shutdown, BOTH);
}

#[test]
fn host_closes_and_the_guest_gets_all_that_was_written_before() {
    let mut peer = Peer::with_buffers(2, true);
    peer.refill = false;
    let (mut socket, mut host) = peer.dial(7);
    let sent = pattern(1, 0, 3 * RX_PAYLOAD);
    host.write_all(&sent).unwrap();
    drop(host);
    peer.run();
    // One buffer was left: the guest learns first that nobody listens, then gets the data as it gives buffers.
    peer.expect(&mut socket, Op::Shutdown, NO_RECEIVE);
    peer.refill = true;
    peer.give_buffers(2);
    peer.run();
    let mut got = Vec::new();
    for _ in 0..3 {
        got.extend(peer.next().payload);
    }
    assert!(got == sent);
    peer.expect(&mut socket, Op::Shutdown, BOTH);
    // What was under way meanwhile hurts nobody.
    peer.post_data(&mut socket, b"late");
    peer.expect_silence();
    // Both close at the same time.
    peer.say(&socket, Op::Shutdown, BOTH);
    peer.expect(&mut socket, Op::Reset, 0);
    peer.say(&socket, Op::Reset, 0);
    peer.expect_silence();
    assert_eq!(peer.device.connections(), 0);
}

#[test]
fn guest_closes_and_the_host_gets_all_that_was_sent_before() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    // The host writes what will never be read; that must not turn its end of file into an error.
    host.write_all(b"never read").unwrap();
    let sent = fill_window(&mut peer, &mut socket);
    // Some of it waits here, but the guest need not.
    peer.say(&socket, Op::Shutdown, BOTH);
    peer.expect(&mut socket, Op::Reset, 0);
    assert_eq!(peer.device.connections(), 1);

    // The guest may use its port again meanwhile.
    let (mut again, mut host_again) = peer.dial(7);
    peer.post_data(&mut again, b"second");
    peer.run();

    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    let mut got: Vec<u8> = Vec::new();
    while got.len() < sent.len() {
        let mut piece = [0; 50_000];
        match host.read(&mut piece) {
            Ok(count) => got.extend(&piece[..count]),
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        peer.run();
    }
    assert!(got == sent);
    assert_eq!(read_all(&mut host), b"");
    assert_eq!(peer.device.connections(), 1);
    let mut got = [0; 16];
    assert_eq!(host_again.read(&mut got).unwrap(), 6);
}

/// The guest sends as much as it may: more than the host's socket takes at once.
fn fill_window(peer: &mut Peer, socket: &mut Socket) -> Vec<u8> {
    let sent = pattern(2, 0, socket.credit());
    for piece in sent.chunks(60_000) {
        peer.post_data(socket, piece);
    }
    peer.run();
    peer.inbox.clear();
    assert!(peer.metric("bytes_to_host") < sent.len() as u64, "nothing waits");
    sent
}

#[test]
fn guest_ends_its_direction_while_bytes_wait_for_the_host() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    let sent = fill_window(&mut peer, &mut socket);
    peer.say(&socket, Op::Shutdown, NO_SEND);
    let mut got: Vec<u8> = Vec::new();
    while got.len() < sent.len() {
        let mut piece = [0; 50_000];
        let count = host.read(&mut piece).unwrap();
        assert_ne!(count, 0, "the end before the last byte");
        got.extend(&piece[..count]);
        peer.run();
    }
    assert!(got == sent);
    assert_eq!(read_all(&mut host), b"");
}

#[test]
fn host_closes_while_bytes_wait_for_it() {
    let mut peer = Peer::new();
    let (mut socket, host) = peer.dial(7);
    let sent = fill_window(&mut peer, &mut socket);
    drop(host);
    peer.expect(&mut socket, Op::Shutdown, NO_RECEIVE);
    assert_eq!(socket.credit(), socket.peer_buf_alloc as usize, "nothing waits any more");
    assert_eq!(peer.metric("bytes_to_host") + peer.metric("bytes_discarded"), sent.len() as u64);
    peer.expect(&mut socket, Op::Shutdown, BOTH);
}

#[test]
fn guest_that_closed_and_a_host_that_never_reads_leave_nothing_behind() {
    let mut peer = Peer::new();
    let (mut socket, host) = peer.dial(7);
    fill_window(&mut peer, &mut socket);
    peer.say(&socket, Op::Shutdown, BOTH);
    assert_eq!(peer.device.connections(), 1);
    drop(host);
    peer.run();
    assert_eq!(peer.device.connections(), 0);
    assert!(peer.metric("bytes_discarded") > 0);
}

#[test]
fn guest_resets_in_each_state() {
    let mut peer = Peer::new();
    // Open.
    let (mut socket, mut host) = peer.dial(1);
    peer.post_data(&mut socket, b"last words");
    peer.say(&socket, Op::Reset, 0);
    assert_eq!(read_all(&mut host), b"last words");
    // The guest has ended its direction.
    let (socket, mut host) = peer.dial(2);
    peer.say(&socket, Op::Shutdown, NO_SEND);
    peer.say(&socket, Op::Reset, 0);
    assert_eq!(read_all(&mut host), b"");
    assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    // The host has ended its direction.
    let (mut socket, host) = peer.dial(3);
    host.shutdown(Shutdown::Write).unwrap();
    peer.expect(&mut socket, Op::Shutdown, NO_SEND);
    peer.say(&socket, Op::Reset, 0);
    // Accepted, and the guest does not know it yet.
    peer.refill = false;
    let given = peer.guest.queues[0].in_flight();
    for port in 0..given {
        peer.say(&Socket::new(u32::try_from(port).unwrap(), 1), Op::CreditRequest, 0);
    }
    peer.inbox.clear();
    let socket = Socket::new(4, PORT);
    peer.say(&socket, Op::Request, 0);
    let VsockEvent::Accepted { socket: host, .. } = peer.next_event() else { panic!() };
    peer.say(&socket, Op::Reset, 0);
    assert_eq!(read_all(&mut std::fs::File::from(host)), b"");
    peer.refill = true;
    peer.give_buffers(50);
    peer.expect_silence();
    assert_eq!(peer.device.connections(), 0);
    assert_eq!(peer.metric("reset_by_guest"), 4);
}

#[test]
fn a_port_pair_that_waits_for_its_end_can_be_used_again() {
    let mut peer = Peer::new();
    let (mut socket, host) = peer.dial(7);
    drop(host);
    peer.expect(&mut socket, Op::Shutdown, NO_RECEIVE);
    peer.expect(&mut socket, Op::Shutdown, BOTH);
    assert_eq!(peer.device.connections(), 1);
    let (mut socket, mut host) = peer.dial(7);
    peer.post_data(&mut socket, b"new");
    peer.run();
    let mut got = [0; 16];
    assert_eq!(host.read(&mut got).unwrap(), 3);
    assert_eq!(peer.device.connections(), 1);
}

#[test]
fn connections_are_limited_and_those_at_their_end_make_room() {
    let mut peer = Peer::new();
    let mut hosts = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        hosts.push(peer.dial(port).1);
    }
    let mut extra = Socket::new(5000, PORT);
    peer.say(&extra, Op::Request, 0);
    peer.expect(&mut extra, Op::Reset, 0);
    assert!(matches!(peer.device.connect(1, 1), Err(ConnectError::Full(_))));
    assert_eq!(peer.metric("connections"), MAX_CONNECTIONS as u64);

    // The guest does not answer SHUTDOWN: its entry goes when the place is needed.
    hosts.remove(17);
    peer.run();
    peer.inbox.clear();
    peer.say(&extra, Op::Request, 0);
    let mut old = Socket::new(17, PORT);
    peer.expect(&mut old, Op::Reset, 0);
    peer.expect(&mut extra, Op::Response, 0);
}

#[test]
fn windows_shrink_as_connections_become_many() {
    let mut peer = Peer::new();
    let mut total = 0;
    let mut hosts = Vec::new();
    let mut last = u32::MAX;
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        let (socket, host) = peer.dial(port);
        assert!(socket.peer_buf_alloc <= last);
        last = socket.peer_buf_alloc;
        total += u64::from(last);
        hosts.push(host);
        if port == 100 {
            assert_eq!(last, 256 << 10);
        }
    }
    assert_eq!(last, 16 << 10);
    assert!(total <= 48 << 20, "{total}");
    // And all of it comes back.
    hosts.clear();
    peer.run();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        peer.say(&Socket::new(port, PORT), Op::Reset, 0);
    }
    peer.inbox.clear();
    assert_eq!(peer.dial(1).0.peer_buf_alloc, 256 << 10);
}

#[test]
fn reset_of_the_device_closes_all_and_it_can_be_used_again() {
    let mut peer = Peer::new();
    let (_, mut accepted) = peer.dial(7);
    let (_, mut dialled) = peer.answer(8, 1);
    peer.device.reset();
    assert_eq!(read_all(&mut accepted), b"");
    assert_eq!(read_all(&mut dialled), b"");
    assert_eq!(peer.device.connections(), 0);
    let sizes = peer.device.queue_sizes();
    peer.guest.restart(&sizes);
    peer.guest.activate(&mut peer.device).unwrap();
    peer.give_buffers(10);
    peer.dial(7);
}

#[test]
fn connections_outlive_a_pause() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    peer.device.pause();
    host.write_all(b"while paused").unwrap();
    peer.post_data(&mut socket, b"from the guest");
    peer.expect_silence();
    assert!(would_block(&mut host));
    peer.device.resume();
    peer.run();
    assert_eq!(peer.take_data(&mut socket), b"while paused");
    let mut got = [0; 32];
    assert_eq!(host.read(&mut got).unwrap(), 14);
    assert_eq!(peer.transport_resets, 0);
}

#[test]
fn a_restored_device_tells_the_guest_that_its_connections_are_gone() {
    let mut peer = Peer::new();
    let (mut socket, mut host) = peer.dial(7);
    peer.device.pause();
    // Saved while a packet was under way.
    peer.post_data(&mut socket, b"lost");
    let state = serde_json::to_string(&peer.device.save()).unwrap();
    let queues = peer.device.queues();

    let mut new = Vsock::new(9, &[]).unwrap();
    let activation = peer.guest.activation_from::<Vsock>(&queues, new.features());
    new.restore(&serde_json::from_str(&state).unwrap(), Some(activation)).unwrap();
    peer.device = new;
    assert_eq!(read_all(&mut host), b"");
    peer.expect_silence();
    assert_eq!(peer.transport_resets, 0);

    peer.device.resume();
    peer.expect(&mut socket, Op::Reset, 0);
    assert_eq!(peer.transport_resets, 1);
    let mut cid = [0; 8];
    peer.device.read_config(0, &mut cid);
    assert_eq!(cid, [3, 0, 0, 0, 0, 0, 0, 0]);
    // The ports came along.
    let _again = peer.dial(7);
    peer.expect_silence();
    assert_eq!(peer.transport_resets, 1);
}

#[test]
fn configuration_space_is_the_context_id() {
    let device = Vsock::new(0x1234_5678, &[]).unwrap();
    let mut all = [0xff; 12];
    device.read_config(0, &mut all);
    assert_eq!(all, [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut part = [0xff; 2];
    device.read_config(1, &mut part);
    assert_eq!(part, [0x56, 0x34]);
    for beyond in [7, 8, 9, u64::MAX] {
        device.read_config(beyond, &mut part);
        assert_eq!(part, [0, 0]);
    }
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(Vsock::new(cid, &[]), Err(VsockError::Cid(c)) if c == cid));
    }
}
