use std::sync::{Arc, Mutex};

use vm_memory::Bytes;

use super::*;
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Descriptor, Guest, MEMORY_END, SEAM, WRITE};

/// Zeroes what is given back, as the host does, and counts calls.
#[derive(Debug, Clone, Default)]
struct Host {
    calls: Arc<Mutex<Vec<usize>>>,
    fails: Arc<Mutex<bool>>,
}

impl BalloonBackend for Host {
    fn give_back(&mut self, pages: &VolatileSlice<'_>) -> io::Result<()> {
        if *self.fails.lock().unwrap() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        assert!(pages.len().is_multiple_of(4096) && pages.ptr_guard().as_ptr().addr().is_multiple_of(4096));
        pages.copy_from(&vec![0; pages.len()]);
        self.calls.lock().unwrap().push(pages.len());
        Ok(())
    }
}

impl Host {
    fn calls(&self) -> Vec<usize> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

fn numbers(pages: &[u32]) -> Buffer {
    Buffer::Out(pages.iter().flat_map(|page| page.to_le_bytes()).collect())
}

fn start() -> (Balloon, Guest, Host) {
    let host = Host::default();
    let mut balloon = Balloon::new(Box::new(host.clone()));
    let guest = Guest::with(&mut balloon);
    (balloon, guest, host)
}

/// Fills the page with a byte.
fn mark(guest: &Guest, page: u32) {
    guest.memory.write_slice(&[0x77; 4096], GuestAddress(u64::from(page) * PAGE)).unwrap();
}

fn first_byte(guest: &Guest, page: u32) -> u8 {
    guest.memory.read_obj(GuestAddress(u64::from(page) * PAGE)).unwrap()
}

/// Free blocks of `len` bytes at `gpa`, as the driver reports them: the pages themselves are the buffers.
fn report(guest: &mut Guest, balloon: &mut Balloon, queue: usize, blocks: &[(u64, u32)]) {
    let descriptor = |i: usize, (address, len): (u64, u32)| Descriptor {
        address,
        len,
        flags: WRITE | if i + 1 < blocks.len() { crate::testing::NEXT } else { 0 },
        next: u16::try_from(i + 1).unwrap(),
    };
    let chain: Vec<_> = blocks.iter().enumerate().map(|(i, block)| descriptor(i, *block)).collect();
    guest.queues[queue].add_raw(&chain);
    guest.kicks[queue].write(1).unwrap();
    guest.settle(balloon);
    assert!(!guest.interrupt.needs_reset());
}

#[derive(Default)]
struct BalloonFixture(Host);

impl Fixture for BalloonFixture {
    type Device = Balloon;

