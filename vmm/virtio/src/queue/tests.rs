//! Queues between a fake driver and themselves.

use std::os::fd::AsFd;

use super::*;
use crate::testing::contract::CASES;
use crate::testing::{Buffer, FakeQueue, Guest, INDIRECT, MEMORY_END, NEXT, SEAM};

const SIZE: u16 = 16;

fn guest(event_idx: bool) -> (Guest, Queue) {
    let guest = Guest::new(&[SIZE], event_idx);
    let queue = queue(&guest);
    (guest, queue)
}

fn queue(guest: &Guest) -> Queue {
    let state = guest.queues[0].state();
    Queue::new(&state, &guest.memory, guest.interrupt.clone(), "test", 0).unwrap()
}

fn add(guest: &mut Guest, buffers: &[Buffer]) -> u16 {
    guest.queues[0].add(&mut guest.heap, buffers)
}

fn one(guest: &mut Guest) -> u16 {
    add(guest, &[Buffer::Out(vec![1, 2, 3]), Buffer::In(2)])
}

#[test]
fn a_chain_carries_what_the_driver_wrote_and_brings_back_the_answer() {
    let (mut guest, mut queue) = guest(true);
    for indirect in [false, true] {
        let buffers = [
            Buffer::Out(vec![1, 2]),
            Buffer::Out(vec![3, 4, 5]),
            Buffer::In(1),
            Buffer::In(4),
            Buffer::In(3),
        ];
        let fake = &mut guest.queues[0];
        let head = if indirect {
            fake.add_indirect(&mut guest.heap, &buffers)
        } else {
            fake.add(&mut guest.heap, &buffers)
        };

        let chain = queue.pop(&guest.memory).unwrap();
        assert_eq!(chain.head(), head);
        let (mut reader, mut writer) = chain.split();
        assert_eq!((reader.left(), writer.left()), (5, 8));
        assert_eq!(reader.read_obj::<u32>(), Ok(0x0403_0201));
        assert_eq!(reader.read_obj::<u32>(), Err(ShortChain { wanted: 4, left: 1 }));
        writer.write_all(&[9, 8, 7, 6]).unwrap();
        let written = u32::try_from(writer.written()).unwrap();
        queue.push_used(&guest.memory, head, written);

        let used = guest.queues[0].take_used().unwrap();
        assert_eq!(used.len, 4);
        assert_eq!(used.data[..4], [9, 8, 7, 6]);
        assert_eq!(used.data[4..], [0xa5; 4]);
    }
    assert!(queue.pop(&guest.memory).is_none());
    assert!(!guest.interrupt.needs_reset());
}

#[test]
fn halves_of_a_split_cannot_reach_each_other() {
    let (mut guest, mut queue) = guest(true);
    for at in 0..=6 {
        let head = add(&mut guest, &[Buffer::Out((1..=6).collect()), Buffer::In(2), Buffer::In(4)]);
        let (mut front, mut room) = queue.pop(&guest.memory).unwrap().split();
        let mut back = front.split_off(at).unwrap();
        let (mut a, mut b) = ([0; 8], [0; 8]);
        assert_eq!((front.read(&mut a), back.read(&mut b)), (at, 6 - at));
        assert_eq!([&a[..at], &b[..6 - at]].concat(), [1, 2, 3, 4, 5, 6]);

        let mut tail = room.split_off(at).unwrap();
        assert_eq!((room.write(&[1; 9]), tail.write(&[2; 9])), (at, 6 - at));
        assert_eq!((room.written(), tail.written()), (at, 6 - at));
        assert!(tail.split_off(1).is_err());
        queue.push_used(&guest.memory, head, 6);
        assert_eq!(guest.queues[0].take_used().unwrap().data, [vec![1; at], vec![2; 6 - at]].concat());
    }
}

