//! A guest's end of the upcall channel that says whatever it likes, while resizes are asked for, and devices to come and go: each
//! ends once, and no vCPU is stopped, no device taken out, that it did not say it is rid of.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vmm::devices::DeviceKey;
use vmm::upcall::abi::{self, Header, kind};
use vmm::upcall::{Ask, Channel, DevicePlace};
use vmm::vm::change::{
    Asked, Changes, CpuSet, Cpus, Gone, Left, Machine, MemoryState, Plug, PlugAsked, Target,
};
use zerocopy::{FromBytes, IntoBytes};

const VCPUS: u8 = 8;

struct World {
    channel: Channel,
    started: CpuSet,
    memory: MemoryState,
    /// Status registers of what is on the bus.
    devices: BTreeMap<DeviceKey, u32>,
    /// What the guest was told of in this step, or asked to give up.
    told: BTreeSet<DeviceKey>,
}

impl Machine for World {
    fn is_open(&self) -> bool {
        self.channel.hello().is_some()
    }

    fn send(&mut self, ask: &Ask, within: Duration) -> Option<u64> {
        if let Ask::AddDevice { place } | Ask::RemoveDevice { place } = ask {
            self.told.insert(DeviceKey(place.base));
        }
        self.channel.send(ask, within)
    }

    fn start_vcpus(&mut self, set: CpuSet) -> Result<(), String> {
        assert!(set.without(CpuSet::first(VCPUS)).is_empty());
        self.started = self.started.and(set);
        Ok(())
    }

    fn park_vcpus(&mut self, set: CpuSet) {
        assert!(!set.has(0), "the boot CPU was stopped");
        self.started = self.started.without(set);
    }

    fn hang_up(&mut self) {
        self.channel.close();
    }

    fn memory(&self) -> Option<MemoryState> {
        Some(self.memory)
    }

    fn request_memory(&mut self, bytes: u64) -> Result<(), String> {
        self.memory.requested = bytes;
        self.memory.seen = false;
        Ok(())
    }

    fn serves(&self, kind: u16) -> bool {
        self.channel.hello().is_some_and(|hello| hello.knows(kind))
    }

    fn place(&self, device: DeviceKey) -> Option<DevicePlace> {
        self.devices.contains_key(&device).then_some(DevicePlace { base: device.0, size: 4096, irq: 5 })
    }

    fn driver_status(&self, device: DeviceKey) -> u32 {
        self.devices.get(&device).copied().unwrap_or_default()
    }

    fn unplug(&mut self, device: DeviceKey) -> Option<Gone> {
        self.devices.remove(&device).map(|_| Gone::default())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut world = World {
        channel: Channel::with_epochs(|| 77),
        started: CpuSet::first(1),
        memory: MemoryState { base: 0xd000_0000, requested: 0, plugged: 0, seen: false },
        devices: BTreeMap::new(),
        told: BTreeSet::new(),
    };
    let mut changes = Changes::new(CpuSet::first(1), CpuSet::first(VCPUS), 1 << 28);
    let (mut guest, mut now, mut id, mut open) = (None::<UnixStream>, Instant::now(), 0, BTreeSet::new());
    let mut asked = None;
    while !input.is_empty() {
        match input.u8() % 12 {
            0 => {
                let (near, far) = UnixStream::pair().expect("a few descriptors");
                near.set_nonblocking(true).expect("a socket");
                far.set_nonblocking(true).expect("a socket");
                world.channel.accept(near.into(), u32::from(input.u16() % 1100), now);
                guest = Some(far);
            }
            1 | 2 => say(&mut guest, &hello(&mut input)),
            3 => {
                let len = usize::from(input.u8());
                say(&mut guest, input.bytes(len));
            }
            4 | 5 => {
                asked = heard(&mut guest).or(asked);
                say(&mut guest, &reply(&mut input, asked));
            }
            6 => {
                id += 1;
                open.insert(id);
                let vcpus = Some(Cpus::Count(1 + input.u8() % VCPUS));
                let memory = (input.u8() & 1 == 0).then(|| u64::from(input.u8()) << 21);
                let target = Target { vcpus, memory };
                changes.request(Asked { id, target, at: now, timeout: Duration::from_secs(1) }, &mut world);
            }
            8 => {
                id += 1;
                let device = DeviceKey(id);
                world.devices.insert(device, 0);
                let asked = PlugAsked { id, device, plug: Plug::Add, at: now, timeout: Duration::from_secs(1) };
                match changes.plug(asked, &mut world) {
                    Ok(()) => drop(open.insert(id)),
                    Err(_) => drop(world.devices.remove(&device)),
                }
            }
            9 => {
                let nth = usize::from(input.u8() % 8);
                let Some(device) = world.devices.keys().nth(nth).copied() else { continue };
                id += 1;
                let asked =
                    PlugAsked { id, device, plug: Plug::Remove, at: now, timeout: Duration::from_secs(1) };
                if changes.plug(asked, &mut world).is_ok() {
                    open.insert(id);
                }
            }
            10 => {
                let nth = usize::from(input.u8() % 8);
                if let Some(status) = world.devices.values_mut().nth(nth) {
                    *status = input.u8().into();
                    changes.device_moved(&mut world, now);
                }
            }
            7 => world.memory.plugged = u64::from(input.u8()) << 21,
            _ => now += Duration::from_millis(u64::from(input.u16()) % 4000),
        }
        for what in world.channel.on_ready() {
            changes.happened(what, &mut world, now);
        }
        world.channel.expire(now);
        changes.expire(&mut world, now);
        for answer in changes.take_answers() {
            assert!(open.remove(&answer.id), "{} was answered twice", answer.id);
        }
        for plugged in changes.take_plugged() {
            assert!(open.remove(&plugged.id), "{} was answered twice", plugged.id);
            let there = world.devices.contains_key(&plugged.device);
            match (plugged.plug, plugged.ended) {
                (Plug::Add, Ok(())) => assert!(world.told.contains(&plugged.device)),
                (_, Ok(()) | Err((_, Left::Out))) => assert!(!there, "{:?} is still there", plugged.device),
                (_, Err((_, Left::In | Left::Parked))) => assert!(there, "{:?} is gone", plugged.device),
            }
        }
        assert!(changes.online().is_none_or(|online| online.without(world.started).is_empty()));
    }
    // One that was asked last may wait behind many.
    for _ in 0..80 {
        now += Duration::from_secs(10);
        changes.expire(&mut world, now);
    }
    for answer in changes.take_answers() {
        assert!(open.remove(&answer.id));
    }
    for plugged in changes.take_plugged() {
        assert!(open.remove(&plugged.id));
    }
    assert!(open.is_empty(), "not answered: {open:?}");
});

