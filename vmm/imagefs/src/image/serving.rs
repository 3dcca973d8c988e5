//! Requests of one guest to one disk, and those of them that wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio::GuestMemory;
use virtio::blk::{BadRequest, Limits, MAX_DATA, QUEUE_SIZE, Request};
use virtio::device::Activation;
use virtio::queue::{Chain, Queue, QueueState};
use virtio::rate::GUEST_ERRORS;
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, Lost};
use super::device::News;
use super::fetches::{Fetches, cut};
use super::files::{BlobFile, Files, Span};
use super::metrics::{Metrics, add};

/// Longest identification string (virtio 1.2, 5.2.6).
pub const ID_LEN: usize = 20;
/// Requests done at a stretch, and bytes, before other disks of the thread have their turn.
const BUDGET_REQUESTS: u32 = 64;
const BUDGET_BYTES: u64 = 4 << 20;
/// Answers of the image service taken at a stretch.
const BUDGET_ANSWERS: u32 = 64;

// virtio 1.2, 5.2.6.
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What a disk needs whether or not a driver uses it.
#[derive(Debug)]
pub struct Backing {
    pub files: Files,
    pub fetches: Fetches,
    pub id: [u8; ID_LEN],
    /// How long a read may wait.
    pub patience: Duration,
    pub metrics: Arc<Metrics>,
    pub news: Arc<News>,
}

/// A request that was taken and waits for its bytes.
#[derive(Debug)]
struct Waiting {
    head: u16,
    since: Instant,
    /// What it lacked when it was last looked at.
    lacks: Vec<Span>,
    /// Wishes whose end it waits for.
    tags: Vec<u64>,
    /// It is time to look at it again.
    stale: bool,
    /// A wish that was others' too has failed: its own are its own from now on.
    alone: bool,
    /// A wish of its own has failed.
    failed: bool,
}

/// Why a request is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It has just come.
    First,
    /// It has waited.
    Again,
    /// It shall fail.
    Last,
}

/// What came of looking at a request.
enum Seen {
    /// It is answered.
    Done,
    /// It has to wait for these.
    Lacks(Vec<Span>),
}

/// A disk in use.
#[derive(Debug)]
pub struct Serving {
    backing: Backing,
    memory: GuestMemory,
    queue: Queue,
    kick: EventFd,
    waiting: Vec<Waiting>,
    /// There may be requests in the queue.
    more: bool,
}

impl Backing {
    fn limits(&self) -> Limits {
        Limits { sectors: self.files.sectors(), read_only: true, max_data: MAX_DATA }
    }

    /// Goes on with another connection and other cache files.
    pub fn rebind(&mut self, channel: Channel, blobs: Vec<BlobFile>) {
        self.files.replace(blobs);
        self.fetches.connect(channel);
    }

    /// Does a request and writes its status, unless bytes are not there. Tells how many bytes were written in all, or
    /// `Err` if there is no room for a status.
    fn answer(&self, chain: Chain<'_>, look: Look) -> Result<Result<u32, Vec<Span>>, ()> {
        let (reader, mut room) = chain.split();
        // 5.2.6: the status is the last byte.
        let data_len = room.left().checked_sub(1).ok_or(())?;
        let mut status = room.split_off(data_len).expect("one byte less than there is");
        let request = match look {
            Look::Last => Err(IO_ERROR),
            _ => Request::parse(reader, room, &self.limits()).map_err(|e| self.refuse(&e)),
        };
        let (code, filled) = match request {
            Err(code) => (code, 0),
            Ok(Request::Read { offset, mut data }) => match self.read(&mut data, offset) {
                Ok(None) => {
                    add(&self.metrics.hits, u64::from(look == Look::First));
                    (OK, data.written())
                }
                Ok(Some(lacks)) => return Ok(Err(lacks)),
                Err(e) => {
                    add(&self.metrics.host_errors, 1);
                    GUEST_ERRORS.warn(format_args!("image: {e}"));
                    (IO_ERROR, data.written())
                }
            },
            Ok(Request::GetId(mut room)) => (OK, room.write(&self.id)),
            // Linux sends none to a disk that has no cache, and all that could be written is written.
            Ok(Request::Flush) => (OK, 0),
            Ok(Request::Write { .. } | Request::Discard(_) | Request::WriteZeroes(_)) => (IO_ERROR, 0),
        };
        status.write_obj(&code).expect("room of one byte");
        // 2.7.8.2: the length counts bytes written without a gap from the start.
        let len = if filled == data_len { data_len + 1 } else { filled };
        Ok(Ok(u32::try_from(len).expect("chains are shorter than 2^32 bytes")))
    }

