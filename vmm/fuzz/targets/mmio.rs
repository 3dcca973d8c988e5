//! The registers of a transport with a device behind it, between saves, restores and hostile rings.
#![no_main]

use std::sync::Arc;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::mmio::{MmioTransport, TRANSPORT_FEATURES, registers as reg};
use virtio::testing::{CountedLine, Echo, Guest};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut guest = Guest::of(&Echo::default(), true);
    let line = Arc::new(CountedLine::default());
    let mut transport =
        MmioTransport::new(Echo::default(), guest.memory.clone(), line.clone()).expect("a few descriptors");
    for _ in 0..200 {
        if input.is_empty() {
            break;
        }
        match input.u8() % 8 {
            0..=2 => {
                let offset = u64::from(input.u8()) * 4;
                transport.write(offset, &input.u32().to_le_bytes());
            }
            3 => {
                let (offset, len) = (input.address(), usize::from(input.u8() % 17));
                transport.write(offset, input.bytes(len));
            }
            4 => {
                let (offset, len) = (u64::from(input.u16()), usize::from(input.u8() % 17));
                transport.read(offset, &mut vec![0; len]);
            }
            5 => bring_up(&mut transport, &guest, input.u8()),
            6 => {
                disturb(&mut guest, usize::from(input.u8() % 2), &mut input);
                transport.on_queue(usize::from(input.u8() % 3));
            }
            _ => {
                transport.pause();
                if input.u8() % 2 == 0 {
                    let state = transport.save().expect("it is paused");
                    let mut other = MmioTransport::new(Echo::default(), guest.memory.clone(), line.clone())
                        .expect("a few descriptors");
                    other.restore(&state).expect("what was saved fits");
                    assert_eq!(other.save().expect("it is paused"), state);
                    transport = other;
                }
                transport.resume();
            }
        }
        let mut status = [0; 4];
        transport.read(reg::STATUS, &mut status);
        let status = u32::from_le_bytes(status) & !(64 | 128);
        assert!([0, 1, 3, 11, 15].contains(&status), "status {status:#x}");
        assert!(!transport.is_active() || status == 15);
    }
});

/// What a good driver does, so that a run gets somewhere.
fn bring_up(transport: &mut MmioTransport<Echo>, guest: &Guest, steps: u8) {
    let mut set = |offset: u64, value: u32| transport.write(offset, &value.to_le_bytes());
    set(reg::STATUS, 0);
    set(reg::STATUS, 1);
    set(reg::STATUS, 3);
    for (sel, features) in [(0, TRANSPORT_FEATURES & 0xffff_ffff), (1, TRANSPORT_FEATURES >> 32)] {
        set(reg::DRIVER_FEATURES_SEL, sel);
        set(reg::DRIVER_FEATURES, u32::try_from(features).expect("32 bits of it"));
    }
    if steps % 4 == 0 {
        return;
    }
    set(reg::STATUS, 11);
    for (index, queue) in (0..).zip(&guest.queues) {
        let state = queue.state();
        set(reg::QUEUE_SEL, index);
        set(reg::QUEUE_SIZE, state.size.into());
        for (register, address) in [
            (reg::QUEUE_DESC_LOW, state.desc_table),
            (reg::QUEUE_DRIVER_LOW, state.avail_ring),
            (reg::QUEUE_DEVICE_LOW, state.used_ring),
        ] {
            set(register, u32::try_from(address).expect("memory ends at 4 MiB"));
        }
        set(reg::QUEUE_READY, 1);
    }
    if steps % 4 != 1 {
        set(reg::STATUS, 15);
    }
}