fn say(guest: &mut Option<UnixStream>, bytes: &[u8]) {
    if let Some(guest) = guest {
        // Fails when the host has hung up.
        let _ = guest.write(bytes);
    }
}

/// The last request the host sent.
fn heard(guest: &mut Option<UnixStream>) -> Option<Header> {
    let mut bytes = vec![0; 1 << 14];
    let got = guest.as_mut()?.read(&mut bytes).ok()?;
    let (mut rest, mut last) = (&bytes[..got], None);
    while let Ok((header, body)) = Header::read_from_prefix(rest) {
        rest = &body[header.len.get() as usize..];
        last = Some(header);
    }
    last
}

fn hello(input: &mut Input<'_>) -> Vec<u8> {
    let set = |byte: u8| [u64::from(byte).into(), 0.into(), 0.into(), 0.into()];
    let hello = abi::Hello {
        ops: u64::MAX.into(),
        memory_block: (1 << 27).into(),
        page_size: 4096.into(),
        reserved: 0.into(),
        possible: set(0xff),
        online: set(input.u8() | 1),
        release: [b'6'; 64],
    };
    let epoch = [0, 77, 77, 1][usize::from(input.u8() % 4)];
    frame(kind::HELLO, epoch, 0, 0, hello.as_bytes())
}

/// Something that looks like an answer.
fn reply(input: &mut Input<'_>, asked: Option<Header>) -> Vec<u8> {
    let (kind, seq) = asked.map_or((kind::QUERY, 1), |header| (header.type_.get(), header.seq.get()));
    let wild = input.u8();
    let online = [u64::from(input.u8() | u8::from(wild != 1)).into(), 0.into(), 0.into(), 0.into()];
    let len = usize::from(input.u8() % 64);
    let body = match kind {
        kind::SET_CPUS => {
            let done = abi::CpusDone { online, count: u32::from(input.u8() % 9).into(), reserved: 0.into() };
            [done.as_bytes(), input.bytes(len)].concat()
        }
        _ => [online.as_bytes(), input.bytes(len)].concat(),
    };
    let kind = if wild == 2 { input.u16() } else { kind | abi::REPLY };
    let seq = if wild == 3 { u64::from(input.u8()) } else { seq };
    let epoch = if wild == 4 { 78 } else { 77 };
    frame(kind, epoch, seq, if wild < 32 { input.u32() } else { 0 }, &body)
}

fn frame(kind: u16, epoch: u64, seq: u64, status: u32, body: &[u8]) -> Vec<u8> {
    let header = Header {
        magic: abi::MAGIC.into(),
        version: abi::VERSION.into(),
        type_: kind.into(),
        len: u32::try_from(body.len()).expect("small").into(),
        status: status.into(),
        deadline_ms: 0.into(),
        reserved: 0.into(),
        epoch: epoch.into(),
        seq: seq.into(),
    };
    [header.as_bytes(), body].concat()
}
