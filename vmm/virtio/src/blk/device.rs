//! The device: request queues, all alike.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::request::{
    Limits, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_ZEROES_RANGES, MAX_ZEROES_SECTORS, Request, SIZE_MAX,
};
use super::{BlkMetrics, BlkState, Disk, SECTOR};
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::queue::{Chain, QueueState};
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Most data buffers in a request: all descriptors but those of header and status.
const SEG_MAX: u16 = QUEUE_SIZE - 2;
/// Requests done at a stretch, before other devices have their turn.
const BUDGET_REQUESTS: u32 = 64;
/// Bytes moved at a stretch, or as much in other work ([`Request::cost`]); the request that goes past it is still done.
const BUDGET_BYTES: u64 = 4 << 20;
/// Least unit that is worth discarding, in sectors: a page of the host.
const DISCARD_ALIGNMENT: u32 = 8;

/// The configuration space up to the last field that a feature of ours shows (virtio 1.2, 5.2.4).
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// A disk of the guest.
#[derive(Debug)]
pub struct Blk {
    work: Work,
    service: Service,
    queues: u16,
}

/// What does the requests, apart from the queues they come by.
#[derive(Debug)]
struct Service {
    disk: Disk,
    /// Each write is durable before it is answered.
    write_through: bool,
    /// What is left of this turn's budget.
    budget: u64,
    metrics: BlkMetrics,
}

impl Blk {
    /// A device over `disk` with that many request queues, at least one.
    pub fn new(disk: Disk, queues: u16) -> Self {
        Blk {
            work: Work::default(),
            service: Service { disk, write_through: true, budget: 0, metrics: BlkMetrics::default() },
            queues: queues.max(1),
        }
    }

    /// Makes what was written durable, whoever asks.
    pub fn flush(&self) -> io::Result<()> {
        if self.service.disk.is_read_only() { Ok(()) } else { self.service.disk.flush() }
    }

    fn begin(&mut self, features: u64) {
        self.service.write_through = features & 1 << VIRTIO_BLK_F_FLUSH == 0;
    }

    fn serve(&mut self, index: usize) {
        let Some(active) = self.work.running() else { return };
        let Some(queue) = active.queues.get_mut(index) else { return };
        let mut requests = 0;
        self.service.budget = BUDGET_BYTES;
        loop {
            if requests == BUDGET_REQUESTS || self.service.budget == 0 {
                // Fails only when it is raised already.
                let _ = active.kicks[index].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            requests += 1;
            let head = chain.head();
            match self.service.answer(chain) {
                Some(len) => queue.push_used(&active.memory, head, len),
                None => {
                    queue.break_off("request without room for a status");
                    break;
                }
            }
        }
        queue.notify(&active.memory);
    }
}

impl Service {
    fn limits(&self) -> Limits {
        Limits {
            sectors: self.disk.sectors(),
            read_only: self.disk.is_read_only(),
            max_data: u64::from(SEG_MAX) * u64::from(SIZE_MAX),
        }
    }

    /// Does a request and writes its status. Tells how many bytes were written in all, or `None` if there is no room
    /// for the status.
    fn answer(&mut self, chain: Chain<'_>) -> Option<u32> {
        let (reader, mut room) = chain.split();
        // 5.2.6: the status is the last byte.
        let data_len = room.left().checked_sub(1)?;
        let mut status = room.split_off(data_len).expect("one byte less than there is");
        let (code, filled) = match Request::parse(reader, room, &self.limits()) {
            Ok(request) => self.perform(request),
            Err(e) => {
                self.metrics.bad_requests += 1;
                GUEST_ERRORS.warn(format_args!("blk: {e}"));
                (if e.is_unsupported() { VIRTIO_BLK_S_UNSUPP } else { VIRTIO_BLK_S_IOERR }, 0)
            }
        };
        status.write_obj(&u8::try_from(code).expect("codes are 0 to 2")).expect("room of one byte");
        // 2.7.8.2: the length counts bytes written without a gap from the start.
        let len = if filled == data_len { data_len + 1 } else { filled };
        Some(u32::try_from(len).expect("chains are shorter than 2^32 bytes"))
    }

