//! Devices that come to a guest, or go, or do not. That none is taken from under the guest [`Fake::unplug`] sees to.

use super::*;

const GRACE: Duration = SECOND;

/// Puts a device on the bus and asks for it to come.
fn add(changes: &mut Changes, fake: &mut Fake, key: u64, now: Instant) {
    fake.devices.insert(DeviceKey(key), FakeDevice::default());
    changes.plug(plug(key, Plug::Add, now), fake).unwrap();
}

fn remove(changes: &mut Changes, fake: &mut Fake, key: u64, now: Instant) {
    changes.plug(plug(key, Plug::Remove, now), fake).unwrap();
}

/// A request whose id is the device's.
fn plug(key: u64, plug: Plug, at: Instant) -> PlugAsked {
    PlugAsked { id: key, device: DeviceKey(key), plug, at, timeout: SECOND }
}

fn answer(changes: &mut Changes) -> Result<(), (Why, Left)> {
    let [plugged] = changes.take_plugged().try_into().expect("one answer");
    plugged.ended
}

fn setting() -> (Changes, Fake, Instant) {
    (changes(), Fake::new(), Instant::now())
}

#[test]
fn a_device_comes_and_goes_and_comes_again() {
    let (mut changes, mut fake, now) = setting();
    for _ in 0..3 {
        add(&mut changes, &mut fake, 1, now);
        assert!(changes.take_plugged().is_empty(), "the guest has not answered");
        settle(&mut changes, &mut fake, now);
        assert_eq!(answer(&mut changes), Ok(()));
        assert!(fake.devices[&DeviceKey(1)].in_guest);
        remove(&mut changes, &mut fake, 1, now);
        assert!(fake.devices.contains_key(&DeviceKey(1)), "it stays until the guest is rid of it");
        settle(&mut changes, &mut fake, now);
        assert_eq!(answer(&mut changes), Ok(()));
        assert!(fake.devices.is_empty());
    }
    let counters = changes.plug_counters();
    assert_eq!((counters.attached, counters.detached, changes.parked()), (3, 3, 0));
}

#[test]
fn a_guest_that_refuses_a_device_has_not_got_it() {
    let (mut changes, mut fake, now) = setting();
    fake.plug_errno = 16;
    add(&mut changes, &mut fake, 1, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Err((Why::Refused(16), Left::Out)));
    assert!(fake.devices.is_empty());
    fake.plug_errno = 0;
    add(&mut changes, &mut fake, 2, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Ok(()));
    // And one that refuses to let go keeps it, until it does not.
    fake.plug_errno = 16;
    remove(&mut changes, &mut fake, 2, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Err((Why::Refused(16), Left::In)));
    fake.plug_errno = 0;
    remove(&mut changes, &mut fake, 2, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Ok(()));
    assert!(fake.devices.is_empty());
}

#[test]
fn a_guest_whose_kernel_does_not_serve_devices_is_not_asked() {
    let (mut changes, mut fake, now) = setting();
    fake.serves_devices = false;
    add(&mut changes, &mut fake, 1, now);
    assert_eq!(answer(&mut changes), Err((Why::Unserved(kind::ADD_DEVICE), Left::Out)));
    assert!(fake.inbox.is_empty() && fake.devices.is_empty());
}

#[test]
fn without_a_channel_the_time_passes_and_nothing_stays() {
    let (mut changes, mut fake, now) = setting();
    fake.open = false;
    add(&mut changes, &mut fake, 1, now);
    add(&mut changes, &mut fake, 2, now + SECOND / 2);
    assert_eq!(changes.next_timeout(now), Some(SECOND));
    changes.expire(&mut fake, now + SECOND);
    assert_eq!(answer(&mut changes), Err((Why::NoChannel, Left::Out)));
    assert!(!fake.devices.contains_key(&DeviceKey(1)));
    // The second had time left, and the guest was slow to boot.
    fake.open = true;
    changes.happened(fake.hello(), &mut fake, now + SECOND);
    settle(&mut changes, &mut fake, now + SECOND);
    assert_eq!(answer(&mut changes), Ok(()));
}

