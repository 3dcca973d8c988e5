//! The disk between a fake driver and real files.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::blk::SECTOR;
use crate::blk::request::{MAX_ZEROES_SECTORS, SIZE_MAX};
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Guest, Used};

const SECTORS: u64 = 256;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    let bytes: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at / SECTOR).to_le_bytes()[0] ^ 0x55).collect();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

fn blk(file: &File, read_only: bool, queues: u16) -> Blk {
    Blk::new(Disk::new(file.try_clone().unwrap().into(), read_only, "disk-0").unwrap(), queues)
}

fn header(kind: u32, sector: u64) -> Buffer {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    Buffer::Out(bytes)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// A disk in use.
struct Rig {
    file: File,
    blk: Blk,
    guest: Guest,
}

impl Rig {
    fn new(read_only: bool) -> Self {
        let file = image();
        let mut blk = blk(&file, read_only, 1);
        let guest = Guest::with(&mut blk);
        Rig { file, blk, guest }
    }

    fn ask(&mut self, buffers: &[Buffer]) -> Used {
        self.guest.ask(&mut self.blk, 0, buffers)
    }

    /// Status of a request whose answer is nothing else.
    fn status(&mut self, kind: u32, sector: u64, data: Vec<u8>) -> u8 {
        let used = self.ask(&[header(kind, sector), Buffer::Out(data), Buffer::In(1)]);
        assert_eq!(used.len, 1);
        used.data[0]
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; 256 * 512];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// Requests are writes to the first half of the disk, and reads of its second half, in turn and by both queues.
struct BlkFixture(File);

impl Default for BlkFixture {
    fn default() -> Self {
        BlkFixture(image())
    }
}

impl Fixture for BlkFixture {
    type Device = Blk;

    fn device(&mut self) -> Blk {
        blk(&self.0, false, 2)
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        let sector = u64::from(n) * 131 % SECTORS;
        let queue = (n / 2 % 2) as usize;
        if sector < SECTORS / 2 {
            let bytes = n.to_le_bytes().repeat(128);
            guest.send(queue, &[header(1, sector), Buffer::Out(bytes), Buffer::In(1)]);
        } else {
            guest.send(queue, &[header(0, sector), Buffer::In(100), Buffer::In(412), Buffer::In(1)]);
        }
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Blk, n: u32) {
        let sector = u64::from(n) * 131 % SECTORS;
        let used = guest.wait(device, (n / 2 % 2) as usize);
        if sector < SECTORS / 2 {
            assert_eq!((used.len, &used.data[..]), (1, &[OK][..]));
            let mut bytes = [0; 512];
            self.0.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
            assert_eq!(bytes[..], n.to_le_bytes().repeat(128));
        } else {
            assert_eq!(used.len, 513);
            assert_eq!(used.data[..512], [sector.to_le_bytes()[0] ^ 0x55; 512]);
            assert_eq!(used.data[512], OK);
        }
    }
}

crate::device_contract_tests!(contract, BlkFixture);

#[test]
fn reads_and_writes_scattered_data() {
    let mut rig = Rig::new(false);
    let bytes: Vec<u8> = (0..1024_u32).map(|n| n.to_le_bytes()[0]).collect();
    let used = rig.ask(&[
        header(1, 3),
        Buffer::Out(bytes[..1].into()),
        Buffer::Out(bytes[1..700].into()),
        Buffer::Out(bytes[700..].into()),
        Buffer::In(1),
    ]);
    assert_eq!((used.len, used.data), (1, vec![OK]));
    assert_eq!(rig.content()[3 * 512..5 * 512], bytes);

    let used = rig.ask(&[header(0, 3), Buffer::In(1000), Buffer::In(24), Buffer::In(1)]);
    assert_eq!(used.len, 1025);
    assert_eq!((&used.data[..1024], used.data[1024]), (&bytes[..], OK));

    // Status and data may share a buffer, and the header may be in pieces.
    let Buffer::Out(head) = header(0, 4) else { unreachable!() };
    let used = rig.ask(&[Buffer::Out(head[..5].into()), Buffer::Out(head[5..].into()), Buffer::In(513)]);
    assert_eq!((used.len, &used.data[..512], used.data[512]), (513, &bytes[512..], OK));

    assert_eq!(
        rig.blk.service.metrics,
        BlkMetrics { reads: 2, read_bytes: 1536, writes: 1, written_bytes: 1024, ..BlkMetrics::default() }
    );
}

#[test]
fn what_is_not_on_the_disk_is_an_error() {
    let mut rig = Rig::new(false);
    let before = rig.content();
    for (sector, bytes) in
        [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512)]
    {
        let used = rig.ask(&[header(0, sector), Buffer::In(bytes), Buffer::In(1)]);
        assert_eq!((used.len, *used.data.last().unwrap()), (0, IOERR), "sector {sector}");
        assert_eq!(used.data[..bytes], vec![0xa5; bytes]);
        assert_eq!(rig.status(1, sector, vec![1; bytes]), IOERR);
    }
    assert_eq!(rig.status(1, 0, vec![1; 511]), IOERR, "part of a sector");
    assert_eq!(rig.status(1, 0, vec![1; 513]), IOERR, "part of a sector");
    // The last sector is.
    assert_eq!(rig.content(), before);
    assert_eq!(rig.status(1, SECTORS - 1, vec![1; 512]), OK);
    assert_eq!(rig.status(1, SECTORS, vec![]), OK, "nothing, at the end");
    assert_eq!(rig.blk.service.metrics.bad_requests, 12);
}

#[test]
fn a_read_only_disk_takes_no_changes() {
    let mut rig = Rig::new(true);
    let before = rig.content();
    assert_eq!(rig.blk.features() & (1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_DISCARD), 1 << VIRTIO_BLK_F_RO);
    assert_eq!(rig.status(1, 0, vec![1; 512]), IOERR);
    assert_eq!(rig.status(DISCARD, 0, range(0, 8, 0)), IOERR);
    assert_eq!(rig.status(WRITE_ZEROES, 0, range(0, 8, 0)), IOERR);
    assert_eq!(rig.status(4, 0, vec![]), OK, "nothing to flush");
    assert_eq!(rig.content(), before);
    let used = rig.ask(&[header(0, 9), Buffer::In(512), Buffer::In(1)]);
    assert_eq!((used.len, used.data[0]), (513, 9 ^ 0x55));
}

#[test]
fn discards_give_space_back_and_zeros_are_zeros() {
    let mut rig = Rig::new(false);
    rig.file.sync_all().unwrap();
    let blocks = rig.file.metadata().unwrap().blocks();
    let two = [range(8, 16, 0), range(64, 128, 0)].concat();
    assert_eq!(rig.status(DISCARD, 0, two), OK);
    let freed = blocks - rig.file.metadata().unwrap().blocks();
    // A file system that cannot punch holes does nothing, which is right, too.
    assert!(freed == 144 || freed == 0, "{freed} of 144 sectors came back");

    let before = rig.content();
    for (sector, flags) in [(200, 0), (208, 1)] {
        assert_eq!(rig.status(WRITE_ZEROES, 0, range(sector, 8, flags)), OK);
    }
    let after = rig.content();
    assert_eq!(after[200 * 512..216 * 512], [0; 16 * 512]);
    assert_eq!((&after[..200 * 512], &after[216 * 512..]), (&before[..200 * 512], &before[216 * 512..]));
    assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR);
    assert_eq!((rig.blk.service.metrics.discards, rig.blk.service.metrics.write_zeroes), (1, 2));
}

