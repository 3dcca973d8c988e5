//! The device between a fake driver and sockets that keep messages apart, as a tap does.

mod contract;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

use super::*;
use crate::net::HEADER;
use crate::testing::{Buffer, Guest, Heap, MEMORY_END, SEAM, Used};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MTU: u16 = 1500;
const RX: usize = 0;
const TX: usize = 1;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SEGMENTS: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;

/// A network with ends for the device and for the host.
struct Wires {
    device: Vec<UnixDatagram>,
    host: Vec<UnixDatagram>,
}

impl Wires {
    fn new(pairs: usize) -> Self {
        let (device, host): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixDatagram::pair().unwrap()).unzip();
        host.iter().for_each(|end| end.set_nonblocking(true).unwrap());
        Wires { device, host }
    }

    fn net(&self) -> Net {
        let fds = self.device.iter().map(|end| OwnedFd::from(end.try_clone().unwrap())).collect();
        Net::new(Taps::of_sockets(fds).unwrap(), MAC, MTU)
    }

    fn take(&self, wire: usize) -> Option<Vec<u8>> {
        let mut frame = vec![0; 100_000];
        let len = self.host[wire].recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    fn send(&self, wire: usize, frame: &[u8]) {
        assert_eq!(self.host[wire].send(frame).unwrap(), frame.len());
    }
}

/// A header and `len` bytes, each frame of its own.
fn frame(n: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend(n.to_le_bytes().into_iter().cycle().take(len));
    frame
}

/// What the driver sees of a frame that came in `buffers` chains.
fn seen(mut frame: Vec<u8>, buffers: u8) -> Vec<u8> {
    frame[10] = buffers;
    frame
}

/// A guest whose driver agreed to `features`.
fn guest(net: &mut Net, features: u64) -> Guest {
    let guest = Guest::of(net, true);
    let states: Vec<_> = guest.queues.iter().map(|queue| queue.state()).collect();
    net.activate(guest.activation_from::<Net>(&states, features)).unwrap();
    guest
}

fn used_indices(guest: &Guest) -> Vec<u16> {
    guest.queues.iter().map(|queue| queue.used_idx()).collect()
}

fn content(used: &Used) -> &[u8] {
    &used.data[..used.len as usize]
}

#[test]
fn a_long_frame_lies_in_several_buffers_that_come_at_once() {
    let wires = Wires::new(1);
    let mut net = wires.net();
    let mut guest = Guest::with(&mut net);
    let heads: Vec<u16> =
        (0..85).map(|_| guest.send(RX, &[Buffer::In(HEADER), Buffer::In(1488), Buffer::In(36)])).collect();
    let mut all = 0;
    for (n, len, buffers) in [(1, 40_000, 27), (2, 1524, 1), (3, 1525, 2), (4, 0, 1)] {
        wires.send(0, &frame(n, len));
        let mut got = content(&guest.wait(&mut net, RX)).to_vec();
        all += u16::from(buffers);
        assert_eq!(guest.queues[RX].used_idx(), all, "all buffers are there as soon as one is");
        for _ in 1..buffers {
            got.extend(content(&guest.wait(&mut net, RX)));
        }
        assert_eq!(got, seen(frame(n, len), buffers), "frame {n}");
    }
    assert_eq!(guest.queues[RX].in_flight(), heads.len() - 31);
    assert_eq!((net.metrics.rx_frames, net.metrics.rx_bytes), (4, 43_049));
}

#[test]
fn without_merged_buffers_a_frame_fits_into_one_or_is_lost() {
    let wires = Wires::new(1);
    let mut net = wires.net();
    let features = net.features() & !MERGE & !SEGMENTS;
    let mut guest = guest(&mut net, features);
    for _ in 0..3 {
        guest.send(RX, &[Buffer::In(HEADER), Buffer::In(1514)]);
    }
    for (n, len) in [(1, 1514), (2, 1515), (3, 60)] {
        wires.send(0, &frame(n, len));
    }
    for (n, len) in [(1, 1514), (3, 60)] {
        let used = guest.wait(&mut net, RX);
        assert_eq!(content(&used), seen(frame(n, len), 1));
    }
    assert_eq!((net.metrics.rx_frames, net.metrics.rx_too_long), (2, 1));
    assert_eq!(guest.queues[RX].in_flight(), 1, "the buffer of the lost frame serves the next one");
}

