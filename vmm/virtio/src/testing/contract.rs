//! What every device must do, whatever it is for (the contract of [`VirtioDevice`]).

use super::{Descriptor, FakeQueue, Guest, INDIRECT, MEMORY_END, NEXT, SEAM, WRITE, write_descriptor};
use crate::device::VirtioDevice;

/// How to use one kind of device, for [`device_contract_tests!`](crate::device_contract_tests).
///
/// Requests are numbered from 0. `complete` of each number comes once after its `submit`, in the same order.
pub trait Fixture {
    /// The device.
    type Device: VirtioDevice;

    /// Chains that `submit` may keep in flight at the same time.
    const BATCH: u32 = 4;

    /// Makes a device. Called again for a second one that takes over from the first: it is over the same backend.
    fn device(&mut self) -> Self::Device;

    /// What the driver does after each activation of a fresh device, as to offer buffers to receive into.
    fn prepare(&mut self, _guest: &mut Guest) {}

    /// Makes request number `n` available, with [`Guest::send`] or alike.
    fn submit(&mut self, guest: &mut Guest, n: u32);

    /// Waits for the answer to request `n`, with [`Guest::wait`] or alike, and checks it.
    fn complete(&mut self, guest: &mut Guest, device: &mut Self::Device, n: u32);
}

/// Makes a test of each function of [`contract`](crate::testing::contract), in a module of its own, for a type that is
/// [`Fixture`] and `Default`:
///
/// ```ignore
/// device_contract_tests!(contract, RngFixture);
/// ```
#[macro_export]
macro_rules! device_contract_tests {
    ($module:ident, $fixture:ty) => {
        mod $module {
            use super::*;
            $crate::device_contract_tests!(@ $fixture:
                answers_requests_past_the_end_of_its_rings
                answers_a_batch
                works_without_event_index
                keeps_still_while_paused
                goes_on_in_a_restored_device
                restores_what_it_saved
                is_saved_and_restored_while_inactive
                works_again_after_reset
                bears_spurious_notifications
                bears_malformed_chains
                bears_a_wild_available_index
            );
        }
    };
    (@ $fixture:ty: $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                $crate::testing::contract::$test(<$fixture as Default>::default());
            }
        )*
    };
}

fn round<F: Fixture>(f: &mut F, guest: &mut Guest, device: &mut F::Device, numbers: std::ops::Range<u32>) {
    for n in numbers.clone() {
        f.submit(guest, n);
    }
    for n in numbers {
        f.complete(guest, device, n);
    }
}

fn start<F: Fixture>(f: &mut F, event_idx: bool) -> (Guest, F::Device) {
    let mut device = f.device();
    let mut guest = Guest::of(&device, event_idx);
    guest.activate(&mut device).expect("the fake driver's queues are good");
    f.prepare(&mut guest);
    (guest, device)
}

/// What a driver does that gave up on a device and tries again.
fn start_again<F: Fixture>(f: &mut F, guest: &mut Guest, device: &mut F::Device) {
    device.reset();
    guest.restart(&device.queue_sizes());
    guest.activate(device).expect("a device that was reset can be activated");
    f.prepare(guest);
}

/// More requests, one after the other, than any queue is long.
pub fn answers_requests_past_the_end_of_its_rings<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    let longest = device.queue_sizes().into_iter().max().expect("a device has a queue");
    for n in 0..u32::from(longest) + 10 {
        round(&mut f, &mut guest, &mut device, n..n + 1);
    }
}

/// Several requests at once.
pub fn answers_a_batch<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    for n in 0..10 {
        round(&mut f, &mut guest, &mut device, n * F::BATCH..(n + 1) * F::BATCH);
    }
}

/// A driver that did not negotiate `VIRTIO_F_EVENT_IDX`.
pub fn works_without_event_index<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, false);
    for n in 0..10 {
        round(&mut f, &mut guest, &mut device, n * F::BATCH..(n + 1) * F::BATCH);
    }
}

/// Between pause and resume no ring changes; afterwards everything is answered.
pub fn keeps_still_while_paused<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    let batch = F::BATCH;
    round(&mut f, &mut guest, &mut device, 0..batch);

    f.submit(&mut guest, batch);
    device.pause();
    let (used, queues) = (used_indices(&guest), device.queues());
    for n in batch + 1..2 * batch {
        f.submit(&mut guest, n);
    }
    if F::Device::OWN_THREADS {
        guest.settle(&mut device);
    }
    assert_eq!(used_indices(&guest), used, "a paused device gave a chain back");
    assert_eq!(device.queues(), queues, "a paused device moved in its rings");

    device.resume();
    for n in batch..2 * batch {
        f.complete(&mut guest, &mut device, n);
    }
    round(&mut f, &mut guest, &mut device, 2 * batch..3 * batch);
}