#[test]
fn ranges_must_make_sense() {
    let mut rig = Rig::new(false);
    let before = rig.content();
    for (kind, data, status) in [
        (DISCARD, range(0, 8, 1), UNSUPP), // 5.2.6.2: unmap is not for discard
        (DISCARD, range(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, range(0, 8, 2), UNSUPP),
        (DISCARD, range(SECTORS, 1, 0), IOERR),
        (DISCARD, range(SECTORS - 1, 2, 0), IOERR),
        (DISCARD, range(u64::MAX, 2, 0), IOERR),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, range(0, MAX_ZEROES_SECTORS + 1, 0), IOERR),
        (DISCARD, range(0, 8, 0)[..15].to_vec(), IOERR),
        (DISCARD, range(0, 8, 0).repeat(17), IOERR),
        (WRITE_ZEROES, range(0, 8, 0).repeat(2), IOERR),
        // The second range is bad: the first must not be done either.
        (DISCARD, [range(0, 8, 0), range(SECTORS, 8, 0)].concat(), IOERR),
        (DISCARD, vec![], OK),
        (WRITE_ZEROES, range(0, 0, 0), OK),
    ] {
        assert_eq!(rig.status(kind, 0, data.clone()), status, "type {kind}: {data:?}");
    }
    assert_eq!(rig.content(), before);
}