    fn refuse(&self, error: &BadRequest) -> u8 {
        add(&self.metrics.bad_requests, 1);
        GUEST_ERRORS.warn(format_args!("image: {error}"));
        if error.is_unsupported() { UNSUPPORTED } else { IO_ERROR }
    }

    /// Fills `data`, or says what is not there.
    fn read(&self, data: &mut virtio::queue::Writer<'_>, offset: u64) -> io::Result<Option<Vec<Span>>> {
        let len = data.left() as u64;
        let lacks = self.files.missing(offset, len)?;
        if !lacks.is_empty() {
            return Ok(Some(lacks));
        }
        self.files.read(data, offset)?;
        // Without a connection nothing holds what is in the cache there. What is taken away loses its bit first.
        if self.fetches.channel().is_none() {
            let taken = self.files.missing(offset, len)?;
            if !taken.is_empty() {
                return Ok(Some(taken));
            }
        }
        add(&self.metrics.reads, 1);
        add(&self.metrics.read_bytes, len);
        Ok(None)
    }
}

impl Serving {
    /// Takes up work for a driver.
    ///
    /// # Panics
    /// If there is not one queue.
    pub fn new(backing: Backing, activation: Activation) -> Self {
        let Activation { memory, mut queues, mut kicks, .. } = activation;
        let (queue, kick) = queues.pop().zip(kicks.pop()).expect("an image's disk has one queue");
        Serving { backing, memory, queue, kick, waiting: Vec::new(), more: true }
    }

    /// As [`Serving::new`], with requests that had been taken.
    pub fn restored(backing: Backing, activation: Activation, heads: &[u16]) -> Self {
        let mut serving = Serving::new(backing, activation);
        let heads = heads.iter().take(QUEUE_SIZE.into());
        serving.waiting = heads.map(|head| Waiting::new(*head, Vec::new(), true)).collect();
        serving.count_waiting();
        serving
    }

    /// The driver is gone, and what it waited for with it.
    pub fn into_backing(self) -> Backing {
        self.backing.metrics.waiting.store(0, Ordering::Relaxed);
        self.backing
    }

    /// The queue as it stands.
    pub fn queue(&self) -> QueueState {
        self.queue.state()
    }

    /// Heads of the requests that wait.
    pub fn heads(&self) -> Vec<u16> {
        self.waiting.iter().map(|waiting| waiting.head).collect()
    }

    /// Goes on with another connection and other cache files.
    pub fn rebind(&mut self, channel: Channel, blobs: Vec<BlobFile>) {
        self.backing.rebind(channel, blobs);
        self.forget_wishes();
    }

