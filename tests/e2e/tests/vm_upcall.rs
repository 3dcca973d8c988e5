//! The driver of `kernel-config/upcall` in the guest's kernel. The test is the host: it says byte by byte what `README.md` there
//! says a host says, so it stands for any other implementation of it.
#![cfg(feature = "lab")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use e2e::vm::{Guest, GuestSpec};
use vmm_api::{Event, MemoryConfig};

/// Port of the host that the driver dials.
const PORT: u32 = 1023;
const MAGIC: u32 = 0x5055_5443;
const HEADER: usize = 40;
const REPLY: u16 = 0x8000;

const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const REFUSED: u16 = 3;
const QUERY: u16 = 16;
const SET_CPUS: u16 = 17;
const SET_MEMORY: u16 = 18;
const ADD_DEVICE: u16 = 19;
const REMOVE_DEVICE: u16 = 20;
const SET_TIME: u16 = 21;
const RESEED: u16 = 22;
const FREEZE: u16 = 23;
const THAW: u16 = 24;

/// What stays silent for this long has gone wrong: seconds in a guest of a guest whose CPUs all spin.
const LIMIT: Duration = Duration::from_secs(120);
const EPOCH: u64 = 0x0123_4567_89ab_cdef;

/// A header's fields, and what follows it.
#[derive(Debug, Clone, PartialEq)]
struct Frame {
    magic: u32,
    version: u16,
    kind: u16,
    status: i32,
    deadline_ms: u32,
    epoch: u64,
    seq: u64,
    payload: Vec<u8>,
}