#[test]
fn a_driver_that_comes_later_is_waited_for() {
    let (mut changes, mut fake, now) = setting();
    fake.driver = 1;
    add(&mut changes, &mut fake, 1, now);
    settle(&mut changes, &mut fake, now);
    for status in [1, 3, 11, 15] {
        assert!(changes.take_plugged().is_empty());
        fake.devices.get_mut(&DeviceKey(1)).unwrap().status = status;
        changes.device_moved(&mut fake, now);
    }
    assert_eq!(answer(&mut changes), Ok(()));
}

#[test]
fn a_device_whose_driver_gives_up_or_does_not_come_is_taken_back_first() {
    for (driver, expected) in
        [(0x83, Why::DriverFailed(0x83)), (1, Why::NoDriver(1)), (0x4f, Why::DriverFailed(0x4f))]
    {
        let (mut changes, mut fake, mut now) = setting();
        fake.driver = driver;
        add(&mut changes, &mut fake, 1, now);
        settle(&mut changes, &mut fake, now);
        now += SECOND;
        changes.expire(&mut fake, now);
        settle(&mut changes, &mut fake, now);
        assert_eq!(answer(&mut changes), Err((expected, Left::Out)));
        assert!(fake.devices.is_empty() && changes.parked() == 0);
    }
}

#[test]
fn a_device_that_the_guest_may_have_is_parked_until_it_has_given_it_up() {
    let (mut changes, mut fake, now) = setting();
    add(&mut changes, &mut fake, 1, now);
    changes.expire(&mut fake, now + SECOND);
    assert!(changes.take_plugged().is_empty(), "the guest has its grace");
    let late = now + SECOND + GRACE;
    changes.expire(&mut fake, late);
    assert_eq!(answer(&mut changes), Err((Why::TimedOut, Left::Parked)));
    assert!(changes.is_parked(DeviceKey(1)) && fake.devices.contains_key(&DeviceKey(1)));
    // It wakes up, does what it was asked, and is asked to undo it.
    assert_eq!(fake.inbox.len(), 2);
    settle(&mut changes, &mut fake, late);
    assert!(fake.devices.is_empty() && changes.parked() == 0);
    assert!(changes.take_plugged().is_empty(), "it was answered");
}

#[test]
fn an_answer_that_is_too_late_frees_what_is_parked() {
    let (mut changes, mut fake, now) = setting();
    add(&mut changes, &mut fake, 1, now);
    changes.expire(&mut fake, now + 2 * SECOND);
    // Nor does it answer the request to undo it.
    changes.expire(&mut fake, now + 100 * SECOND);
    assert!(changes.is_parked(DeviceKey(1)));
    assert_eq!(changes.next_timeout(now + 100 * SECOND), None, "it is not pestered");
    settle(&mut changes, &mut fake, now + 200 * SECOND);
    assert!(fake.devices.is_empty() && changes.parked() == 0);
}

#[test]
fn whoever_comes_next_has_the_guest_asked_for_what_is_parked() {
    let (mut changes, mut fake, now) = setting();
    add(&mut changes, &mut fake, 1, now);
    changes.expire(&mut fake, now + 2 * SECOND);
    changes.expire(&mut fake, now + 100 * SECOND);
    fake.inbox.clear();
    changes.take_plugged();
    let later = now + 101 * SECOND;
    // The owner may also say so itself.
    remove(&mut changes, &mut fake, 1, later);
    settle(&mut changes, &mut fake, later);
    assert_eq!((changes.take_plugged().len(), changes.take_answers().len()), (1, 0));
    assert!(fake.devices.is_empty() && changes.parked() == 0);

    add(&mut changes, &mut fake, 2, later);
    changes.expire(&mut fake, later + 2 * SECOND);
    changes.expire(&mut fake, later + 100 * SECOND);
    fake.inbox.clear();
    changes.take_plugged();
    let later = later + 101 * SECOND;
    changes.request(count(9, 2, later), &mut fake);
    settle(&mut changes, &mut fake, later);
    assert_eq!(vcpus(&mut changes).0, Ending::Done);
    assert!(fake.devices.is_empty() && changes.parked() == 0);
}

