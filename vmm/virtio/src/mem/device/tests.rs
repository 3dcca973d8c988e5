#![allow(clippy::single_range_in_vec_init, reason = "runs of blocks are ranges, and one is a run, too")]

use std::io;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

use super::*;
use crate::memory::Region;
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Descriptor, Guest, NEXT, WRITE};

const ADDR: u64 = 0x1_8000_0000;
const COUNT: u64 = 256;
const STEP: u64 = 128 << 20;
const ACK: [u16; 2] = [0, 0];
const NACK: [u16; 2] = [1, 0];
const BUSY: [u16; 2] = [2, 0];
const ERROR: [u16; 2] = [3, 0];

/// What the host would have: the blocks that were made and not taken away. Refuses what the device must not ask.
#[derive(Debug, Clone)]
struct Host {
    blocks: Arc<Blocks>,
    there: Arc<Mutex<Vec<bool>>>,
    fails: Arc<Mutex<bool>>,
}

impl Host {
    fn new() -> Self {
        let count = usize::try_from(COUNT).unwrap();
        Host {
            blocks: Arc::new(Blocks::new(COUNT)),
            there: Arc::new(Mutex::new(vec![false; count])),
            fails: Arc::default(),
        }
    }

    fn change(&self, run: &Range<u64>, to: bool) {
        let mut there = self.there.lock().unwrap();
        for block in run.clone() {
            let block = &mut there[usize::try_from(block).unwrap()];
            assert_ne!(*block, to, "asked for what is so already");
            *block = to;
        }
    }

    fn fail(&self, fails: bool) {
        *self.fails.lock().unwrap() = fails;
    }

    fn answer(&self) -> io::Result<()> {
        if *self.fails.lock().unwrap() { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    fn device(&self) -> Mem {
        let config = MemConfig { addr: ADDR, most: COUNT * BLOCK - 2 * BLOCK, step: STEP };
        Mem::new(config, Arc::clone(&self.blocks), Box::new(self.clone()))
    }

    /// A device of which `blocks` blocks are requested, and its driver.
    fn start(&self, blocks: u64) -> (Mem, Guest) {
        let mut mem = self.device();
        mem.set_requested(blocks * BLOCK).unwrap();
        let guest = Guest::with(&mut mem);
        (mem, guest)
    }
}

impl MemBackend for Host {
    fn plug(&mut self, blocks: Range<u64>) -> io::Result<()> {
        assert!(self.blocks.are(blocks.clone(), false), "devices could reach blocks before they are there");
        self.answer()?;
        self.change(&blocks, true);
        Ok(())
    }

    fn unplug(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        for run in runs {
            assert!(self.blocks.are(run.clone(), false), "devices can still reach blocks that go");
        }
        self.answer()?;
        runs.iter().for_each(|run| self.change(run, false));
        Ok(())
    }
}

fn request(kind: u16, addr: u64, nb_blocks: u16) -> Vec<u8> {
    let padding = [0xee; 6];
    let request = Request {
        kind: U16::new(kind),
        padding,
        addr: U64::new(addr),
        nb_blocks: U16::new(nb_blocks),
        padding_of_kind: padding,
    };
    request.as_bytes().to_vec()
}

/// Type and state of the response to a request.
fn ask(mem: &mut Mem, guest: &mut Guest, kind: u16, block: u64, nb_blocks: u16) -> [u16; 2] {
    ask_at(mem, guest, kind, ADDR + block * BLOCK, nb_blocks)
}

fn ask_at(mem: &mut Mem, guest: &mut Guest, kind: u16, addr: u64, nb_blocks: u16) -> [u16; 2] {
    let used = guest.ask(mem, 0, &[Buffer::Out(request(kind, addr, nb_blocks)), Buffer::In(RESPONSE)]);
    assert_eq!((used.len, used.data.len()), (10, 10));
    assert_eq!(used.data[2..8], [0; 6]);
    [0, 8].map(|at| u16::from_le_bytes([used.data[at], used.data[at + 1]]))
}

fn config(mem: &Mem) -> [u64; 7] {
    let mut bytes = [0; 56];
    mem.read_config(0, &mut bytes);
    std::array::from_fn(|i| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap()))
}

/// Asks for the state of blocks that stay as they are: plugged, unplugged, some of both.
struct MemFixture(Host);

impl Default for MemFixture {
    fn default() -> Self {
        let mut host = Host::new();
        host.plug(0..4).unwrap();
        host.blocks.set(0..4, true);
        MemFixture(host)
    }
}

impl Fixture for MemFixture {
    type Device = Mem;

