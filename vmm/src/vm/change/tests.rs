//! Resizes of a VM whose guest answers, or does not.

mod plugs;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use vmm_api::{Ending, Reached};
use zerocopy::IntoBytes;

use super::*;
use crate::upcall::abi::{CpuResult, CpusDone, View, kind};
use crate::upcall::{Happened, Hello};

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_millis(64);
const BOOT: u64 = 256 * MIB;

/// A machine with an honest guest, which does only what it is told to.
#[derive(Debug)]
struct Fake {
    open: bool,
    online: CpuSet,
    started: CpuSet,
    refuses: CpuSet,
    /// Requests the guest has not looked at.
    inbox: VecDeque<(u64, Ask)>,
    seq: u64,
    memory: MemoryState,
    no_threads: bool,
    /// Its memory driver looks at the device.
    looks: bool,
    /// Memory it can do without.
    available: u64,
    /// What is on the bus.
    devices: BTreeMap<DeviceKey, FakeDevice>,
    /// Its answer to ADD_DEVICE and REMOVE_DEVICE, if it is an error.
    plug_errno: u32,
    /// What its drivers write to the status register of a device that comes.
    driver: u32,
    serves_devices: bool,
}

/// A device, and whether the guest has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct FakeDevice {
    in_guest: bool,
    status: u32,
}

impl Fake {
    fn new() -> Self {
        Fake {
            open: true,
            online: CpuSet::first(1),
            started: CpuSet::first(1),
            refuses: CpuSet::default(),
            inbox: VecDeque::new(),
            seq: 0,
            memory: MemoryState { base: 0xd000_0000, requested: 0, plugged: 0, seen: true },
            no_threads: false,
            looks: true,
            available: 1 << 40,
            devices: BTreeMap::new(),
            plug_errno: 0,
            driver: 15,
            serves_devices: true,
        }
    }

    /// The device whose registers are there.
    fn device_at(&mut self, place: DevicePlace) -> Option<&mut FakeDevice> {
        self.devices.get_mut(&DeviceKey(place.base >> 12))
    }

    fn plug(&mut self, place: DevicePlace, comes: bool) -> u32 {
        let (errno, driver) = (self.plug_errno, self.driver);
        // A guest that is asked for a device that is not on the bus finds none.
        let Some(device) = self.device_at(place) else { return if comes { 19 } else { 0 } };
        if errno == 0 {
            *device = FakeDevice { in_guest: comes, status: if comes { driver } else { 0 } };
        }
        errno
    }

    /// The guest does the oldest thing it was asked, as far as `limit` items, and says so.
    fn work(&mut self, limit: usize) -> Option<Happened> {
        let (seq, ask) = self.inbox.pop_front()?;
        let (status, body) = match ask {
            Ask::Query => (0, self.view()),
            Ask::SetCpus(wanted) => self.set_cpus(wanted, limit),
            Ask::AddDevice { place } => (self.plug(place, true), vec![]),
            Ask::RemoveDevice { place } => (self.plug(place, false), vec![]),
            Ask::SetMemory { .. } if !self.looks => (0, self.view()),
            Ask::SetMemory { .. } => {
                self.memory.seen = true;
                let step = (limit as u64).saturating_mul(128 * MIB);
                let MemoryState { plugged, requested, .. } = self.memory;
                self.memory.plugged = match plugged < requested {
                    true => requested.min(plugged.saturating_add(step)),
                    false => requested.max(plugged.saturating_sub(step)),
                };
                (0, self.view())
            }
        };
        Some(Happened::Replied { seq, kind: ask.kind(), status, body })
    }

    fn set_cpus(&mut self, wanted: CpuSet, limit: usize) -> (u32, Vec<u8>) {
        let changes = wanted.without(self.online).iter().chain(self.online.without(wanted).iter().rev());
        let mut results = vec![];
        for (at, cpu) in changes.enumerate() {
            let one: CpuSet = [cpu].into_iter().collect();
            let errno = match cpu {
                _ if at >= limit => libc::ETIME,
                _ if self.refuses.has(cpu) => libc::EBUSY,
                _ if !self.started.has(cpu) => libc::EIO,
                _ if self.online.has(cpu) => {
                    self.online = self.online.without(one);
                    0
                }
                _ => {
                    self.online = self.online.and(one);
                    0
                }
            };
            results.push(CpuResult { apic_id: u32::from(cpu).into(), status: errno.unsigned_abs().into() });
        }
        let status = results.iter().map(|r| r.status.get()).find(|s| *s != 0).unwrap_or(0);
        let done = CpusDone {
            online: self.online.to_words().map(Into::into),
            count: u32::try_from(results.len()).unwrap().into(),
            reserved: 0.into(),
        };
        let mut body = done.as_bytes().to_vec();
        body.extend(results.iter().flat_map(|r| r.as_bytes().to_vec()));
        (status, body)
    }

