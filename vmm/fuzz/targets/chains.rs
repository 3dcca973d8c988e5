//! Descriptor chains and rings: whatever lies in them, what `Queue::pop` gives can be read and written.
#![no_main]

use std::cell::RefCell;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::queue::Queue;
use virtio::testing::Guest;

const SIZES: [u16; 2] = [16, 16];

thread_local! {
    static GUESTS: [RefCell<Guest>; 2] = [false, true].map(|event_idx| RefCell::new(Guest::new(&SIZES, event_idx)));
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let event_idx = usize::from(input.u8() & 1);
    GUESTS.with(|guests| {
        let mut guest = guests[event_idx].borrow_mut();
        guest.restart(&SIZES);
        let mut queues: Vec<Queue> = (0..SIZES.len())
            .map(|at| {
                let state = guest.queues[at].state();
                Queue::new(&state, &guest.memory, guest.interrupt.clone(), "fuzz", at)
                    .expect("rings are in memory")
            })
            .collect();
        for _ in 0..64 {
            if input.is_empty() {
                break;
            }
            let at = usize::from(input.u8() % 2);
            disturb(&mut guest, at, &mut input);
            if input.u8() % 4 != 0 {
                work(&mut queues[at], &guest, &mut input);
            }
        }
        for queue in &mut queues {
            work(queue, &guest, &mut input);
            let state = queue.state();
            let again = Queue::new(&state, &guest.memory, guest.interrupt.clone(), "fuzz", 0)
                .expect("was good before");
            assert_eq!(again.state(), state);
            assert_eq!(again.is_live(), queue.is_live());
        }
    });
});

/// What a device does: bounded, as a guest may make chains available as fast as they are taken.
fn work(queue: &mut Queue, guest: &Guest, input: &mut Input<'_>) {
    for _ in 0..32 {
        let Some(chain) = queue.pop(&guest.memory) else { break };
        let head = chain.head();
        let (mut reader, mut writer) = chain.split();
        let (readable, writable) = (reader.left(), writer.left());

        let mut bytes = [0; 300];
        let cut = usize::from(input.u8());
        if let Ok(mut tail) = reader.split_off(cut) {
            assert_eq!((reader.left(), tail.left()), (cut, readable - cut));
            tail.read(&mut bytes);
            let _ = tail.skip(cut);
        }
        let count = reader.read(&mut bytes);
        assert!(count <= readable);

        let cut = usize::from(input.u8());
        match writer.split_off(cut) {
            Ok(mut tail) => {
                assert_eq!((writer.left(), tail.left()), (cut, writable - cut));
                tail.write(&bytes);
            }
            Err(e) => assert_eq!((e.wanted, e.left), (cut, writable)),
        }
        writer.write(&bytes);
        assert!(writer.written() <= writable);
        queue.push_used(&guest.memory, head, u32::try_from(writer.written()).expect("at most 300"));
    }
    queue.notify(&guest.memory);
}