    fn device(&mut self) -> Balloon {
        Balloon::new(Box::new(self.0.clone()))
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        // Pages that neither rings nor buffers lie in.
        guest.send((n % 2) as usize, &[numbers(&[0, n % 8])]);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Balloon, n: u32) {
        assert_eq!(guest.wait(device, (n % 2) as usize).len, 0);
    }
}

crate::device_contract_tests!(contract, BalloonFixture);

#[test]
fn what_goes_into_the_balloon_goes_back_in_as_few_calls_as_can_be() {
    let (mut balloon, mut guest, host) = start();
    for page in 0x300..0x306 {
        mark(&guest, page);
    }
    guest.ask(&mut balloon, 0, &[numbers(&[0x303, 0x301, 0x302, 0x305, 0x302])]);
    assert_eq!(host.calls(), [3 * 4096, 4096]);
    let left: Vec<_> = (0x300..0x306).map(|page| first_byte(&guest, page)).collect();
    assert_eq!(left, [0x77, 0, 0, 0, 0x77, 0]);
    guest.ask(&mut balloon, 1, &[numbers(&[0x301, 0x302])]);
    assert_eq!(host.calls(), Vec::<usize>::new(), "they come by themselves");
    let m = balloon.pages.metrics;
    assert_eq!((m.inflated_pages, m.deflated_pages, m.bytes_given_back), (5, 2, 4 * 4096));
}

#[test]
fn pages_outside_memory_are_counted_and_the_others_go() {
    let (mut balloon, mut guest, host) = start();
    let end = u32::try_from(MEMORY_END / PAGE).unwrap();
    let seam = u32::try_from(SEAM / PAGE).unwrap();
    guest.ask(&mut balloon, 0, &[numbers(&[end - 1, end, end + 1, u32::MAX, seam - 1, seam])]);
    assert_eq!(balloon.pages.metrics.bad_pages, 3);
    let mut calls = host.calls();
    calls.sort_unstable();
    assert_eq!(calls, [4096; 3], "two beside the seam, one at the end");
}

#[test]
fn requests_of_strange_lengths_are_counted() {
    let (mut balloon, mut guest, host) = start();
    guest.ask(&mut balloon, 0, &[Buffer::Out(vec![1, 0, 0, 0, 9, 9])]);
    assert_eq!((balloon.pages.metrics.bad_requests, host.calls().len()), (1, 1));
    guest.ask(&mut balloon, 0, &[numbers(&vec![1; MAX_PAGES + 1])]);
    assert_eq!((balloon.pages.metrics.bad_requests, host.calls().len()), (2, 1));
    guest.ask(&mut balloon, 0, &[Buffer::In(8)]);
    assert_eq!((balloon.pages.metrics.bad_requests, host.calls().len()), (2, 0));
}

#[test]
fn reported_blocks_go_back_on_either_queue() {
    let (mut balloon, mut guest, host) = start();
    for queue in [3, 4] {
        mark(&guest, 0x200);
        mark(&guest, 0x3ff);
        report(&mut guest, &mut balloon, queue, &[(0x20_0000, 0x10_0000), (0x30_0000, 0x10_0000)]);
        assert_eq!(host.calls(), [0x10_0000; 2]);
        assert_eq!((first_byte(&guest, 0x200), first_byte(&guest, 0x3ff)), (0, 0));
    }
    // Not whole pages: what is whole of them.
    report(&mut guest, &mut balloon, 3, &[(0x20_0100, 0x2000), (0x20_0100, 0x100)]);
    assert_eq!(host.calls(), [0x1000]);
    let m = balloon.pages.metrics;
    assert_eq!((m.bad_pages, m.reported_bytes), (1, 0x40_2100));
}

#[test]
fn queues_are_numbered_without_gaps() {
    let host = Host::default();
    let mut balloon = Balloon::new(Box::new(host.clone()));
    let mut guest = Guest::of(&balloon, true);
    let mut activation = guest.activation(&balloon);
    activation.features = PAGE_REPORTING;
    balloon.activate(activation).unwrap();
    report(&mut guest, &mut balloon, 2, &[(0x20_0000, 0x1000)]);
    assert_eq!(host.calls(), [0x1000]);
    balloon.request_statistics();
    // Without the feature there is no such queue.
    assert_eq!(Role::of(2, 0), None);
    assert_eq!(Role::of(4, STATS_VQ), None);
}

#[test]
fn a_pattern_is_kept_unless_it_is_zeros() {
    let (mut balloon, mut guest, host) = start();
    balloon.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
    mark(&guest, 0x200);
    report(&mut guest, &mut balloon, 3, &[(0x20_0000, 0x2000)]);
    assert_eq!((host.calls(), first_byte(&guest, 0x200)), (vec![], 0x77));
    assert_eq!(balloon.pages.metrics.poisoned_bytes, 0x2000);
    // What is in the balloon has no content to be missed.
    guest.ask(&mut balloon, 0, &[numbers(&[0x200])]);
    assert_eq!(host.calls(), [4096]);
    balloon.write_config(12, &[0; 4]);
    report(&mut guest, &mut balloon, 3, &[(0x20_0000, 0x2000)]);
    assert_eq!(host.calls(), [0x2000]);
}

#[test]
fn the_owner_sets_a_target_and_the_driver_says_what_it_did() {
    let (mut balloon, guest, _) = start();
    balloon.set_target(5 * PAGE).unwrap();
    assert_eq!((guest.interrupts(), guest.interrupt.status()), (1, crate::irq::CONFIG_CHANGE));
    let mut config = [0xff; 20];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    balloon.write_config(4, &3_u32.to_le_bytes());
    assert_eq!((balloon.target(), balloon.actual()), (5 * PAGE, 3 * PAGE));
    // Nothing else is the driver's, and no part of a field.
    for (offset, data) in [(0, &[9; 4][..]), (8, &[9; 4]), (4, &[9; 2]), (5, &[9; 4]), (u64::MAX, &[9])] {
        balloon.write_config(offset, data);
    }
    assert_eq!(balloon.save(), BalloonState { target_pages: 5, actual_pages: 3, poison_val: 0 });
    for bytes in [1, PAGE + 1, (u64::from(u32::MAX) + 1) * PAGE] {
        let error = balloon.set_target(bytes).unwrap_err();
        assert!(error.to_string().contains("at most 17592186040320 bytes"), "{error}");
    }
    balloon.reset();
    assert_eq!((balloon.target(), balloon.actual()), (5 * PAGE, 0));
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut balloon, mut guest, _) = start();
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    balloon.request_statistics(); // before there is a buffer
    let first = [entry(4, 111), entry(0, u64::MAX), entry(99, 5), entry(6, 222)].concat();
    let mut head = guest.send(2, &[Buffer::Out(first)]);
    guest.settle(&mut balloon);
    assert_eq!((balloon.statistics().free(), balloon.statistics().available()), (Some(111), Some(222)));
    assert_eq!(balloon.statistics().list().count(), 2);
    assert_eq!(guest.queues[2].used_idx(), 0, "the buffer stays");
    for round in 1..200_u64 {
        balloon.request_statistics();
        guest.wait_for(&mut balloon, 2, head);
        head = guest.send(2, &[Buffer::Out([entry(6, round), vec![1, 2, 3]].concat())]);
        guest.settle(&mut balloon);
        assert_eq!(balloon.statistics().available(), Some(round));
        // Over a restore, too.
        balloon.pause();
        let mut next = Balloon::new(Box::new(Host::default()));
        let set_up = guest.activation_from::<Balloon>(&balloon.queues(), next.features());
        next.restore(&balloon.save(), Some(set_up)).unwrap();
        next.resume();
        assert_eq!(next.statistics().available(), Some(round));
        balloon = next;
    }
    let names: Vec<_> = balloon.metrics().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"guest_available_bytes") && !names.contains(&"guest_swap_in_bytes"), "{names:?}");
}

#[test]
fn a_host_that_refuses_is_counted() {
    let (mut balloon, mut guest, host) = start();
    *host.fails.lock().unwrap() = true;
    guest.ask(&mut balloon, 0, &[numbers(&[1, 2, 9])]);
    assert_eq!((balloon.pages.metrics.host_errors, balloon.pages.metrics.bytes_given_back), (2, 0));
}