    fn view(&self) -> Vec<u8> {
        let view = View {
            online: self.online.to_words().map(Into::into),
            total_bytes: 0.into(),
            free_bytes: self.available.into(),
            realtime_ns: 0.into(),
            frozen: 0.into(),
            devices: 0.into(),
        };
        view.as_bytes().to_vec()
    }

    fn hello(&self) -> Happened {
        let hello = Hello { ops: !0, possible: CpuSet::first(8), online: self.online, release: "6.1".into() };
        Happened::Opened(hello)
    }
}

impl Machine for Fake {
    fn is_open(&self) -> bool {
        self.open
    }

    fn send(&mut self, ask: &Ask, _within: Duration) -> Option<u64> {
        self.seq += 1;
        self.inbox.push_back((self.seq, ask.clone()));
        self.open.then_some(self.seq)
    }

    fn start_vcpus(&mut self, set: CpuSet) -> Result<(), String> {
        if self.no_threads && !set.is_empty() {
            return Err("make vCPU 1: no".to_owned());
        }
        self.started = self.started.and(set);
        Ok(())
    }

    fn park_vcpus(&mut self, set: CpuSet) {
        assert!(set.common(self.online).is_empty(), "the guest still uses {:?}", set.common(self.online));
        self.started = self.started.without(set);
    }

    fn hang_up(&mut self) {
        self.open = false;
    }

    fn memory(&self) -> Option<MemoryState> {
        Some(self.memory)
    }

    fn request_memory(&mut self, bytes: u64) -> Result<(), String> {
        self.memory.seen = false;
        self.memory.requested = bytes;
        Ok(())
    }

    fn serves(&self, kind: u16) -> bool {
        self.open && (self.serves_devices || kind < kind::ADD_DEVICE)
    }

    fn place(&self, device: DeviceKey) -> Option<DevicePlace> {
        self.devices.contains_key(&device).then_some(DevicePlace { base: device.0 << 12, size: 4096, irq: 5 })
    }

    fn driver_status(&self, device: DeviceKey) -> u32 {
        self.devices.get(&device).map_or(0, |device| device.status)
    }

    fn unplug(&mut self, device: DeviceKey) -> Option<Gone> {
        let gone = self.devices.remove(&device)?;
        assert!(!gone.in_guest, "the guest still has {device:?}");
        Some(Gone::default())
    }
}

fn changes() -> Changes {
    Changes::new(CpuSet::first(1), CpuSet::first(8), BOOT)
}

fn asked(id: u64, vcpus: Option<Cpus>, memory: Option<u64>, at: Instant) -> Asked {
    Asked { id, target: Target { vcpus, memory }, at, timeout: SECOND }
}

fn count(id: u64, vcpus: u8, at: Instant) -> Asked {
    asked(id, Some(Cpus::Count(vcpus)), None, at)
}

fn vcpus(changes: &mut Changes) -> (Ending, Option<u32>, String) {
    let [answer] = changes.take_answers().try_into().expect("one answer");
    let reached = answer.resized.vcpus.expect("vCPUs were asked for").reached;
    (answer.resized.ending, reached, answer.resized.detail)
}

/// Has the guest answer all it is asked.
fn settle(changes: &mut Changes, fake: &mut Fake, now: Instant) {
    while let Some(reply) = fake.work(usize::MAX) {
        changes.happened(reply, fake, now);
    }
}

#[test]
fn vcpus_come_and_go_and_their_threads_with_them() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    changes.request(count(1, 4, now), &mut fake);
    assert_eq!(fake.started, CpuSet::first(4), "threads are there before the guest is asked");
    assert_eq!(fake.online, CpuSet::first(1));
    settle(&mut changes, &mut fake, now);
    assert_eq!(vcpus(&mut changes), (Ending::Done, Some(4), String::new()));
    let these: CpuSet = [0, 2].into_iter().collect();
    changes.request(asked(2, Some(Cpus::These(these)), None, now), &mut fake);
    assert_eq!(fake.started, CpuSet::first(4), "threads stay until the guest is rid of them");
    settle(&mut changes, &mut fake, now);
    assert_eq!(vcpus(&mut changes).0, Ending::Done);
    assert_eq!((fake.online, fake.started), (these, these));
}

