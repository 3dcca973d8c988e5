//! The channel against a guest that holds to the protocol, and guests that do not.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, Header, REPLY, kind};
use super::{Ask, Channel, Happened};
use crate::vcpu::CpuSet;

const EPOCH: u64 = 77;
const LIMIT: Duration = Duration::from_secs(1);

/// The guest's end.
struct Guest(UnixStream);

impl Guest {
    fn dial(channel: &mut Channel, port: u32) -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        channel.accept(near.into(), port, Instant::now());
        Guest(far)
    }

    /// Dials, says hello and is let in.
    fn open(channel: &mut Channel, epoch: u64) -> Self {
        let mut guest = Self::dial(channel, 1000);
        guest.send(kind::HELLO, epoch, 0, &hello());
        assert!(matches!(channel.on_ready()[..], [Happened::Opened(_)]));
        let (header, _) = guest.take();
        assert_eq!((header.type_.get(), header.epoch.get()), (kind::WELCOME, EPOCH));
        guest
    }

    fn send(&mut self, kind: u16, epoch: u64, seq: u64, body: &[u8]) {
        let bytes = [header(kind, body.len(), epoch, seq).as_bytes(), body].concat();
        self.0.write_all(&bytes).unwrap();
    }

    fn take(&mut self) -> (Header, Vec<u8>) {
        let mut bytes = [0; size_of::<Header>()];
        self.0.read_exact(&mut bytes).unwrap();
        let header = Header::read_from_bytes(&bytes).unwrap();
        let mut body = vec![0; header.len.get() as usize];
        self.0.read_exact(&mut body).unwrap();
        (header, body)
    }

    fn is_cut_off(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

fn header(kind: u16, len: usize, epoch: u64, seq: u64) -> Header {
    Header {
        magic: abi::MAGIC.into(),
        version: abi::VERSION.into(),
        type_: kind.into(),
        len: u32::try_from(len).unwrap().into(),
        status: 0.into(),
        deadline_ms: 0.into(),
        reserved: 0.into(),
        epoch: epoch.into(),
        seq: seq.into(),
    }
}

fn hello() -> Vec<u8> {
    let set = |count| CpuSet::first(count).to_words().map(Into::into);
    let mut release = [0; 64];
    release[..9].copy_from_slice(b"6.1\x1b[0m\n\xff");
    abi::Hello {
        ops: (1 << kind::QUERY | 1 << kind::SET_CPUS).into(),
        memory_block: (128 << 20).into(),
        page_size: 4096.into(),
        reserved: 0.into(),
        possible: set(4),
        online: set(2),
        release,
    }
    .as_bytes()
    .to_vec()
}

fn channel() -> Channel {
    Channel::with_epochs(|| EPOCH)
}

#[test]
fn a_request_is_answered_by_its_number() {
    let mut channel = channel();
    assert_eq!(channel.send(&Ask::Query, LIMIT), None, "nobody is there yet");
    let mut guest = Guest::open(&mut channel, 0);
    let hello = channel.hello().unwrap();
    assert_eq!(hello.release, "6.1?[0m??");
    assert_eq!((hello.possible, hello.online), (CpuSet::first(4), CpuSet::first(2)));
    assert!(hello.knows(kind::SET_CPUS) && !hello.knows(kind::FREEZE));

    let seq = channel.send(&Ask::SetCpus(CpuSet::first(3)), LIMIT).unwrap();
    let (header, body) = guest.take();
    assert_eq!((header.type_.get(), header.seq.get(), header.deadline_ms.get()), (kind::SET_CPUS, seq, 1000));
    assert_eq!(abi::Cpus::read_from_bytes(&body).unwrap().online[0], 0b111);
    // In pieces, as a stream may come.
    let reply = [self::header(kind::SET_CPUS | REPLY, 3, EPOCH, seq).as_bytes(), b"abc"].concat();
    for byte in &reply[..reply.len() - 1] {
        guest.0.write_all(&[*byte]).unwrap();
        assert_eq!(channel.on_ready(), []);
    }
    guest.0.write_all(&reply[reply.len() - 1..]).unwrap();
    let replied = Happened::Replied { seq, kind: kind::SET_CPUS, status: 0, body: b"abc".to_vec() };
    assert_eq!(channel.on_ready(), [replied]);
    // Twice is once too often, and no harm.
    guest.0.write_all(&reply).unwrap();
    assert_eq!(channel.on_ready(), []);
    assert_eq!(channel.counters().stray_replies, 1);
    drop(guest);
    assert_eq!(channel.on_ready(), [Happened::Lost("the guest hung up".into())]);
}

#[test]
fn only_the_kernel_that_was_here_comes_back() {
    let mut channel = channel();
    let first = Guest::open(&mut channel, 0);
    // While the channel is open nobody else is let in.
    let mut second = Guest::dial(&mut channel, 1000);
    let (header, _) = second.take();
    assert_eq!((header.type_.get(), header.status.get()), (kind::REFUSED, 16));
    assert!(second.is_cut_off());
    drop(first);
    assert_eq!(channel.on_ready().len(), 1);
    // An unprivileged port, no epoch, a guessed one.
    let mut user = Guest::dial(&mut channel, 1024);
    assert_eq!(user.take().0.status.get(), 13);
    for epoch in [0, EPOCH - 1] {
        let mut stranger = Guest::dial(&mut channel, 1000);
        stranger.send(kind::HELLO, epoch, 0, &hello());
        assert_eq!(channel.on_ready(), []);
        assert_eq!(stranger.take().0.status.get(), 116);
        assert!(stranger.is_cut_off());
    }
    assert_eq!(channel.counters().turned_away, 4);
    Guest::open(&mut channel, EPOCH);
    assert_eq!(channel.counters().opened, 2);
}

#[test]
fn who_dials_and_says_nothing_keeps_nobody_out() {
    let mut channel = channel();
    let mut silent = Guest::dial(&mut channel, 1);
    let guest = Guest::open(&mut channel, 0);
    assert!(silent.is_cut_off());
    drop(guest);
    channel.on_ready();
    let mut silent = Guest::dial(&mut channel, 1);
    let patience = channel.next_timeout(Instant::now()).unwrap();
    channel.expire(Instant::now() + patience);
    assert!(silent.is_cut_off());
    assert_eq!(channel.next_timeout(Instant::now()), None);
}

/// Defect 3 of the field: a wrong frame must not leave an old result standing; here it ends the channel.
#[test]
fn what_breaks_the_protocol_closes_the_channel() {
    type Spoil = fn(&mut Header);
    let spoils: [(Spoil, &str); 7] = [
        (|h| h.magic = 1.into(), "magic"),
        (|h| h.version = 2.into(), "version 2"),
        (|h| h.len = 4097.into(), "4097 bytes"),
        (|h| h.epoch = 78.into(), "another epoch"),
        (|h| h.type_ = kind::QUERY.into(), "type 0x10"),
        (|h| h.type_ = (kind::SET_CPUS | REPLY).into(), "type 0x8011"),
        (|h| h.seq = 9.into(), "type 0x8010"),
    ];
    for (spoil, word) in spoils {
        let mut channel = channel();
        let mut guest = Guest::open(&mut channel, 0);
        let seq = channel.send(&Ask::Query, LIMIT).unwrap();
        let mut reply = header(kind::QUERY | REPLY, 0, EPOCH, seq);
        spoil(&mut reply);
        guest.0.write_all(reply.as_bytes()).unwrap();
        match &channel.on_ready()[..] {
            [Happened::Lost(why)] => assert!(why.contains(word), "{why} is without {word}"),
            other => panic!("{word}: {other:?}"),
        }
        assert_eq!(channel.counters().violations, 1);
        Guest::open(&mut channel, EPOCH);
    }
}

#[test]
fn a_hello_that_cannot_be_is_none() {
    for spoil in [
        (|h: &mut abi::Hello| h.online = [0.into(); 4]) as fn(&mut abi::Hello),
        |h| h.online = CpuSet::first(5).to_words().map(Into::into),
        |h| h.possible[3] = 1.into(),
    ] {
        let mut channel = channel();
        let mut guest = Guest::dial(&mut channel, 1000);
        let mut body = abi::Hello::read_from_bytes(&hello()).unwrap();
        spoil(&mut body);
        guest.send(kind::HELLO, 0, 0, body.as_bytes());
        assert_eq!(channel.on_ready(), []);
        assert!(channel.hello().is_none() && guest.is_cut_off());
    }
    let mut channel = channel();
    let mut guest = Guest::dial(&mut channel, 1000);
    guest.send(kind::HELLO, 0, 0, &hello()[..100]);
    channel.on_ready();
    assert!(guest.is_cut_off());
}
