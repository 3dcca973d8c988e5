//! A guest with a socket driver, kept as simple as a driver can be: it does what the test says, keeps what it gets,
//! and keeps to its credit.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use crate::device::VirtioDevice;
use crate::testing::{Buffer, Guest, Heap};
use crate::vsock::packet::{HEADER_LEN, HOST_CID, Header, Key, Op, STREAM};
use crate::vsock::{Vsock, VsockEvent};

pub const CID: u32 = 3;
/// A port that the guest may dial.
pub const PORT: u32 = 1024;
/// As Linux has them: one buffer of a page less bookkeeping.
pub const RX_BUFFER: usize = 3776;
/// Room for payload in it.
pub const RX_PAYLOAD: usize = RX_BUFFER - HEADER_LEN;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// What the guest knows of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Socket {
    pub key: Key,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub sent: u32,
    pub peer_buf_alloc: u32,
    pub peer_fwd_cnt: u32,
}

impl Socket {
    pub fn new(guest_port: u32, host_port: u32) -> Self {
        Socket {
            key: Key { host_port, guest_port },
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// Bytes that the guest may send.
    pub fn credit(&self) -> usize {
        (self.peer_buf_alloc - self.sent.wrapping_sub(self.peer_fwd_cnt)) as usize
    }

    fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc.get();
        self.peer_fwd_cnt = header.fwd_cnt.get();
    }

    pub fn header(&self, op: Op, flags: u32, len: usize) -> Header {
        Header {
            src_cid: u64::from(CID).into(),
            dst_cid: HOST_CID.into(),
            src_port: self.key.guest_port.into(),
            dst_port: self.key.host_port.into(),
            len: u32::try_from(len).unwrap().into(),
            kind: STREAM.into(),
            op: (op as u16).into(),
            flags: flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        }
    }
}

/// A packet as the guest got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Got {
    pub header: Header,
    pub payload: Vec<u8>,
}

impl Got {
    pub fn op(&self) -> Op {
        Op::try_from(self.header.op.get()).unwrap()
    }

    pub fn flags(&self) -> u32 {
        self.header.flags.get()
    }

    pub fn key(&self) -> Key {
        Key { host_port: self.header.src_port.get(), guest_port: self.header.dst_port.get() }
    }
}

/// The guest and its device.
pub struct Peer {
    pub guest: Guest,
    pub device: Vsock,
    pub inbox: VecDeque<Got>,
    pub events: VecDeque<VsockEvent>,
    pub transport_resets: usize,
    /// Give a used receive buffer back at once.
    pub refill: bool,
    /// Time spent in the device, the main loop's system calls included.
    pub in_device: Duration,
    rx_heap: Heap,
    tx_heap: Heap,
    interrupts: u64,
}

impl Peer {
    pub fn new() -> Self {
        Self::with_buffers(100, true)
    }

    pub fn with_buffers(count: usize, event_idx: bool) -> Self {
        let mut device = Vsock::new(CID, &[PORT, PORT + 1]).unwrap();
        let guest = Guest::of(&device, event_idx);
        guest.activate(&mut device).unwrap();
        let mut peer = Peer {
            guest,
            device,
            inbox: VecDeque::new(),
            events: VecDeque::new(),
            transport_resets: 0,
            refill: true,
            in_device: Duration::ZERO,
            rx_heap: Heap::within(0x10_0000..0x20_0000),
            tx_heap: Heap::within(0x20_0000..0x40_0000),
            interrupts: 0,
        };
        peer.give_buffers(count);
        for _ in 0..4 {
            peer.guest.queues[EVENT].add(&mut Heap::within(0x3f_f000..0x40_0000), &[Buffer::In(4)]);
        }
        peer.guest.notify(EVENT);
        peer
    }