    fn device(&mut self) -> Mem {
        let mut mem = self.0.device();
        mem.set_requested(STEP).unwrap();
        mem
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        let bytes = request(REQ_STATE, ADDR + u64::from(n % 3 * 2) * BLOCK, 3);
        guest.send(0, &[Buffer::Out(bytes), Buffer::In(RESPONSE)]);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Mem, n: u32) {
        let used = guest.wait(device, 0);
        let state = [0, 2, 1][n as usize % 3];
        assert_eq!(used.data, [0, 0, 0, 0, 0, 0, 0, 0, state, 0]);
    }
}

crate::device_contract_tests!(contract, MemFixture);

#[test]
fn the_configuration_says_what_there_is() {
    let host = Host::new();
    let mut mem = host.device();
    assert_eq!(config(&mem), [BLOCK, 0, ADDR, COUNT * BLOCK, 0, 0, 0]);
    mem.set_requested(3 * BLOCK).unwrap();
    assert_eq!(config(&mem), [BLOCK, 0, ADDR, COUNT * BLOCK, STEP, 0, 3 * BLOCK]);
    let mut guest = Guest::with(&mut mem);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 1, 2), ACK);
    assert_eq!(config(&mem)[5], 2 * BLOCK);
    assert_eq!((mem.plugged(), mem.requested(), mem.region_size()), (2 * BLOCK, 3 * BLOCK, COUNT * BLOCK));
    mem.set_requested(mem.most()).unwrap();
    assert_eq!(config(&mem)[4], COUNT * BLOCK, "whole blocks of the guest are usable");
}

#[test]
fn owners_may_ask_for_whole_blocks_up_to_the_most() {
    let mut mem = Host::new().device();
    assert_eq!(mem.set_requested(BLOCK + 4096), Err(MemError::Unaligned { bytes: BLOCK + 4096 }));
    let most = mem.most();
    let error = mem.set_requested(most + BLOCK).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{} bytes were requested, where at most {most} can be", most + BLOCK)
    );
    assert_eq!(mem.requested(), 0);
    mem.set_requested(most).unwrap();
    mem.set_requested(0).unwrap();
}

#[test]
fn a_driver_is_told_of_each_request_and_seen_to_read_it() {
    let (mut mem, guest) = Host::new().start(1);
    let generation = guest.interrupt.config_generation();
    mem.set_requested(2 * BLOCK).unwrap();
    mem.set_requested(2 * BLOCK).unwrap();
    assert_eq!(guest.interrupt.status(), crate::irq::CONFIG_CHANGE);
    assert_eq!((guest.interrupts(), guest.interrupt.config_generation()), (2, generation + 2));
    assert!(!mem.seen());
    // In halves, as virtio-mmio drivers read.
    mem.read_config(48, &mut [0; 4]);
    mem.read_config(0, &mut [0; 48]);
    mem.read_config(56, &mut [0; 8]);
    mem.read_config(u64::MAX, &mut [0; 8]);
    assert!(!mem.seen());
    mem.read_config(52, &mut [0; 4]);
    assert!(mem.seen());
    mem.set_requested(2 * BLOCK).unwrap();
    assert!(!mem.seen());
    config(&mem);
    assert!(mem.seen());
    mem.reset();
    assert!(!mem.seen(), "the next driver has not read it");
}

#[test]
fn blocks_are_plugged_once_and_unplugged_once() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(10);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 2, 4), ACK);
    for (block, count) in [(2, 1), (1, 2), (5, 2), (0, 8)] {
        assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, block, count), ERROR, "{block} {count}");
    }
    for (block, count) in [(1, 2), (5, 2), (0, 1), (6, 1)] {
        assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG, block, count), ERROR, "{block} {count}");
    }
    assert_eq!(mem.plugged(), 4 * BLOCK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG, 3, 2), ACK);
    assert_eq!(host.blocks.runs(), [2..3, 5..6]);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 3, 2), ACK);
    let m = mem.region.metrics;
    assert_eq!((m.plugs, m.unplugs, m.errors, m.refused), (2, 1, 8, 0));
    assert_eq!((m.bytes_plugged, m.bytes_given_back), (6 * BLOCK, 2 * BLOCK));
}