#[test]
fn a_reset_in_the_middle_leaves_a_device_where_it_may_be() {
    let (mut changes, mut fake, now) = setting();
    let lost = || Happened::Lost("the guest hung up".into());
    // The guest has done it, but its answer is lost.
    add(&mut changes, &mut fake, 1, now);
    fake.work(1).unwrap();
    fake.open = false;
    changes.happened(lost(), &mut fake, now);
    assert_eq!(answer(&mut changes), Err((Why::Reset("the guest hung up".into()), Left::Parked)));
    fake.open = true;
    changes.happened(fake.hello(), &mut fake, now);
    settle(&mut changes, &mut fake, now);
    assert!(fake.devices.is_empty() && changes.parked() == 0);

    add(&mut changes, &mut fake, 2, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Ok(()));
    remove(&mut changes, &mut fake, 2, now);
    fake.work(1).unwrap();
    fake.open = false;
    changes.happened(lost(), &mut fake, now);
    assert_eq!(answer(&mut changes), Err((Why::Reset("the guest hung up".into()), Left::In)));
    assert!(fake.devices.contains_key(&DeviceKey(2)), "the guest has not said that it is rid of it");
    fake.open = true;
    changes.happened(fake.hello(), &mut fake, now);
    remove(&mut changes, &mut fake, 2, now);
    settle(&mut changes, &mut fake, now);
    assert_eq!(answer(&mut changes), Ok(()));
    assert!(fake.devices.is_empty());
}

#[test]
fn a_reset_while_a_driver_is_waited_for_ends_it() {
    let (mut changes, mut fake, now) = setting();
    fake.driver = 3;
    add(&mut changes, &mut fake, 1, now);
    settle(&mut changes, &mut fake, now);
    fake.open = false;
    changes.happened(Happened::Lost("gone".into()), &mut fake, now);
    assert_eq!(answer(&mut changes), Err((Why::Reset("gone".into()), Left::Parked)));
    // A driver that comes now changes nothing.
    changes.device_moved(&mut fake, now);
    assert!(changes.take_plugged().is_empty());
}

#[test]
fn what_waits_keeps_its_order_and_resizes_stand_in_the_same_line() {
    let (mut changes, mut fake, now) = setting();
    add(&mut changes, &mut fake, 1, now);
    changes.request(count(100, 2, now), &mut fake);
    add(&mut changes, &mut fake, 2, now);
    changes.request(count(101, 3, now), &mut fake);
    remove(&mut changes, &mut fake, 1, now);
    assert_eq!(fake.inbox.len(), 1, "one at a time");
    let mut order = vec![];
    while let Some((_, ask)) = fake.inbox.front() {
        order.push(ask.kind());
        let reply = fake.work(usize::MAX).unwrap();
        changes.happened(reply, &mut fake, now);
        assert!(fake.inbox.len() <= 1, "one at a time");
    }
    // The later resize has the place of the earlier one.
    assert_eq!(order, [kind::ADD_DEVICE, kind::SET_CPUS, kind::ADD_DEVICE, kind::REMOVE_DEVICE]);
    let resizes: Vec<_> = changes.take_answers().into_iter().map(|a| (a.id, a.resized.ending)).collect();
    assert_eq!(resizes, [(100, Ending::Replaced), (101, Ending::Done)]);
    let plugs: Vec<_> = changes.take_plugged().into_iter().map(|p| (p.id, p.ended)).collect();
    assert_eq!(plugs, [(1, Ok(())), (2, Ok(())), (1, Ok(()))]);
}

