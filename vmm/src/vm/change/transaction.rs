//! One resize: what is left to do, and what came of the rest.

use std::time::Instant;

use vmm_api::{Ending, Reached, Resized};

use super::{Answer, Asked, Cpus, MemoryState, mib};

/// The transaction: what is left to do, and what came of the rest.
#[derive(Debug)]
pub struct Transaction {
    pub asked: Asked,
    pub vcpus_left: bool,
    pub memory_left: bool,
    /// Whether the guest had a say: what else it took says nothing about it.
    pub began: Option<Instant>,
    pub endings: Vec<Ending>,
    pub vcpus: Option<u32>,
    pub memory: Option<u64>,
    pub detail: String,
}

/// What a transaction does next.
#[derive(Debug)]
pub enum Step {
    Vcpus(Cpus),
    Memory(u64),
}

impl Transaction {
    /// Nothing of it has been tried.
    pub fn new(asked: Asked) -> Self {
        Transaction {
            vcpus_left: asked.target.vcpus.is_some(),
            memory_left: asked.target.memory.is_some(),
            asked,
            began: None,
            endings: vec![],
            vcpus: None,
            memory: None,
            detail: String::new(),
        }
    }

    /// It ends here, whatever is left to do.
    pub fn cut_off(&mut self, ending: Ending, why: &str) {
        self.endings.push(ending);
        if self.detail.is_empty() {
            why.clone_into(&mut self.detail);
        }
        (self.vcpus_left, self.memory_left) = (false, false);
    }

    /// Whether there is something to do yet.
    pub fn is_unfinished(&self) -> bool {
        self.vcpus_left || self.memory_left
    }

    /// The next step. New vCPUs need memory of the guest, so memory grows first; it shrinks last.
    pub fn next(&mut self, memory: Option<MemoryState>) -> Option<Step> {
        let grows = self.asked.target.memory.is_some_and(|bytes| memory.is_some_and(|m| bytes > m.plugged));
        if self.memory_left && (grows || !self.vcpus_left) {
            self.memory_left = false;
            return self.asked.target.memory.map(Step::Memory);
        }
        if self.vcpus_left {
            self.vcpus_left = false;
            return self.asked.target.vcpus.map(Step::Vcpus);
        }
        None
    }

    /// A step ended: with all that was wanted, or some of it.
    pub fn end_step(&mut self, all: bool, some: bool, detail: &str) {
        self.endings.push(match (all, some) {
            (true, _) => Ending::Done,
            (false, true) => Ending::Partial,
            (false, false) => Ending::Refused,
        });
        if !all && self.detail.is_empty() {
            detail.clone_into(&mut self.detail);
        }
    }

    /// It cannot be done.
    pub fn refuse(&mut self, why: &str) {
        self.end_step(false, false, why);
        (self.vcpus_left, self.memory_left) = (false, false);
    }

    /// What came of it.
    pub fn answer(self, boot_memory: u64) -> Answer {
        let memory = |bytes| mib(boot_memory + bytes);
        Answer {
            id: self.asked.id,
            resized: Resized {
                ending: whole(&self.endings),
                vcpus: self.asked.vcpus().map(|asked| Reached { asked, reached: self.vcpus }),
                memory_mib: self
                    .asked
                    .target
                    .memory
                    .map(|bytes| Reached { asked: memory(bytes), reached: self.memory.map(memory) }),
                detail: self.detail,
            },
        }
    }
}

/// How the whole ended, of how its steps did.
fn whole(endings: &[Ending]) -> Ending {
    match endings.iter().max() {
        // Nothing to do is done.
        None => Ending::Done,
        Some(Ending::Refused) if endings.iter().any(|e| *e < Ending::Refused) => Ending::Partial,
        Some(worst) => *worst,
    }
}
