//! Many connections, random steps on both sides, against a model that knows only what two pipes are.
//!
//! Each byte tells the connection and the position that it belongs to, so that the model needs to keep no more than
//! counts: what each side has written, what the other one has read, who has ended what.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::pattern;
use super::peer::{Got, PORT, Peer, Socket};
use crate::device::VirtioDevice;
use crate::vsock::VsockEvent;
use crate::vsock::packet::{Key, NO_RECEIVE, NO_SEND, Op};

/// What one step does. Numbers choose among the connections there are, and sizes.
#[derive(Debug, Clone, Copy)]
enum Step {
    GuestDials,
    HostDials,
    GuestWrites(usize, usize),
    HostWrites(usize, usize),
    /// The guest's program reads what came, and the guest says so.
    GuestReads(usize),
    HostReads(usize, usize),
    GuestEnds(usize),
    HostEnds(usize),
    GuestCloses(usize),
    HostCloses(usize),
    GuestResets(usize),
    GiveBuffers(usize),
    Turn,
    Pause,
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..64_usize;
    let size = prop_oneof![1..64_usize, 1..70_000_usize];
    prop_oneof![
        2 => Just(Step::GuestDials),
        2 => Just(Step::HostDials),
        10 => (which.clone(), size.clone()).prop_map(|(w, s)| Step::GuestWrites(w, s)),
        10 => (which.clone(), size.clone()).prop_map(|(w, s)| Step::HostWrites(w, s)),
        8 => which.clone().prop_map(Step::GuestReads),
        8 => (which.clone(), size).prop_map(|(w, s)| Step::HostReads(w, s)),
        1 => which.clone().prop_map(Step::GuestEnds),
        1 => which.clone().prop_map(Step::HostEnds),
        1 => which.clone().prop_map(Step::GuestCloses),
        1 => which.clone().prop_map(Step::HostCloses),
        1 => which.prop_map(Step::GuestResets),
        10 => (1..30_usize).prop_map(Step::GiveBuffers),
        20 => Just(Step::Turn),
        1 => Just(Step::Pause),
        2 => Just(Step::Resume),
    ]
}

/// One connection, as a program on each side sees it.
struct Link {
    socket: Socket,
    host: Option<UnixStream>,
    seed: u64,
    /// The guest knows that it is connected.
    open: bool,
    /// Bytes the guest wrote, and the host read.
    up: (usize, usize),
    /// Bytes the host wrote, and the guest got.
    down: (usize, usize),
    /// Bytes that the guest got and its program has not read.
    unread: u32,
    guest_ended: bool,
    guest_closed: bool,
    host_ended: bool,
    /// What the device said in SHUTDOWN.
    told: u32,
    /// The host has read the end of file.
    host_saw_end: bool,
}

impl Link {
    fn new(socket: Socket, host: UnixStream) -> Self {
        let seed = u64::from(socket.key.guest_port) << 21 ^ u64::from(socket.key.host_port);
        Link {
            socket,
            host: Some(host),
            seed,
            // A dial of the host is open once there is a link at all.
            open: socket.key.host_port != PORT,
            up: (0, 0),
            down: (0, 0),
            unread: 0,
            guest_ended: false,
            guest_closed: false,
            host_ended: false,
            told: 0,
            host_saw_end: false,
        }
    }

    fn host_reads(&mut self, max: usize) -> usize {
        let Some(host) = &mut self.host else { return 0 };
        let mut bytes = vec![0; max];
        match host.read(&mut bytes) {
            Ok(0) => {
                assert!(self.guest_ended || self.guest_closed, "end of file though the guest goes on");
                assert_eq!(self.up.0, self.up.1, "end of file before the last byte");
                self.host_saw_end = true;
                0
            }
            Ok(count) => {
                assert!(bytes[..count] == pattern(self.seed, self.up.1, count), "bytes from the guest");
                self.up.1 += count;
                assert!(self.up.1 <= self.up.0);
                count
            }
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                0
            }
        }
    }
}

struct World {
    peer: Peer,
    links: BTreeMap<Key, Link>,
    /// Closed by the guest: the host may still read.
    orphans: Vec<Link>,
    /// Dials under way: REQUEST seen and answered, the event not yet.
    answered: BTreeMap<u64, Socket>,
    dials: u64,
    next_port: u32,
}

impl World {
    fn new() -> Self {
        let mut peer = Peer::with_buffers(20, true);
        peer.refill = false;
        World {
            peer,
            links: BTreeMap::new(),
            orphans: Vec::new(),
            answered: BTreeMap::new(),
            dials: 0,
            next_port: 100,
        }
    }

