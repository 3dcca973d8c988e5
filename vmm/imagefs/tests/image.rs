//! The disk of an image between a fake driver and a fake image service, on a thread that may call no more than in the VMM.

mod confine;
mod service;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use imagefs::image::{ImageDisk, ImageThread};
use service::{BLOBS, BOOTSTRAP, Cache, Service, disk};
use virtio::device::{Threads, VirtioDevice};
use virtio::testing::contract::Fixture;
use virtio::testing::{Buffer, Descriptor, Guest, NEXT, Used, WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_api::image::{BLOCK, Fetch};

const SECTOR: u64 = 512;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const LONG: Duration = Duration::from_secs(60);
/// Blocks before the first blob.
const FIRST: u64 = BOOTSTRAP.div_ceil(BLOCK);

struct Confined;

impl Threads for Confined {
    fn enter(&self, name: &str) -> io::Result<()> {
        confine::confine(name);
        Ok(())
    }

    fn died(&self, name: &str) {
        panic!("{name} died");
    }
}

fn thread() -> Arc<ImageThread> {
    Arc::new(ImageThread::new(Arc::new(Confined)).unwrap())
}

fn header(kind: u32, sector: u64) -> Buffer {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Buffer::Out(bytes)
}

/// A read of blocks of the disk.
fn read(first: u64, blocks: u64) -> [Buffer; 3] {
    let len = usize::try_from(blocks * BLOCK).unwrap();
    [header(0, first * BLOCK / SECTOR), Buffer::In(len), Buffer::In(1)]
}

fn assert_read(used: &Used, first: u64, blocks: u64) {
    let len = usize::try_from(blocks * BLOCK).unwrap();
    assert_eq!((used.len as usize, used.data[len]), (len + 1, OK), "blocks {first} to {}", first + blocks);
    let wanted = disk(first * BLOCK..(first + blocks) * BLOCK);
    assert!(used.data[..len] == wanted, "other bytes in blocks {first} to {}", first + blocks);
}

fn assert_fails(used: &Used) {
    assert_eq!(used.data.last(), Some(&IO_ERROR));
}

fn blocks(fetch: Fetch) -> (u32, u64, u32) {
    (fetch.blob, fetch.first, fetch.blocks)
}

struct Rig {
    cache: Arc<Cache>,
    device: ImageDisk,
    guest: Guest,
    service: Service,
}

impl Rig {
    fn new(patience: Duration) -> Self {
        let cache = Cache::new();
        let (files, channel, service) = cache.open();
        let mut device = ImageDisk::new(files, channel, "image-0", patience, thread()).unwrap();
        let guest = Guest::with(&mut device);
        Rig { cache, device, guest, service }
    }

    /// Begins to read; the request's name.
    fn read(&mut self, first: u64, blocks: u64) -> u16 {
        self.guest.send(0, &read(first, blocks))
    }

    /// Has the guest make several requests at once.
    fn read_all(&mut self, reads: &[(u64, u64)]) -> Vec<u16> {
        self.device.pause();
        let heads = reads.iter().map(|(first, blocks)| self.read(*first, *blocks)).collect();
        self.device.resume();
        heads
    }

    fn wait(&mut self, head: u16) -> Used {
        self.guest.wait_for(&mut self.device, 0, head)
    }

    fn metric(&self, name: &str) -> u64 {
        let found = self.device.metrics().into_iter().find(|(known, _)| *known == name);
        found.expect("a counter of that name").1
    }

    /// A new connection in place of the lost one.
    fn reconnect(&mut self) {
        let (channel, service) = self.cache.connect();
        self.device.rebind(channel, self.cache.blobs()).unwrap();
        self.service = service;
    }

    /// Waits for the device to say that the connection is lost.
    fn wait_lost(&mut self) {
        for _ in 0..2000 {
            self.guest.pump(&mut self.device);
            if self.device.take_lost() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the device does not notice the end of its connection");
    }
}

/// Reads here and there, of what is ready and of what is not, with a service that fulfils what it is asked for.
struct ImageFixture {
    cache: Arc<Cache>,
    thread: Arc<ImageThread>,
    heads: HashMap<u32, u16>,
}

impl Default for ImageFixture {
    fn default() -> Self {
        ImageFixture { cache: Cache::new(), thread: thread(), heads: HashMap::new() }
    }
}

impl ImageFixture {
    fn place(n: u32) -> u64 {
        u64::from(n) * 131 % (FIRST + BLOBS[0] / BLOCK)
    }
}

impl Fixture for ImageFixture {
    type Device = ImageDisk;

    fn device(&mut self) -> ImageDisk {
        let (files, channel, service) = self.cache.open();
        service.serve();
        ImageDisk::new(files, channel, "image-0", LONG, self.thread.clone()).unwrap()
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        self.heads.insert(n, guest.send(0, &read(Self::place(n), 1)));
    }

    /// In any order: one that waits does not hold up one that need not.
    fn complete(&mut self, guest: &mut Guest, device: &mut ImageDisk, n: u32) {
        let used = guest.wait_for(device, 0, self.heads[&n]);
        assert_read(&used, Self::place(n), 1);
    }
}

virtio::device_contract_tests!(contract, ImageFixture);

#[test]
fn the_whole_disk_reads_byte_for_byte() {
    let mut rig = Rig::new(LONG);
    let (_, service) = rig.cache.connect();
    std::mem::replace(&mut rig.service, service).serve();
    let all = FIRST + BLOBS.iter().map(|bytes| bytes.div_ceil(BLOCK)).sum::<u64>();
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), all * BLOCK / SECTOR);
    let mut first = 0;
    // Steps that no part is a multiple of, so that reads go across all seams.
    while first < all {
        let count = 61.min(all - first);
        let head = rig.read(first, count);
        let used = rig.wait(head);
        assert_read(&used, first, count);
        first += count;
    }
    assert_eq!(rig.metric("read_bytes"), all * BLOCK);
    assert_eq!(rig.metric("reads"), all.div_ceil(61));
    assert_eq!((rig.metric("late"), rig.metric("lost"), rig.metric("waiting")), (0, 0, 0));
    assert_eq!(rig.metric("wait_count"), rig.metric("misses"));
    // Again, without asking anyone.
    let fetches = rig.metric("fetches");
    let head = rig.read(FIRST + 100, 200);
    let used = rig.wait(head);
    assert_read(&used, FIRST + 100, 200);
    assert_eq!(rig.metric("fetches"), fetches);
}

