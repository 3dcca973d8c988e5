//! The transport, driven as a guest drives it: by register accesses.

use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, CountedLine, Echo, Guest};

const OK: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// A transport and a driver for it.
struct Rig {
    transport: MmioTransport<Echo>,
    guest: Guest,
    line: Arc<CountedLine>,
}

impl Rig {
    fn new() -> Self {
        let guest = Guest::of(&Echo::default(), true);
        let line = Arc::new(CountedLine::default());
        let transport = MmioTransport::new(Echo::default(), guest.memory.clone(), line.clone()).unwrap();
        Rig { transport, guest, line }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn set_features(&mut self, features: u64) {
        for sel in [0, 1] {
            self.set(reg::DRIVER_FEATURES_SEL, sel);
            self.set(reg::DRIVER_FEATURES, half(features, sel));
        }
    }

    /// 3.1.1, up to the status asked for, which is the status then unless the device objects.
    fn bring_to(&mut self, status: u32, features: u64) {
        for step in [1, 3, 11, 15].into_iter().filter(|step| *step <= status) {
            if step == 11 {
                self.set_features(features);
            }
            if step == 15 {
                self.set_up_queues();
            }
            self.set(reg::STATUS, step);
        }
    }

    fn set_up_queues(&mut self) {
        for index in 0..self.guest.queues.len() {
            let state = self.guest.queues[index].state();
            self.set(reg::QUEUE_SEL, u32::try_from(index).unwrap());
            assert_eq!(self.get(reg::QUEUE_READY), 0);
            assert_eq!(self.get(reg::QUEUE_SIZE_MAX), u32::from(state.max_size));
            self.set(reg::QUEUE_SIZE, state.size.into());
            for (low, high, address) in [
                (reg::QUEUE_DESC_LOW, reg::QUEUE_DESC_HIGH, state.desc_table),
                (reg::QUEUE_DRIVER_LOW, reg::QUEUE_DRIVER_HIGH, state.avail_ring),
                (reg::QUEUE_DEVICE_LOW, reg::QUEUE_DEVICE_HIGH, state.used_ring),
            ] {
                self.set(low, half(address, 0));
                self.set(high, half(address, 1));
            }
            self.set(reg::QUEUE_READY, 1);
            assert_eq!(self.get(reg::QUEUE_READY), 1);
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.transport.metrics().iter().find(|(n, _)| *n == name).unwrap().1
    }

    fn echo(&mut self, queue: usize, text: &[u8]) {
        let fake = &mut self.guest.queues[queue];
        let head = fake.add(&mut self.guest.heap, &[Buffer::Out(text.into()), Buffer::In(text.len())]);
        assert!(fake.must_notify());
        self.set(reg::QUEUE_NOTIFY, u32::try_from(queue).unwrap());
        self.transport.on_queue(queue);
        let used = self.guest.queues[queue].take_used().unwrap();
        assert_eq!((used.head, &used.data[..]), (head, text));
    }
}

#[test]
fn a_driver_sets_the_device_up_and_uses_it() {
    let mut rig = Rig::new();
    assert_eq!(rig.get(reg::MAGIC_VALUE), 0x7472_6976);
    assert_eq!(rig.get(reg::VERSION), 2);
    assert_eq!(rig.get(reg::DEVICE_ID), 42);
    assert_eq!(rig.get(reg::VENDOR_ID), 0x6d76_7463);
    assert_eq!(rig.get(reg::STATUS), 0);
    rig.set(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.get(reg::DEVICE_FEATURES), 1, "VIRTIO_F_VERSION_1 is bit 32");
    rig.set(reg::DEVICE_FEATURES_SEL, 0);
    assert_eq!(rig.get(reg::DEVICE_FEATURES), 1 << 29 | 1 << 28 | 1 << 3 | 1);
    rig.set(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(rig.get(reg::DEVICE_FEATURES), 0);

    rig.bring_to(15, TRANSPORT_FEATURES | 1);
    assert_eq!(rig.get(reg::STATUS), OK);
    assert!(rig.transport.is_active());
    rig.echo(0, b"first");
    rig.echo(1, b"second");
    rig.echo(0, b"third");

    assert_eq!((rig.line.count(), rig.get(reg::INTERRUPT_STATUS)), (3, 1));
    rig.set(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.get(reg::INTERRUPT_STATUS), 0);
    assert_eq!(rig.counter("bad_accesses"), 0);
}

#[test]
fn features_are_refused_if_not_offered_or_without_version_1() {
    for (features, ok) in [
        (VERSION_1, true),
        (VERSION_1 | 1, true),
        (TRANSPORT_FEATURES, true),
        (0, false),
        (1, false),
        (VERSION_1 | 2, false),
        (VERSION_1 | 1 << 34, false), // packed ring
        (u64::MAX, false),
    ] {
        let mut rig = Rig::new();
        rig.bring_to(11, features);
        assert_eq!(rig.get(reg::STATUS), if ok { 11 } else { 3 }, "{features:#x}");
        // Too late to change them.
        rig.set_features(u64::MAX);
        assert_eq!(rig.transport.driver_features == features, ok || features == u64::MAX);
    }
}

#[test]
fn queues_cannot_be_changed_before_features_ok_while_ready_or_at_work() {
    let mut rig = Rig::new();
    rig.bring_to(3, VERSION_1);
    rig.set(reg::QUEUE_SIZE, 8);
    rig.set(reg::QUEUE_READY, 1);
    assert_eq!((rig.transport.queues[0].size, rig.get(reg::QUEUE_READY)), (16, 0));
    assert_eq!(rig.counter("bad_accesses"), 2);

    rig.set_features(VERSION_1);
    rig.set(reg::STATUS, 11);
    rig.set(reg::QUEUE_SIZE, 8);
    rig.set(reg::QUEUE_READY, 1);
    rig.set(reg::QUEUE_SIZE, 4);
    assert_eq!((rig.transport.queues[0].size, rig.get(reg::QUEUE_READY)), (8, 1));
    rig.set(reg::QUEUE_READY, 0);
    rig.set_up_queues();
    rig.set(reg::STATUS, 15);
    rig.set(reg::QUEUE_SEL, 0);
    rig.set(reg::QUEUE_READY, 1);
    rig.set(reg::QUEUE_SIZE, 4);
    assert_eq!((rig.transport.queues[0].size, rig.get(reg::QUEUE_READY)), (16, 1));
    assert!(rig.transport.is_active());

    // There is no such queue.
    rig.set(reg::QUEUE_SEL, 2);
    assert_eq!((rig.get(reg::QUEUE_SIZE_MAX), rig.get(reg::QUEUE_READY)), (0, 0));
    rig.set(reg::QUEUE_SEL, u32::MAX);
    assert_eq!(rig.get(reg::QUEUE_SIZE_MAX), 0);
    let before = rig.counter("bad_accesses");
    rig.set(reg::QUEUE_SIZE, 8);
    assert_eq!(rig.counter("bad_accesses"), before + 1);
}

/// As Linux's `vm_del_vq` does it, for whichever driver does not reset the device first.
#[test]
fn a_driver_stops_a_queue_and_with_it_the_device_until_a_reset() {
    let mut rig = Rig::new();
    rig.bring_to(15, VERSION_1);
    rig.echo(0, b"at work");
    let used = rig.guest.queues[0].used_idx();
    for index in [1, 0] {
        rig.set(reg::QUEUE_SEL, index);
        rig.set(reg::QUEUE_READY, 0);
        assert_eq!((rig.get(reg::QUEUE_READY), rig.get(reg::STATUS)), (0, OK));
        assert!(!rig.transport.is_active());
    }
    // Its rings may be other memory by now.
    rig.guest.send(0, &[Buffer::Out(b"nobody".to_vec()), Buffer::In(6)]);
    rig.transport.on_queue(0);
    rig.set(reg::QUEUE_READY, 1);
    assert_eq!((rig.get(reg::QUEUE_READY), rig.guest.queues[0].used_idx()), (0, used));
    rig.transport.pause();
    let saved = rig.transport.save().unwrap();
    assert!(!saved.active && saved.status == OK);
    rig.transport.resume();
    rig.set(reg::STATUS, 0);
    rig.guest.restart(&rig.transport.device().queue_sizes());
    rig.bring_to(15, VERSION_1);
    rig.echo(0, b"again");
}

#[test]
fn bad_queues_ask_for_a_reset() {
    let cases: [(u64, u32); 6] = [
        (reg::QUEUE_SIZE, 0),
        (reg::QUEUE_SIZE, 12),
        (reg::QUEUE_SIZE, 0x1_0010), // 16 in its lower half
        (reg::QUEUE_DEVICE_HIGH, 1),
        (reg::QUEUE_DEVICE_LOW, 0x40_0000 - 4),
        (reg::QUEUE_DESC_LOW, 0x1_0008),
    ];
    for (register, value) in cases {
        let mut rig = Rig::new();
        rig.bring_to(11, VERSION_1);
        rig.set_up_queues();
        rig.set(reg::QUEUE_SEL, 0);
        rig.set(reg::QUEUE_READY, 0);
        rig.set(register, value);
        rig.set(reg::QUEUE_READY, 1);
        rig.set(reg::STATUS, 15);
        assert_eq!(rig.get(reg::STATUS), OK | status::NEEDS_RESET, "{register:#x} {value:#x}");
        assert_eq!(
            (rig.line.count(), rig.get(reg::INTERRUPT_STATUS)),
            (1, 2),
            "told by a configuration change"
        );
        assert!(!rig.transport.is_active());
        rig.set(reg::QUEUE_NOTIFY, 0);
        rig.transport.on_queue(0);
        assert_eq!(rig.counter("bad_queues"), 1);

        // Linux writes the status back with what it read.
        rig.set(reg::STATUS, OK | status::NEEDS_RESET | status::FAILED);
        assert_eq!(rig.get(reg::STATUS), OK | status::NEEDS_RESET | status::FAILED);
        rig.set(reg::STATUS, 0);
        assert_eq!((rig.get(reg::STATUS), rig.get(reg::INTERRUPT_STATUS)), (0, 0));
        rig.bring_to(15, VERSION_1);
        rig.guest.restart(&[16, 64]);
        assert!(rig.transport.is_active());
    }
}

#[test]
fn a_device_that_refuses_asks_for_a_reset() {
    let mut rig = Rig::new();
    rig.bring_to(15, VERSION_1 | Echo::REFUSE);
    assert_eq!(rig.get(reg::STATUS), OK | status::NEEDS_RESET);
    assert!(!rig.transport.is_active());
}

#[test]
fn an_unused_queue_stays_unused() {
    let mut rig = Rig::new();
    rig.bring_to(11, VERSION_1);
    rig.set_up_queues();
    rig.set(reg::QUEUE_SEL, 1);
    rig.set(reg::QUEUE_READY, 0);
    rig.set(reg::STATUS, 15);
    assert_eq!(rig.get(reg::STATUS), OK);
    rig.transport.on_queue(1);
    rig.transport.on_queue(2);
    rig.transport.on_queue(usize::MAX);
}

#[test]
fn reset_forgets_everything() {
    let mut rig = Rig::new();
    rig.bring_to(15, TRANSPORT_FEATURES);
    rig.echo(0, b"before");
    rig.set(reg::QUEUE_NOTIFY, 1);
    rig.set(reg::STATUS, 0);
    assert!(!rig.transport.is_active());
    assert_eq!((rig.get(reg::STATUS), rig.get(reg::INTERRUPT_STATUS), rig.get(reg::QUEUE_READY)), (0, 0, 0));
    assert!(rig.transport.kicks()[1].read().is_err(), "a notification for the old rings");
    rig.guest.restart(&[16, 64]);
    rig.bring_to(15, TRANSPORT_FEATURES);
    rig.echo(0, b"after");
    assert_eq!(rig.counter("resets"), 1);
}

#[test]
fn accesses_of_wrong_width_or_place_do_nothing() {
    let mut rig = Rig::new();
    rig.bring_to(3, VERSION_1);
    for len in [0, 1, 2, 3, 5, 8, 16] {
        let mut data = vec![0xee; len];
        rig.transport.read(reg::MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0; len]);
        rig.transport.write(reg::STATUS, &vec![0; len]);
    }
    for offset in [reg::STATUS + 1, reg::STATUS + 2, 0x3c, 0x0c0, reg::QUEUE_NOTIFY, reg::DRIVER_FEATURES] {
        assert_eq!(rig.get(offset), 0, "{offset:#x}");
    }
    rig.set(reg::MAGIC_VALUE, 1);
    rig.set(reg::CONFIG_GENERATION, 1);
    assert_eq!(rig.get(reg::STATUS), 3);
    assert_eq!(rig.counter("bad_accesses"), 7 + 7 + 6 + 2);
}

#[test]
fn there_is_no_shared_memory() {
    let mut rig = Rig::new();
    rig.set(reg::SHM_SEL, 0);
    for register in [reg::SHM_LEN_LOW, reg::SHM_LEN_HIGH, reg::SHM_BASE_LOW, reg::SHM_BASE_HIGH] {
        assert_eq!(rig.get(register), u32::MAX);
    }
}

#[test]
fn the_configuration_space_has_any_width_and_an_end() {
    let mut rig = Rig::new();
    rig.set(reg::CONFIG, 0x0101_0101);
    assert_eq!(rig.get(reg::CONFIG), 0, "not before DRIVER");
    rig.bring_to(3, VERSION_1);
    rig.set(reg::CONFIG, 0x0403_0201);
    rig.transport.write(reg::CONFIG + 6, &[7]);
    let mut data = [0xee; 8];
    rig.transport.read(reg::CONFIG, &mut data);
    assert_eq!(data, [1, 2, 3, 4, 0, 0, 7, 0]);
    rig.transport.read(reg::CONFIG + 6, &mut data);
    assert_eq!(data, [7, 0, 0, 0, 0, 0, 0, 0]);
    rig.transport.read(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
    rig.transport.write(u64::MAX, &data);
    rig.transport.write(reg::SIZE - 1, &data);
}

#[test]
fn a_saved_transport_goes_on_as_another() {
    let mut rig = Rig::new();
    rig.bring_to(15, TRANSPORT_FEATURES | 1);
    rig.echo(0, b"one");
    assert!(matches!(rig.transport.save(), Err(StateError::NotPaused { .. })));
    rig.transport.pause();

    // Comes while paused: nobody is told but the kick, which the new process does not have.
    let fake = &mut rig.guest.queues[0];
    fake.add(&mut rig.guest.heap, &[Buffer::Out(b"two".into()), Buffer::In(3)]);
    rig.set(reg::QUEUE_NOTIFY, 0);
    rig.transport.on_queue(0);
    assert!(rig.guest.queues[0].take_used().is_none());

    let state = rig.transport.save().unwrap();
    let json = serde_json::to_string(&state).unwrap();
    let state: MmioState<_> = serde_json::from_str(&json).unwrap();
    let line = Arc::new(CountedLine::default());
    rig.transport = MmioTransport::new(Echo::default(), rig.guest.memory.clone(), line.clone()).unwrap();
    rig.transport.restore(&state).unwrap();
    assert_eq!(rig.transport.save().unwrap(), state);
    assert!(rig.guest.queues[0].take_used().is_none(), "paused");
    rig.transport.resume();
    assert_eq!(rig.guest.queues[0].take_used().unwrap().data, b"two");
    assert_eq!(line.count(), 2, "the one that was not acknowledged, and the new one");
    rig.line = line;
    rig.echo(1, b"three");
    assert!(matches!(rig.transport.restore(&state), Err(StateError::InUse { .. })));
}

#[test]
fn a_transport_at_every_stage_is_saved_and_restored() {
    for stage in [0, 1, 3, 11] {
        let mut rig = Rig::new();
        rig.bring_to(stage, VERSION_1);
        rig.set(reg::QUEUE_SEL, 1);
        rig.transport.pause();
        let state = rig.transport.save().unwrap();
        let mut new = Rig::new();
        new.transport.restore(&state).unwrap();
        new.transport.resume();
        assert_eq!((new.get(reg::STATUS), new.get(reg::QUEUE_SIZE_MAX)), (stage, 64));
        new.set(reg::STATUS, 0);
        new.bring_to(15, VERSION_1);
        new.echo(0, b"works");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    let mut rig = Rig::new();
    rig.bring_to(15, VERSION_1);
    rig.transport.pause();
    let state = rig.transport.save().unwrap();
    let refused = |change: fn(&mut MmioState<_>)| {
        let mut state = state.clone();
        change(&mut state);
        Rig::new().transport.restore(&state).unwrap_err()
    };
    assert!(matches!(refused(|s| s.device_id = 1), StateError::DeviceId { saved: 1, id: 42, .. }));
    assert!(matches!(refused(|s| s.queues.truncate(1)), StateError::Queues { .. }));
    assert!(matches!(refused(|s| s.queues[1].max_size = 1), StateError::Queues { .. }));
    assert!(matches!(refused(|s| s.driver_features = 2), StateError::Features { missing: 2, .. }));
    assert!(matches!(refused(|s| s.queues[1].used_ring = 1), StateError::Queue { index: 1, .. }));
    assert!(matches!(refused(|s| s.queues[1].size = 3), StateError::Queue { index: 1, .. }));
}

#[test]
fn a_broken_ring_shows_in_the_status_and_survives_saving() {
    let mut rig = Rig::new();
    rig.bring_to(15, VERSION_1);
    rig.guest.queues[0].set_avail_idx(0x8000);
    rig.transport.on_queue(0);
    assert_eq!(rig.get(reg::STATUS), OK | status::NEEDS_RESET);
    rig.transport.pause();
    let state = rig.transport.save().unwrap();
    let mut new = Rig::new();
    new.transport.restore(&state).unwrap();
    new.transport.resume();
    assert_eq!(new.get(reg::STATUS), OK | status::NEEDS_RESET);
    assert_eq!(rig.counter("breakages"), 1);
    new.set(reg::STATUS, 0);
    new.bring_to(15, VERSION_1);
    new.echo(0, b"works");
}

#[derive(Debug, Clone)]
enum Action {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Queue(usize),
    BringUp(u32),
    PauseAndResume,
    SaveAndRestore,
}

fn action() -> impl Strategy<Value = Action> {
    // Mostly registers, and mostly words: else little of it gets anywhere.
    let offset =
        prop_oneof![8 => (0_u64..0x44).prop_map(|word| word * 4), 1 => 0_u64..0x1100, 1 => any::<u64>()];
    let value = prop_oneof![Just(0_u32), Just(1), Just(3), Just(11), Just(15), 0_u32..256, any::<u32>()];
    let word = value.prop_map(|value| value.to_le_bytes().to_vec());
    let bytes = prop_oneof![8 => word, 1 => prop::collection::vec(any::<u8>(), 0..16)];
    prop_oneof![
        12 => (offset.clone(), bytes).prop_map(|(offset, bytes)| Action::Write(offset, bytes)),
        4 => (offset, 0_usize..16).prop_map(|(offset, len)| Action::Read(offset, len)),
        2 => (0_usize..3).prop_map(Action::Queue),
        2 => prop_oneof![Just(3_u32), Just(11), Just(15)].prop_map(Action::BringUp),
        1 => Just(Action::PauseAndResume),
        1 => Just(Action::SaveAndRestore),
    ]
}

proptest! {
    /// Whatever the guest writes: no panic, and the status is one of the diagram.
    #[test]
    fn bears_any_accesses(actions in prop::collection::vec(action(), 1..100)) {
        let mut rig = Rig::new();
        for action in actions {
            match action {
                Action::Write(offset, data) => rig.transport.write(offset, &data),
                Action::Read(offset, len) => rig.transport.read(offset, &mut vec![0; len]),
                Action::Queue(index) => rig.transport.on_queue(index),
                Action::BringUp(status) => {
                    rig.set(reg::STATUS, 0);
                    rig.bring_to(status, TRANSPORT_FEATURES | 1);
                }
                Action::PauseAndResume => {
                    rig.transport.pause();
                    rig.transport.resume();
                }
                Action::SaveAndRestore => {
                    rig.transport.pause();
                    let state = rig.transport.save().unwrap();
                    let mut new = MmioTransport::new(Echo::default(), rig.guest.memory.clone(), rig.line.clone()).unwrap();
                    new.restore(&state).unwrap();
                    prop_assert_eq!(new.save().unwrap(), state);
                    new.resume();
                    rig.transport = new;
                }
            }
            let now = rig.get(reg::STATUS) & !status::NEEDS_RESET & !status::FAILED;
            prop_assert!([0, 1, 3, 11, 15].contains(&now), "status {:#x}", now);
            prop_assert!(!rig.transport.is_active() || now == OK);
        }
    }
}