#[test]
fn files_are_read_and_written_in_place() {
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"0123456789").unwrap();
    let (mut guest, mut queue) = guest(true);
    let head = add(
        &mut guest,
        &[Buffer::Out(b"abc".into()), Buffer::Out(b"de".into()), Buffer::In(3), Buffer::In(5)],
    );
    let (mut reader, mut writer) = queue.pop(&guest.memory).unwrap().split();
    writer.read_exact_at(file.as_fd(), 1).unwrap();
    reader.skip(1).unwrap();
    reader.write_all_at(file.as_fd(), 8).unwrap();
    assert_eq!((reader.left(), writer.left(), writer.written()), (0, 0, 8));
    queue.push_used(&guest.memory, head, 8);
    assert_eq!(guest.queues[0].take_used().unwrap().data, b"12345678");
    let mut content = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut content).unwrap();
    assert_eq!(content, b"01234567bcde");

    // Beyond the end of the file there is nothing to read.
    add(&mut guest, &[Buffer::In(3)]);
    let (_, mut writer) = queue.pop(&guest.memory).unwrap().split();
    assert_eq!(writer.read_exact_at(file.as_fd(), 10).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    assert!(writer.read_exact_at(file.as_fd(), u64::MAX).is_err());
}

#[test]
fn streams_take_no_more_than_the_limit() {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    let (near, far) = UnixStream::pair().unwrap();
    let (mut guest, mut queue) = guest(true);
    let head = add(
        &mut guest,
        &[Buffer::Out(b"abc".into()), Buffer::Out(b"de".into()), Buffer::In(2), Buffer::In(6)],
    );
    let (mut reader, mut writer) = queue.pop(&guest.memory).unwrap().split();
    assert_eq!(reader.write_to(near.as_fd(), 4).unwrap(), 4);
    assert_eq!(reader.write_to(near.as_fd(), 4).unwrap(), 1);
    assert_eq!(reader.write_to(near.as_fd(), 4).unwrap(), 0);
    assert_eq!(writer.read_from(far.as_fd(), 3).unwrap(), 3);
    assert_eq!(writer.read_from(far.as_fd(), 9).unwrap(), 2);
    drop(near);
    assert_eq!(writer.read_from(far.as_fd(), 9).unwrap(), 0);
    queue.push_used(&guest.memory, head, 5);
    assert_eq!(guest.queues[0].take_used().unwrap().data[..5], *b"abcde");
}

#[test]
fn a_buffer_across_two_regions_is_whole() {
    let (mut guest, mut queue) = guest(true);
    guest.memory.write_slice(&[1, 2, 3, 4], GuestAddress(SEAM - 2)).unwrap();
    guest.queues[0].add_raw(&[crate::testing::Descriptor { address: SEAM - 2, len: 4, flags: 0, next: 0 }]);
    let (mut reader, _) = queue.pop(&guest.memory).unwrap().split();
    assert_eq!(reader.read_obj::<[u8; 4]>(), Ok([1, 2, 3, 4]));
}

/// A mapping that faults when it is written, right behind memory.
fn with_read_only_memory(guest: &mut Guest) {
    use crate::memory::{BLOCK, Blocks, Region};
    use vm_memory::mmap::MmapRegionBuilder;
    let mapping = MmapRegionBuilder::new(usize::try_from(BLOCK).unwrap())
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE);
    let mapping =
        vm_memory::GuestRegionMmap::new(mapping.build().unwrap(), GuestAddress(MEMORY_END)).unwrap();
    let blocks = std::sync::Arc::new(Blocks::new(1));
    blocks.set(0..1, true);
    let region = std::sync::Arc::new(Region::read_only(mapping, blocks));
    guest.memory = guest.memory.insert_region(region).unwrap();
}