#[test]
fn no_frame_is_lost_while_the_driver_is_about_to_offer_more() {
    let wires = Wires::new(1);
    let mut net = wires.net();
    let mut guest = Guest::with(&mut net);
    wires.send(0, &frame(1, 60_000));
    guest.settle(&mut net);
    assert!(!guest.pump(&mut net), "no buffers: the main loop must not spin");
    for _ in 0..40 {
        guest.send(RX, &[Buffer::In(1600)]);
        guest.settle(&mut net);
    }
    assert!(!guest.pump(&mut net), "too few buffers: the main loop must not spin");
    assert_eq!(guest.queues[RX].used_idx(), 0);
    guest.send(RX, &[Buffer::In(1600)]);
    let first = guest.wait(&mut net, RX);
    assert_eq!(first.data[10], 38);
}

#[test]
fn a_small_queue_gets_what_fits() {
    let wires = Wires::new(1);
    let mut net = wires.net();
    let mut guest = Guest::with(&mut net);
    for _ in 0..QUEUE_SIZE {
        guest.send(RX, &[Buffer::In(100)]);
    }
    wires.send(0, &frame(1, 30_000));
    wires.send(0, &frame(2, 150));
    let used = [(); 2].map(|()| guest.wait(&mut net, RX));
    assert_eq!([content(&used[0]), content(&used[1])].concat(), seen(frame(2, 150), 2));
    assert_eq!(net.metrics.rx_too_long, 1);
}

#[test]
fn what_is_no_receive_buffer_breaks_the_queue() {
    for buffers in [vec![Buffer::In(HEADER - 1)], vec![Buffer::Out(vec![0; 64]), Buffer::In(2000)]] {
        let wires = Wires::new(1);
        let mut net = wires.net();
        let mut guest = Guest::with(&mut net);
        guest.send(RX, &buffers);
        wires.send(0, &frame(1, 60));
        guest.settle(&mut net);
        assert!(guest.interrupt.needs_reset());
        assert!(!guest.pump(&mut net), "broken: the main loop must not spin");
        assert_eq!(guest.queues[RX].used_idx(), 0);
        // The other direction goes on.
        guest.ask(&mut net, TX, &[Buffer::Out(frame(2, 60))]);
        assert_eq!(wires.take(0), Some(frame(2, 60)));
    }
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let wires = Wires::new(1);
    let mut net = wires.net();
    let mut guest = Guest::with(&mut net);
    let no_frames = [
        vec![Buffer::Out(vec![0; HEADER - 1])],
        vec![Buffer::Out(frame(1, 13))],
        vec![Buffer::Out(frame(1, 65_563))],
        vec![Buffer::Out(frame(1, 300_000))],
        vec![Buffer::Out(frame(1, 60)), Buffer::In(1)],
        vec![Buffer::In(100)],
    ];
    for (count, buffers) in (1..).zip(&no_frames) {
        assert_eq!(guest.ask(&mut net, TX, buffers).len, 0);
        assert_eq!((net.metrics.tx_malformed, wires.take(0)), (count, None));
    }
    for len in [14, 65_562] {
        // Cut in odd places, one of them within the header.
        let bytes = frame(9, len);
        let buffers: Vec<_> =
            [&bytes[..5], &bytes[5..13], &bytes[13..]].map(|b| Buffer::Out(b.into())).into();
        guest.ask(&mut net, TX, &buffers);
        assert_eq!(wires.take(0), Some(bytes));
    }
    assert!(!guest.interrupt.needs_reset());
    assert_eq!((net.metrics.tx_frames, net.metrics.tx_bytes), (2, 65_576));
}