    /// The queue's event.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The connection to the image service, while there is one.
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.backing.fetches.channel().map(AsFd::as_fd)
    }

    /// A wish waits for room on the connection.
    pub fn is_clogged(&self) -> bool {
        self.backing.fetches.is_clogged()
    }

    /// Has the queue looked at in the next turn, whatever else happens.
    pub fn look(&mut self) {
        self.more = true;
    }

    /// Does what there is to do. Tells when the next turn must come at the latest: at once if something is left to do.
    pub fn turn(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if let Err(lost) = self.take_answers() {
            self.lose(&lost);
        }
        self.look_again();
        if self.more {
            self.take_requests(now);
        }
        self.expire(now);
        let asked = self.ask(now).and_then(|()| self.backing.fetches.check(self.backing.patience, now));
        if let Err(lost) = asked {
            self.lose(&lost);
        }
        self.queue.notify(&self.memory);
        self.count_waiting();
        let due = self.waiting.iter().map(|waiting| waiting.since + self.backing.patience).min();
        if self.more { Some(now) } else { due }
    }

    fn take_answers(&mut self) -> Result<(), Lost> {
        for _ in 0..BUDGET_ANSWERS {
            let Some((answer, flight)) = self.backing.fetches.answer()? else { return Ok(()) };
            let span = flight.span;
            if answer.errno != 0 {
                add(&self.backing.metrics.fetch_errors, 1);
                GUEST_ERRORS.warn(format_args!(
                    "image: blocks {} to {} of blob {} cannot be had: {}",
                    span.first,
                    span.end,
                    span.blob,
                    io::Error::from_raw_os_error(i32::try_from(answer.errno).unwrap_or(libc::EIO)),
                ));
            } else if let Err(e) = self.backing.files.leave_out(span) {
                // Whoever waits for it looks at it again, and finds the same.
                GUEST_ERRORS.warn(format_args!("image: ready map of blob {}: {e}", span.blob));
            }
            for waiting in &mut self.waiting {
                waiting.ended(answer.tag, answer.errno != 0, &span);
            }
        }
        Ok(())
    }

    /// Looks at the requests that wait and may have what they lacked.
    fn look_again(&mut self) {
        let mut index = 0;
        while index < self.waiting.len() {
            if !self.waiting[index].stale {
                index += 1;
                continue;
            }
            let Waiting { head, since, failed, .. } = self.waiting[index];
            match self.see_again(head, if failed { Look::Last } else { Look::Again }) {
                Seen::Done => {
                    self.waiting.remove(index);
                    self.backing.metrics.waited(since.elapsed());
                    // What was put off for want of room may go on.
                    self.more = true;
                }
                Seen::Lacks(lacks) => {
                    let waiting = &mut self.waiting[index];
                    (waiting.lacks, waiting.stale) = (lacks, false);
                    index += 1;
                }
            }
        }
    }

    fn take_requests(&mut self, now: Instant) {
        self.more = false;
        let mut bytes = 0;
        for _ in 0..BUDGET_REQUESTS {
            // A driver that makes one chain available several times cannot have more of them wait than it has descriptors.
            if bytes >= BUDGET_BYTES || self.waiting.len() >= self.queue.size().into() {
                self.more = self.waiting.len() < self.queue.size().into();
                return;
            }
            let Some(chain) = self.queue.pop(&self.memory) else { return };
            let (head, len) = (chain.head(), chain.lens().1 as u64);
            bytes += len;
            match see(&self.backing, &mut self.queue, &self.memory, chain, Look::First) {
                Seen::Done => {}
                Seen::Lacks(lacks) => {
                    add(&self.backing.metrics.misses, 1);
                    add(&self.backing.metrics.missed_bytes, len.saturating_sub(1));
                    self.waiting.push(Waiting { since: now, ..Waiting::new(head, lacks, false) });
                }
            }
        }
        self.more = true;
    }

    /// Fails what has waited too long.
    fn expire(&mut self, now: Instant) {
        let patience = self.backing.patience;
        let is_late = |waiting: &mut Waiting| now.saturating_duration_since(waiting.since) >= patience;
        let late: Vec<Waiting> = self.waiting.extract_if(.., is_late).collect();
        for waiting in late {
            add(&self.backing.metrics.late, 1);
            GUEST_ERRORS
                .warn(format_args!("image: a read fails, as its bytes have not come within {patience:?}"));
            self.see_again(waiting.head, Look::Last);
            self.backing.metrics.waited(waiting.since.elapsed());
            self.more = true;
        }
    }

    /// Asks for what is lacking and not asked for yet.
    fn ask(&mut self, now: Instant) -> Result<(), Lost> {
        let Backing { fetches, metrics, .. } = &mut self.backing;
        if fetches.channel().is_none() {
            return Ok(());
        }
        fetches.unclog();
        let mut count = 0;
        let idle = |waiting: &&mut Waiting| waiting.tags.is_empty() && !waiting.stale;
        for waiting in self.waiting.iter_mut().filter(idle).filter(|waiting| waiting.alone) {
            for span in waiting.lacks.iter().flat_map(|span| cut(*span)) {
                let Some(tag) = fetches.ask_alone(span, now)? else { break };
                waiting.tags.push(tag);
                add(&metrics.fetched_blocks, span.end - span.first);
                count += 1;
            }
        }
        let wanted: Vec<Span> = self
            .waiting
            .iter_mut()
            .filter(idle)
            .filter(|waiting| !waiting.alone)
            .flat_map(|waiting| waiting.lacks.iter().copied())
            .collect();
        if !wanted.is_empty() {
            let asked = fetches.ask(&wanted, now)?;
            add(&metrics.fetched_blocks, asked.blocks);
            count += asked.wishes;
            for waiting in self.waiting.iter_mut().filter(idle).filter(|waiting| !waiting.alone) {
                waiting.tags = fetches.tags_for(&waiting.lacks);
            }
        }
        add(&metrics.fetches, count);
        Ok(())
    }

    fn see_again(&mut self, head: u16, look: Look) -> Seen {
        match self.queue.again(&self.memory, head) {
            Some(chain) => see(&self.backing, &mut self.queue, &self.memory, chain, look),
            // The queue is broken: nothing of it is answered any more.
            None => Seen::Done,
        }
    }

    fn lose(&mut self, why: &Lost) {
        if self.backing.fetches.channel().is_none() {
            return;
        }
        GUEST_ERRORS.warn(format_args!("image: {}", chain_of(why)));
        add(&self.backing.metrics.lost, 1);
        self.backing.fetches.hang_up();
        self.forget_wishes();
        self.backing.news.tell();
    }

    /// Nothing is under way any more: what waits is looked at again, and asked for again when somebody can be asked.
    fn forget_wishes(&mut self) {
        for waiting in &mut self.waiting {
            waiting.tags.clear();
            waiting.stale = true;
        }
    }

    fn count_waiting(&self) {
        self.backing.metrics.waiting.store(self.waiting.len() as u64, Ordering::Relaxed);
    }
}

