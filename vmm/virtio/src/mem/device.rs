//! The device: one queue of requests to plug and unplug, and what its owner wants.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{Immutable, IntoBytes};

use super::request::{
    Answer, BlockState, REQ_PLUG, REQ_STATE, REQ_UNPLUG, REQ_UNPLUG_ALL, REQUEST, RESPONSE, Request,
};
use super::{MemBackend, MemMetrics, MemState};
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::memory::{BLOCK, Blocks};
use crate::queue::QueueState;
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// Descriptors of the queue. A driver waits for each answer.
const QUEUE_SIZE: u16 = 64;
/// Requests answered at a stretch, before other devices have their turn.
const BUDGET_REQUESTS: u32 = 16;
/// Bytes plugged or unplugged at a stretch; the request that goes past it is still done.
const BUDGET_BYTES: u64 = 1 << 30;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (virtio 1.2, 5.15.3).
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The configuration space (virtio 1.2, 5.15.4).
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    block_size: U64,
    node_id: U16,
    padding: [u8; 6],
    addr: U64,
    region_size: U64,
    usable_region_size: U64,
    plugged_size: U64,
    requested_size: U64,
}

/// Where `requested_size` lies in the configuration space.
const REQUESTED_SIZE: Range<u64> = 48..56;

/// What a device is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemConfig {
    /// Guest physical address of the region: a multiple of `step`.
    pub addr: u64,
    /// Most that may be requested, in bytes: a multiple of [`BLOCK`], at most the region.
    pub most: u64,
    /// In what steps the usable part grows, in bytes: the guest's own memory blocks. A power of two, at least [`BLOCK`].
    pub step: u64,
}

/// The owner asks for what cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemError {
    /// Parts of blocks cannot be had.
    #[error("{bytes} bytes were requested, which is no multiple of {BLOCK}")]
    Unaligned {
        /// Asked for.
        bytes: u64,
    },
    /// More than there can be.
    #[error("{bytes} bytes were requested, where at most {most} can be")]
    TooMuch {
        /// Asked for.
        bytes: u64,
        /// Most.
        most: u64,
    },
}

/// A memory device.
#[derive(Debug)]
pub struct Mem {
    work: Work,
    region: Hotplug,
    /// Bytes of `requested_size` that the driver has not read since it was set, as bits.
    unread: Cell<u8>,
}

/// The region, apart from the queue its requests come by.
#[derive(Debug)]
struct Hotplug {
    config: MemConfig,
    usable: u64,
    requested: u64,
    /// Only the device writes it, so that it need not ask twice.
    blocks: Arc<Blocks>,
    backend: Box<dyn MemBackend>,
    /// What is left of this turn's budget.
    budget: u64,
    metrics: MemMetrics,
}

impl Mem {
    /// A device for a region of `blocks`, none of which is plugged (or all of what is, when a saved one is to be restored
    /// over memory that is there).
    ///
    /// # Panics
    /// If `config` does not fit itself or the region.
    pub fn new(config: MemConfig, blocks: Arc<Blocks>, backend: Box<dyn MemBackend>) -> Self {
        let MemConfig { addr, most, step } = config;
        assert!(step.is_power_of_two() && step >= BLOCK && addr.is_multiple_of(step), "{config:?}");
        assert!(most.is_multiple_of(BLOCK) && most <= blocks.bytes(), "{config:?}");
        assert!(addr.checked_add(blocks.bytes()).is_some(), "{config:?}");
        let metrics = MemMetrics::default();
        let region = Hotplug { config, usable: 0, requested: 0, blocks, backend, budget: 0, metrics };
        Mem { work: Work::default(), region, unread: Cell::new(u8::MAX) }
    }

    /// Asks the driver for `bytes` of the region in all, and interrupts it, even if it was asked for as much before: it may
    /// have given up. What becomes of it shows in [`Mem::plugged`].
    pub fn set_requested(&mut self, bytes: u64) -> Result<(), MemError> {
        let most = self.region.config.most;
        if !bytes.is_multiple_of(BLOCK) {
            return Err(MemError::Unaligned { bytes });
        }
        if bytes > most {
            return Err(MemError::TooMuch { bytes, most });
        }
        self.region.requested = bytes;
        self.region.usable = self.region.usable.max(self.region.usable_for(bytes));
        self.unread.set(u8::MAX);
        if let Some(active) = self.work.activation() {
            active.interrupt.config_change();
        }
        Ok(())
    }

    /// What was asked for last, in bytes.
    pub fn requested(&self) -> u64 {
        self.region.requested
    }

    /// What is plugged, in bytes.
    pub fn plugged(&self) -> u64 {
        self.region.plugged()
    }

    /// Length of the region in bytes. It may be more than can be asked for.
    pub fn region_size(&self) -> u64 {
        self.region.blocks.bytes()
    }

    /// Most that can be asked for, in bytes.
    pub fn most(&self) -> u64 {
        self.region.config.most
    }

    /// Whether a driver has set the device up.
    pub fn is_active(&self) -> bool {
        self.work.activation().is_some()
    }