/// Requests that were in flight when a device was saved are answered, once, by the one that takes over.
pub fn goes_on_in_a_restored_device<F: Fixture>(mut f: F) {
    let (mut guest, mut old) = start(&mut f, true);
    let batch = F::BATCH;
    for at in 0..3 {
        let first = at * 2 * batch;
        round(&mut f, &mut guest, &mut old, first..first + batch);
        for n in first + batch..first + 2 * batch {
            f.submit(&mut guest, n);
        }
        // Some of them may be done before, some half, some not seen.
        for _ in 0..at {
            guest.pump(&mut old);
        }
        old.pause();
        let mut new = f.device();
        take_over(&guest, &old, &mut new);
        drop(old);
        new.resume();
        for n in first + batch..first + 2 * batch {
            f.complete(&mut guest, &mut new, n);
        }
        old = new;
    }
}

/// A restored device saves the same.
pub fn restores_what_it_saved<F: Fixture>(mut f: F) {
    let (mut guest, mut old) = start(&mut f, true);
    round(&mut f, &mut guest, &mut old, 0..F::BATCH);
    f.submit(&mut guest, F::BATCH);
    old.pause();
    let mut new = f.device();
    take_over(&guest, &old, &mut new);
    assert_eq!(new.save(), old.save());
    assert_eq!(new.queues(), old.queues());
}

/// A device that no driver has set up is saved too, and the restored one can be set up.
pub fn is_saved_and_restored_while_inactive<F: Fixture>(mut f: F) {
    let mut old = f.device();
    old.pause();
    let mut device = f.device();
    device.restore(&old.save(), None).expect("an inactive device can be restored");
    drop(old);
    device.resume();
    let mut guest = Guest::with(&mut device);
    f.prepare(&mut guest);
    round(&mut f, &mut guest, &mut device, 0..F::BATCH);
}

/// Reset in the midst of work, paused, and twice.
pub fn works_again_after_reset<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    let mut n = 0;
    for paused in [false, true, false] {
        round(&mut f, &mut guest, &mut device, n..n + F::BATCH);
        f.submit(&mut guest, n + F::BATCH);
        n += F::BATCH + 1;
        if paused {
            device.pause();
        }
        device.reset();
        device.reset();
        guest.restart(&device.queue_sizes());
        guest.settle(&mut device);
        assert_eq!(
            used_indices(&guest),
            vec![0; guest.queues.len()],
            "a device that was reset wrote to a ring"
        );
        guest.activate(&mut device).expect("a device that was reset can be activated");
        f.prepare(&mut guest);
    }
    round(&mut f, &mut guest, &mut device, n..n + F::BATCH);
}

/// Notifications for nothing, before and after activation.
pub fn bears_spurious_notifications<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    for _ in 0..3 {
        for kick in &guest.kicks {
            kick.write(1).expect("an eventfd takes a small count");
        }
        guest.settle(&mut device);
        device.on_backend();
    }
    round(&mut f, &mut guest, &mut device, 0..F::BATCH);
}

/// Chains that make no sense, on each queue: at worst the device asks for a reset, and works after it.
pub fn bears_malformed_chains<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    let mut n = 0;
    for queue in 0..guest.queues.len() {
        for (name, chain) in CASES {
            log::debug!("queue {queue}: {name}");
            chain(&mut guest, queue);
            guest.kicks[queue].write(1).expect("an eventfd takes a small count");
            guest.settle(&mut device);
            start_again(&mut f, &mut guest, &mut device);
            round(&mut f, &mut guest, &mut device, n..n + 1);
            n += 1;
        }
    }
}

/// An available index that jumps by more than the queue has entries, or backwards.
pub fn bears_a_wild_available_index<F: Fixture>(mut f: F) {
    let (mut guest, mut device) = start(&mut f, true);
    let mut n = 0;
    for queue in 0..guest.queues.len() {
        let size = guest.queues[queue].state().size;
        for index in [size + 1, size.wrapping_mul(2) + 1, u16::MAX, 0x8000] {
            guest.queues[queue].set_avail_idx(index);
            guest.kicks[queue].write(1).expect("an eventfd takes a small count");
            guest.settle(&mut device);
            start_again(&mut f, &mut guest, &mut device);
            round(&mut f, &mut guest, &mut device, n..n + 1);
            n += 1;
        }
    }
}

/// Makes `new` what `old` is.
fn take_over<D: VirtioDevice>(guest: &Guest, old: &D, new: &mut D) {
    let activation = guest.activation_from::<D>(&old.queues(), new.features());
    new.restore(&old.save(), Some(activation)).expect("a device restores what it saved");
}

fn used_indices(guest: &Guest) -> Vec<u16> {
    guest.queues.iter().map(FakeQueue::used_idx).collect()
}

type MakeChain = fn(&mut Guest, usize);