#[test]
fn read_only_memory_is_read_and_never_written() {
    let (mut guest, _) = guest(true);
    with_read_only_memory(&mut guest);
    let at = |address, len, flags| crate::testing::Descriptor { address, len, flags, next: 1 };
    let write = crate::testing::WRITE;
    let mut first = queue(&guest);
    guest.queues[0].add_raw(&[at(MEMORY_END - 4, 4096, NEXT), at(MEMORY_END - 4096, 4096, write)]);
    let (mut reader, mut writer) = first.pop(&guest.memory).unwrap().split();
    let mut bytes = [0xa5; 4096];
    assert_eq!((reader.read(&mut bytes), writer.write(&bytes)), (4096, 4096));
    assert_eq!(bytes[4..], [0; 4092]);
    guest.restart(&[SIZE]);
    // All of it, its first byte, its last, and a buffer of no bytes at all, which is nobody's.
    for (address, len, good) in [
        (MEMORY_END, 1, false),
        (MEMORY_END - 4, 5, false),
        (MEMORY_END + 0x1f_ffff, 1, false),
        (MEMORY_END + 8, 0, true),
    ] {
        let mut queue = queue(&guest);
        guest.queues[0].add_raw(&[at(address, len, write)]);
        assert_eq!(queue.pop(&guest.memory).is_some(), good, "{address:#x}, {len}");
        assert_eq!(queue.is_live(), good, "{address:#x}, {len}");
        guest.restart(&[SIZE]);
    }
}

#[test]
fn no_notification_is_lost_and_few_are_asked_for() {
    for event_idx in [false, true] {
        let (mut guest, mut queue) = guest(event_idx);
        assert!(queue.pop(&guest.memory).is_none());
        one(&mut guest);
        assert!(guest.queues[0].must_notify(), "the queue was empty");
        assert!(queue.pop(&guest.memory).is_some());
        one(&mut guest);
        assert!(!guest.queues[0].must_notify(), "the device is at work anyway");
        assert!(queue.pop(&guest.memory).is_some());
        assert!(queue.pop(&guest.memory).is_none());
        one(&mut guest);
        assert!(guest.queues[0].must_notify(), "the device saw the end of the queue");
    }
}

#[test]
fn the_driver_is_interrupted_when_it_wants() {
    for event_idx in [false, true] {
        let (mut guest, mut queue) = guest(event_idx);
        assert!(!queue.notify(&guest.memory), "nothing was used");
        for _ in 0..3 {
            let head = one(&mut guest);
            queue.pop(&guest.memory).unwrap();
            queue.push_used(&guest.memory, head, 0);
        }
        assert!(queue.notify(&guest.memory));
        assert!(!queue.notify(&guest.memory), "told already");
        assert_eq!((guest.interrupts(), guest.interrupt.status()), (1, 1));

        // The driver has not looked yet: with the event index, it does not want to hear of a fourth.
        let head = one(&mut guest);
        queue.pop(&guest.memory).unwrap();
        queue.push_used(&guest.memory, head, 0);
        assert_eq!(queue.notify(&guest.memory), !event_idx);

        // It looks; and without the event index it sets VIRTQ_AVAIL_F_NO_INTERRUPT.
        while guest.queues[0].take_used().is_some() {}
        if !event_idx {
            guest.memory.write_obj(1_u16, GuestAddress(guest.queues[0].state().avail_ring)).unwrap();
        }
        let head = one(&mut guest);
        queue.pop(&guest.memory).unwrap();
        queue.push_used(&guest.memory, head, 0);
        assert_eq!(queue.notify(&guest.memory), event_idx);
    }
}

#[test]
fn a_chain_put_back_comes_again() {
    let (mut guest, mut queue) = guest(true);
    let head = one(&mut guest);
    assert_eq!(queue.pop(&guest.memory).unwrap().head(), head);
    queue.undo_pop();
    assert_eq!(queue.pop(&guest.memory).unwrap().head(), head);
    assert!(queue.pop(&guest.memory).is_none());
}

#[test]
fn indices_wrap() {
    let (mut guest, mut queue) = guest(true);
    for _ in 0..70_000 {
        let head = one(&mut guest);
        assert_eq!(queue.pop(&guest.memory).unwrap().head(), head);
        queue.push_used(&guest.memory, head, 0);
        assert!(queue.notify(&guest.memory));
        guest.queues[0].take_used().unwrap();
    }
}

#[test]
fn a_saved_queue_goes_on_where_it_was() {
    let (mut guest, mut queue) = guest(true);
    one(&mut guest);
    queue.pop(&guest.memory).unwrap();
    let second = one(&mut guest);
    let state = queue.state();
    let mut restored = Queue::new(&state, &guest.memory, guest.interrupt.clone(), "test", 0).unwrap();
    assert_eq!(restored.state(), state);
    assert_eq!(restored.pop(&guest.memory).unwrap().head(), second);

    restored.break_off("test");
    let broken = Queue::new(&restored.state(), &guest.memory, guest.interrupt.clone(), "test", 0).unwrap();
    assert!(!broken.is_live());
}