#[test]
fn says_its_id() {
    let mut rig = Rig::new(false);
    let used = rig.ask(&[header(GET_ID, 0), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(
        (used.len, &used.data[..20], used.data[20]),
        (21, &b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], OK)
    );
    let used = rig.ask(&[header(GET_ID, 0), Buffer::In(3), Buffer::In(1)]);
    assert_eq!((used.len, &used.data[..]), (4, &b"dis\0"[..]));
    let used = rig.ask(&[header(GET_ID, 0), Buffer::In(30), Buffer::In(1)]);
    assert_eq!((used.len, used.data[30]), (20, OK), "20 bytes, a gap, the status");
}

#[test]
fn unknown_requests_are_unsupported_and_short_ones_fail() {
    let mut rig = Rig::new(false);
    for kind in [2, 3, 5, 9, 14, 16, u32::MAX] {
        assert_eq!(rig.status(kind, 0, vec![]), UNSUPP, "{kind}");
    }
    let used = rig.ask(&[Buffer::Out(vec![0; 15]), Buffer::In(1)]);
    assert_eq!((used.len, used.data[0]), (1, IOERR));
    let used = rig.ask(&[Buffer::In(1)]);
    assert_eq!((used.len, used.data[0]), (1, IOERR));
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_queue() {
    let mut rig = Rig::new(false);
    rig.guest.send(0, &[header(4, 0)]);
    rig.guest.settle(&mut rig.blk);
    assert!(rig.guest.interrupt.needs_reset());
}

#[test]
fn a_file_that_shrank_is_an_error_and_not_zeros() {
    let mut rig = Rig::new(false);
    rig.file.set_len(512).unwrap();
    let used = rig.ask(&[header(0, 0), Buffer::In(1024), Buffer::In(1)]);
    assert_eq!((used.len, used.data[0], used.data[1024]), (512, 0x55, IOERR));
    assert_eq!(rig.blk.service.metrics.host_errors, 1);
}

#[test]
fn a_full_host_is_an_error() {
    // /dev/full is no disk; a file beyond the process's size limit would kill the test. A read-only descriptor behind
    // a writable disk cannot be made. So: a file sealed against writing.
    let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::WRITE).unwrap();
    let mut blk = Blk::new(Disk::new(memory, false, "").unwrap(), 1);
    let mut guest = Guest::with(&mut blk);
    for (kind, data) in [(1, vec![1; 512]), (DISCARD, range(0, 8, 0)), (WRITE_ZEROES, range(0, 8, 0))] {
        let used = guest.ask(&mut blk, 0, &[header(kind, 0), Buffer::Out(data), Buffer::In(1)]);
        assert_eq!(used.data, [IOERR], "{kind}");
    }
    assert_eq!(blk.service.metrics.host_errors, 3);
}

#[test]
fn work_is_bounded_for_each_turn_and_goes_on_by_itself() {
    let mut rig = Rig::new(false);
    for _ in 0..80 {
        rig.guest.send(0, &[header(GET_ID, 0), Buffer::In(1)]);
    }
    rig.guest.kicks[0].read().unwrap();
    rig.blk.on_queue(0);
    assert_eq!(rig.guest.queues[0].used_idx(), u16::try_from(BUDGET_REQUESTS).unwrap());
    assert!(rig.guest.pump(&mut rig.blk), "it asked to be called again");
    assert_eq!(rig.guest.queues[0].used_idx(), 80);
    assert!(!rig.guest.pump(&mut rig.blk));

    let mut rig = Rig::new(false);
    for _ in 0..10 {
        rig.guest.send(0, &[header(4, 0), Buffer::In(1)]);
    }
    let mut turns = 0;
    while rig.guest.pump(&mut rig.blk) {
        turns += 1;
    }
    assert_eq!((turns, rig.blk.service.metrics.flushes), (3, 10), "a turn takes 4 flushes");
}

#[test]
fn the_configuration_space_says_what_there_is() {
    let file = image();
    let blk = blk(&file, false, 3);
    let mut config = [0xee; 64];
    blk.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (256, 0));
    assert_eq!((word(8), word(12), word(20)), (SIZE_MAX, 254, 512));
    assert_eq!(config[34..36], [3, 0]);
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 16, 8));
    assert_eq!((word(48), word(52), config[56]), (1 << 16, 1, 1));
    assert_eq!(config[60..], [0; 4]);
    assert_eq!(blk.features(), 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14);
    assert_eq!(blk.queue_sizes(), [256; 3]);
}

#[test]
fn the_state_of_another_disk_is_refused() {
    let file = image();
    let state = blk(&file, false, 1).save();
    assert!(blk(&file, true, 1).restore(&state, None).is_err());
    file.set_len(512).unwrap();
    let error = blk(&file, false, 1).restore(&state, None).unwrap_err().to_string();
    assert!(error.contains("256") && error.contains("sectors: 1"), "{error}");
}
