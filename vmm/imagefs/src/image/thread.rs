//! The thread that serves the images of a VM, and how disks come to it and go from it.
//!
//! ```text
//!          ── serve(disk) ──>            a disk belongs to the device or to the thread, never to both
//!  device                     thread
//!          <── release() ────            between two turns
//! ```
//!
//! It is made with the VM, since system call filters are inherited: a thread that is made when an image is attached would get
//! the main thread's.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio::device::Threads;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::channel::Channel;
use super::files::BlobFile;
use super::serving::Serving;

/// Its name.
const NAME: &str = "image";
/// Stack of the thread. Far below 2 MiB: a stack of that size gets a whole huge page on a host that gives those to all.
const STACK: usize = 256 << 10;

/// Names a disk of the thread.
pub type Key = u64;

/// What the thread is asked to do, in this order.
#[derive(Debug)]
enum Order {
    Serve(Key, Box<Serving>),
    Release(Key, SyncSender<Box<Serving>>),
    Rebind(Key, Channel, Vec<BlobFile>),
    End,
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Vec<Order>>,
    /// Readable while there are orders.
    wake: EventFd,
    dead: AtomicBool,
}

/// A thread for the images of a VM.
#[derive(Debug)]
pub struct ImageThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl ImageThread {
    /// Starts the thread. Returns when it has entered, or could not.
    pub fn new(threads: Arc<dyn Threads>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { orders: Mutex::default(), wake, dead: AtomicBool::new(false) });
        let (ready, is_ready) = channel();
        let worker = Arc::clone(&shared);
        let run = move || {
            let entered = threads.enter(NAME);
            let failed = entered.is_err();
            let _ = ready.send(entered); // its maker waits for it
            drop(ready);
            if !failed {
                // The release build aborts at a panic, which ends the VMM as loudly.
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    worker.dead.store(true, Ordering::SeqCst);
                    // Whoever waits for a disk learns now that none comes.
                    worker.orders().clear();
                    threads.died(NAME);
                }
            }
        };
        let thread = thread::Builder::new().name(NAME.to_owned()).stack_size(STACK).spawn(run)?;
        is_ready.recv().map_err(|_| io::Error::other("the thread ended before it was ready"))??;
        Ok(ImageThread { shared, thread: Some(thread) })
    }

    /// Whether it panicked.
    pub(super) fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::SeqCst)
    }

    /// Hands a disk over, to be served from now on.
    pub(super) fn serve(&self, key: Key, disk: Box<Serving>) {
        self.order(Order::Serve(key, disk));
    }

    /// Takes a disk back, between two turns of the thread. `None` if the thread has died.
    pub(super) fn release(&self, key: Key) -> Option<Box<Serving>> {
        self.ask_back(key).recv().ok()
    }

    /// As `release`, if that is possible within `patience`; else it goes on.
    pub(super) fn try_release(&self, key: Key, patience: Duration) -> Option<Box<Serving>> {
        let back = self.ask_back(key);
        match back.recv_timeout(patience) {
            Ok(disk) => Some(disk),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let is_it = |order: &Order| matches!(order, Order::Release(of, _) if *of == key);
                self.shared.orders().retain(|order| !is_it(order));
                // If the thread was faster, the disk is on its way.
                back.recv().ok()
            }
        }
    }

    fn ask_back(&self, key: Key) -> Receiver<Box<Serving>> {
        let (give, back) = sync_channel(1);
        self.order(Order::Release(key, give));
        back
    }

    /// Gives a disk another connection and other cache files.
    pub(super) fn rebind(&self, key: Key, channel: Channel, blobs: Vec<BlobFile>) {
        self.order(Order::Rebind(key, channel, blobs));
    }

    fn order(&self, order: Order) {
        let mut orders = self.shared.orders();
        if self.is_dead() {
            return; // dropped, and so answered
        }
        orders.push(order);
        // Fails only when it is raised already.
        let _ = self.shared.wake.write(1);
    }
}

impl Drop for ImageThread {
    fn drop(&mut self) {
        self.order(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // its panic has been told
        }
    }
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Vec<Order>> {
        self.orders.lock().expect("no thread panics while it holds the orders")
    }

    fn run(&self) {
        let mut disks: Vec<(Key, Box<Serving>)> = Vec::new();
        loop {
            let orders = std::mem::take(&mut *self.orders());
            for order in orders {
                match order {
                    Order::End => return,
                    Order::Serve(key, mut disk) => {
                        disk.look();
                        disks.push((key, disk));
                    }
                    Order::Release(key, give) => {
                        if let Some(index) = disks.iter().position(|(of, _)| *of == key) {
                            let (_, disk) = disks.swap_remove(index);
                            // Whoever asked waits for it; without it nobody is left who could use the disk.
                            let _ = give.send(disk);
                        }
                    }
                    Order::Rebind(key, channel, blobs) => {
                        if let Some((_, disk)) = disks.iter_mut().find(|(of, _)| *of == key) {
                            disk.rebind(channel, blobs);
                        }
                    }
                }
            }
            let due = disks.iter_mut().filter_map(|(_, disk)| disk.turn()).min();
            self.wait(&mut disks, due);
        }
    }

    /// Waits until there is something to do for any disk, or `due`.
    fn wait(&self, disks: &mut [(Key, Box<Serving>)], due: Option<Instant>) {
        let timeout = due.map(|due| timespec(due.saturating_duration_since(Instant::now())));
        let mut fds = vec![PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN)];
        for (_, disk) in &*disks {
            fds.push(PollFd::from_borrowed_fd(borrow(disk.kick()), PollFlags::IN));
            if let Some(channel) = disk.channel() {
                let room = if disk.is_clogged() { PollFlags::OUT } else { PollFlags::empty() };
                fds.push(PollFd::from_borrowed_fd(channel, PollFlags::IN | room));
            }
        }
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return; // interrupted by a signal: look around and come back
        }
        drop(fds);
        // Empty when nothing came.
        let _ = self.wake.read();
        for (_, disk) in disks {
            if disk.kick().read().is_ok() {
                disk.look();
            }
        }
    }
}

/// So long, and where that is not at once, a little longer: what is due is due then.
fn timespec(left: Duration) -> Timespec {
    let left = if left.is_zero() { left } else { left.saturating_add(Duration::from_millis(1)) };
    Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    }
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