#[test]
fn malformed_chains_break_the_queue_and_only_those() {
    let harmless = [
        "no byte at all, readable",
        "no byte at all, writable",
        "no byte, outside memory",
        "one byte, readable",
        "one byte, writable",
        "readable only",
        "writable only",
        "across two regions",
        "indirect and next", // The table is the whole chain, NEXT is ignored.
        "the rings themselves as buffer",
        "the same chain twice",
    ];
    for (name, make) in CASES {
        let (mut guest, _) = guest(true);
        make(&mut guest, 0);
        let mut queue = queue(&guest);
        let popped = queue.pop(&guest.memory).is_some();
        assert_eq!(popped, harmless.contains(name), "{name}");
        assert_eq!(guest.interrupt.needs_reset(), !popped, "{name}");
        if !popped {
            assert_eq!(
                (guest.interrupts(), guest.interrupt.status(), guest.interrupt.breakages()),
                (1, 2, 1)
            );
            // Broken for good, however good what follows may be.
            one(&mut guest);
            assert!(queue.pop(&guest.memory).is_none() && !queue.is_live());
            queue.push_used(&guest.memory, 0, 0);
            assert!(!queue.notify(&guest.memory));
        }
    }
}

/// By a head alone a chain is what it was when it was popped, or is refused for the same reason.
#[test]
fn a_chain_is_found_again_by_its_head() {
    let same = |guest: &Guest, name: &str| {
        let table = guest.queues[0].state().desc_table;
        let mut ring = guest.queues[0].state().to_ring(&guest.memory).unwrap();
        let raw = ring.iter(&guest.memory).unwrap().next().unwrap();
        let head = raw.head_index();
        let popped = Chain::check(head, raw, &guest.memory, SIZE);
        let again = Chain::check(head, Walk::new(&guest.memory, table, SIZE, head), &guest.memory, SIZE);
        let say = |chain: Result<Chain<'_>, QueueError>| match chain {
            Ok(chain) => format!("{:?}", (chain.head(), chain.lens(), chain.writable().len())),
            Err(error) => error.to_string(),
        };
        assert_eq!(say(popped), say(again), "{name}");
    };
    for (name, make) in CASES {
        let (mut guest, _) = guest(true);
        make(&mut guest, 0);
        same(&guest, name);
    }
    let buffers = [Buffer::Out(vec![1; 70]), Buffer::In(9), Buffer::In(80)];
    let (mut guest, mut queue) = guest(true);
    let (heap, fake) = (&mut guest.heap, &mut guest.queues[0]);
    let heads = [fake.add_indirect(heap, &buffers), fake.add(heap, &buffers)];
    same(&guest, "good");
    for head in heads {
        assert_eq!(queue.pop(&guest.memory).unwrap().head(), head);
    }
    // In any order, and only while the queue is whole.
    for head in [heads[1], heads[0]] {
        assert_eq!(queue.again(&guest.memory, head).unwrap().lens(), (70, 89));
        queue.push_used(&guest.memory, head, 1);
        assert_eq!(guest.queues[0].take_used().unwrap().head, head);
    }
    assert!(queue.again(&guest.memory, SIZE).is_none());
    assert!(guest.interrupt.needs_reset() && queue.again(&guest.memory, heads[0]).is_none());
}

#[test]
fn an_available_index_out_of_reach_breaks_the_queue() {
    for index in [SIZE + 1, 0x8000, u16::MAX] {
        let (guest, mut queue) = guest(true);
        guest.queues[0].set_avail_idx(index);
        assert!(queue.pop(&guest.memory).is_none());
        assert!(guest.interrupt.needs_reset(), "{index}");
    }
    let (guest, mut queue) = guest(true);
    guest.queues[0].set_avail_idx(SIZE);
    assert!(queue.pop(&guest.memory).is_some(), "descriptor 0 is all zeros: a chain of one empty buffer");
    assert!(!guest.interrupt.needs_reset());
}