#[test]
fn no_more_is_plugged_than_was_asked_for() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(4);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 0, 5), NACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 0, 3), ACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 3, 2), NACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 3, 1), ACK);
    mem.set_requested(2 * BLOCK).unwrap();
    assert_eq!(mem.plugged(), 4 * BLOCK, "shrinking is the driver's");
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 4, 1), NACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG, 0, 2), ACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 4, 1), NACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 3, 1), ERROR, "already there comes before too much");
    assert_eq!(mem.region.metrics.refused, 4);
}

#[test]
fn what_lies_outside_the_usable_region_is_an_error() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(64);
    let usable = STEP / BLOCK;
    for kind in [REQ_PLUG, REQ_UNPLUG, REQ_STATE] {
        let cases = [
            (ADDR + 4096, 1),
            (ADDR + BLOCK / 2, 1),
            (ADDR, 0),
            (ADDR - BLOCK, 1),
            (ADDR - BLOCK, 2),
            (0, 1),
            (ADDR + usable * BLOCK, 1),
            (ADDR + (usable - 1) * BLOCK, 2),
            (ADDR, u16::MAX),
            (u64::MAX - BLOCK + 1, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ];
        for (addr, count) in cases {
            assert_eq!(ask_at(&mut mem, &mut guest, kind, addr, count), ERROR, "{kind} {addr:#x} {count}");
        }
    }
    for kind in [4, 5, u16::MAX] {
        assert_eq!(ask(&mut mem, &mut guest, kind, 0, 1), ERROR);
    }
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, usable - 1, 1), ACK);
}

#[test]
fn states_are_plugged_unplugged_and_mixed() {
    let (mut mem, mut guest) = Host::new().start(8);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 2, 2), ACK);
    for (block, count, state) in
        [(2, 2, 0), (2, 1, 0), (0, 2, 1), (4, 60, 1), (1, 2, 2), (3, 2, 2), (0, 64, 2)]
    {
        assert_eq!(ask(&mut mem, &mut guest, REQ_STATE, block, count), [0, state], "{block} {count}");
    }
    assert_eq!(mem.region.metrics.states, 7);
}

#[test]
fn unplug_all_leaves_nothing_and_shrinks_what_is_usable() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(130);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG_ALL, 0, 0), ACK);
    for block in [0, 2, 129] {
        assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, block, 1), ACK);
    }
    mem.set_requested(BLOCK).unwrap();
    assert_eq!(config(&mem)[4], 3 * STEP, "it may not shrink by itself");
    host.fail(true);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG_ALL, 0, 0), BUSY);
    assert_eq!((mem.plugged(), config(&mem)[4]), (3 * BLOCK, 3 * STEP));
    host.fail(false);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG_ALL, 5, 7), ACK);
    assert_eq!((mem.plugged(), config(&mem)[4], mem.requested()), (0, STEP, BLOCK));
    assert!(host.there.lock().unwrap().iter().all(|there| !there));
}

#[test]
fn a_host_that_cannot_is_busy_and_nothing_has_changed() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(8);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 0, 2), ACK);
    host.fail(true);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 2, 2), BUSY);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG, 0, 1), BUSY);
    assert_eq!((host.blocks.runs(), mem.region.metrics.busy), (vec![0..2], 2));
    host.fail(false);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 2, 2), ACK);
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG, 0, 1), ACK);
}

#[test]
fn a_reset_changes_no_block_and_no_size() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(8);
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 1, 3), ACK);
    let before = config(&mem);
    mem.reset();
    assert_eq!((config(&mem), host.blocks.runs()), (before, vec![1..4]));
    // Without a driver the owner may ask, and nobody is interrupted.
    let interrupts = guest.interrupts();
    mem.set_requested(4 * BLOCK).unwrap();
    assert_eq!(guest.interrupts(), interrupts);
    guest.restart(&mem.queue_sizes());
    guest.activate(&mut mem).unwrap();
    assert_eq!(ask(&mut mem, &mut guest, REQ_UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(mem.plugged(), 0);
}

#[test]
fn a_driver_that_reads_what_is_not_there_gets_no_device() {
    let mut mem = Host::new().device();
    let guest = Guest::of(&mem, true);
    let mut activation = guest.activation(&mem);
    activation.features = 0;
    assert!(mem.activate(activation).is_err());
}

#[test]
fn requests_that_are_too_short_are_errors_and_without_room_for_an_answer_nothing_is_done() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(8);
    let short = &request(REQ_PLUG, ADDR, 1)[..23];
    let used = guest.ask(&mut mem, 0, &[Buffer::Out(short.to_vec()), Buffer::In(RESPONSE)]);
    assert_eq!(used.data[0], 3);
    // Split anywhere, it is a request.
    let (a, b) = (request(REQ_PLUG, ADDR, 1)[..9].to_vec(), request(REQ_PLUG, ADDR, 1)[9..].to_vec());
    let used = guest.ask(&mut mem, 0, &[Buffer::Out(a), Buffer::Out(b), Buffer::In(3), Buffer::In(20)]);
    assert_eq!((used.len, used.data[0], mem.plugged()), (10, 0, BLOCK));
    guest.send(0, &[Buffer::Out(request(REQ_PLUG, ADDR + BLOCK, 1)), Buffer::In(RESPONSE - 1)]);
    guest.settle(&mut mem);
    assert!(guest.interrupt.needs_reset());
    assert_eq!(mem.plugged(), BLOCK);
}

