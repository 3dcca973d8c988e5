//! The state machine. See the module's head.

use std::time::{Duration, Instant};

use vmm_api::{Ending, Reached, Resized};

use super::stats::Counters;
use super::transaction::{Step, Transaction};
use super::{Answer, Asked, Cpus, Machine, MemoryState, mib};
use crate::upcall::abi::kind::SET_CPUS;
use crate::upcall::{self, Ask, Happened};
use crate::vcpu::CpuSet;
use virtio::memory::BLOCK;

/// How much longer than the guest's own deadline its answer may take.
const GRACE: Duration = Duration::from_secs(1);
/// A question that changes nothing is answered at once, or never.
const QUERY: Duration = Duration::from_secs(5);
/// First and longest pause before the guest is asked again to do what the memory device wants.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(64);
/// How often it is asked again without getting any further. Linux tries again by itself, but only after 50 seconds.
const NUDGES: u8 = 6;
/// What a guest that shrinks keeps of its available memory. Linux offlines its last free page if it is asked to, and dies.
const RESERVE: u64 = 16 << 20;

/// What the guest has been asked, and has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Query,
    Cpus {
        before: CpuSet,
        wanted: CpuSet,
    },
    /// How much could it do without?
    Look {
        wanted: u64,
    },
    /// `seen`: the driver had looked at the device when it was asked, so that the answer is about what it saw.
    Memory {
        memory: Memory,
        seen: bool,
    },
    /// Nothing, for a while.
    Pause {
        memory: Memory,
    },
}

/// A change of memory under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    before: u64,
    /// What the guest had when it was asked last.
    last: u64,
    nudges: u8,
    pause: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Question {
    seq: u64,
    open: Open,
    until: Instant,
}

/// Resizes of one VM.
#[derive(Debug)]
pub struct Resizer {
    /// vCPUs that can be.
    possible: CpuSet,
    boot_memory: u64,
    /// What the guest has online; `None`: it has not said.
    online: Option<CpuSet>,
    /// vCPUs whose threads run: at least those the guest has online.
    started: CpuSet,
    vcpus_asked: u32,
    current: Option<Transaction>,
    waiting: Option<Asked>,
    question: Option<Question>,
    answers: Vec<Answer>,
    counters: Counters,
}

