//! The state machine. See the module's head.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use vmm_api::{Ending, Reached, Resized};

use super::plug::{Current, Parked, PlugAsked, PlugCounters, Plugged, Why};
use super::stats::Counters;
use super::transaction::{Step, Transaction};
use super::{Answer, Asked, Machine, mib};
use crate::devices::DeviceKey;
use crate::upcall::abi::kind::SET_CPUS;
use crate::upcall::{self, Ask, Happened};
use crate::vcpu::CpuSet;

/// How much longer than the guest's own deadline its answer may take.
pub(super) const GRACE: Duration = Duration::from_secs(1);
/// A question that changes nothing is answered at once, or never.
pub(super) const QUERY: Duration = Duration::from_secs(5);
/// First and longest pause before the guest is asked again to do what the memory device wants.
pub(super) const PAUSE: Duration = Duration::from_millis(1);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(64);
/// How often it is asked again without getting any further. Linux tries again by itself, but only after 50 seconds.
pub(super) const NUDGES: u8 = 6;
/// What a guest that shrinks keeps of its available memory. Linux offlines its last free page if it is asked to, and dies.
pub(super) const RESERVE: u64 = 16 << 20;

/// What the guest has been asked, and has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Open {
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
    /// ADD_DEVICE.
    Add {
        device: DeviceKey,
    },
    /// Nothing: its driver is waited for.
    Driver {
        device: DeviceKey,
    },
    /// REMOVE_DEVICE, as was requested.
    Remove {
        device: DeviceKey,
    },
    /// REMOVE_DEVICE of one that is parked.
    TakeBack {
        device: DeviceKey,
    },
}

/// A change of memory under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub before: u64,
    /// What the guest had when it was asked last.
    pub last: u64,
    pub nudges: u8,
    pub pause: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub seq: u64,
    pub open: Open,
    pub until: Instant,
}

/// A request that waits for its turn.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiting {
    Resize(Asked),
    Plug(PlugAsked),
}

impl Waiting {
    fn deadline(&self) -> Instant {
        match self {
            Waiting::Resize(asked) => asked.deadline(),
            Waiting::Plug(asked) => asked.deadline(),
        }
    }
}

/// Changes of one VM.
#[derive(Debug)]
pub struct Changes {
    /// vCPUs that can be.
    pub(super) possible: CpuSet,
    boot_memory: u64,
    /// What the guest has online; `None`: it has not said.
    pub(super) online: Option<CpuSet>,
    /// vCPUs whose threads run: at least those the guest has online.
    pub(super) started: CpuSet,
    vcpus_asked: u32,
    /// The resize under way; there is no plug, then.
    pub(super) current: Option<Transaction>,
    /// The plug under way; there is no resize, then.
    pub(super) plug: Option<Current>,
    /// In the order in which they came, one resize among them at most.
    pub(super) waiting: VecDeque<Waiting>,
    pub(super) question: Option<Question>,
    answers: Vec<Answer>,
    pub(super) plugged: Vec<Plugged>,
    pub(super) parked: BTreeMap<DeviceKey, Parked>,
    counters: Counters,
    pub(super) plug_counters: PlugCounters,
}

impl Changes {
    /// A VM that boots with `boot` of the vCPUs `possible`, and `boot_memory` bytes.
    pub fn new(boot: CpuSet, possible: CpuSet, boot_memory: u64) -> Self {
        Changes {
            possible,
            boot_memory,
            // Those that it is told to use; its hello says what came of it.
            online: Some(boot),
            started: boot,
            vcpus_asked: boot.len().into(),
            current: None,
            plug: None,
            waiting: VecDeque::new(),
            question: None,
            answers: Vec::new(),
            plugged: Vec::new(),
            parked: BTreeMap::new(),
            counters: Counters::default(),
            plug_counters: PlugCounters::default(),
        }
    }