    pub fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            self.give_buffer(RX_BUFFER);
        }
    }

    pub fn give_buffer(&mut self, len: usize) {
        self.guest.queues[RX].add(&mut self.rx_heap, &[Buffer::In(len)]);
        self.guest.notify(RX);
    }

    /// Adds a packet as it is; `run` has the device take it.
    pub fn post(&mut self, header: &Header, payload: &[u8]) {
        while self.guest.queues[TX].in_flight() > 100 {
            self.run_once();
        }
        let mut buffers = vec![Buffer::Out(header.as_bytes().to_vec())];
        if !payload.is_empty() {
            buffers.push(Buffer::Out(payload.to_vec()));
        }
        self.post_raw(&buffers);
    }

    /// Adds any chain.
    pub fn post_raw(&mut self, buffers: &[Buffer]) {
        self.guest.queues[TX].add_indirect(&mut self.tx_heap, buffers);
        self.guest.notify(TX);
    }

    /// Sends a packet without payload, and runs until all is quiet.
    pub fn say(&mut self, socket: &Socket, op: Op, flags: u32) {
        self.post(&socket.header(op, flags, 0), &[]);
        self.run();
    }

    /// Posts a piece of data, which must be within the credit. Does not run.
    pub fn post_data(&mut self, socket: &mut Socket, payload: &[u8]) {
        assert!(payload.len() <= socket.credit());
        self.post(&socket.header(Op::Data, 0, payload.len()), payload);
        socket.sent = socket.sent.wrapping_add(u32::try_from(payload.len()).unwrap());
    }

    /// One turn of the main loop, and of the guest's interrupt handler. Tells whether anything happened.
    pub fn run_once(&mut self) -> bool {
        let start = Instant::now();
        let busy = self.guest.pump(&mut self.device);
        self.in_device += start.elapsed();
        self.events.extend(self.device.take_events());
        if self.guest.interrupts() == self.interrupts {
            return busy;
        }
        self.interrupts = self.guest.interrupts();
        let mut taken = 0;
        while let Some(used) = self.guest.queues[RX].take_used() {
            let (header, payload) = used.data.split_at(HEADER_LEN);
            let header = Header::read_from_bytes(header).unwrap();
            assert_eq!(used.len, u32::try_from(HEADER_LEN).unwrap() + header.len.get());
            assert_eq!(header.dst_cid.get(), u64::from(CID));
            let payload = payload[..header.len.get() as usize].to_vec();
            self.inbox.push_back(Got { header, payload });
            taken += 1;
        }
        if self.refill {
            self.give_buffers(taken);
        }
        while let Some(used) = self.guest.queues[TX].take_used() {
            assert_eq!(used.len, 0, "the device writes nothing to a packet of the guest");
        }
        while let Some(used) = self.guest.queues[EVENT].take_used() {
            assert_eq!((used.len, &used.data[..]), (4, &[0; 4][..]));
            self.transport_resets += 1;
        }
        true
    }

    /// Runs until all is quiet.
    pub fn run(&mut self) {
        for _ in 0..1_000_000 {
            if !self.run_once() {
                return;
            }
        }
        panic!("the device is never done: {:?}", self.device);
    }

    /// The next packet, which must be there.
    pub fn next(&mut self) -> Got {
        self.run();
        self.inbox.pop_front().unwrap_or_else(|| panic!("no packet: {:?}", self.device))
    }

    /// The next packet, which must be this one.
    pub fn expect(&mut self, socket: &mut Socket, op: Op, flags: u32) {
        let got = self.next();
        assert_eq!((got.op(), got.key(), got.flags()), (op, socket.key, flags), "{got:?}");
        assert_eq!(got.payload.len(), 0);
        socket.learn(&got.header);
    }

    /// Nothing comes.
    pub fn expect_silence(&mut self) {
        self.run();
        assert_eq!(self.inbox, []);
        assert!(self.events.is_empty(), "{:?}", self.events);
    }

    pub fn next_event(&mut self) -> VsockEvent {
        self.run();
        self.events.pop_front().unwrap_or_else(|| panic!("no event: {:?}", self.device))
    }

    /// The guest dials the host.
    pub fn dial(&mut self, guest_port: u32) -> (Socket, UnixStream) {
        let mut socket = Socket::new(guest_port, PORT);
        self.say(&socket, Op::Request, 0);
        self.expect(&mut socket, Op::Response, 0);
        match self.next_event() {
            VsockEvent::Accepted { port: PORT, guest_port: p, socket: host } if p == guest_port => {
                (socket, stream(host))
            }
            other => panic!("{other:?}"),
        }
    }

    /// The host dials the guest, and it accepts.
    pub fn answer(&mut self, port: u32, request: u64) -> (Socket, UnixStream) {
        self.device.connect(port, request).unwrap();
        let got = self.next();
        assert_eq!((got.op(), got.key().guest_port), (Op::Request, port));
        let mut socket = Socket::new(port, got.key().host_port);
        socket.learn(&got.header);
        self.say(&socket, Op::Response, 0);
        match self.next_event() {
            VsockEvent::Connected { request: r, socket: host } if r == request => (socket, stream(host)),
            other => panic!("{other:?}"),
        }
    }

    pub fn metric(&self, name: &str) -> u64 {
        let metrics: BTreeMap<_, _> = self.device.metrics().into_iter().collect();
        metrics[name]
    }

    /// What arrived for this connection, taken as read by the guest's program. The packets must be data; credit
    /// packets pass.
    pub fn take_data(&mut self, socket: &mut Socket) -> Vec<u8> {
        let mut bytes = Vec::new();
        for got in std::mem::take(&mut self.inbox) {
            assert_eq!(got.key(), socket.key);
            socket.learn(&got.header);
            match got.op() {
                Op::Data => bytes.extend(got.payload),
                Op::CreditUpdate => {}
                Op::CreditRequest => self.post(&socket.header(Op::CreditUpdate, 0, 0), &[]),
                op => panic!("{op:?} among data"),
            }
        }
        socket.fwd_cnt = socket.fwd_cnt.wrapping_add(u32::try_from(bytes.len()).unwrap());
        bytes
    }
}

fn stream(socket: OwnedFd) -> UnixStream {
    let flags = rustix::fs::fcntl_getfl(socket.as_fd()).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
    UnixStream::from(socket)
}
