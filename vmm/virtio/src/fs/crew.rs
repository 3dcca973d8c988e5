//! The threads that serve requests, and how they are made to stop between two of them.
//!
//! Threads are made with the device, since system call filters are inherited: a thread made at activation would get
//! those of the vCPU thread which the driver runs on.
//!
//! ```text
//!            run(work)                 stop()
//!  parked ──────────────> serving ──────────────> parked          join() from either
//!                            └─ while_still(task): stop, task, run; in time or not at all
//! ```
//!
//! While work is running, each thread waits for any queue's event, and takes requests until the queues are empty. A
//! thread that takes one lets a free colleague look for the next: while the device works on a queue, the driver does
//! not notify.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::FsServer;
use crate::GuestMemory;
use crate::device::Threads;
use crate::queue::Queue;

/// Stack of a thread. Far below 2 MiB: a stack of that size gets a whole huge page on a host that gives those to all.
const STACK: usize = 512 << 10;

/// What an activation gave to work on.
#[derive(Debug)]
pub struct Work {
    pub memory: GuestMemory,
    pub queues: Vec<Mutex<Queue>>,
    pub kicks: Vec<EventFd>,
}

#[derive(Debug, Default)]
struct Orders {
    /// What to work on; `None` to park.
    work: Option<Arc<Work>>,
    /// Threads not parked.
    serving: usize,
    end: bool,
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
    /// Readable while threads shall stop, so that it ends their waiting.
    wake: EventFd,
    stop: AtomicBool,
    /// Threads that work and are not serving a request at the moment.
    free: AtomicUsize,
    served: AtomicU64,
    dead: AtomicBool,
}

/// What came of telling the threads to stop.
enum Halt {
    /// They had nothing to work on.
    Parked,
    /// They had this, and all have parked.
    Stopped(Arc<Work>),
    /// One is still at a request. All go on.
    Late,
}

/// The threads of one device.
#[derive(Debug)]
pub struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Starts `count` threads, parked. Returns when all of them are ready, or one could not be made so.
    pub fn new(count: u16, server: &Arc<dyn FsServer>, threads: &Arc<dyn Threads>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            orders: Mutex::default(),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            stop: AtomicBool::new(false),
            free: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            dead: AtomicBool::new(false),
        });
        let mut crew = Crew { shared, threads: Vec::new() };
        let (ready, is_ready) = channel();
        for index in 0..count {
            let member = Member {
                shared: crew.shared.clone(),
                server: server.clone(),
                threads: threads.clone(),
                name: format!("fs{index}"),
            };
            let ready = ready.clone();
            crew.threads.push(
                thread::Builder::new()
                    .name(member.name.clone())
                    .stack_size(STACK)
                    .spawn(|| member.run(ready))?,
            );
        }
        drop(ready);
        for _ in 0..count {
            is_ready.recv().map_err(|_| io::Error::other("a thread ended before it was ready"))??;
        }
        Ok(crew)
    }

    /// Lets the threads work, first on what is in the queues already.
    pub fn run(&self, work: Arc<Work>) {
        self.shared.orders().work = Some(work);
        self.shared.changed.notify_all();
    }

    /// Stops the threads when each has finished the request it is at, and gives back what they worked on. Blocks so
    /// long.
    pub fn stop(&self) -> Option<Arc<Work>> {
        match self.halt(None) {
            Halt::Parked => None,
            Halt::Stopped(work) => Some(work),
            Halt::Late => unreachable!("there is no limit"),
        }
    }

    /// Does `task` while every thread is between two requests; `None` if one was not within `patience`. What the threads
    /// work on is theirs again afterwards.
    pub fn while_still<T>(&self, patience: Duration, task: impl FnOnce() -> T) -> Option<T> {
        match self.halt(Some(Instant::now() + patience)) {
            Halt::Parked => Some(task()),
            Halt::Stopped(work) => {
                let done = task();
                self.run(work);
                Some(done)
            }
            Halt::Late => None,
        }
    }

    fn halt(&self, deadline: Option<Instant>) -> Halt {
        let mut orders = self.shared.orders();
        let Some(work) = orders.work.take() else { return Halt::Parked };
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake.write(1).expect("the counter is 0 while threads run, so it takes one more");
        let mut late = false;
        while orders.serving > 0 && !late {
            orders = match deadline {
                None => self.shared.wait(orders),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    late = left.is_zero();
                    self.shared.wait_for(orders, left)
                }
            };
        }
        let late = orders.serving > 0;
        self.shared.wake.read().expect("written above, and nobody else reads it");
        self.shared.stop.store(false, Ordering::SeqCst);
        if late {
            // Those that have parked go on, too.
            orders.work = Some(work);
            self.shared.changed.notify_all();
            return Halt::Late;
        }
        Halt::Stopped(work)
    }

    /// Requests served.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }

    /// Whether a thread panicked.
    pub fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::SeqCst)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.stop();
        self.shared.orders().end = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // its panic has been told
        }
    }
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().expect("no thread panics while it holds the orders")
    }

    fn wait<'s>(&self, orders: MutexGuard<'s, Orders>) -> MutexGuard<'s, Orders> {
        self.changed.wait(orders).expect("no thread panics while it holds the orders")
    }

    fn wait_for<'s>(&self, orders: MutexGuard<'s, Orders>, most: Duration) -> MutexGuard<'s, Orders> {
        let waited = self.changed.wait_timeout(orders, most);
        waited.expect("no thread panics while it holds the orders").0
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// One thread.
struct Member {
    shared: Arc<Shared>,
    server: Arc<dyn FsServer>,
    threads: Arc<dyn Threads>,
    name: String,
}