    /// Begins, or has wait, what is asked.
    pub fn request(&mut self, asked: Asked, machine: &mut impl Machine) {
        if !self.is_busy() {
            self.begin(Waiting::Resize(asked));
            return self.advance(machine, asked.at);
        }
        let earlier = self.waiting.iter_mut().find_map(|waiting| match waiting {
            Waiting::Resize(earlier) => Some(earlier),
            Waiting::Plug(_) => None,
        });
        match earlier {
            Some(earlier) => {
                let replaced = std::mem::replace(earlier, asked);
                self.answer_untried(&replaced, Ending::Replaced, "");
            }
            None => self.waiting.push_back(Waiting::Resize(asked)),
        }
    }

    /// Whether a request is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.current.is_some() || self.plug.is_some()
    }

    pub(super) fn begin(&mut self, what: Waiting) {
        // Whoever comes finds out whether the guest can be rid of what is parked.
        self.parked.values_mut().for_each(|parked| parked.due = true);
        match what {
            Waiting::Resize(asked) => {
                self.vcpus_asked = asked.vcpus().unwrap_or(self.vcpus_asked);
                self.current = Some(Transaction::new(asked));
            }
            Waiting::Plug(asked) => self.plug = Some(Current::new(asked)),
        }
    }

    pub(super) fn begin_next(&mut self) {
        if let Some(next) = self.waiting.pop_front() {
            self.begin(next);
        }
    }

    /// Takes what happened on the channel.
    pub fn happened(&mut self, what: Happened, machine: &mut impl Machine, now: Instant) {
        match what {
            Happened::Opened(hello) => {
                if let Some(question) = self.question.take() {
                    self.cut_off(&question, Ending::Reset, "the guest dialled again", machine, now);
                }
                self.learn(hello.online, machine);
                self.parked.values_mut().for_each(|parked| parked.due = true);
                self.advance(machine, now);
            }
            Happened::Lost(why) => self.lost(&why, machine, now),
            Happened::Replied { seq, kind, status, body } => {
                let Some(question) = self.question.take_if(|q| q.seq == seq) else {
                    return self.late_reply(seq, kind, status, machine);
                };
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
                        return self.cut_off(&question, Ending::Reset, &violation.to_string(), machine, now);
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
                    self.cut_off(&question, Ending::Reset, &violation.to_string(), machine, now);
                }
            },
            Open::Memory { memory, seen } => self.memory_replied(memory, seen, status, machine, now),
            Open::Add { .. } | Open::Remove { .. } | Open::TakeBack { .. } => {
                self.plug_replied(question.open, status, machine, now);
            }
            Open::Pause { .. } | Open::Driver { .. } => {
                unreachable!("they have no number that a reply could have")
            }
        }
    }

    /// The channel is gone.
    fn lost(&mut self, why: &str, machine: &mut impl Machine, now: Instant) {
        if let Some(question) = self.question.take() {
            self.cut_off(&question, Ending::Reset, why, machine, now);
        }
        self.advance(machine, now);
    }

    /// A question has no answer: what it was about ends as far as it is known.
    fn cut_off(
        &mut self,
        question: &Question,
        ending: Ending,
        why: &str,
        machine: &mut impl Machine,
        now: Instant,
    ) {
        let memory = match question.open {
            Open::Query => None,
            Open::Cpus { .. } => {
                self.online = None;
                None
            }
            // It keeps what it has: nothing comes or goes behind the owner's back later.
            Open::Look { .. } | Open::Memory { .. } | Open::Pause { .. } => self.settle_memory(machine),
            Open::Add { .. } | Open::Driver { .. } | Open::Remove { .. } | Open::TakeBack { .. } => {
                return self.plug_cut_off(question, ending, why, now);
            }
        };
        let Some(transaction) = &mut self.current else { return };
        transaction.memory = memory.or(transaction.memory);
        transaction.cut_off(ending, why);
    }

    /// Does what there is to do, until something has to be waited for.
    pub(super) fn advance(&mut self, machine: &mut impl Machine, now: Instant) {
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
                // One that failed has nothing left to wait for.
                self.expire_plug(machine, now);
                return;
            }
            if self.online.is_none() {
                self.ask(&Ask::Query, Open::Query, QUERY, machine, now);
                continue;
            }
            if self.ask_for_parked(machine, now) {
                continue;
            }
            if self.plug.is_some() {
                self.step_plug(machine, now);
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

    pub(super) fn ask(
        &mut self,
        ask: &Ask,
        open: Open,
        within: Duration,
        machine: &mut impl Machine,
        now: Instant,
    ) {
        let until = now + within + GRACE;
        match machine.send(ask, within) {
            Some(seq) => self.question = Some(Question { seq, open, until }),
            None => {
                let question = Question { seq: 0, open, until };
                self.cut_off(&question, Ending::Reset, "the guest hung up", machine, now);
            }
        }
    }

    /// Of the request under way.
    fn deadline(&self) -> Option<Instant> {
        let plug = self.plug.as_ref().map(|current| current.asked.deadline());
        plug.or(self.current.as_ref().map(|transaction| transaction.asked.deadline()))
    }

    fn has_time_left(&self, now: Instant) -> bool {
        self.current.as_ref().is_some_and(|transaction| now < transaction.asked.deadline())
    }

    pub(super) fn time_left(&self, now: Instant) -> Duration {
        let deadline = self.deadline().unwrap_or(now);
        deadline.saturating_duration_since(now).max(Duration::from_millis(1))
    }

    fn finish(&mut self, now: Instant) {
        let Some(transaction) = self.current.take() else { return };
        self.counters.took(transaction.began, now);
        let answer = transaction.answer(self.boot_memory);
        self.counters.ended(answer.resized.ending);
        self.answers.push(answer);
        self.begin_next();
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
        // First, so that none of them begins when the one before it ends here.
        let (overdue, waiting): (VecDeque<_>, _) =
            self.waiting.drain(..).partition(|waiting| waiting.deadline() <= now);
        self.waiting = waiting;
        match self.question.take_if(|q| q.until <= now) {
            Some(Question { open: Open::Pause { memory }, .. }) if self.has_time_left(now) => {
                self.ask_memory(memory, machine, now);
            }
            Some(Question { open: Open::Pause { memory }, .. }) => {
                let seen = machine.memory().is_some_and(|state| state.seen);
                let why = if seen { "no time was left" } else { "the guest's memory driver does not answer" };
                self.end_memory(Some(memory.before), why, machine);
            }
            Some(Question { open: Open::Driver { device }, .. }) => self.driver_is_late(device, machine),
            Some(question) => self.cut_off(&question, Ending::TimedOut, "", machine, now),
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
        self.expire_plug(machine, now);
        // Last and in their order, so that each finds its device as those before it have left it.
        for waiting in overdue {
            match waiting {
                Waiting::Resize(asked) => {
                    self.answer_untried(&asked, Ending::TimedOut, "an earlier change took all the time");
                }
                Waiting::Plug(asked) => {
                    let why = if machine.is_open() { Why::NoTurn } else { Why::NoChannel };
                    let left = self.take_out_unasked(&asked, machine);
                    self.answer_plug(&asked, Err((why, left)), now);
                }
            }
        }
        self.advance(machine, now);
    }

    /// How long until [`Changes::expire`] has something to do.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        let question = self.question.map(|q| q.until);
        let current = self.deadline().filter(|_| question.is_none());
        let waiting = self.waiting.iter().map(Waiting::deadline).min();
        [question, current, waiting].into_iter().flatten().min().map(|at| at.saturating_duration_since(now))
    }

    /// The VM ends: who still waits for an answer.
    pub fn end_all(&mut self) -> Vec<u64> {
        let resize = self.current.take().map(|transaction| transaction.asked.id);
        let plug = self.plug.take().map(|current| current.asked.id);
        self.question = None;
        let waiting = self.waiting.drain(..).map(|waiting| match waiting {
            Waiting::Resize(asked) => asked.id,
            Waiting::Plug(asked) => asked.id,
        });
        resize.into_iter().chain(plug).chain(waiting).collect()
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

pub(super) fn errno_text(errno: u32) -> String {
    std::io::Error::from_raw_os_error(i32::try_from(errno).unwrap_or(i32::MAX)).to_string()
}