#[test]
fn a_read_waits_for_its_bytes_and_others_do_not_wait_for_it() {
    let mut rig = Rig::new(LONG);
    rig.cache.fill(0, 50..60);
    let waits = rig.read(FIRST + 10, 4);
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 10, 4));
    for (first, count) in [(0, 2), (FIRST + 50, 10)] {
        let head = rig.read(first, count);
        let used = rig.wait(head);
        assert_read(&used, first, count);
    }
    assert_eq!((rig.metric("waiting"), rig.metric("hits"), rig.metric("misses")), (1, 2, 1));
    // The same blocks again are not asked for again.
    let also = rig.read(FIRST + 11, 2);
    assert_eq!(rig.service.wish_within(Duration::from_millis(50)), None);
    rig.service.fulfil(fetch);
    for (head, first, count) in [(waits, FIRST + 10, 4), (also, FIRST + 11, 2)] {
        let used = rig.wait(head);
        assert_read(&used, first, count);
    }
}

#[test]
fn only_what_is_missing_is_asked_for() {
    let mut rig = Rig::new(LONG);
    rig.cache.fill(0, 0..5);
    rig.cache.fill(0, 7..20);
    let head = rig.read(FIRST, 20);
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 5, 2));
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 20);
    // In parts, each of a blob's own.
    let seam = FIRST + BLOBS[0].div_ceil(BLOCK);
    let head = rig.read(seam - 1, 2);
    let (a, b) = (rig.service.wish(), rig.service.wish());
    assert_eq!((blocks(a), blocks(b)), ((0, 2999, 1), (1, 0, 1)));
    rig.service.fulfil(b);
    rig.service.fulfil(a);
    let used = rig.wait(head);
    assert_read(&used, seam - 1, 2);
}

