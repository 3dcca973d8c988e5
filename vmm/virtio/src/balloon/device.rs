//! The device: pages in, pages out, pages free.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemory as _, VolatileSlice};
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::pages::{PAGE, runs, whole_pages};
use super::{BalloonBackend, BalloonMetrics, BalloonState, Statistics};
use crate::GuestMemory;
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::queue::{Chain, QueueState};
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// Descriptors of each queue. Linux reports up to 32 blocks at once.
const QUEUE_SIZE: u16 = 128;
/// Queues: inflate, deflate, statistics, and reporting twice (see the module's head).
const QUEUES: usize = 5;
/// Requests answered at a stretch, before other devices have their turn.
const BUDGET: u32 = 16;
/// Pages of one request that are looked at. Linux names 256.
const MAX_PAGES: usize = 1024;

/// Features (virtio 1.2, 5.5.3).
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const PAGE_REPORTING: u64 = 1 << 5;

/// The configuration space (virtio 1.2, 5.5.4).
#[derive(Debug, Clone, Copy, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    num_pages: U32,
    actual: U32,
    free_page_hint_cmd_id: U32,
    poison_val: U32,
}

/// The owner wants a balloon that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a balloon of {bytes} bytes was asked for, must be a multiple of {PAGE} and at most {} bytes", u64::from(u32::MAX) * PAGE)]
pub struct TargetError {
    /// Asked for.
    pub bytes: u64,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

impl Role {
    /// Of queue `index`, with these features.
    fn of(index: usize, features: u64) -> Option<Self> {
        match (index, features & STATS_VQ != 0, features & PAGE_REPORTING != 0) {
            (0, ..) => Some(Role::Inflate),
            (1, ..) => Some(Role::Deflate),
            (2, true, _) => Some(Role::Statistics),
            (2.., _, true) => Some(Role::Reporting),
            _ => None,
        }
    }
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    work: Work,
    config: Config,
    pages: Pages,
    statistics: Statistics,
}

/// What becomes of pages, apart from the queues they are named by.
#[derive(Debug)]
struct Pages {
    backend: Box<dyn BalloonBackend>,
    /// Kept for its room.
    numbers: Vec<u32>,
    metrics: BalloonMetrics,
}

impl Balloon {
    /// An empty balloon that is to stay so.
    pub fn new(backend: Box<dyn BalloonBackend>) -> Self {
        let pages = Pages { backend, numbers: Vec::new(), metrics: BalloonMetrics::default() };
        Balloon { work: Work::default(), config: Config::default(), pages, statistics: Statistics::default() }
    }

    /// Asks the driver for a balloon of `bytes`. What becomes of it shows in [`Balloon::actual`].
    pub fn set_target(&mut self, bytes: u64) -> Result<(), TargetError> {
        let pages = u32::try_from(bytes / PAGE).ok().filter(|_| bytes.is_multiple_of(PAGE));
        self.config.num_pages = U32::new(pages.ok_or(TargetError { bytes })?);
        if let Some(active) = self.work.activation() {
            active.interrupt.config_change();
        }
        Ok(())
    }

    /// What was asked for last, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.config.num_pages.get()) * PAGE
    }

    /// What the driver says it gave, in bytes.
    pub fn actual(&self) -> u64 {
        u64::from(self.config.actual.get()) * PAGE
    }

    /// What the guest's kernel said last of its memory.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// Asks for new statistics, which [`Balloon::statistics`] gives when they have come. Costs the guest an interrupt.
    pub fn request_statistics(&mut self) {
        let Some(active) = self.work.running() else { return };
        if Role::of(2, active.features) != Some(Role::Statistics) {
            return;
        }
        let queue = &mut active.queues[2];
        // 5.5.6.3: giving the buffer back is the request.
        let Some(chain) = queue.pop(&active.memory) else { return };
        queue.push_used(&active.memory, chain.head(), 0);
        queue.notify(&active.memory);
        self.serve_statistics();
    }