/// Chains that no driver should make.
pub const CASES: &[(&str, MakeChain)] = &[
    ("no byte at all, readable", |g, q| raw(g, q, &[(0x10_0000, 0, 0, 0)])),
    ("no byte at all, writable", |g, q| raw(g, q, &[(0x10_0000, 0, WRITE, 0)])),
    ("no byte, outside memory", |g, q| raw(g, q, &[(u64::MAX, 0, 0, 0)])),
    ("one byte, readable", |g, q| raw(g, q, &[(0x10_0000, 1, 0, 0)])),
    ("one byte, writable", |g, q| raw(g, q, &[(0x10_0000, 1, WRITE, 0)])),
    ("readable only", |g, q| raw(g, q, &[(0x10_0000, 4096, 0, 0)])),
    ("writable only", |g, q| raw(g, q, &[(0x10_0000, 4096, WRITE, 0)])),
    ("across two regions", |g, q| raw(g, q, &[(SEAM - 8, 16, NEXT, 1), (SEAM - 8, 4096, WRITE, 0)])),
    ("starts outside memory", |g, q| raw(g, q, &[(MEMORY_END, 16, 0, 0)])),
    ("ends outside memory", |g, q| raw(g, q, &[(MEMORY_END - 8, 16, WRITE, 0)])),
    ("address wraps", |g, q| raw(g, q, &[(u64::MAX - 7, 16, 0, 0)])),
    ("4 GiB long", |g, q| raw(g, q, &[(0, u32::MAX, WRITE, 0)])),
    ("more than 4 GiB in all", |g, q| raw(g, q, &[(0, 0x40_0000, NEXT, 1), (0, u32::MAX, 0, 0)])),
    ("readable after writable", |g, q| raw(g, q, &[(0x10_0000, 64, WRITE | NEXT, 1), (0x11_0000, 64, 0, 0)])),
    ("loop of one", |g, q| raw(g, q, &[(0x10_0000, 16, NEXT, 0)])),
    ("loop of two", |g, q| raw(g, q, &[(0x10_0000, 16, NEXT, 1), (0x10_0000, 16, NEXT, 0)])),
    ("next beyond the table", |g, q| raw(g, q, &[(0x10_0000, 16, NEXT, 0x7fff)])),
    ("indirect table of no entry", |g, q| raw(g, q, &[(0x10_0000, 0, INDIRECT, 0)])),
    ("indirect table of a part entry", |g, q| raw(g, q, &[(0x10_0000, 17, INDIRECT, 0)])),
    ("indirect table outside memory", |g, q| raw(g, q, &[(MEMORY_END, 32, INDIRECT, 0)])),
    ("indirect table of 2^28 entries", |g, q| raw(g, q, &[(0x10_0000, 0xffff_fff0, INDIRECT, 0)])),
    ("indirect and next", |g, q| raw(g, q, &[(0x10_0000, 16, INDIRECT | NEXT, 1), (0x11_0000, 16, 0, 0)])),
    ("indirect table in an indirect table", |g, q| {
        table(g, &[(0x10_0000, 32, INDIRECT, 0)]);
        raw(g, q, &[(0x10_0000, 16, INDIRECT, 0)]);
    }),
    ("loop in an indirect table", |g, q| {
        table(g, &[(0x11_0000, 16, NEXT, 1), (0x11_0000, 16, NEXT, 0)]);
        raw(g, q, &[(0x10_0000, 32, INDIRECT, 0)]);
    }),
    ("indirect table longer than the queue", |g, q| {
        let count = g.queues[q].state().size + 1;
        let entries: Vec<_> =
            (1..=count).map(|next| (0x20_0000, 16, if next == count { 0 } else { NEXT }, next)).collect();
        table(g, &entries);
        raw(g, q, &[(0x10_0000, 16 * u32::from(count), INDIRECT, 0)]);
    }),
    ("head beyond the table", |g, q| g.queues[q].publish_head(u16::MAX)),
    ("the rings themselves as buffer", |g, q| {
        let state = g.queues[q].state();
        raw(g, q, &[(state.desc_table, 256, NEXT, 1), (state.desc_table, 4096, WRITE, 0)]);
    }),
    ("the same chain twice", |g, q| {
        raw(g, q, &[(0x10_0000, 64, NEXT, 1), (0x11_0000, 64, WRITE, 0)]);
        g.queues[q].publish_head(0);
    }),
];

fn raw(guest: &mut Guest, queue: usize, chain: &[(u64, u32, u16, u16)]) {
    let chain: Vec<_> = chain.iter().map(|&entry| descriptor(entry)).collect();
    guest.queues[queue].add_raw(&chain);
}

fn table(guest: &mut Guest, entries: &[(u64, u32, u16, u16)]) {
    let mut address = 0x10_0000;
    for entry in entries {
        write_descriptor(&guest.memory, address, descriptor(*entry));
        address += 16;
    }
}

fn descriptor((address, len, flags, next): (u64, u32, u16, u16)) -> Descriptor {
    Descriptor { address, len, flags, next }
}