impl Member {
    fn run(self, ready: Sender<io::Result<()>>) {
        let entered = self.server.enter_thread().and_then(|()| self.threads.enter(&self.name));
        let failed = entered.is_err();
        let _ = ready.send(entered); // nobody listens any more if a colleague failed first
        if failed {
            return;
        }
        drop(ready);
        while let Some(work) = self.next_work() {
            // The release build aborts at a panic, which ends the VMM as loudly. Where it unwinds, a thread must not
            // vanish in silence, and `stop` must not wait for it.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.serve(&work)));
            if outcome.is_err() {
                self.shared.dead.store(true, Ordering::SeqCst);
                self.threads.died(&self.name);
            }
            self.shared.orders().serving -= 1;
            self.shared.changed.notify_all();
            if outcome.is_err() {
                return;
            }
        }
    }

    /// Waits for work; `None` to end.
    fn next_work(&self) -> Option<Arc<Work>> {
        let mut orders = self.shared.orders();
        loop {
            if orders.end {
                return None;
            }
            if let Some(work) = orders.work.clone() {
                orders.serving += 1;
                return Some(work);
            }
            orders = self.shared.wait(orders);
        }
    }

    fn serve(&self, work: &Work) {
        self.shared.free.fetch_add(1, Ordering::SeqCst);
        while !self.shared.stopping() && !self.shared.dead.load(Ordering::SeqCst) {
            for index in 0..work.queues.len() {
                self.empty(work, index);
            }
            self.await_event(work);
        }
        self.shared.free.fetch_sub(1, Ordering::SeqCst);
    }

    /// Serves the requests of one queue until there are no more.
    fn empty(&self, work: &Work, index: usize) {
        let queue = || work.queues[index].lock().expect("no thread panics while it holds a queue");
        while !self.shared.stopping() {
            let Some(chain) = queue().pop(&work.memory) else { return };
            if self.shared.free.fetch_sub(1, Ordering::SeqCst) > 1 {
                // Fails only when the counter is full: then a colleague will look anyway.
                let _ = work.kicks[index].write(1);
            }
            let head = chain.head();
            let (request, reply) = chain.split();
            let len = self.server.handle(request, reply);
            self.shared.free.fetch_add(1, Ordering::SeqCst);
            self.shared.served.fetch_add(1, Ordering::Relaxed);
            let mut queue = queue();
            queue.push_used(&work.memory, head, len);
            queue.notify(&work.memory);
        }
    }

    fn await_event(&self, work: &Work) {
        let events = || work.kicks.iter().chain([&self.shared.wake]);
        let mut fds: Vec<PollFd<'_>> =
            events().map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)).collect();
        if poll(&mut fds, None).is_err() {
            return; // interrupted by a signal: look around and come back
        }
        for (kick, fd) in work.kicks.iter().zip(&fds) {
            if !fd.revents().is_empty() {
                let _ = kick.read(); // a colleague may have been faster
            }
        }
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