/// A device over a socket that can tell that its other end, the second value, is gone.
fn over_seqpacket() -> (Net, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    // The least there is, a few frames.
    sockopt::set_socket_send_buffer_size(&ours, 0).unwrap();
    (Net::new(Taps::of_sockets(vec![ours]).unwrap(), MAC, MTU), theirs)
}

#[test]
fn frames_wait_for_a_tap_without_room() {
    let (mut net, theirs) = over_seqpacket();
    let mut guest = Guest::with(&mut net);
    let heads: Vec<_> = (0..100).map(|n| guest.send(TX, &[Buffer::Out(frame(n, 100))])).collect();
    guest.settle(&mut net);
    assert!(!guest.pump(&mut net), "the tap is full: the main loop must not spin");
    assert!(usize::from(guest.queues[TX].used_idx()) < heads.len());
    for n in 0..100 {
        let mut sent = [0; 200];
        let len = guest.wait_until(&mut net, |_| rustix::io::read(&theirs, &mut sent).ok());
        assert_eq!(sent[..len], frame(n, 100));
    }
    heads.into_iter().for_each(|head| assert_eq!(guest.wait_for(&mut net, TX, head).len, 0));
    assert!(net.metrics.tx_waits > 0);
    assert_eq!((net.metrics.tx_frames, net.metrics.host_errors), (100, 0));
}

#[test]
fn a_turn_ends_after_so_many_frames() {
    let (mut net, theirs) = over_seqpacket();
    let mut guest = Guest::with(&mut net);
    for n in 0..70 {
        // Nobody takes frames, but what is no frame is as much work.
        guest.send(TX, &[Buffer::Out(vec![0; 20])]);
        rustix::io::write(&theirs, &frame(n, 20)).unwrap();
    }
    guest.heap = Heap::default();
    for _ in 0..QUEUE_SIZE {
        guest.send(RX, &[Buffer::In(512)]);
    }
    net.on_queue(TX);
    net.on_queue(RX);
    assert_eq!([TX, RX].map(|index| guest.queues[index].used_idx()), [64, 64]);
    guest.settle(&mut net);
    assert_eq!([TX, RX].map(|index| guest.queues[index].used_idx()), [70, 70]);

    // A tap whose other side is gone is always readable.
    drop(theirs);
    guest.settle(&mut net);
    assert!(!guest.pump(&mut net), "ended: the main loop must not spin");
    guest.ask(&mut net, TX, &[Buffer::Out(frame(0, 20))]);
    assert_eq!((net.metrics.host_errors, net.metrics.tx_frames), (1, 0));
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    let wires = Wires::new(3);
    let mut net = wires.net();
    let mut guest = Guest::with(&mut net);
    let command = |guest: &mut Guest, net: &mut Net, bytes: &[u8]| {
        let used = guest.ask(net, 6, &[Buffer::Out(bytes.into()), Buffer::In(1)]);
        content(&used)[0]
    };
    for queue in [0, 2, 4] {
        guest.heap =
            Heap::within(0x10_0000 + 0x4_0000 * queue as u64..0x10_0000 + 0x4_0000 * (queue as u64 + 1));
        for _ in 0..60 {
            guest.send(queue, &[Buffer::In(4096)]);
        }
    }
    let mut n = 0;
    let mut arrivals = |guest: &mut Guest, net: &mut Net| {
        [0, 1, 2].map(|wire| {
            n += 1;
            wires.send(wire, &frame(n, 60));
            let before = used_indices(guest);
            let queue = guest.wait_until(net, |guest| {
                let now = used_indices(guest);
                [0, 2, 4].into_iter().find(|queue| now[*queue] != before[*queue])
            });
            let used = guest.wait(net, queue);
            assert_eq!(content(&used), seen(frame(n, 60), 1));
            queue
        })
    };
    guest.heap = Heap::within(0x30_0000..MEMORY_END);
    assert_eq!(arrivals(&mut guest, &mut net), [0, 0, 0]);
    assert_eq!(command(&mut guest, &mut net, &[4, 0, 2, 0]), 0);
    assert_eq!(arrivals(&mut guest, &mut net), [0, 2, 0]);
    assert_eq!(command(&mut guest, &mut net, &[4, 0, 3, 0]), 0);
    assert_eq!(arrivals(&mut guest, &mut net), [0, 2, 4]);
    for wrong in [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[4, 0, 3], &[4, 1, 3, 0], &[0, 0, 1], &[4], &[255; 70]] {
        assert_eq!(command(&mut guest, &mut net, wrong), 1, "{wrong:?}");
    }
    assert_eq!(arrivals(&mut guest, &mut net), [0, 2, 4]);
    assert_eq!((net.metrics.commands, net.metrics.bad_commands), (2, 7));

    let mut other = wires.net();
    net.pause();
    let states = net.queues();
    other.restore(&net.save(), Some(guest.activation_from::<Net>(&states, net.features()))).unwrap();
    other.resume();
    assert_eq!(arrivals(&mut guest, &mut other), [0, 2, 4]);

    guest.send(6, &[Buffer::Out(vec![4, 0, 1, 0])]);
    guest.settle(&mut other);
    assert!(guest.interrupt.needs_reset(), "a command without room for a status");
}