    /// Whether the driver has read all of `requested_size` since it was set.
    pub fn seen(&self) -> bool {
        self.unread.get() == 0
    }

    fn serve(&mut self) {
        self.region.budget = BUDGET_BYTES;
        for turn in 0.. {
            let Some(active) = self.work.running() else { return };
            let queue = &mut active.queues[0];
            if turn == BUDGET_REQUESTS || self.region.budget == 0 {
                // Fails only when it is raised already.
                let _ = active.kicks[0].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            let (readable, writable) = chain.lens();
            if writable < RESPONSE {
                queue.break_off(format_args!("a request has {writable} bytes for its response"));
                break;
            }
            let answer = match chain.split().0.read_obj::<Request>() {
                Ok(request) => self.region.carry_out(&request),
                Err(_) => {
                    GUEST_ERRORS
                        .warn(format_args!("mem: a request has {readable} bytes, {REQUEST} are needed"));
                    self.region.count(Answer::Error)
                }
            };
            // The buffers may have been in a block that is gone now: they are looked up anew.
            queue.undo_pop();
            let Some(chain) = queue.pop(&active.memory) else { break };
            let head = chain.head();
            let response = answer.response();
            if chain.split().1.write_obj(&response).is_err() {
                queue.break_off("a request's room for a response went away");
                break;
            }
            queue.push_used(&active.memory, head, u32::try_from(RESPONSE).expect("10 bytes"));
        }
        if let Some(active) = self.work.running() {
            active.queues[0].notify(&active.memory);
        }
    }
}

impl Hotplug {
    fn plugged(&self) -> u64 {
        self.blocks.plugged() * BLOCK
    }

    fn usable_for(&self, requested: u64) -> u64 {
        requested.next_multiple_of(self.config.step).min(self.blocks.bytes())
    }

    /// The blocks that a request names, if it may name them (5.15.6.3.2 and alike).
    fn named(&self, request: &Request) -> Option<Range<u64>> {
        let (addr, count) = (request.addr.get(), u64::from(request.nb_blocks.get()));
        let offset = addr.checked_sub(self.config.addr)?;
        let end = offset.checked_add(count * BLOCK)?;
        let good = offset.is_multiple_of(BLOCK) && count > 0 && end <= self.usable;
        good.then_some(offset / BLOCK..end / BLOCK)
    }

    fn carry_out(&mut self, request: &Request) -> Answer {
        let answer = match (request.kind.get(), self.named(request)) {
            (REQ_UNPLUG_ALL, _) => self.unplug_all(),
            (REQ_PLUG, Some(blocks)) => self.plug(blocks),
            (REQ_UNPLUG, Some(blocks)) => self.unplug(blocks),
            (REQ_STATE, Some(blocks)) => self.state(blocks),
            _ => Answer::Error,
        };
        self.count(answer)
    }

    fn count(&mut self, answer: Answer) -> Answer {
        match answer {
            Answer::Nack => self.metrics.refused += 1,
            Answer::Busy => self.metrics.busy += 1,
            Answer::Error => self.metrics.errors += 1,
            Answer::Ack | Answer::State(_) => {}
        }
        answer
    }

    fn plug(&mut self, blocks: Range<u64>) -> Answer {
        if !self.blocks.are(blocks.clone(), false) {
            return Answer::Error;
        }
        let bytes = (blocks.end - blocks.start) * BLOCK;
        if self.plugged() + bytes > self.requested {
            return Answer::Nack;
        }
        if let Err(e) = self.backend.plug(blocks.clone()) {
            GUEST_ERRORS.warn(format_args!("mem: {} MiB cannot be plugged: {e}", bytes >> 20));
            return Answer::Busy;
        }
        self.blocks.set(blocks, true);
        self.budget = self.budget.saturating_sub(bytes);
        self.metrics.plugs += 1;
        self.metrics.bytes_plugged += bytes;
        Answer::Ack
    }

    fn unplug(&mut self, blocks: Range<u64>) -> Answer {
        if !self.blocks.are(blocks.clone(), true) {
            return Answer::Error;
        }
        let answer = self.give_back(&[blocks]);
        self.metrics.unplugs += u64::from(answer == Answer::Ack);
        answer
    }

    fn unplug_all(&mut self) -> Answer {
        let runs = self.blocks.runs();
        let answer = if runs.is_empty() { Answer::Ack } else { self.give_back(&runs) };
        if answer == Answer::Ack {
            self.usable = self.usable_for(self.requested);
            self.metrics.unplug_alls += 1;
        }
        answer
    }

    /// Takes away what is there of `runs`, which is all of it.
    fn give_back(&mut self, runs: &[Range<u64>]) -> Answer {
        let mark = |plugged| runs.iter().for_each(|run| self.blocks.set(run.clone(), plugged));
        let bytes = runs.iter().map(|run| (run.end - run.start) * BLOCK).sum::<u64>();
        // No device finds them any more before they go.
        mark(false);
        if let Err(e) = self.backend.unplug(runs) {
            mark(true);
            GUEST_ERRORS.warn(format_args!("mem: {} MiB cannot be unplugged: {e}", bytes >> 20));
            return Answer::Busy;
        }
        self.budget = self.budget.saturating_sub(bytes);
        self.metrics.bytes_given_back += bytes;
        Answer::Ack
    }