    fn serve(&mut self, index: usize) {
        let Some(active) = self.work.running() else { return };
        let Some(role) = Role::of(index, active.features) else { return };
        if role == Role::Statistics {
            return self.serve_statistics();
        }
        let poisoned = active.features & PAGE_POISON != 0 && self.config.poison_val.get() != 0;
        let queue = &mut active.queues[index];
        for turn in 0.. {
            if turn == BUDGET {
                // Fails only when it is raised already.
                let _ = active.kicks[index].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            let head = chain.head();
            match role {
                Role::Inflate => self.pages.inflate(&active.memory, chain),
                Role::Deflate => self.pages.deflate(&chain),
                Role::Reporting => self.pages.report(&chain, poisoned),
                Role::Statistics => {}
            }
            queue.push_used(&active.memory, head, 0);
        }
        queue.notify(&active.memory);
    }

    /// Reads what came and puts it back: the driver's buffer stays until new statistics are wanted. So it is the ring that
    /// remembers it, over a save and a restore, too.
    fn serve_statistics(&mut self) {
        let Some(active) = self.work.running() else { return };
        let queue = &mut active.queues[2];
        if let Some(chain) = queue.pop(&active.memory) {
            self.statistics.take(chain.split().0);
            queue.undo_pop();
        }
    }
}

impl Pages {
    fn inflate(&mut self, memory: &GuestMemory, chain: Chain<'_>) {
        let (mut reader, _) = chain.split();
        let count = reader.left() / size_of::<u32>();
        self.metrics.bad_requests += u64::from(count > MAX_PAGES || !reader.left().is_multiple_of(4));
        self.numbers.clear();
        for _ in 0..count.min(MAX_PAGES) {
            let number: U32 = reader.read_obj().expect("counted before");
            self.numbers.push(number.get());
        }
        self.metrics.inflated_pages += self.numbers.len() as u64;
        for run in runs(&mut self.numbers) {
            if !self.give_back_at(memory, run.start, run.end - run.start) {
                // Those of them that are memory.
                for page in 0..(run.end - run.start) / PAGE {
                    if !self.give_back_at(memory, run.start + page * PAGE, PAGE) {
                        self.metrics.bad_pages += 1;
                        GUEST_ERRORS.warn(format_args!(
                            "balloon: the page at {:#x} is not in guest memory",
                            run.start + page * PAGE
                        ));
                    }
                }
            }
        }
    }

    /// False, and nothing done, where not all of it is memory.
    fn give_back_at(&mut self, memory: &GuestMemory, gpa: u64, len: u64) -> bool {
        let len = usize::try_from(len).expect("x86-64 addresses fit usize");
        let slices: Result<Vec<_>, _> = memory.get_slices(GuestAddress(gpa), len).collect();
        let Ok(slices) = slices else { return false };
        slices.iter().for_each(|slice| self.give_back(slice));
        true
    }

    fn give_back(&mut self, pages: &VolatileSlice<'_>) {
        match self.backend.give_back(pages) {
            Ok(()) => self.metrics.bytes_given_back += pages.len() as u64,
            Err(e) => self.refused(&e),
        }
    }

    fn refused(&mut self, error: &io::Error) {
        self.metrics.host_errors += 1;
        GUEST_ERRORS.warn(format_args!("balloon: the host does not take pages: {error}"));
    }

    /// The driver may have used its pages again before it says so; they came by themselves.
    fn deflate(&mut self, chain: &Chain<'_>) {
        self.metrics.deflated_pages += (chain.lens().0 / size_of::<u32>()) as u64;
    }

    fn report(&mut self, chain: &Chain<'_>, poisoned: bool) {
        for slice in chain.writable() {
            self.metrics.reported_bytes += slice.len() as u64;
            match whole_pages(slice) {
                // 5.5.6.8.2: it would come back as zeros, where the guest expects its pattern.
                Some(pages) if poisoned => self.metrics.poisoned_bytes += pages.len() as u64,
                Some(pages) => self.give_back(&pages),
                None => self.metrics.bad_pages += 1,
            }
        }
    }
}

impl VirtioDevice for Balloon {
    type State = BalloonState;
    const NAME: &'static str = "balloon";
    const ID: u32 = VIRTIO_ID_BALLOON;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        STATS_VQ | DEFLATE_ON_OOM | PAGE_POISON | PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.config.as_bytes(), offset, data);
    }

    /// `actual` and `poison_val` are the driver's.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        match (offset, data.try_into().map(u32::from_le_bytes)) {
            (4, Ok(actual)) => self.config.actual = U32::new(actual),
            (12, Ok(poison)) => self.config.poison_val = U32::new(poison),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
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

    fn save(&self) -> BalloonState {
        BalloonState {
            target_pages: self.config.num_pages.get(),
            actual_pages: self.config.actual.get(),
            poison_val: self.config.poison_val.get(),
        }
    }

    fn restore(&mut self, state: &BalloonState, activation: Option<Activation>) -> Result<(), ActivateError> {
        self.config.num_pages = U32::new(state.target_pages);
        self.config.actual = U32::new(state.actual_pages);
        self.config.poison_val = U32::new(state.poison_val);
        self.work.restore(activation);
        Ok(())
    }

    /// The next driver begins with an empty balloon; what the last one had in it is its memory again.
    fn reset(&mut self) {
        self.work.reset();
        self.config.actual = U32::new(0);
        self.config.poison_val = U32::new(0);
        self.statistics = Statistics::default();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.pages.metrics.list();
        list.extend([("target_bytes", self.target()), ("actual_bytes", self.actual())]);
        list.extend(self.statistics.list());
        list
    }
}

#[cfg(test)]
mod tests;
