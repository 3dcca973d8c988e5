//! The device: request queues, all alike.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use zerocopy::IntoBytes;

use super::request::{Limits, Request};
use super::space::{MAX_DATA, QUEUE_SIZE, config_space};
use super::{BlkMetrics, BlkState, Disk};
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::queue::{Chain, QueueState};
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// Requests done at a stretch, before other devices have their turn.
const BUDGET_REQUESTS: u32 = 64;
/// Bytes moved at a stretch, or as much in other work ([`Request::cost`]); the request that goes past it is still done.
const BUDGET_BYTES: u64 = 4 << 20;

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
        Limits { sectors: self.disk.sectors(), read_only: self.disk.is_read_only(), max_data: MAX_DATA }
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
        let config = config_space(self.service.disk.sectors(), self.queues);
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