/// Defect 1 of the field: a failed resize must not be in the way of the next. Defect 3: which CPU failed, and why.
#[test]
fn a_refused_vcpu_is_named_and_the_next_resize_works() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    fake.refuses = [2].into_iter().collect();
    changes.request(count(1, 4, now), &mut fake);
    settle(&mut changes, &mut fake, now);
    let (ending, reached, detail) = vcpus(&mut changes);
    assert_eq!((ending, reached), (Ending::Partial, Some(3)));
    assert!(detail.starts_with("CPU 2: Device or resource busy"), "{detail}");
    assert!(!fake.started.has(2), "what did not come does not stay behind");
    fake.refuses = CpuSet::default();
    changes.request(count(2, 4, now), &mut fake);
    settle(&mut changes, &mut fake, now);
    assert_eq!(vcpus(&mut changes), (Ending::Done, Some(4), String::new()));
}

/// Defect 2: a reset during a resize is not a success, and nobody stops a vCPU that the guest may use.
#[test]
fn a_reset_is_a_reset_and_what_follows_is_asked_for() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    changes.request(count(1, 4, now), &mut fake);
    // The guest has done it, but its answer is lost.
    fake.work(usize::MAX).unwrap();
    fake.open = false;
    changes.happened(Happened::Lost("the guest hung up".into()), &mut fake, now);
    assert_eq!(vcpus(&mut changes), (Ending::Reset, None, "the guest hung up".into()));
    assert_eq!((changes.online(), fake.started), (None, CpuSet::first(4)));
    fake.open = true;
    changes.happened(fake.hello(), &mut fake, now);
    assert_eq!(changes.online(), Some(CpuSet::first(4)));
    changes.request(count(2, 2, now), &mut fake);
    settle(&mut changes, &mut fake, now);
    assert_eq!(vcpus(&mut changes).0, Ending::Done);
    assert_eq!(fake.started, CpuSet::first(2));
}

#[test]
fn a_guest_that_does_not_answer_is_asked_how_it_is_before_the_next_resize() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    changes.request(count(1, 4, now), &mut fake);
    assert_eq!(changes.next_timeout(now), Some(2 * SECOND));
    changes.expire(&mut fake, now + SECOND);
    assert!(changes.take_answers().is_empty(), "the guest has its grace");
    changes.expire(&mut fake, now + 2 * SECOND);
    assert_eq!(vcpus(&mut changes), (Ending::TimedOut, None, String::new()));
    assert_eq!(fake.started, CpuSet::first(4));
    changes.request(count(2, 1, now + 2 * SECOND), &mut fake);
    let late = fake.work(usize::MAX).unwrap();
    changes.happened(late, &mut fake, now + 2 * SECOND);
    assert!(changes.take_answers().is_empty(), "a late answer answers nothing");
    settle(&mut changes, &mut fake, now + 2 * SECOND);
    assert_eq!(vcpus(&mut changes), (Ending::Done, Some(1), String::new()));
}

#[test]
fn one_waits_and_a_later_one_takes_its_place() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    for (id, vcpus) in [(1, 2), (2, 3), (3, 4)] {
        changes.request(count(id, vcpus, now), &mut fake);
    }
    assert_eq!(vcpus(&mut changes), (Ending::Replaced, None, String::new()));
    settle(&mut changes, &mut fake, now);
    let ids: Vec<_> = changes.take_answers().into_iter().map(|a| (a.id, a.resized.ending)).collect();
    assert_eq!(ids, [(1, Ending::Done), (3, Ending::Done)]);
    assert_eq!(fake.online, CpuSet::first(4));
}