#[test]
fn neighbours_are_asked_for_at_once_and_answers_come_in_any_order() {
    let mut rig = Rig::new(LONG);
    let heads =
        rig.read_all(&[(FIRST, 8), (FIRST + 8, 8), (FIRST + 30, 2), (FIRST + 500, 2), (FIRST + 1000, 2)]);
    let fetches = [rig.service.wish(), rig.service.wish(), rig.service.wish()];
    assert_eq!(fetches.map(blocks), [(0, 0, 32), (0, 500, 2), (0, 1000, 2)]);
    assert_eq!(rig.service.wish_within(Duration::from_millis(50)), None);
    rig.service.fulfil(fetches[2]);
    let used = rig.wait(heads[4]);
    assert_read(&used, FIRST + 1000, 2);
    rig.service.fulfil(fetches[0]);
    for (head, first, count) in [(heads[0], 0, 8), (heads[1], 8, 8), (heads[2], 30, 2)] {
        let used = rig.wait(head);
        assert_read(&used, FIRST + first, count);
    }
    assert_eq!(rig.metric("waiting"), 1);
    rig.service.fulfil(fetches[1]);
    let used = rig.wait(heads[3]);
    assert_read(&used, FIRST + 500, 2);
    assert_eq!((rig.metric("fetches"), rig.metric("fetched_blocks")), (3, 36));
}

#[test]
fn a_large_read_is_asked_for_in_wishes_of_4_mib() {
    let mut rig = Rig::new(LONG);
    // 6 MiB into one buffer, over and over: the guest of the test has no more.
    let Buffer::Out(bytes) = header(0, FIRST * BLOCK / SECTOR) else { unreachable!("a header is read") };
    rig.guest.memory.write_slice(&bytes, GuestAddress(0x31_0000)).unwrap();
    let at = |address, len, flags, next| Descriptor { address, len, flags, next };
    let mut chain = vec![at(0x31_0000, 16, NEXT, 1)];
    chain.extend((2..26).map(|next| at(0x20_0000, 256 << 10, NEXT | WRITE, next)));
    chain.push(at(0x30_0000, 1, WRITE, 0));
    rig.guest.queues[0].add_raw(&chain);
    rig.guest.notify(0);
    let fetches = [rig.service.wish(), rig.service.wish()];
    assert_eq!(fetches.map(blocks), [(0, 0, 1024), (0, 1024, 512)]);
    rig.service.fulfil(fetches[1]);
    rig.service.fulfil(fetches[0]);
    let start = Instant::now();
    while rig.guest.queues[0].used_idx() == 0 {
        assert!(start.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.guest.read(0x30_0000, 1), [OK]);
    assert_eq!(rig.guest.read(0x20_0000, 4096), disk((FIRST + 1472) * BLOCK..(FIRST + 1473) * BLOCK));
}

#[test]
fn a_read_fails_when_its_time_is_up_and_the_late_answer_is_welcome() {
    let mut rig = Rig::new(Duration::from_millis(100));
    let head = rig.read(FIRST, 1);
    let fetch = rig.service.wish();
    let used = rig.wait(head);
    assert_fails(&used);
    assert_eq!((rig.metric("late"), rig.metric("waiting"), rig.metric("lost")), (1, 0, 0));
    // Still under way, so it is not asked for again.
    let head = rig.read(FIRST, 1);
    assert_eq!(rig.service.wish_within(Duration::from_millis(20)), None);
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 1);
}

#[test]
fn what_cannot_be_had_fails_alone() {
    let mut rig = Rig::new(LONG);
    let heads = rig.read_all(&[(FIRST, 1), (FIRST + 1, 1)]);
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 0, 2));
    // Of which is not said: both are asked for again, each by itself.
    rig.service.say(fetch.tag, 5);
    let each = [rig.service.wish(), rig.service.wish()];
    assert_eq!(each.map(blocks), [(0, 0, 1), (0, 1, 1)]);
    rig.service.fulfil(each[1]);
    rig.service.say(each[0].tag, 28);
    let used = rig.wait(heads[0]);
    assert_fails(&used);
    let used = rig.wait(heads[1]);
    assert_read(&used, FIRST + 1, 1);
    assert_eq!((rig.metric("fetch_errors"), rig.metric("lost")), (2, 0));
    // The next read asks anew.
    let head = rig.read(FIRST, 1);
    let fetch = rig.service.wish();
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 1);
}