impl Frame {
    fn new(kind: u16, epoch: u64, seq: u64, payload: &[u8]) -> Frame {
        let payload = payload.to_vec();
        Frame { magic: MAGIC, version: 1, kind, status: 0, deadline_ms: 0, epoch, seq, payload }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.magic.to_le_bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(u32::try_from(self.payload.len()).expect("a test's payload is short").to_le_bytes());
        bytes.extend(self.status.to_le_bytes());
        bytes.extend(self.deadline_ms.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(self.seq.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    fn read(from: &mut UnixStream) -> Result<Frame> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header).context("read a header")?;
        let mut payload = vec![0; u32_at(&header, 8) as usize];
        ensure!(payload.len() <= 4096, "{} bytes follow a header", payload.len());
        from.read_exact(&mut payload).context("read what follows a header")?;
        let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let frame = Frame {
            magic: u32_at(&header, 0),
            version: short(4),
            kind: short(6),
            status: u32_at(&header, 12).cast_signed(),
            deadline_ms: u32_at(&header, 16),
            epoch: u64_at(&header, 24),
            seq: u64_at(&header, 32),
            payload,
        };
        ensure!((frame.magic, frame.version, frame.deadline_ms) == (MAGIC, 1, 0), "{frame:?}");
        ensure!(u32_at(&header, 20) == 0, "reserved bytes are not 0: {header:?}");
        Ok(frame)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A guest and the host's end of its channel.
struct Host {
    guest: Guest,
    channel: UnixStream,
    seq: u64,
}

impl Host {
    /// A guest with four CPUs of which one is online, whose user space spins, and prints the CPUs online whenever they change.
    fn boot() -> Result<Host> {
        let (guest, channel, hello) = Host::first_hello("")?;
        ensure!(hello.epoch == 0, "{hello:?}");
        let mut host = Host { guest, channel, seq: 100 };
        host.welcome(EPOCH)?;
        Ok(host)
    }

    /// As [`Host::boot`], up to the first thing the guest says. The log so far is shown before anything spins: line by line, it
    /// would take minutes beside it.
    fn first_hello(script: &str) -> Result<(Guest, UnixStream, Frame)> {
        let spec = GuestSpec {
            vcpus: 4,
            memory: MemoryConfig::new(512),
            cmdline: "maxcpus=1",
            ports: vec![PORT],
            script: format!(
                "cat /dev/kmsg & sleep 2\n{script}\n\
                 for i in 1 2 3 4; do while :; do :; done & done\n\
                 last=; while :; do now=$(cat /sys/devices/system/cpu/online)\n\
                 [ \"$now\" = \"$last\" ] || echo online=$now; last=$now; sleep 1; done\n"
            ),
            ..GuestSpec::default()
        };
        let mut guest = spec.boot()?;
        let mut channel = accept(&mut guest)?;
        let hello = Frame::read(&mut channel)?;
        ensure!(hello.kind == HELLO && hello.status == 0, "{hello:?}");
        Ok((guest, channel, hello))
    }

    fn welcome(&mut self, epoch: u64) -> Result<()> {
        self.send(&Frame::new(WELCOME, epoch, 0, &[]))
    }

    fn send(&mut self, frame: &Frame) -> Result<()> {
        self.channel.write_all(&frame.bytes()).context("send a frame")
    }

    /// The next request of this kind, not sent yet.
    fn request(&mut self, kind: u16, payload: &[u8]) -> Frame {
        self.seq += 1;
        Frame::new(kind, EPOCH, self.seq, payload)
    }

    /// Sends `request` and gives the reply, which has to be one to it.
    fn exchange(&mut self, request: &Frame) -> Result<Frame> {
        self.send(request)?;
        let reply = Frame::read(&mut self.channel)?;
        let header = (reply.kind, reply.seq, reply.epoch);
        ensure!(header == (request.kind | REPLY, request.seq, EPOCH), "{reply:?} to {request:?}");
        Ok(reply)
    }

    fn ask(&mut self, kind: u16, payload: &[u8]) -> Result<Frame> {
        let request = self.request(kind, payload);
        self.exchange(&request)
    }

    /// The status of a reply that has nothing else in it.
    fn status(&mut self, kind: u16, payload: &[u8]) -> Result<i32> {
        let reply = self.ask(kind, payload)?;
        ensure!(reply.payload.is_empty(), "{reply:?}");
        Ok(reply.status)
    }

    fn view(&mut self) -> Result<View> {
        let reply = self.ask(QUERY, &[])?;
        ensure!(reply.status == 0, "{reply:?}");
        View::of(&reply.payload)
    }

    /// Waits until the guest has hung up.
    fn hung_up(&mut self) -> Result<()> {
        let mut byte = [0];
        ensure!(self.channel.read(&mut byte).context("wait for the guest to hang up")? == 0, "got {byte:?}");
        Ok(())
    }

    /// Takes the guest's next connection, whose HELLO has to have `epoch`, and welcomes it.
    fn reconnected(&mut self, epoch: u64) -> Result<()> {
        self.channel = accept(&mut self.guest)?;
        let hello = Frame::read(&mut self.channel)?;
        ensure!((hello.kind, hello.epoch) == (HELLO, epoch), "{hello:?}");
        self.welcome(EPOCH)
    }

    /// Nothing in the kernel's log is what a kernel says of its own mistakes.
    fn finish(mut self) -> Result<Guest> {
        let marker = Frame::new(QUERY, 1, u64::MAX, &[]);
        self.send(&marker)?;
        let reply = Frame::read(&mut self.channel)?;
        ensure!(reply.status == libc::ESTALE, "{reply:?}");
        let text = format!("request {} is of another epoch", u64::MAX);
        self.guest.wait_for_line("the end of the kernel's log", |line| line.contains(&text))?;
        let bad = [
            "BUG:",
            "WARNING:",
            "Oops",
            "INFO: task",
            "KASAN",
            "Call Trace",
            "lockup",
            "deadlock",
            "suspicious",
        ];
        let is_bad =
            |line: &str| bad.iter().any(|b| line.contains(b)) && !line.contains("Speculative Return");
        let found: Vec<_> = self.guest.lines().iter().filter(|line| is_bad(line)).collect();
        ensure!(found.is_empty(), "{found:#?} in {:#?}", self.guest.lines());
        Ok(self.guest)
    }
}

/// The next connection of the guest's driver, which comes from a port that only root can have.
fn accept(guest: &mut Guest) -> Result<UnixStream> {
    let (event, mut fds) = guest.event()?;
    let Event::VsockAccepted { port: PORT, guest_port, .. } = event else { bail!("got {event:?}") };
    ensure!(guest_port < 1024, "from port {guest_port}");
    let channel = UnixStream::from(fds.pop().context("no descriptor")?);
    channel.set_nonblocking(false)?;
    channel.set_read_timeout(Some(LIMIT))?;
    channel.set_write_timeout(Some(LIMIT))?;
    Ok(channel)
}

/// A set of CPUs on the wire.
fn cpus(ids: &[u32]) -> Vec<u8> {
    let mut words = [0_u64; 4];
    for id in ids {
        words[*id as usize / 64] |= 1 << (id % 64);
    }
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn ids(set: &[u8]) -> Vec<u32> {
    (0..256).filter(|id| set[*id as usize / 8] >> (id % 8) & 1 == 1).collect()
}

#[derive(Debug)]
struct View {
    online: Vec<u32>,
    total: u64,
    free: u64,
    realtime_ns: u64,
    frozen: u32,
    devices: u32,
}

impl View {
    fn of(payload: &[u8]) -> Result<View> {
        ensure!(payload.len() == 64, "{} bytes are no view", payload.len());
        Ok(View {
            online: ids(&payload[..32]),
            total: u64_at(payload, 32),
            free: u64_at(payload, 40),
            realtime_ns: u64_at(payload, 48),
            frozen: u32_at(payload, 56),
            devices: u32_at(payload, 60),
        })
    }
}

/// What a SET_CPUS reply says: status, CPUs online, and (APIC id, error) of each that was to change.
type CpusDone = (i32, Vec<u32>, Vec<(u32, i32)>);

fn cpus_done(reply: &Frame) -> Result<CpusDone> {
    let count = u32_at(&reply.payload, 32) as usize;
    ensure!(reply.payload.len() == 40 + 8 * count, "{reply:?}");
    let items = reply.payload[40..].chunks(8).map(|c| (u32_at(c, 0), u32_at(c, 4).cast_signed())).collect();
    Ok((reply.status, ids(&reply.payload[..32]), items))
}

fn device(base: u64, size: u64, irq: u32) -> Vec<u8> {
    [&base.to_le_bytes()[..], &size.to_le_bytes(), &irq.to_le_bytes(), &[0; 4]].concat()
}

#[test]
fn the_guest_says_what_it_is() -> Result<()> {
    let (guest, channel, hello) = Host::first_hello("")?;
    assert_eq!((hello.epoch, hello.seq, hello.payload.len()), (0, 0, 24 + 32 + 32 + 64));
    let payload = &hello.payload;
    assert_eq!(u64_at(payload, 0), 0x1ff << 16, "operations");
    assert_eq!(u64_at(payload, 8), 128 << 20, "memory block");
    assert_eq!(u32_at(payload, 16), 4096, "page size");
    assert_eq!(ids(&payload[24..56]), [0, 1, 2, 3], "possible CPUs");
    assert_eq!(ids(&payload[56..88]), [0], "CPUs online");
    let release = String::from_utf8_lossy(&payload[88..]);
    let (release, rest) = release.split_once('\0').context("no NUL after the release")?;
    assert!(release.contains("-ctvm") && rest.chars().all(|c| c == '\0'), "{release:?} {rest:?}");

    let mut host = Host { guest, channel, seq: 0 };
    host.welcome(EPOCH)?;
    let view = host.view()?;
    assert_eq!((&view.online[..], view.frozen, view.devices), (&[0][..], 0, 0));
    assert!(
        (300 << 20..512 << 20).contains(&view.total) && view.free < view.total && view.free > 100 << 20,
        "{view:?}"
    );
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    assert!(now.abs_diff(Duration::from_nanos(view.realtime_ns)) < LIMIT, "{view:?} at {now:?}");
    host.finish()?;
    Ok(())
}

#[test]
fn cpus_come_and_go_in_any_order_while_all_of_them_spin() -> Result<()> {
    let mut host = Host::boot()?;
    host.guest.wait_for_line("the guest's user space", |line| line == "online=0")?;
    let steps: [(&[u32], &[u32], &str); 5] = [
        (&[0, 1, 2, 3], &[1, 2, 3], "online=0-3"),
        (&[0, 2], &[3, 1], "online=0,2"),
        (&[0, 1, 3], &[1, 3, 2], "online=0-1,3"),
        (&[0, 1, 3], &[], ""),
        (&[0], &[3, 1], "online=0"),
    ];
    for (wanted, changed, seen) in steps {
        let reply = host.ask(SET_CPUS, &cpus(wanted))?;
        let changed: Vec<_> = changed.iter().map(|id| (*id, 0)).collect();
        assert_eq!(cpus_done(&reply)?, (0, wanted.to_vec(), changed), "{seen}");
        assert_eq!(host.view()?.online, wanted);
        if !seen.is_empty() {
            host.guest.wait_for_line(seen, |line| line == seen)?;
        }
    }
    // What cannot be does not keep what can.
    let reply = host.ask(SET_CPUS, &cpus(&[1, 4, 255]))?;
    let items = vec![(1, 0), (4, libc::EINVAL), (255, libc::EINVAL), (0, libc::EBUSY)];
    assert_eq!(cpus_done(&reply)?, (libc::EINVAL, vec![0, 1], items));
    let reply = host.ask(SET_CPUS, &cpus(&[]))?;
    assert_eq!(cpus_done(&reply)?, (libc::EBUSY, vec![0], vec![(1, 0), (0, libc::EBUSY)]));
    host.finish()?;
    Ok(())
}

#[test]
fn what_is_not_begun_by_the_deadline_is_said_to_be() -> Result<()> {
    let mut host = Host::boot()?;
    // One takes longer than this, so the first is begun, or none, and the last is not.
    let mut late = host.request(SET_CPUS, &cpus(&[0, 1, 2, 3]));
    late.deadline_ms = 1;
    let (status, online, items) = cpus_done(&host.exchange(&late)?)?;
    assert_eq!(status, libc::ETIME);
    assert_eq!(items.iter().map(|i| i.0).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(items[2].1, libc::ETIME);
    let done = items.iter().filter(|i| i.1 == 0).map(|i| i.0);
    assert_eq!(online, std::iter::once(0).chain(done).collect::<Vec<_>>());
    // The same again, with time enough, ends where the first was to end.
    let mut again = host.request(SET_CPUS, &cpus(&[0, 1, 2, 3]));
    again.deadline_ms = u32::try_from(LIMIT.as_millis())?;
    let (status, online, _) = cpus_done(&host.exchange(&again)?)?;
    assert_eq!((status, online), (0, vec![0, 1, 2, 3]));
    host.finish()?;
    Ok(())
}

#[test]
fn frames_that_are_not_the_protocol_s_end_the_connection_or_are_refused() -> Result<()> {
    let mut host = Host::boot()?;
    for (what, at, value) in [("magic", 0, 0x42), ("version", 4, 2), ("length", 9, 0x11)] {
        let mut bytes = host.request(QUERY, &[]).bytes();
        bytes[at] = value;
        host.channel.write_all(&bytes)?;
        host.hung_up().with_context(|| format!("after a wrong {what}"))?;
        host.reconnected(EPOCH)?;
        let said = format!("host sent a frame with {what}");
        host.guest.wait_for_line("the driver's complaint", |line| line.contains(&said))?;
    }

    // A frame in pieces is a frame.
    let request = host.request(SET_MEMORY, &[0; 16]);
    for byte in request.bytes() {
        host.channel.write_all(&[byte])?;
    }
    let reply = Frame::read(&mut host.channel)?;
    assert_eq!((reply.kind, reply.status, reply.seq), (SET_MEMORY | REPLY, 0, request.seq));
    View::of(&reply.payload)?;

    // Another epoch: nothing is done, and the last reply can still be had.
    let mut stale = host.request(SET_CPUS, &cpus(&[0, 1]));
    stale.epoch = EPOCH + 1;
    let refused = host.exchange(&stale)?;
    assert_eq!((refused.status, refused.payload.len()), (libc::ESTALE, 0));
    assert_eq!(host.exchange(&request)?, reply, "the same reply, not a new view");
    stale.epoch = EPOCH;
    let (status, online, items) = cpus_done(&host.exchange(&stale)?)?;
    assert_eq!((status, online, items), (0, vec![0, 1], vec![(1, 0)]), "not done before");
    let (_, _, repeated) = cpus_done(&host.exchange(&stale)?)?;
    assert_eq!(repeated, [(1, 0)], "done again it would have had nothing to do");

    for unknown in [0, HELLO, WELCOME, 25, 64, 0x7fff] {
        assert_eq!(host.status(unknown, &[0; 64])?, libc::EOPNOTSUPP, "type {unknown}");
    }
    for (kind, len) in
        [(SET_CPUS, 31), (SET_MEMORY, 15), (ADD_DEVICE, 23), (REMOVE_DEVICE, 0), (SET_TIME, 7), (RESEED, 15)]
    {
        assert_eq!(host.status(kind, &vec![0; len])?, libc::EINVAL, "type {kind}, {len} bytes");
    }
    // What is longer than this version knows is taken for what it begins with.
    assert_eq!(host.ask(SET_CPUS, &[cpus(&[0, 1]), vec![0xff; 4064]].concat())?.status, 0);

    // Numbers go up.
    let mut old = host.request(QUERY, &[]);
    old.seq = 1;
    host.send(&old)?;
    host.hung_up()?;
    host.reconnected(EPOCH)?;
    assert_eq!(host.view()?.online, [0, 1]);
    host.finish()?;
    Ok(())
}

#[test]
fn a_guest_that_is_hung_up_on_or_refused_comes_back() -> Result<()> {
    let (guest, channel, _) = Host::first_hello("")?;
    let mut host = Host { guest, channel, seq: 0 };
    for _ in 0..2 {
        let mut refused = Frame::new(REFUSED, 0, 0, &[]);
        refused.status = libc::EBUSY;
        host.send(&refused)?;
        host.channel = accept(&mut host.guest)?;
        let hello = Frame::read(&mut host.channel)?;
        assert_eq!((hello.kind, hello.epoch), (HELLO, 0));
    }
    host.welcome(7)?;
    // A host that restored the guest has another epoch; what the guest says is the last one it knew.
    host.channel = UnixStream::pair()?.0;
    host.reconnected(7)?;
    assert_eq!(host.view()?.online, [0]);
    for _ in 0..5 {
        host.channel.shutdown(std::net::Shutdown::Both)?;
        host.reconnected(EPOCH)?;
        assert_eq!(host.view()?.online, [0]);
    }
    // A host that hangs up in the middle of a frame, and one that welcomes with what is no epoch.
    let half = host.request(QUERY, &[]).bytes();
    host.channel.write_all(&half[..HEADER - 1])?;
    host.channel = UnixStream::pair()?.0;
    host.channel = accept(&mut host.guest)?;
    Frame::read(&mut host.channel)?;
    host.welcome(0)?;
    host.hung_up()?;
    host.reconnected(EPOCH)?;
    let guest = host.finish()?;
    let said = guest.lines().iter().filter(|line| line.contains("the host refuses this guest: error 16"));
    // A debug kernel boots so slowly that this is said before the log is shown.
    assert!(said.count() == 1 || e2e::debug_kernel(), "{:#?}", guest.lines());
    Ok(())
}

#[test]
fn devices_come_and_go() -> Result<()> {
    // What the guest was told of its entropy device on the command line.
    let script = "for d in /sys/bus/virtio/drivers/virtio_rng/virtio*; do p=$(readlink -f $d/..); done\n\
         echo rng=$(basename $p)\n\
         ( while :; do n=$(ls /sys/bus/virtio/drivers/virtio_rng | grep -c '^virtio' || :)\n\
         [ \"$n\" = \"$was\" ] || echo rngs=$n; was=$n; sleep 1; done ) &";
    let (guest, channel, _) = Host::first_hello(script)?;
    let mut host = Host { guest, channel, seq: 0 };
    host.welcome(EPOCH)?;

    assert_eq!(host.status(ADD_DEVICE, &device(0xd001_2000, 0x1000, 23))?, libc::ENODEV, "no device there");
    assert_eq!(host.status(ADD_DEVICE, &device(0x10_0000, 0x1000, 23))?, libc::EINVAL, "registers in memory");
    assert_eq!(
        host.status(ADD_DEVICE, &device(0xd001_2000, 0x10, 23))?,
        libc::EINVAL,
        "no room for registers"
    );
    assert_eq!(host.status(ADD_DEVICE, &device(u64::MAX - 0xfff, 0x2000, 23))?, libc::EINVAL, "over the end");
    assert_eq!(host.status(REMOVE_DEVICE, &device(0xd001_2000, 0, 0))?, 0, "is not there");
    assert_eq!(host.view()?.devices, 0);

    let (base, irq) = entropy_device(&mut host)?;
    host.guest.wait_for_line("the entropy device", |line| line == "rngs=1")?;
    assert_eq!(host.status(ADD_DEVICE, &device(base, 0x1000, irq))?, 0, "is there already");
    assert_eq!(host.status(ADD_DEVICE, &device(base, 0x1000, irq + 1))?, libc::EEXIST);
    assert_eq!(host.status(ADD_DEVICE, &device(base, 0x200, irq))?, libc::EEXIST);
    for round in 0..3 {
        assert_eq!(host.status(REMOVE_DEVICE, &device(base, 0x1000, irq))?, 0, "round {round}");
        assert_eq!(host.view()?.devices, 0);
        host.guest.wait_for_line("the device's going", |line| line == "rngs=0")?;
        assert_eq!(host.status(ADD_DEVICE, &device(base, 0x1000, irq))?, 0, "round {round}");
        assert_eq!(host.status(ADD_DEVICE, &device(base, 0x1000, irq))?, 0, "round {round}, again");
        assert_eq!(host.status(ADD_DEVICE, &device(base, 0x1000, irq + 1))?, libc::EEXIST, "round {round}");
        assert_eq!(host.view()?.devices, 1);
        host.guest.wait_for_line("the device's coming", |line| line == "rngs=1")?;
    }
    host.finish()?;
    Ok(())
}

/// Registers and interrupt of the guest's entropy device: slots are in the order of the command line, one interrupt each.
fn entropy_device(host: &mut Host) -> Result<(u64, u32)> {
    let line = host.guest.wait_for_line("the entropy device", |line| line.starts_with("rng=virtio-mmio."))?;
    let slot: u32 = line.trim_start_matches("rng=virtio-mmio.").parse()?;
    Ok((0xd000_0000 + 0x1000 * u64::from(slot), 5 + slot))
}

#[test]
fn the_clock_is_set_and_the_generator_reseeded() -> Result<()> {
    let mut host = Host::boot()?;
    const HOUR: u64 = 3_600_000_000_000;
    let before = host.view()?.realtime_ns;
    let target = before + HOUR;
    let reply = host.ask(SET_TIME, &target.to_le_bytes())?;
    assert_eq!((reply.status, reply.payload.len()), (0, 8));
    let added = u64_at(&reply.payload, 0).cast_signed();
    let limit = i64::try_from(LIMIT.as_nanos())?;
    assert!(added <= HOUR.cast_signed() && added > HOUR.cast_signed() - limit, "{added}");
    assert!(host.view()?.realtime_ns >= target);
    let reply = host.ask(SET_TIME, &before.to_le_bytes())?;
    assert_eq!(reply.status, 0);
    let added = u64_at(&reply.payload, 0).cast_signed();
    assert!(added <= -HOUR.cast_signed() && added > -HOUR.cast_signed() - limit, "{added}");
    for wrong in [u64::MAX, 1 << 63, i64::MAX.cast_unsigned()] {
        assert_eq!(host.status(SET_TIME, &wrong.to_le_bytes())?, libc::EINVAL, "{wrong}");
    }
    for len in [16, 64, 4096] {
        assert_eq!(host.status(RESEED, &vec![0x5a; len])?, 0, "{len} bytes");
    }
    host.finish()?;
    Ok(())
}

#[test]
fn a_frozen_guest_changes_nothing_until_it_is_thawed() -> Result<()> {
    let mut host = Host::boot()?;
    for _ in 0..2 {
        assert_eq!(host.status(FREEZE, &[])?, 0);
        assert_eq!(host.view()?.frozen, 1);
    }
    let some = device(0xd001_2000, 0x1000, 23);
    for (kind, payload) in [
        (SET_CPUS, cpus(&[0, 1])),
        (SET_MEMORY, vec![0; 16]),
        (ADD_DEVICE, some.clone()),
        (REMOVE_DEVICE, some),
    ] {
        assert_eq!(host.status(kind, &payload)?, libc::EBUSY, "type {kind}");
    }
    // What a host does with a guest that it restored.
    let now = host.view()?.realtime_ns;
    assert_eq!(host.ask(SET_TIME, &now.to_le_bytes())?.status, 0);
    assert_eq!(host.status(RESEED, &[1; 32])?, 0);
    // A lost connection does not thaw.
    host.channel.shutdown(std::net::Shutdown::Both)?;
    host.reconnected(EPOCH)?;
    assert_eq!(host.view()?.frozen, 1);
    for _ in 0..2 {
        assert_eq!(host.status(THAW, &[])?, 0);
        assert_eq!(host.view()?.frozen, 0);
    }
    let reply = host.ask(SET_CPUS, &cpus(&[0, 1]))?;
    assert_eq!(cpus_done(&reply)?, (0, vec![0, 1], vec![(1, 0)]));
    assert_eq!(View::of(&host.ask(SET_MEMORY, &[0; 16])?.payload)?.online, [0, 1]);
    host.finish()?;
    Ok(())
}
