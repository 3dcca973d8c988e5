//! Steps of a resize: what the guest is asked, and what its answer means.

use std::time::Instant;

use super::changes::{
    Changes, LONGEST_PAUSE, Memory, NUDGES, Open, PAUSE, QUERY, Question, RESERVE, errno_text,
};
use super::{Cpus, Machine, MemoryState};
use crate::upcall::Ask;
use crate::vcpu::CpuSet;
use virtio::memory::BLOCK;

impl Changes {
    pub(super) fn settle_memory(&mut self, machine: &mut impl Machine) -> Option<u64> {
        let MemoryState { plugged, requested, .. } = machine.memory()?;
        if plugged != requested
            && let Err(error) = machine.request_memory(plugged)
        {
            log::warn!("leave memory as it is: {error}");
        }
        Some(plugged)
    }

    /// `before`: what the guest had, if it has changed since.
    pub(super) fn end_memory(&mut self, before: Option<u64>, detail: &str, machine: &mut impl Machine) {
        let Some(plugged) = self.settle_memory(machine) else { return };
        let Some(transaction) = &mut self.current else { return };
        let wanted = transaction.asked.target.memory.unwrap_or(plugged);
        transaction.memory = Some(plugged);
        transaction.end_step(plugged == wanted, before.is_some_and(|before| plugged != before), detail);
    }

    pub(super) fn end_vcpus(&mut self, before: CpuSet, wanted: CpuSet, detail: &str) {
        let (Some(transaction), Some(online)) = (&mut self.current, self.online) else { return };
        transaction.vcpus = Some(online.len().into());
        transaction.end_step(online == wanted, online != before, detail);
    }

    pub(super) fn change_vcpus(&mut self, cpus: Cpus, machine: &mut impl Machine, now: Instant) {
        let before = self.online.expect("asked for before anything is changed");
        let wanted = match cpus {
            Cpus::Count(count) => before.resized(count, self.possible),
            Cpus::These(set) => set,
        };
        let new = wanted.without(self.started);
        if let Err(why) = machine.start_vcpus(new) {
            return self.end_vcpus(before, wanted, &why);
        }
        self.started = self.started.and(new);
        let within = self.time_left(now);
        self.ask(&Ask::SetCpus(wanted), Open::Cpus { before, wanted }, within, machine, now);
    }

    pub(super) fn change_memory(&mut self, bytes: u64, machine: &mut impl Machine, now: Instant) {
        let Some(memory) = machine.memory() else {
            let transaction = self.current.as_mut().expect("a step is one of it");
            return transaction.refuse("this VM was configured without memory to grow into");
        };
        if bytes < memory.plugged {
            let within = self.time_left(now).min(QUERY);
            return self.ask(&Ask::Query, Open::Look { wanted: bytes }, within, machine, now);
        }
        self.request_memory(bytes, memory.plugged, machine, now);
    }

    /// Shrinks to `wanted`, as far as the guest has it `available`.
    pub(super) fn shrink(&mut self, wanted: u64, available: u64, machine: &mut impl Machine, now: Instant) {
        let Some(memory) = machine.memory() else { return };
        let spare = available.saturating_sub(RESERVE) & !(BLOCK - 1);
        let least = memory.plugged.saturating_sub(spare);
        if least > wanted
            && let Some(transaction) = &mut self.current
        {
            transaction.detail = format!("the guest has {} MiB that it can do without", spare >> 20);
        }
        self.request_memory(wanted.max(least), memory.plugged, machine, now);
    }

    pub(super) fn request_memory(
        &mut self,
        bytes: u64,
        before: u64,
        machine: &mut impl Machine,
        now: Instant,
    ) {
        if bytes == before {
            return self.end_memory(None, "", machine);
        }
        if let Err(why) = machine.request_memory(bytes) {
            return self.end_memory(None, &why, machine);
        }
        self.ask_memory(Memory { before, last: before, nudges: 0, pause: PAUSE }, machine, now);
    }

    pub(super) fn ask_memory(&mut self, memory: Memory, machine: &mut impl Machine, now: Instant) {
        let Some(state) = machine.memory() else { return };
        let ask = Ask::SetMemory { base: state.base, bytes: state.requested };
        let within = self.time_left(now);
        self.ask(&ask, Open::Memory { memory, seen: state.seen }, within, machine, now);
    }

    pub(super) fn memory_replied(
        &mut self,
        memory: Memory,
        seen: bool,
        status: u32,
        machine: &mut impl Machine,
        now: Instant,
    ) {
        let Some(state) = machine.memory() else { return };
        let reached = state.plugged == state.requested;
        if status != 0 || reached || (seen && memory.nudges >= NUDGES && state.plugged == memory.last) {
            let detail = if status == 0 { String::new() } else { errno_text(status) };
            return self.end_memory(Some(memory.before), &detail, machine);
        }
        let mut next = Memory { last: state.plugged, pause: LONGEST_PAUSE.min(2 * memory.pause), ..memory };
        if seen {
            next.nudges = if state.plugged == memory.last { memory.nudges + 1 } else { 0 };
            // The same once more: an interrupt, for a driver that has given up for now.
            if let Err(why) = machine.request_memory(state.requested) {
                return self.end_memory(Some(memory.before), &why, machine);
            }
        }
        // Else the request overtook the device's interrupt, and the answer is about what was before it.
        let until = now + memory.pause;
        self.question = Some(Question { seq: 0, open: Open::Pause { memory: next }, until });
    }
}