#[test]
fn a_guest_that_boots_has_until_the_deadline() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    fake.open = false;
    changes.request(count(1, 2, now), &mut fake);
    changes.request(count(2, 3, now + SECOND / 2), &mut fake);
    changes.expire(&mut fake, now + SECOND);
    let (ending, reached, detail) = vcpus(&mut changes);
    assert_eq!((ending, reached), (Ending::TimedOut, None));
    assert!(detail.contains("not opened the upcall channel"), "{detail}");
    fake.open = true;
    changes.happened(fake.hello(), &mut fake, now + SECOND);
    settle(&mut changes, &mut fake, now + SECOND);
    assert_eq!(vcpus(&mut changes), (Ending::Done, Some(3), String::new()));
}

/// Defects 5 and 6: growing twice asks for the total, and the answer says what came of it.
#[test]
fn memory_grows_twice_and_shrinks_as_far_as_it_can() {
    let (mut changes, mut fake, mut now) = (changes(), Fake::new(), Instant::now());
    let memory = |changes: &mut Changes| {
        let [answer] = changes.take_answers().try_into().expect("one answer");
        (answer.resized.ending, answer.resized.memory_mib.unwrap())
    };
    for (id, mib) in [(1, 512), (2, 1024)] {
        changes.request(asked(id, None, Some(mib * MIB), now), &mut fake);
        settle(&mut changes, &mut fake, now);
        let total = u32::try_from(mib).unwrap() + 256;
        assert_eq!(memory(&mut changes), (Ending::Done, Reached { asked: total, reached: Some(total) }));
    }
    changes.request(asked(3, None, Some(0), now), &mut fake);
    // All that can be had is 256 MiB, however often it is asked again.
    for limit in [9, 0, 2].into_iter().chain([0; 20]) {
        if let Some(reply) = fake.work(limit) {
            changes.happened(reply, &mut fake, now);
        }
        now += changes.next_timeout(now).unwrap_or_default().min(LONGEST);
        changes.expire(&mut fake, now);
    }
    assert_eq!(memory(&mut changes), (Ending::Partial, Reached { asked: 256, reached: Some(1024) }));
    assert_eq!(fake.memory.requested, 768 * MIB, "nothing goes on behind the owner's back");
}

/// Linux gives its last free page if it is asked for it, and dies.
#[test]
fn a_guest_is_not_asked_for_what_it_uses() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    fake.memory = MemoryState { requested: 1024 * MIB, plugged: 1024 * MIB, ..fake.memory };
    fake.available = 117 * MIB;
    changes.request(asked(1, None, Some(0), now), &mut fake);
    settle(&mut changes, &mut fake, now);
    let [answer] = changes.take_answers().try_into().expect("one answer");
    let reached = Reached { asked: 256, reached: Some(256 + 1024 - 100) };
    assert_eq!((answer.resized.ending, answer.resized.memory_mib), (Ending::Partial, Some(reached)));
    assert!(answer.resized.detail.contains("100 MiB"), "{}", answer.resized.detail);
    fake.available = 16 * MIB;
    changes.request(asked(2, None, Some(0), now), &mut fake);
    settle(&mut changes, &mut fake, now);
    let [answer] = changes.take_answers().try_into().expect("one answer");
    assert_eq!(answer.resized.ending, Ending::Refused);
    assert_eq!(fake.memory.plugged, 924 * MIB);
}

/// The request overtakes the device's interrupt: its answer says nothing, and it is asked again.
#[test]
fn memory_is_asked_for_until_its_driver_has_looked() {
    let (mut changes, mut fake, mut now) = (changes(), Fake::new(), Instant::now());
    fake.looks = false;
    changes.request(asked(1, None, Some(256 * MIB), now), &mut fake);
    settle(&mut changes, &mut fake, now);
    for round in 0..12 {
        let pause = changes.next_timeout(now).unwrap();
        assert!(pause <= LONGEST, "round {round}: {pause:?}");
        assert!(fake.inbox.is_empty(), "not before it is over");
        now += pause;
        changes.expire(&mut fake, now);
        fake.looks = round == 11;
        settle(&mut changes, &mut fake, now);
    }
    // Either way it has an end.
    let [answer] = changes.take_answers().try_into().expect("one answer");
    assert_eq!(answer.resized.ending, Ending::Done);
    fake.looks = false;
    changes.request(asked(2, None, Some(0), now), &mut fake);
    while let Some(pause) = changes.next_timeout(now) {
        settle(&mut changes, &mut fake, now);
        now += pause;
        changes.expire(&mut fake, now);
    }
    let [answer] = changes.take_answers().try_into().expect("one answer");
    assert_eq!(answer.resized.ending, Ending::Refused);
    assert!(answer.resized.detail.contains("memory driver"), "{}", answer.resized.detail);
}