    fn state(&mut self, blocks: Range<u64>) -> Answer {
        self.metrics.states += 1;
        Answer::State(if self.blocks.are(blocks.clone(), true) {
            BlockState::Plugged
        } else if self.blocks.are(blocks, false) {
            BlockState::Unplugged
        } else {
            BlockState::Mixed
        })
    }

    /// Makes what is plugged what `state` says.
    fn restore(&mut self, state: &MemState) -> Result<(), String> {
        let MemState { addr, region_size, usable_size, requested_size, plugged } = state;
        let own = (self.config.addr, self.blocks.bytes());
        if (*addr, *region_size) != own {
            return Err(format!(
                "saved was a region of {region_size} bytes at {addr:#x}, this one has {} at {:#x}",
                own.1, own.0
            ));
        }
        let wanted = Blocks::new(self.blocks.count());
        for (first, count) in plugged {
            let run = *first..first.saturating_add(*count);
            if run.end.checked_mul(BLOCK).is_none_or(|end| end > *usable_size)
                || !wanted.are(run.clone(), false)
            {
                return Err(format!("blocks {run:?} are not in the usable region, or are named twice"));
            }
            wanted.set(run, true);
        }
        let aligned = requested_size.is_multiple_of(BLOCK) && usable_size.is_multiple_of(BLOCK);
        if !aligned || *requested_size > self.config.most || !(*requested_size..=own.1).contains(usable_size)
        {
            return Err(format!("{requested_size} bytes requested, {usable_size} usable of {}", own.1));
        }
        (self.usable, self.requested) = (*usable_size, *requested_size);
        for run in self.blocks.runs().into_iter().flat_map(|run| split(run, &wanted, false)) {
            if self.give_back(&[run]) != Answer::Ack {
                return Err("a block cannot be unplugged".to_owned());
            }
        }
        for run in wanted.runs().into_iter().flat_map(|run| split(run, &self.blocks, false)) {
            self.backend.plug(run.clone()).map_err(|e| format!("blocks {run:?} cannot be plugged: {e}"))?;
            self.blocks.set(run, true);
        }
        Ok(())
    }
}

/// The parts of `run` that are in the other state in `blocks`.
fn split(run: Range<u64>, blocks: &Blocks, plugged: bool) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    for block in run.filter(|block| blocks.are(*block..block + 1, plugged)) {
        match parts.last_mut() {
            Some(part) if part.end == block => part.end += 1,
            _ => parts.push(block..block + 1),
        }
    }
    parts
}

impl VirtioDevice for Mem {
    type State = MemState;
    const NAME: &'static str = "mem";
    const ID: u32 = VIRTIO_ID_MEM;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let region = &self.region;
        let config = Config {
            block_size: U64::new(BLOCK),
            node_id: U16::new(0),
            padding: [0; 6],
            addr: U64::new(region.config.addr),
            region_size: U64::new(region.blocks.bytes()),
            usable_region_size: U64::new(region.usable),
            plugged_size: U64::new(region.plugged()),
            requested_size: U64::new(region.requested),
        };
        read_config_bytes(config.as_bytes(), offset, data);
        let end = offset.saturating_add(data.len() as u64);
        let read = offset.max(REQUESTED_SIZE.start)..end.min(REQUESTED_SIZE.end);
        for byte in read {
            self.unread.set(self.unread.get() & !(1 << (byte - REQUESTED_SIZE.start)));
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.features & UNPLUGGED_INACCESSIBLE == 0 {
            // 5.15.5.2: "MAY fail to operate further".
            let reason = "the driver might read memory that is not plugged".to_owned();
            return Err(ActivateError { device: Self::NAME, reason });
        }
        self.work.begin(activation);
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) {
        self.serve();
    }

    fn pause(&mut self) {
        self.work.pause();
    }

    fn resume(&mut self) {
        self.work.resume();
        self.serve();
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> MemState {
        let region = &self.region;
        MemState {
            addr: region.config.addr,
            region_size: region.blocks.bytes(),
            usable_size: region.usable,
            requested_size: region.requested,
            plugged: region.blocks.runs().iter().map(|run| (run.start, run.end - run.start)).collect(),
        }
    }

    fn restore(&mut self, state: &MemState, activation: Option<Activation>) -> Result<(), ActivateError> {
        let failed = |reason| ActivateError { device: Self::NAME, reason };
        self.region.restore(state).map_err(failed)?;
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
        // The next driver has not seen it.
        self.unread.set(u8::MAX);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.region.metrics.list();
        list.extend([
            ("requested_bytes", self.region.requested),
            ("plugged_bytes", self.region.plugged()),
            ("usable_bytes", self.region.usable),
            ("region_bytes", self.region.blocks.bytes()),
            ("seen", u64::from(self.seen())),
        ]);
        list
    }
}

#[cfg(test)]
mod tests;