/// What comes back is nonsense: the connection ends, the read waits for another one.
fn survives(nonsense: impl FnOnce(&Rig, Fetch)) {
    let mut rig = Rig::new(LONG);
    rig.cache.fill(0, 100..110);
    let head = rig.read(FIRST, 3);
    let fetch = rig.service.wish();
    nonsense(&rig, fetch);
    assert!(rig.service.is_closed());
    rig.wait_lost();
    assert!(!rig.device.take_lost(), "it is told once");
    assert_eq!((rig.metric("lost"), rig.metric("waiting")), (1, 1));
    // What is there can be read meanwhile.
    let hit = rig.read(FIRST + 100, 10);
    let used = rig.wait(hit);
    assert_read(&used, FIRST + 100, 10);
    rig.reconnect();
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 0, 3));
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 3);
}

#[test]
fn an_answer_of_another_length_ends_the_connection() {
    survives(|rig, _| rig.service.send(&[0; 15]));
    survives(|rig, _| rig.service.send(&[0; 24]));
    survives(|rig, _| rig.service.send(&[0; 60_000]));
}

#[test]
fn an_answer_to_nothing_ends_the_connection() {
    survives(|rig, fetch| rig.service.say(fetch.tag + 1, 0));
    survives(|rig, _| rig.service.say(u64::MAX, 5));
}

/// A block that no chunk of the image holds: the service has nothing to say of it, and other images may have one there.
#[test]
fn what_belongs_to_no_chunk_reads_as_zeros() {
    let mut rig = Rig::new(LONG);
    let head = rig.read(FIRST, 6);
    let fetch = rig.service.wish();
    rig.cache.fill(0, 0..2);
    rig.cache.fill(0, 3..6);
    rig.service.say(fetch.tag, 0);
    let used = rig.wait(head);
    let mut wanted = disk(FIRST * BLOCK..(FIRST + 6) * BLOCK);
    wanted[2 * 4096..3 * 4096].fill(0);
    assert!(used.data[..6 * 4096] == wanted && used.data[6 * 4096] == OK);
    // And is not asked for again.
    let head = rig.read(FIRST + 2, 1);
    let used = rig.wait(head);
    assert_eq!(used.data[..4096], [0; 4096]);
    assert_eq!(rig.metric("fetches"), 1);
}

#[test]
fn a_service_that_goes_away_is_waited_for() {
    let mut rig = Rig::new(LONG);
    let waits = rig.read(FIRST, 1);
    let first = rig.service.wish();
    assert_eq!(blocks(first), (0, 0, 1));
    let (_, other) = rig.cache.connect();
    drop(std::mem::replace(&mut rig.service, other));
    rig.wait_lost();
    // More comes while nobody is there.
    let more = rig.read_all(&[(FIRST + 200, 1), (FIRST + 201, 1)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.metric("waiting"), 3);
    // The service that comes back knows some of it already.
    rig.cache.fill(0, 0..1);
    rig.reconnect();
    let used = rig.wait(waits);
    assert_read(&used, FIRST, 1);
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 200, 2));
    rig.service.fulfil(fetch);
    for (head, first) in [(more[0], FIRST + 200), (more[1], FIRST + 201)] {
        let used = rig.wait(head);
        assert_read(&used, first, 1);
    }
    assert_eq!((rig.metric("lost"), rig.metric("late")), (1, 0));
}

#[test]
fn reads_fail_when_no_service_comes_back_in_time() {
    let mut rig = Rig::new(Duration::from_millis(200));
    let (_, other) = rig.cache.connect();
    drop(std::mem::replace(&mut rig.service, other));
    let heads = rig.read_all(&[(FIRST, 1), (FIRST + 9, 1)]);
    for head in heads {
        let used = rig.wait(head);
        assert_fails(&used);
    }
    assert_eq!(rig.metric("late"), 2);
    rig.reconnect();
    let head = rig.read(FIRST, 1);
    let fetch = rig.service.wish();
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 1);
}