#[test]
fn a_host_without_threads_asks_nothing_of_the_guest() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    fake.no_threads = true;
    changes.request(count(1, 2, now), &mut fake);
    assert_eq!(vcpus(&mut changes), (Ending::Refused, Some(1), "make vCPU 1: no".into()));
    assert!(fake.inbox.is_empty());
}

#[test]
fn memory_grows_first_and_shrinks_last() {
    let (mut changes, mut fake, now) = (changes(), Fake::new(), Instant::now());
    let mut kinds = |id, cpus, bytes| {
        changes.request(asked(id, Some(Cpus::Count(cpus)), Some(bytes), now), &mut fake);
        let mut kinds = vec![];
        while let Some((_, ask)) = fake.inbox.front() {
            kinds.push(ask.kind());
            let reply = fake.work(usize::MAX).unwrap();
            changes.happened(reply, &mut fake, now);
        }
        assert_eq!(changes.take_answers().len(), 1);
        kinds
    };
    assert_eq!(kinds(1, 4, 512 * MIB), [kind::SET_MEMORY, kind::SET_CPUS]);
    assert_eq!(kinds(2, 2, 0), [kind::SET_CPUS, kind::QUERY, kind::SET_MEMORY]);
}

#[derive(Debug, Clone)]
enum Event {
    Ask { vcpus: Option<u8>, memory: Option<u64> },
    Guest { limit: usize, answers: bool },
    GuestRefuses(u8),
    Lose,
    Dial,
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (prop::option::of(1u8..=8), prop::option::of(0u64..=16)).prop_map(|(vcpus, memory)| {
            let nothing = vcpus.is_none() && memory.is_none();
            Event::Ask { vcpus: if nothing { Some(1) } else { vcpus }, memory: memory.map(|n| n * 128 * MIB) }
        }),
        6 => (0usize..10, prop::bool::weighted(0.8)).prop_map(|(limit, answers)| Event::Guest { limit, answers }),
        1 => (1u8..8).prop_map(Event::GuestRefuses),
        1 => Just(Event::Lose),
        2 => Just(Event::Dial),
        2 => (0u64..3_000).prop_map(Event::Wait),
    ]
}

proptest! {
    /// Whatever happens: each request is answered once, no vCPU stops that the guest uses ([`Fake::park_vcpus`]), and what
    /// is known of the guest is true.
    #[test]
    fn every_resize_ends_once(events in prop::collection::vec(event(), 0..60)) {
        let (mut changes, mut fake, mut now) = (changes(), Fake::new(), Instant::now());
        let (mut id, mut open) = (0, BTreeSet::new());
        let quiet = [Event::Wait(400_000), Event::Dial, Event::Wait(0)];
        for event in events.into_iter().chain(quiet) {
            match event {
                Event::Ask { vcpus, memory } => {
                    id += 1;
                    open.insert(id);
                    changes.request(asked(id, vcpus.map(Cpus::Count), memory, now), &mut fake);
                }
                Event::Guest { limit, answers } => {
                    let reply = fake.work(limit);
                    if let Some(reply) = reply.filter(|_| answers) {
                        changes.happened(reply, &mut fake, now);
                    }
                }
                Event::GuestRefuses(cpu) => fake.refuses = [cpu].into_iter().collect(),
                Event::Lose if fake.open => {
                    fake.open = false;
                    fake.inbox.clear();
                    changes.happened(Happened::Lost("gone".into()), &mut fake, now);
                }
                Event::Dial if !fake.open => {
                    fake.open = true;
                    changes.happened(fake.hello(), &mut fake, now);
                }
                Event::Lose | Event::Dial => {}
                Event::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    // Twice, as what ends makes room for what waits.
                    changes.expire(&mut fake, now);
                    changes.expire(&mut fake, now);
                }
            }
            for answer in changes.take_answers() {
                prop_assert!(open.remove(&answer.id), "{} was answered twice", answer.id);
            }
            prop_assert!(fake.online.without(fake.started).is_empty());
            if changes.next_timeout(now).is_none() && let Some(online) = changes.online() {
                prop_assert_eq!(online, fake.online);
            }
        }
        prop_assert!(open.is_empty(), "not answered: {:?}", open);
    }
}