#[test]
fn the_line_has_an_end() {
    let (mut changes, mut fake, now) = setting();
    fake.open = false;
    for key in 0..=u64::try_from(vmm_api::config::MAX_WAITING).unwrap() {
        add(&mut changes, &mut fake, key, now);
    }
    assert_eq!(changes.plug(plug(99, Plug::Add, now), &mut fake), Err(Crowded));
    assert_eq!(changes.end_all().len(), 33);
}

#[test]
fn whoever_waits_in_vain_is_told_and_leaves_nothing() {
    let (mut changes, mut fake, now) = setting();
    let mut long = plug(1, Plug::Add, now);
    long.timeout = 10 * SECOND;
    fake.devices.insert(DeviceKey(1), FakeDevice::default());
    changes.plug(long, &mut fake).unwrap();
    add(&mut changes, &mut fake, 2, now);
    remove(&mut changes, &mut fake, 1, now);
    changes.expire(&mut fake, now + SECOND);
    let ended: Vec<_> = changes.take_plugged().into_iter().map(|p| (p.plug, p.ended)).collect();
    assert_eq!(
        ended,
        [(Plug::Add, Err((Why::NoTurn, Left::Out))), (Plug::Remove, Err((Why::NoTurn, Left::In)))]
    );
    settle(&mut changes, &mut fake, now + SECOND);
    assert_eq!(answer(&mut changes), Ok(()));
    assert_eq!(fake.devices.len(), 1);
}

/// Found by the fuzz target: the removal was told that the device stays, which went in the same moment.
#[test]
fn what_is_late_together_is_told_in_its_order() {
    let (mut changes, mut fake, now) = setting();
    fake.open = false;
    add(&mut changes, &mut fake, 1, now);
    add(&mut changes, &mut fake, 2, now);
    remove(&mut changes, &mut fake, 2, now);
    changes.expire(&mut fake, now + SECOND);
    let ended: Vec<_> = changes.take_plugged().into_iter().map(|p| (p.plug, p.ended)).collect();
    let expected = [
        (Plug::Add, Err((Why::NoChannel, Left::Out))),
        (Plug::Add, Err((Why::NoChannel, Left::Out))),
        (Plug::Remove, Err((Why::NoChannel, Left::Out))),
    ];
    assert_eq!(ended, expected);
    assert!(fake.devices.is_empty());
}

#[test]
fn a_device_that_went_meanwhile_is_gone_already() {
    let (mut changes, mut fake, now) = setting();
    add(&mut changes, &mut fake, 1, now);
    settle(&mut changes, &mut fake, now);
    changes.take_plugged();
    remove(&mut changes, &mut fake, 1, now);
    remove(&mut changes, &mut fake, 1, now);
    settle(&mut changes, &mut fake, now);
    let ended: Vec<_> = changes.take_plugged().into_iter().map(|p| p.ended).collect();
    assert_eq!(ended, [Ok(()), Err((Why::Gone, Left::Out))]);
}

#[derive(Debug, Clone)]
enum Event {
    Add,
    Remove(u8),
    Resize(u8),
    Guest {
        answers: bool,
    },
    /// Its answers come, all of them late.
    Backlog,
    Errno(u32),
    Driver(u32),
    Moved(u8, u32),
    Lose,
    Dial,
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => Just(Event::Add),
        3 => any::<u8>().prop_map(Event::Remove),
        1 => (1u8..=8).prop_map(Event::Resize),
        8 => prop::bool::weighted(0.7).prop_map(|answers| Event::Guest { answers }),
        1 => Just(Event::Backlog),
        1 => prop_oneof![Just(0), Just(16)].prop_map(Event::Errno),
        1 => prop_oneof![Just(15), Just(1), Just(0x83)].prop_map(Event::Driver),
        1 => (any::<u8>(), prop_oneof![Just(15), Just(3), Just(0x83)]).prop_map(|(n, s)| Event::Moved(n, s)),
        1 => Just(Event::Lose),
        2 => Just(Event::Dial),
        2 => (0u64..3_000).prop_map(Event::Wait),
    ]
}