#[test]
fn an_answer_into_a_block_that_the_request_takes_away_is_not_written() {
    let host = Host::new();
    let mut mem = host.device();
    mem.set_requested(8 * BLOCK).unwrap();
    let mut guest = Guest::of(&mem, true);
    let len = usize::try_from(COUNT * BLOCK).unwrap();
    let mapping = GuestRegionMmap::from_range(GuestAddress(ADDR), len, None).unwrap();
    let region = Region::in_blocks(mapping, Arc::clone(&host.blocks));
    guest.memory = guest.memory.insert_region(Arc::new(region)).unwrap();
    guest.activate(&mut mem).unwrap();
    assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, 0, 2), ACK);

    let room = ADDR + BLOCK + 64;
    let unplug = |mem: &mut Mem, guest: &mut Guest, block: u64| {
        let bytes = request(REQ_UNPLUG, ADDR + block * BLOCK, 1);
        guest.memory.write_slice(&bytes, GuestAddress(0x10_0000)).unwrap();
        guest.memory.write_slice(&[0xa5; 10], GuestAddress(room)).unwrap();
        let head = Descriptor { address: 0x10_0000, len: 24, flags: NEXT, next: 1 };
        guest.queues[0].add_raw(&[head, Descriptor { address: room, len: 10, flags: WRITE, next: 0 }]);
        guest.kicks[0].write(1).unwrap();
        guest.settle(mem);
        guest.interrupt.needs_reset()
    };
    let there = |guest: &Guest| guest.read(room, 10);
    assert!(!unplug(&mut mem, &mut guest, 0), "a response in another block is fine");
    assert_eq!(there(&guest), [0; 10]);
    assert!(unplug(&mut mem, &mut guest, 1), "the response has no place any more");
    assert_eq!(mem.plugged(), 0);
    host.blocks.set(1..2, true);
    assert_eq!(there(&guest), [0xa5; 10]);
}

#[test]
fn a_saved_region_is_plugged_again_and_a_wrong_one_refused() {
    let host = Host::new();
    let (mut mem, mut guest) = host.start(70);
    for (block, count) in [(0, 3), (5, 1), (60, 10)] {
        assert_eq!(ask(&mut mem, &mut guest, REQ_PLUG, block, count), ACK);
    }
    mem.pause();
    let state = mem.save();
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<MemState>(&json).unwrap(), state);

    let fresh = Host::new();
    fresh.device().restore(&state, None).unwrap();
    assert_eq!(fresh.blocks.runs(), [0..3, 5..6, 60..70]);
    assert_eq!(*fresh.there.lock().unwrap(), *host.there.lock().unwrap());
    // Over another one's blocks.
    let mut device = fresh.device();
    device.restore(&MemState { plugged: vec![(1, 5)], ..state.clone() }, None).unwrap();
    assert_eq!((fresh.blocks.runs(), device.plugged()), (vec![1..6], 5 * BLOCK));

    for wrong in [
        MemState { addr: ADDR + STEP, ..state.clone() },
        MemState { region_size: state.region_size + BLOCK, ..state.clone() },
        MemState { plugged: vec![(127, 2)], ..state.clone() },
        MemState { plugged: vec![(0, 2), (1, 1)], ..state.clone() },
        MemState { plugged: vec![(u64::MAX, 2)], ..state.clone() },
        MemState { requested_size: BLOCK + 1, ..state.clone() },
        MemState { requested_size: state.region_size, usable_size: state.region_size, ..state.clone() },
        MemState { usable_size: 69 * BLOCK, plugged: vec![], ..state.clone() },
        MemState { usable_size: state.region_size + BLOCK, ..state.clone() },
    ] {
        assert!(Host::new().device().restore(&wrong, None).is_err(), "{wrong:?}");
    }
    let full = Host::new();
    full.fail(true);
    let error = full.device().restore(&state, None).unwrap_err().to_string();
    assert!(error.contains("blocks 0..3 cannot be plugged"), "{error}");
}