#[test]
fn other_cache_files_take_the_place_of_the_old_ones() {
    let mut rig = Rig::new(LONG);
    let waits = rig.read(FIRST, 1);
    rig.service.wish();
    // The service has lost its cache: what is filled in the new files is what counts.
    rig.cache = Cache::new();
    rig.cache.fill(0, 0..1);
    rig.reconnect();
    let used = rig.wait(waits);
    assert_read(&used, FIRST, 1);
    let (channel, _service) = rig.cache.connect();
    let mut fewer = rig.cache.blobs();
    fewer.pop();
    assert_eq!(rig.device.rebind(channel, fewer).unwrap_err().to_string(), "1 blobs, the image has 2");
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    let refused = rig.device.rebind(pipe, rig.cache.blobs()).unwrap_err().to_string();
    assert!(refused.contains("SOCK_SEQPACKET"), "{refused}");
}

#[test]
fn more_wishes_than_may_be_under_way_wait_for_their_turn() {
    let mut rig = Rig::new(LONG);
    let places: Vec<(u64, u64)> = (0..80).map(|n| (FIRST + n * 35, 1)).collect();
    let heads = rig.read_all(&places[..80]);
    let mut fetches: Vec<Fetch> = (0..64).map(|_| rig.service.wish()).collect();
    assert_eq!(rig.service.wish_within(Duration::from_millis(100)), None);
    rig.service.fulfil(fetches.pop().unwrap());
    fetches.push(rig.service.wish());
    while let Some(fetch) = fetches.pop().or_else(|| rig.service.wish_within(Duration::from_millis(300))) {
        rig.service.fulfil(fetch);
    }
    for (head, (first, count)) in heads.into_iter().zip(places) {
        let used = rig.wait(head);
        assert_read(&used, first, count);
    }
    assert_eq!(rig.metric("fetches"), 80);
}

#[test]
fn a_service_that_answers_nothing_any_more_is_given_up() {
    let mut rig = Rig::new(Duration::from_millis(300));
    let places: Vec<(u64, u64)> = (0..80).map(|n| (FIRST + n * 35, 1)).collect();
    let heads = rig.read_all(&places);
    for head in heads {
        let used = rig.wait(head);
        assert_fails(&used);
    }
    rig.wait_lost();
    assert_eq!((rig.metric("late"), rig.metric("lost")), (80, 1));
}

#[test]
fn what_waits_is_saved_and_goes_on_elsewhere() {
    let mut rig = Rig::new(LONG);
    let heads = rig.read_all(&[(FIRST, 1), (FIRST + 300, 2), (FIRST + 600, 3)]);
    let fetches = [rig.service.wish(), rig.service.wish(), rig.service.wish()];
    rig.service.fulfil(fetches[1]);
    let used = rig.wait(heads[1]);
    assert_read(&used, FIRST + 300, 2);
    rig.device.pause();
    let state = rig.device.save();
    assert_eq!(state.waiting, [heads[0], heads[2]]);
    // What becomes ready while it is paused changes nothing in the guest.
    rig.service.fulfil(fetches[0]);
    std::thread::sleep(Duration::from_millis(20));
    let (files, channel, service) = rig.cache.open();
    let mut other = ImageDisk::new(files, channel, "image-0", LONG, thread()).unwrap();
    let activation = rig.guest.activation_from::<ImageDisk>(&rig.device.queues(), other.features());
    other.restore(&state, Some(activation)).unwrap();
    assert_eq!(other.save(), state);
    (rig.device, rig.service) = (other, service);
    rig.device.resume();
    let used = rig.wait(heads[0]);
    assert_read(&used, FIRST, 1);
    let fetch = rig.service.wish();
    assert_eq!(blocks(fetch), (0, 600, 3));
    rig.service.fulfil(fetch);
    let used = rig.wait(heads[2]);
    assert_read(&used, FIRST + 600, 3);
}