    /// Tells the status and how many bytes of data were written.
    fn perform(&mut self, request: Request<'_>) -> (u32, usize) {
        self.budget = self.budget.saturating_sub(request.cost());
        let mut filled = 0;
        let done = match request {
            Request::Read { offset, mut data } => {
                let done = self.disk.read(&mut data, offset);
                filled = data.written();
                done.map(|()| self.metrics.count_read(filled))
            }
            Request::Write { offset, mut data } => {
                let len = data.left();
                self.disk
                    .write(&mut data, offset)
                    .and_then(|()| if self.write_through { self.disk.flush() } else { Ok(()) })
                    .map(|()| self.metrics.count_write(len))
            }
            Request::Flush => self.flush(),
            Request::Discard(ranges) => {
                let mut each = ranges.iter().map(|range| self.disk.discard(range.offset, range.len));
                each.try_for_each(|done| done).map(|()| self.metrics.discards += 1)
            }
            Request::WriteZeroes(ranges) => {
                let mut each =
                    ranges.iter().map(|range| self.disk.write_zeroes(range.offset, range.len, range.unmap));
                each.try_for_each(|done| done).map(|()| self.metrics.write_zeroes += 1)
            }
            Request::GetId(mut room) => {
                filled = room.write(self.disk.id());
                Ok(())
            }
        };
        match done {
            Ok(()) => (VIRTIO_BLK_S_OK, filled),
            Err(e) => {
                self.metrics.host_errors += 1;
                GUEST_ERRORS.warn(format_args!("blk: {e}"));
                (VIRTIO_BLK_S_IOERR, filled)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.disk.is_read_only() {
            self.disk.flush()?;
        }
        self.metrics.flushes += 1;
        Ok(())
    }
}

impl VirtioDevice for Blk {
    type State = BlkState;
    const NAME: &'static str = "blk";
    const ID: u32 = VIRTIO_ID_BLOCK;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE];
        if self.service.disk.is_read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        if self.queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        bits.into_iter().map(|bit| 1 << bit).sum()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            capacity: self.service.disk.sectors().into(),
            size_max: SIZE_MAX.into(),
            seg_max: u32::from(SEG_MAX).into(),
            geometry: [0; 4],
            blk_size: u32::try_from(SECTOR).expect("512").into(),
            topology: [0; 8],
            writeback: 0,
            unused0: 0,
            num_queues: self.queues.into(),
            max_discard_sectors: MAX_DISCARD_SECTORS.into(),
            max_discard_seg: MAX_DISCARD_RANGES.into(),
            discard_sector_alignment: DISCARD_ALIGNMENT.into(),
            max_write_zeroes_sectors: MAX_ZEROES_SECTORS.into(),
            max_write_zeroes_seg: MAX_ZEROES_RANGES.into(),
            write_zeroes_may_unmap: 1,
            unused1: [0; 3],
        };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.begin(activation.features);
        self.work.begin(activation);
        Ok(())
    }

    fn on_queue(&mut self, index: usize) {
        self.serve(index);
    }

    fn pause(&mut self) {
        self.work.pause();
    }

    fn resume(&mut self) {
        self.work.resume();
        for index in 0..self.work.queue_count() {
            self.serve(index);
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> BlkState {
        BlkState { sectors: self.service.disk.sectors(), read_only: self.service.disk.is_read_only() }
    }

    fn restore(&mut self, state: &BlkState, activation: Option<Activation>) -> Result<(), ActivateError> {
        let own = self.save();
        if own != *state {
            let reason = format!("state is of another disk: {state:?}, not {own:?}");
            return Err(ActivateError { device: Self::NAME, reason });
        }
        if let Some(activation) = &activation {
            self.begin(activation.features);
        }
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.service.metrics.list()
    }
}

#[cfg(test)]
mod tests;