proptest! {
    /// Whatever happens: each request is answered once, no device is taken from under the guest ([`Fake::unplug`]), what came
    /// is in the guest, what was said to be out is out, and what is parked goes once the guest behaves.
    #[test]
    fn every_plug_ends_once(events in prop::collection::vec(event(), 0..80)) {
        let (mut changes, mut fake, mut now) = setting();
        let (mut id, mut open, mut answers) = (0, BTreeSet::new(), vec![]);
        let quiet = [
            Event::Errno(0), Event::Driver(15), Event::Wait(400_000), Event::Dial, Event::Backlog, Event::Wait(0),
            Event::Lose, Event::Dial, Event::Backlog, Event::Wait(400_000), Event::Backlog,
        ];
        for event in events.into_iter().chain(quiet) {
            match event {
                Event::Add => {
                    id += 1;
                    fake.devices.insert(DeviceKey(id), FakeDevice::default());
                    let asked = PlugAsked { id, device: DeviceKey(id), plug: Plug::Add, at: now, timeout: SECOND };
                    match changes.plug(asked, &mut fake) {
                        Ok(()) => { open.insert(id); }
                        Err(Crowded) => { fake.devices.remove(&DeviceKey(id)); }
                    }
                }
                Event::Remove(n) => {
                    let Some(device) = fake.devices.keys().nth(usize::from(n)).copied() else { continue };
                    id += 1;
                    let asked = PlugAsked { id, device, plug: Plug::Remove, at: now, timeout: SECOND };
                    if changes.plug(asked, &mut fake).is_ok() {
                        open.insert(id);
                    }
                }
                Event::Resize(vcpus) => {
                    id += 1;
                    open.insert(id);
                    changes.request(count(id, vcpus, now), &mut fake);
                }
                Event::Guest { answers } => {
                    let reply = fake.work(usize::MAX);
                    if let Some(reply) = reply.filter(|_| answers) {
                        changes.happened(reply, &mut fake, now);
                    }
                }
                Event::Backlog => settle(&mut changes, &mut fake, now),
                Event::Errno(errno) => fake.plug_errno = errno,
                Event::Driver(status) => fake.driver = status,
                Event::Moved(n, status) => {
                    let device = fake.devices.values_mut().filter(|d| d.in_guest).nth(usize::from(n));
                    if let Some(device) = device {
                        device.status = status;
                    }
                    changes.device_moved(&mut fake, now);
                }
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
                    changes.expire(&mut fake, now);
                    changes.expire(&mut fake, now);
                }
            }
            for plugged in changes.take_plugged() {
                prop_assert!(open.remove(&plugged.id), "{} was answered twice", plugged.id);
                let there = fake.devices.get(&plugged.device).copied();
                match (plugged.plug, &plugged.ended) {
                    (Plug::Add, Ok(())) => prop_assert!(there.is_none_or(|device| device.in_guest)),
                    (_, Ok(()) | Err((_, Left::Out))) => prop_assert_eq!(there, None),
                    (_, Err((_, Left::In | Left::Parked))) => prop_assert!(there.is_some()),
                }
                answers.push(plugged);
            }
            for answer in changes.take_answers() {
                prop_assert!(open.remove(&answer.id), "{} was answered twice", answer.id);
            }
        }
        prop_assert!(open.is_empty(), "not answered: {:?}", open);
        prop_assert_eq!(changes.parked(), 0, "{:?}", fake.devices);
        // What is left is what came and was not said to have gone.
        let came = answers.iter().filter(|p| p.plug == Plug::Add && p.ended.is_ok()).map(|p| p.device);
        let came: BTreeSet<_> = came.collect();
        prop_assert!(fake.devices.keys().all(|device| came.contains(device)), "{:?}", fake.devices);
    }
}