#[test]
fn a_reset_forgets_what_waits_and_not_what_is_under_way() {
    let mut rig = Rig::new(LONG);
    rig.read(FIRST, 1);
    let fetch = rig.service.wish();
    rig.device.reset();
    assert_eq!(rig.metric("waiting"), 0);
    rig.guest.restart(&rig.device.queue_sizes());
    rig.guest.activate(&mut rig.device).unwrap();
    let head = rig.read(FIRST, 1);
    assert_eq!(rig.service.wish_within(Duration::from_millis(50)), None);
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST, 1);
}

#[test]
fn two_disks_share_a_thread() {
    let (thread, mut rigs) = (thread(), Vec::new());
    for _ in 0..2 {
        let cache = Cache::new();
        let (files, channel, service) = cache.open();
        let mut device = ImageDisk::new(files, channel, "image", LONG, thread.clone()).unwrap();
        let guest = Guest::with(&mut device);
        rigs.push(Rig { cache, device, guest, service });
    }
    let heads: Vec<u16> = rigs.iter_mut().map(|rig| rig.read(FIRST + 5, 1)).collect();
    let fetches: Vec<Fetch> = rigs.iter().map(|rig| rig.service.wish()).collect();
    rigs[1].service.fulfil(fetches[1]);
    let used = rigs[1].wait(heads[1]);
    assert_read(&used, FIRST + 5, 1);
    // One goes, the other stays.
    drop(rigs.pop());
    rigs[0].service.fulfil(fetches[0]);
    let used = rigs[0].wait(heads[0]);
    assert_read(&used, FIRST + 5, 1);
}

#[test]
fn an_image_is_read_only_and_says_its_name() {
    let mut rig = Rig::new(LONG);
    assert_eq!(rig.device.features() & 1 << 5, 1 << 5, "VIRTIO_BLK_F_RO");
    let ask = |rig: &mut Rig, buffers: &[Buffer]| rig.guest.ask(&mut rig.device, 0, buffers);
    let written = ask(&mut rig, &[header(1, 0), Buffer::Out(vec![1; 512]), Buffer::In(1)]);
    assert_fails(&written);
    let beyond = ask(&mut rig, &[header(0, 1 << 40), Buffer::In(512), Buffer::In(1)]);
    assert_fails(&beyond);
    let unknown = ask(&mut rig, &[header(77, 0), Buffer::In(1)]);
    assert_eq!(unknown.data, [2]);
    let name = ask(&mut rig, &[header(8, 0), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(name.data[..8], *b"image-0\0");
    assert_eq!(rig.metric("bad_requests"), 3);
    // Not written to at all.
    let head = rig.read(0, 1);
    let used = rig.wait(head);
    assert_read(&used, 0, 1);
}

/// A driver that changes a request while it waits gets what it asks for in the end, if that is a request at all.
#[test]
fn a_request_that_changes_while_it_waits_is_checked_anew() {
    let mut rig = Rig::new(LONG);
    rig.cache.fill(0, 700..701);
    let head = rig.guest.queues[0]
        .add(&mut rig.guest.heap, &[header(0, FIRST * 8), Buffer::In(4096), Buffer::In(1)]);
    let table = rig.guest.queues[0].state().desc_table + 16 * u64::from(head);
    rig.guest.notify(0);
    let fetch = rig.service.wish();
    let mut raw = [0; 8];
    rig.guest.memory.read_slice(&mut raw, GuestAddress(table)).unwrap();
    // Another sector in the header.
    let sector = ((FIRST + 700) * 8).to_le_bytes();
    rig.guest.memory.write_slice(&sector, GuestAddress(u64::from_le_bytes(raw) + 8)).unwrap();
    rig.service.fulfil(fetch);
    let used = rig.wait(head);
    assert_read(&used, FIRST + 700, 1);
    // A header that lies nowhere.
    let head = rig.guest.queues[0].add(&mut rig.guest.heap, &read(FIRST + 900, 1));
    let table = rig.guest.queues[0].state().desc_table + 16 * u64::from(head);
    rig.guest.notify(0);
    let fetch = rig.service.wish();
    rig.guest.memory.write_slice(&u64::MAX.to_le_bytes(), GuestAddress(table)).unwrap();
    rig.service.fulfil(fetch);
    let interrupt = rig.guest.interrupt.clone();
    rig.guest.wait_until(&mut rig.device, |_| interrupt.needs_reset().then_some(()));
}