#[test]
fn without_the_feature_the_control_queue_is_the_third_and_one_pair_is_used() {
    let wires = Wires::new(2);
    let mut net = wires.net();
    let features = net.features() & !(1 << VIRTIO_NET_F_MQ);
    let mut guest = guest(&mut net, features);
    let used = guest.ask(&mut net, 2, &[Buffer::Out(vec![4, 0, 1, 0]), Buffer::In(1)]);
    assert_eq!(content(&used), [1]);
    guest.send(3, &[Buffer::Out(frame(1, 60))]);
    guest.send(4, &[Buffer::Out(vec![4, 0, 1, 0]), Buffer::In(1)]);
    guest.settle(&mut net);
    assert_eq!([3, 4].map(|index| guest.queues[index].used_idx()), [0, 0]);
}

#[test]
fn the_guest_reads_address_link_and_sizes() {
    let net = Wires::new(2).net();
    let mut config = [0xff; 16];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 2, 0, 0xdc, 0x05, 0, 0, 0, 0]);
    let names =
        |net: &Net| (net.queue_sizes(), net.features() & (1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ));
    assert_eq!(names(&net), (vec![256, 256, 256, 256, 64], 0x42_0000));
    assert_eq!(names(&Wires::new(1).net()), (vec![256, 256], 0));
}

#[test]
fn offloads_follow_the_driver() {
    let mut net = Wires::new(1).net();
    let guest = Guest::with(&mut net);
    assert_eq!(net.taps.offloads(), 7);
    net.pause();
    let mut other = Wires::new(1).net();
    let activation = guest.activation_from::<Net>(&net.queues(), net.features() & !SEGMENTS);
    other.restore(&net.save(), Some(activation)).unwrap();
    assert_eq!(other.taps.offloads(), 1);
    net.reset();
    assert_eq!(net.taps.offloads(), 0);
}

#[test]
fn the_state_of_another_device_is_refused() {
    let mut net = Wires::new(2).net();
    let state = net.save();
    let wrong = [
        NetState { mac: [2; 6], ..state.clone() },
        NetState { mtu: 9000, ..state.clone() },
        NetState { pairs: 1, ..state.clone() },
        NetState { pairs_in_use: 0, ..state.clone() },
        NetState { pairs_in_use: 2, ..state.clone() },
    ];
    for state in wrong {
        assert!(net.restore(&state, None).is_err(), "{state:?}");
    }
    net.restore(&state, None).unwrap();
}