impl Waiting {
    fn new(head: u16, lacks: Vec<Span>, stale: bool) -> Self {
        let since = Instant::now();
        Waiting { head, since, lacks, tags: Vec::new(), stale, alone: false, failed: false }
    }

    /// The wish `tag` has ended, which was for `span`.
    fn ended(&mut self, tag: u64, failed: bool, span: &Span) {
        let before = self.tags.len();
        self.tags.retain(|waits| *waits != tag);
        if self.tags.len() == before {
            return;
        }
        if failed && (self.alone || self.lacks.iter().any(|lacks| lacks.contains(span))) {
            self.failed = true;
            self.tags.clear();
        } else if failed {
            self.alone = true;
            self.tags.clear();
        }
        self.stale = self.tags.is_empty();
    }
}

/// Answers a request, unless it lacks bytes.
fn see(backing: &Backing, queue: &mut Queue, memory: &GuestMemory, chain: Chain<'_>, look: Look) -> Seen {
    let head = chain.head();
    match backing.answer(chain, look) {
        Ok(Ok(len)) => queue.push_used(memory, head, len),
        Ok(Err(lacks)) => return Seen::Lacks(lacks),
        Err(()) => queue.break_off("request without room for a status"),
    }
    Seen::Done
}

/// An error with its causes.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