impl Resizer {
    /// A VM that boots with `boot` of the vCPUs `possible`, and `boot_memory` bytes.
    pub fn new(boot: CpuSet, possible: CpuSet, boot_memory: u64) -> Self {
        Resizer {
            possible,
            boot_memory,
            // Those that it is told to use; its hello says what came of it.
            online: Some(boot),
            started: boot,
            vcpus_asked: boot.len().into(),
            current: None,
            waiting: None,
            question: None,
            answers: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Begins, or has wait, what is asked.
    pub fn request(&mut self, asked: Asked, machine: &mut impl Machine) {
        match self.current {
            None => {
                self.begin(asked);
                self.advance(machine, asked.at);
            }
            Some(_) => {
                if let Some(replaced) = self.waiting.replace(asked) {
                    self.answer_untried(&replaced, Ending::Replaced, "");
                }
            }
        }
    }

    fn begin(&mut self, asked: Asked) {
        self.vcpus_asked = asked.vcpus().unwrap_or(self.vcpus_asked);
        self.current = Some(Transaction::new(asked));
    }

    /// Takes what happened on the channel.
    pub fn happened(&mut self, what: Happened, machine: &mut impl Machine, now: Instant) {
        match what {
            Happened::Opened(hello) => {
                if let Some(question) = self.question.take() {
                    self.cut_off(&question, Ending::Reset, "the guest dialled again", machine);
                }
                self.learn(hello.online, machine);
                self.advance(machine, now);
            }
            Happened::Lost(why) => self.lost(&why, machine, now),
            Happened::Replied { seq, kind, status, body } => {
                let Some(question) = self.question.take_if(|q| q.seq == seq) else { return };
                self.replied(question, (kind, status, &body), machine, now);
                self.advance(machine, now);
            }
        }
    }

    /// The guest has these online. Vcpus it does not use rest.
    fn learn(&mut self, online: CpuSet, machine: &mut impl Machine) {
        // One that never ran cannot be online, whatever the guest says.
        let online = online.common(self.started);
        machine.park_vcpus(self.started.without(online));
        self.started = online;
        self.online = Some(online);
    }

    fn replied(
        &mut self,
        question: Question,
        (kind, status, body): (u16, u32, &[u8]),
        machine: &mut impl Machine,
        now: Instant,
    ) {
        match question.open {
            Open::Query | Open::Cpus { .. } => {
                let online = match upcall::online(kind, body) {
                    Ok(online) => online,
                    // An error reply without a body: the request was not begun.
                    Err(_) if status != 0 && body.is_empty() && kind == SET_CPUS => {
                        self.online.expect("no CPU is asked for while it is unknown")
                    }
                    Err(violation) => {
                        machine.hang_up();
                        return self.cut_off(&question, Ending::Reset, &violation.to_string(), machine);
                    }
                };
                self.learn(online, machine);
                if let Open::Cpus { before, wanted } = question.open {
                    let detail = match upcall::first_failure(body) {
                        Some((cpu, errno)) => format!("CPU {cpu}: {}", errno_text(errno)),
                        None if status != 0 => errno_text(status),
                        None => String::new(),
                    };
                    self.end_vcpus(before, wanted, &detail);
                }
            }
            Open::Look { wanted } => match upcall::available(body) {
                Ok(available) => self.shrink(wanted, available, machine, now),
                Err(_) if status != 0 => self.end_memory(None, &errno_text(status), machine),
                Err(violation) => {
                    machine.hang_up();
                    self.cut_off(&question, Ending::Reset, &violation.to_string(), machine);
                }
            },
            Open::Memory { memory, seen } => self.memory_replied(memory, seen, status, machine, now),
            Open::Pause { .. } => unreachable!("it has no number that a reply could have"),
        }
    }

    /// The channel is gone.
    fn lost(&mut self, why: &str, machine: &mut impl Machine, now: Instant) {
        if let Some(question) = self.question.take() {
            self.cut_off(&question, Ending::Reset, why, machine);
        }
        self.advance(machine, now);
    }

    /// A question has no answer: what it was about ends as far as it is known.
    fn cut_off(&mut self, question: &Question, ending: Ending, why: &str, machine: &mut impl Machine) {
        let memory = match question.open {
            Open::Query => None,
            Open::Cpus { .. } => {
                self.online = None;
                None
            }
            // It keeps what it has: nothing comes or goes behind the owner's back later.
            Open::Look { .. } | Open::Memory { .. } | Open::Pause { .. } => self.settle_memory(machine),
        };
        let Some(transaction) = &mut self.current else { return };
        transaction.memory = memory.or(transaction.memory);
        transaction.cut_off(ending, why);
    }

    fn settle_memory(&mut self, machine: &mut impl Machine) -> Option<u64> {
        let MemoryState { plugged, requested, .. } = machine.memory()?;
        if plugged != requested
            && let Err(error) = machine.request_memory(plugged)
        {
            log::warn!("leave memory as it is: {error}");
        }
        Some(plugged)
    }

    /// `before`: what the guest had, if it has changed since.
    fn end_memory(&mut self, before: Option<u64>, detail: &str, machine: &mut impl Machine) {
        let Some(plugged) = self.settle_memory(machine) else { return };
        let Some(transaction) = &mut self.current else { return };
        let wanted = transaction.asked.target.memory.unwrap_or(plugged);
        transaction.memory = Some(plugged);
        transaction.end_step(plugged == wanted, before.is_some_and(|before| plugged != before), detail);
    }

    fn end_vcpus(&mut self, before: CpuSet, wanted: CpuSet, detail: &str) {
        let (Some(transaction), Some(online)) = (&mut self.current, self.online) else { return };
        transaction.vcpus = Some(online.len().into());
        transaction.end_step(online == wanted, online != before, detail);
    }

    /// Does what there is to do, until something has to be waited for.
    fn advance(&mut self, machine: &mut impl Machine, now: Instant) {
        while self.question.is_none() {
            let begun = self.current.as_mut().filter(|transaction| !transaction.endings.is_empty());
            if let Some(transaction) = begun {
                if transaction.is_unfinished() && !machine.is_open() {
                    transaction.cut_off(Ending::Reset, "the guest hung up");
                } else if transaction.is_unfinished() && transaction.asked.deadline() <= now {
                    transaction.cut_off(Ending::TimedOut, "no time was left for the rest");
                }
                if !transaction.is_unfinished() {
                    self.finish(now);
                    continue;
                }
            }
            if !machine.is_open() {
                return;
            }
            if self.online.is_none() {
                self.ask(&Ask::Query, Open::Query, QUERY, machine, now);
                continue;
            }
            let Some(transaction) = &mut self.current else { return };
            transaction.began.get_or_insert(now);
            match transaction.next(machine.memory()) {
                Some(Step::Memory(bytes)) => self.change_memory(bytes, machine, now),
                Some(Step::Vcpus(cpus)) => self.change_vcpus(cpus, machine, now),
                // Only one that was asked for nothing has nothing to do and nothing done.
                None => self.finish(now),
            }
        }
    }

    fn change_vcpus(&mut self, cpus: Cpus, machine: &mut impl Machine, now: Instant) {
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

    fn change_memory(&mut self, bytes: u64, machine: &mut impl Machine, now: Instant) {
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
    fn shrink(&mut self, wanted: u64, available: u64, machine: &mut impl Machine, now: Instant) {
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

    fn request_memory(&mut self, bytes: u64, before: u64, machine: &mut impl Machine, now: Instant) {
        if bytes == before {
            return self.end_memory(None, "", machine);
        }
        if let Err(why) = machine.request_memory(bytes) {
            return self.end_memory(None, &why, machine);
        }
        self.ask_memory(Memory { before, last: before, nudges: 0, pause: PAUSE }, machine, now);
    }

    fn ask_memory(&mut self, memory: Memory, machine: &mut impl Machine, now: Instant) {
        let Some(state) = machine.memory() else { return };
        let ask = Ask::SetMemory { base: state.base, bytes: state.requested };
        let within = self.time_left(now);
        self.ask(&ask, Open::Memory { memory, seen: state.seen }, within, machine, now);
    }

    fn memory_replied(
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

    fn ask(&mut self, ask: &Ask, open: Open, within: Duration, machine: &mut impl Machine, now: Instant) {
        let until = now + within + GRACE;
        match machine.send(ask, within) {
            Some(seq) => self.question = Some(Question { seq, open, until }),
            None => {
                self.cut_off(&Question { seq: 0, open, until }, Ending::Reset, "the guest hung up", machine);
            }
        }
    }

    fn has_time_left(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|transaction| now < transaction.asked.deadline())
    }

    fn time_left(&self, now: Instant) -> Duration {
        let deadline = self.current.as_ref().map_or(now, |transaction| transaction.asked.deadline());
        deadline.saturating_duration_since(now).max(Duration::from_millis(1))
    }

    fn finish(&mut self, now: Instant) {
        let Some(transaction) = self.current.take() else { return };
        self.counters.took(transaction.began, now);
        let answer = transaction.answer(self.boot_memory);
        self.counters.ended(answer.resized.ending);
        self.answers.push(answer);
        if let Some(next) = self.waiting.take() {
            self.begin(next);
        }
    }

    fn answer_untried(&mut self, asked: &Asked, ending: Ending, detail: &str) {
        self.counters.ended(ending);
        let reached = |asked| Reached { asked, reached: None };
        let memory = asked.target.memory.map(|bytes| reached(mib(self.boot_memory + bytes)));
        let resized = Resized {
            ending,
            vcpus: asked.vcpus().map(reached),
            memory_mib: memory,
            detail: detail.to_owned(),
        };
        self.answers.push(Answer { id: asked.id, resized });
    }

    /// Ends what has taken too long.
    pub fn expire(&mut self, machine: &mut impl Machine, now: Instant) {
        match self.question.take_if(|q| q.until <= now) {
            Some(Question { open: Open::Pause { memory }, .. }) if self.has_time_left(now) => {
                self.ask_memory(memory, machine, now);
            }
            Some(Question { open: Open::Pause { memory }, .. }) => {
                let seen = machine.memory().is_some_and(|state| state.seen);
                let why = if seen { "no time was left" } else { "the guest's memory driver does not answer" };
                self.end_memory(Some(memory.before), why, machine);
            }
            Some(question) => self.cut_off(&question, Ending::TimedOut, "", machine),
            None => {}
        }
        let late = self.question.is_none()
            && self.current.as_ref().is_some_and(|t| t.endings.is_empty() && t.asked.deadline() <= now);
        if late {
            let why = match machine.is_open() {
                true => "the guest did not answer an earlier request",
                false => "the guest's kernel has not opened the upcall channel",
            };
            self.current.as_mut().expect("just looked").cut_off(Ending::TimedOut, why);
        }
        if let Some(asked) = self.waiting.take_if(|asked| asked.deadline() <= now) {
            self.answer_untried(&asked, Ending::TimedOut, "an earlier resize took all the time");
        }
        self.advance(machine, now);
    }

    /// How long until [`Resizer::expire`] has something to do.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let question = self.question.map(|q| q.until);
        let current = self.current.as_ref().map(|t| t.asked.deadline()).filter(|_| question.is_none());
        let waiting = self.waiting.map(|asked| asked.deadline());
        [question, current, waiting].into_iter().flatten().min().map(|at| at.saturating_duration_since(now))
    }

    /// The VM ends: who still waits for an answer.
    pub fn end_all(&mut self) -> Vec<u64> {
        let current = self.current.take().map(|transaction| transaction.asked.id);
        self.question = None;
        current.into_iter().chain(self.waiting.take().map(|asked| asked.id)).collect()
    }

    /// Answers since the last call.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.answers)
    }

    /// What the guest has online; `None`: it has not said.
    pub fn online(&self) -> Option<CpuSet> {
        self.online
    }

    /// vCPUs that can be.
    pub fn possible(&self) -> CpuSet {
        self.possible
    }

    /// vCPUs last asked for.
    pub fn vcpus_asked(&self) -> u32 {
        self.vcpus_asked
    }

    /// Counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

fn errno_text(errno: u32) -> String {
    std::io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX)).to_string()
}