#[test]
fn a_used_head_that_the_ring_does_not_have_breaks_the_queue() {
    let (guest, mut queue) = guest(true);
    queue.push_used(&guest.memory, SIZE, 0);
    assert!(guest.interrupt.needs_reset());
}

#[test]
fn an_unused_queue_is_empty() {
    let (guest, _) = guest(true);
    let state = QueueState::unused(SIZE);
    let mut queue = Queue::new(&state, &guest.memory, guest.interrupt.clone(), "test", 0).unwrap();
    assert!(!queue.is_live());
    assert!(queue.pop(&guest.memory).is_none());
    assert!(!guest.interrupt.needs_reset());
}

#[test]
fn a_longest_chain_is_accepted() {
    let (mut guest, mut queue) = guest(true);
    let buffers = vec![Buffer::In(1); usize::from(SIZE)];
    add(&mut guest, &buffers);
    assert_eq!(queue.pop(&guest.memory).unwrap().split().1.left(), usize::from(SIZE));
    // The table of an indirect chain may end with memory.
    let mut fake = FakeQueue::new(&guest.memory, 0x8_0000, SIZE, true);
    let mut queue = Queue::new(&fake.state(), &guest.memory, guest.interrupt.clone(), "test", 0).unwrap();
    fake.add_raw(&[crate::testing::Descriptor {
        address: MEMORY_END - 16,
        len: 16,
        flags: INDIRECT,
        next: 0,
    }]);
    assert!(queue.pop(&guest.memory).is_some());
}

#[test]
fn a_message_fills_as_many_chains_as_it_needs() {
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let (mut guest, mut queue) = guest(true);
    let heads = [3, 5, 4].map(|len| add(&mut guest, &[Buffer::In(len - 1), Buffer::In(1)]));
    let mut room = Room::default();
    ours.set_nonblocking(true).unwrap();
    assert_eq!(room.receive(ours.as_fd()).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    while let Some(chain) = queue.pop(&guest.memory) {
        assert_eq!(chain.lens(), (0, [3, 5, 4][room.chains()]));
        room.push(chain);
    }
    assert_eq!((room.bytes(), room.chains(), room.is_full()), (12, 3, false));
    theirs.send(&[7; 8]).unwrap();
    assert_eq!(room.receive(ours.as_fd()).unwrap(), Some(8));
    assert_eq!([0, 1, 3, 4, 8, 9, 12].map(|len| room.chains_of(len)), [0, 1, 1, 2, 2, 3, 3]);
    room.write_at(2, &[1, 2, 3]);
    let used = room.take(8);
    assert_eq!(used, [(heads[0], 3), (heads[1], 5)]);
    assert_eq!((room.bytes(), room.chains()), (4, 1));
    queue.undo_pop();

    queue.push_used_together(&guest.memory, &used);
    queue.push_used_together(&guest.memory, &[]);
    assert!(queue.notify(&guest.memory));
    let got = [(); 2].map(|()| guest.queues[0].take_used().unwrap());
    assert_eq!(got.each_ref().map(|used| (used.head, used.len)), [(heads[0], 3), (heads[1], 5)]);
    assert_eq!(got.map(|used| used.data).concat(), [7, 7, 1, 2, 3, 7, 7, 7]);
    assert_eq!(queue.pop(&guest.memory).unwrap().head(), heads[2]);
    assert!(guest.queues[0].take_used().is_none());
}

#[test]
fn a_message_longer_than_its_room_is_told_from_one_that_fits() {
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let (mut guest, mut queue) = guest(true);
    add(&mut guest, &[Buffer::In(6)]);
    let mut room = Room::default();
    room.push(queue.pop(&guest.memory).unwrap());
    for (len, received) in [(6, Some(6)), (7, None), (100, None), (1, Some(1))] {
        theirs.send(&vec![1; len]).unwrap();
        assert_eq!(room.receive(ours.as_fd()).unwrap(), received);
    }
}