    fn pick(&mut self, which: usize) -> Option<&mut Link> {
        let count = self.links.values().filter(|l| l.open).count();
        (count > 0).then(|| self.links.values_mut().filter(|l| l.open).nth(which % count).unwrap())
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::GuestDials => {
                self.next_port += 1;
                let socket = Socket::new(self.next_port, PORT);
                self.peer.post(&socket.header(Op::Request, 0, 0), &[]);
            }
            Step::HostDials => {
                self.dials += 1;
                self.next_port += 1;
                self.peer.device.connect(self.next_port, self.dials).unwrap();
            }
            Step::GuestWrites(which, size) => self.guest_writes(which, size),
            Step::HostWrites(which, size) => {
                let Some(link) = self.pick(which).filter(|l| !l.host_ended) else { return };
                let Some(host) = &mut link.host else { return };
                match host.write(&pattern(link.seed, link.down.0, size)) {
                    Ok(count) => link.down.0 += count,
                    Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
                }
            }
            Step::GuestReads(which) => {
                let Some(link) = self.pick(which) else { return };
                link.socket.fwd_cnt = link.socket.fwd_cnt.wrapping_add(std::mem::take(&mut link.unread));
                let update = link.socket.header(Op::CreditUpdate, 0, 0);
                self.peer.post(&update, &[]);
            }
            Step::HostReads(which, size) => {
                if let Some(link) = self.pick(which) {
                    link.host_reads(size);
                }
                let count = self.orphans.len();
                if count > 0 {
                    self.orphans[which % count].host_reads(size);
                }
            }
            Step::GuestEnds(which) => {
                let Some(link) = self.pick(which) else { return };
                link.guest_ended = true;
                let end = link.socket.header(Op::Shutdown, NO_SEND, 0);
                self.peer.post(&end, &[]);
            }
            Step::HostEnds(which) => {
                let Some(link) = self.pick(which) else { return };
                link.host_ended = true;
                if let Some(host) = &link.host {
                    host.shutdown(Shutdown::Write).unwrap();
                }
            }
            Step::HostCloses(which) => {
                if let Some(link) = self.pick(which) {
                    link.host = None;
                    link.host_ended = true;
                }
            }
            Step::GuestCloses(which) => self.guest_goes(which, Op::Shutdown),
            Step::GuestResets(which) => self.guest_goes(which, Op::Reset),
            Step::GiveBuffers(count) => {
                let room = 100 - self.peer.guest.queues[0].in_flight();
                self.peer.give_buffers(count.min(room));
            }
            Step::Turn => self.turn(),
            Step::Pause => self.peer.device.pause(),
            Step::Resume => self.peer.device.resume(),
        }
    }

    fn guest_writes(&mut self, which: usize, size: usize) {
        if self.peer.guest.queues[1].in_flight() > 90 {
            return;
        }
        let Some(link) = self.pick(which) else { return };
        let len = size.min(link.socket.credit());
        if link.guest_ended || link.told & NO_RECEIVE != 0 || len == 0 {
            return;
        }
        let bytes = pattern(link.seed, link.up.0, len);
        link.up.0 += len;
        let mut socket = link.socket;
        self.peer.post_data(&mut socket, &bytes);
        self.links.get_mut(&socket.key).unwrap().socket = socket;
    }

    /// Closes or resets, and forgets the connection, as far as the guest is concerned.
    fn guest_goes(&mut self, which: usize, op: Op) {
        let Some(key) = self.pick(which).map(|l| l.socket.key) else { return };
        let mut link = self.links.remove(&key).unwrap();
        let flags = if op == Op::Shutdown { NO_SEND | NO_RECEIVE } else { 0 };
        self.peer.post(&link.socket.header(op, flags, 0), &[]);
        link.guest_closed = true;
        self.orphans.push(link);
    }

    /// One turn of the main loop, and what the guest's driver does with what it got.
    fn turn(&mut self) {
        self.peer.run_once();
        while let Some(event) = self.peer.events.pop_front() {
            let (socket, host) = match event {
                VsockEvent::Accepted { port, guest_port, socket } => (Socket::new(guest_port, port), socket),
                VsockEvent::Connected { request, socket } => {
                    let (_, known) = self
                        .answered
                        .iter()
                        .find(|(_, s)| u64::from(s.key.host_port - (1 << 20)) + 1 == request)
                        .expect("the guest has answered this dial");
                    (*known, socket)
                }
                VsockEvent::Refused { .. } => panic!("nobody refused"),
            };
            self.links.insert(socket.key, Link::new(socket, UnixStream::from(host)));
        }
        while let Some(got) = self.peer.inbox.pop_front() {
            let key = got.key();
            match got.op() {
                Op::Request => {
                    let mut socket = Socket::new(key.guest_port, key.host_port);
                    socket.peer_buf_alloc = got.header.buf_alloc.get();
                    self.peer.post(&socket.header(Op::Response, 0, 0), &[]);
                    self.answered.insert(u64::from(key.host_port), socket);
                }
                Op::Response => {
                    // The event has come before: the socket pair is made when the guest asks.
                    let link = self.links.get_mut(&key).unwrap();
                    link.socket.peer_buf_alloc = got.header.buf_alloc.get();
                    link.open = true;
                }
                // Only after the guest closed, or where packets crossed: the guest knows it no more.
                Op::Reset => assert!(!self.links.contains_key(&key)),
                _ => self.guest_gets(&got),
            }
        }
    }

    fn guest_gets(&mut self, got: &Got) {
        // A packet for a connection that the guest has closed meanwhile.
        let Some(link) = self.links.get_mut(&got.key()) else { return };
        link.socket.peer_buf_alloc = got.header.buf_alloc.get();
        link.socket.peer_fwd_cnt = got.header.fwd_cnt.get();
        match got.op() {
            Op::Data => {
                let len = got.payload.len();
                assert_eq!(link.told & NO_SEND, 0, "data after the end");
                assert!(got.payload == pattern(link.seed, link.down.1, len), "bytes from the host");
                link.down.1 += len;
                link.unread += u32::try_from(len).unwrap();
                assert!(link.unread <= link.socket.buf_alloc, "more than the guest has room for");
                assert!(link.down.1 <= link.down.0);
            }
            Op::Shutdown => {
                link.told |= got.flags();
                if got.flags() & NO_SEND != 0 {
                    assert!(link.host_ended, "the end though the host goes on");
                    assert_eq!(link.down.0, link.down.1, "the end before the last byte");
                }
                if link.told == NO_SEND | NO_RECEIVE {
                    let socket = link.socket;
                    let mut link = self.links.remove(&socket.key).unwrap();
                    self.peer.post(&socket.header(Op::Reset, 0, 0), &[]);
                    link.guest_closed = true;
                    self.orphans.push(link);
                }
            }
            Op::CreditRequest => {
                let update = link.socket.header(Op::CreditUpdate, 0, 0);
                self.peer.post(&update, &[]);
            }
            Op::CreditUpdate => {}
            Op::Request | Op::Response | Op::Reset => unreachable!("handled by the caller"),
        }
    }

    /// Everybody reads all there is; then nothing may be missing.
    fn settle(mut self) {
        self.step(Step::Resume);
        for round in 0.. {
            assert!(round < 100_000, "it never comes to rest");
            let before = self.moved();
            let room = 100 - self.peer.guest.queues[0].in_flight();
            self.peer.give_buffers(room);
            for which in 0..self.links.len() {
                self.step(Step::GuestReads(which));
            }
            for _ in 0..20 {
                self.turn();
            }
            let mut read = 0;
            for link in self.links.values_mut().chain(&mut self.orphans) {
                read += link.host_reads(1 << 20);
            }
            if read == 0 && before == self.moved() && self.peer.inbox.is_empty() {
                break;
            }
        }
        for link in self.links.values() {
            assert_eq!(link.down.0, link.down.1, "the guest has not got all");
            if link.host.is_some() {
                assert_eq!(link.up.0, link.up.1, "the host has not got all");
                assert_eq!(link.host_saw_end, link.guest_ended);
            }
            assert_eq!(link.told & NO_SEND != 0, link.host_ended);
        }
        for link in self.orphans.iter().filter(|l| l.host.is_some()) {
            assert_eq!(link.up.0, link.up.1, "the host has not got all of a guest that closed");
            assert!(link.host_saw_end);
        }
        assert_eq!(self.peer.device.connections(), self.links.len());
        assert_eq!(self.peer.metric("violations"), 0);
        assert_eq!(self.peer.metric("malformed"), 0);
    }

    fn moved(&self) -> (u64, u64, usize) {
        (self.peer.metric("packets_to_guest"), self.peer.metric("bytes_to_host"), self.links.len())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn two_pipes_each(steps in prop::collection::vec(step(), 1..400)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.settle();
    }
}