#[derive(Debug, Clone)]
enum Step {
    Ask { kind: u16, block: u64, count: u16, off: bool },
    Request(u64),
    Fail(bool),
    Reset,
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ask = (0_u16..5, 0..COUNT + 8, 0_u16..40, prop::bool::weighted(0.02))
        .prop_map(|(kind, block, count, off)| Step::Ask { kind, block, count, off });
    let step = prop_oneof![
        30 => ask,
        5 => (0..COUNT).prop_map(Step::Request),
        2 => any::<bool>().prop_map(Step::Fail),
        1 => Just(Step::Reset),
        1 => Just(Step::Restore),
    ];
    prop::collection::vec(step, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever driver and owner do: the answers, the sizes and what the host has are those of a set of numbers that
    /// follows the specification.
    #[test]
    fn the_device_is_a_set_of_blocks(steps in steps()) {
        let host = Host::new();
        let (mut mem, mut guest) = host.start(0);
        let mut model = vec![false; usize::try_from(COUNT).unwrap()];
        let (mut requested, mut usable, mut fails) = (0, 0_u64, false);
        for step in steps {
            match step {
                Step::Request(blocks) => {
                    let possible = blocks * BLOCK <= mem.most();
                    prop_assert_eq!(mem.set_requested(blocks * BLOCK).is_ok(), possible);
                    if possible {
                        requested = blocks;
                        usable = usable.max(blocks.next_multiple_of(64).min(COUNT));
                    }
                }
                Step::Fail(to) => {
                    fails = to;
                    host.fail(to);
                }
                Step::Reset => {
                    mem.reset();
                    guest.restart(&mem.queue_sizes());
                    guest.activate(&mut mem).unwrap();
                }
                Step::Restore => {
                    mem.pause();
                    let mut next = host.device();
                    let set_up = guest.activation_from::<Mem>(&mem.queues(), mem.features());
                    next.restore(&mem.save(), Some(set_up)).unwrap();
                    prop_assert_eq!(next.save(), mem.save());
                    mem = next;
                    mem.resume();
                }
                Step::Ask { kind, block, count, off } => {
                    let addr = ADDR + block * BLOCK + u64::from(off);
                    let got = ask_at(&mut mem, &mut guest, kind, addr, count);
                    let end = block + u64::from(count);
                    let plugged = model.iter().filter(|there| **there).count() as u64;
                    let named = (!off && count > 0 && end <= usable)
                        .then(|| usize::try_from(block).unwrap()..usize::try_from(end).unwrap());
                    let expected = match (kind, named) {
                        (REQ_UNPLUG_ALL, _) if fails && plugged > 0 => BUSY,
                        (REQ_UNPLUG_ALL, _) => {
                            model.fill(false);
                            usable = requested.next_multiple_of(64).min(COUNT);
                            ACK
                        }
                        (REQ_PLUG, Some(range)) if model[range.clone()].iter().all(|there| !there) => {
                            if plugged + u64::from(count) > requested {
                                NACK
                            } else if fails {
                                BUSY
                            } else {
                                model[range].fill(true);
                                ACK
                            }
                        }
                        (REQ_UNPLUG, Some(range)) if model[range.clone()].iter().all(|there| *there) => {
                            if fails { BUSY } else { model[range].fill(false); ACK }
                        }
                        (REQ_STATE, Some(range)) => {
                            let there = model[range].iter().filter(|there| **there).count();
                            [0, if there == usize::from(count) { 0 } else if there == 0 { 1 } else { 2 }]
                        }
                        _ => ERROR,
                    };
                    prop_assert_eq!(got, expected, "{:?}", step);
                }
            }
            let plugged = model.iter().filter(|there| **there).count() as u64;
            prop_assert_eq!(&*host.there.lock().unwrap(), &model);
            let expected = [BLOCK, 0, ADDR, COUNT * BLOCK, usable * BLOCK, plugged * BLOCK, requested * BLOCK];
            prop_assert_eq!(config(&mem), expected);
        }
    }
}
