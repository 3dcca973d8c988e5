//! The other side of a device, for tests: a fake driver over real guest memory, and the tests that every device
//! must pass ([`crate::device_contract_tests!`]).
//!
//! The driver is careful on purpose: it notifies only when the device asked for it, and looks at used rings only after an
//! interrupt. A device that loses a notification or forgets an interrupt makes its test stop with "no answer".

pub mod contract;
mod driver;
mod echo;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use driver::{Buffer, Descriptor, FakeQueue, INDIRECT, NEXT, Used, WRITE, write_descriptor};
pub use echo::{Echo, EchoFixture};

use crate::GuestMemory;
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::irq::{Interrupt, IrqLine};
use crate::queue::{Queue, QueueState};

/// Guest memory ends here; behind it is nothing.
pub const MEMORY_END: u64 = 0x40_0000;
/// Two regions of memory meet here: a buffer across it is valid and comes as two slices.
pub const SEAM: u64 = 0x20_0000;

const RINGS: u64 = 0x1_0000;
const HEAP: u64 = 0x10_0000;
/// No answer within this time is a failure. Far above what any test needs.
const PATIENCE: Duration = Duration::from_secs(20);

/// 4 MiB of guest memory in two regions.
pub fn memory() -> GuestMemory {
    let len = |bytes: u64| usize::try_from(bytes).unwrap();
    crate::memory::anonymous(&[(0, len(SEAM)), (SEAM, len(MEMORY_END - SEAM))])
}

/// An interrupt line that counts.
#[derive(Debug, Default)]
pub struct CountedLine(AtomicU64);

impl CountedLine {
    /// Interrupts so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountedLine {
    fn raise(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Where buffers come from: a piece of memory, used in turn and never given back. So keep less than that in flight, and
/// use one of its own for a queue whose buffers stay in flight while others come and go.
#[derive(Debug)]
pub struct Heap {
    all: std::ops::Range<u64>,
    next: u64,
}

impl Default for Heap {
    /// All 3 MiB that the rings leave.
    fn default() -> Self {
        Heap::within(HEAP..MEMORY_END)
    }
}

impl Heap {
    /// A part of what [`Heap::default`] has.
    pub fn within(all: std::ops::Range<u64>) -> Self {
        assert!(HEAP <= all.start && all.end <= MEMORY_END, "{all:x?} is not all for buffers");
        Heap { next: all.start, all }
    }

    /// `len` bytes, aligned to 16.
    pub fn take(&mut self, len: usize) -> u64 {
        let len = (len as u64).next_multiple_of(16);
        assert!(len <= self.all.end - self.all.start, "buffer of {len} bytes is larger than {:x?}", self.all);
        if self.next + len > self.all.end {
            self.next = self.all.start;
        }
        let address = self.next;
        self.next += len;
        address
    }
}

/// A guest with a driver for one device.
#[derive(Debug)]
pub struct Guest {
    /// Its memory.
    pub memory: GuestMemory,
    /// The driver's halves of the queues.
    pub queues: Vec<FakeQueue>,
    /// Where `add` puts buffers.
    pub heap: Heap,
    /// The events of its notifications. `pump` is the main loop that waits for them.
    pub kicks: Vec<EventFd>,
    /// The device's interrupt.
    pub interrupt: Interrupt,
    line: Arc<CountedLine>,
    interrupts_seen: u64,
    done: Vec<VecDeque<Used>>,
    event_idx: bool,
}

impl Guest {
    /// A guest with queues of these sizes.
    pub fn new(queue_sizes: &[u16], event_idx: bool) -> Self {
        let memory = memory();
        let line = Arc::new(CountedLine::default());
        let mut guest = Guest {
            queues: Vec::new(),
            heap: Heap::default(),
            kicks: queue_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            interrupt: Interrupt::new(line.clone()),
            line,
            interrupts_seen: 0,
            done: Vec::new(),
            event_idx,
            memory,
        };
        guest.restart(queue_sizes);
        guest
    }

    /// A guest with the queues of `device`.
    pub fn of<D: VirtioDevice>(device: &D, event_idx: bool) -> Self {
        Self::new(&device.queue_sizes(), event_idx)
    }

    /// A guest whose driver has set the device up.
    pub fn with<D: VirtioDevice>(device: &mut D) -> Self {
        let guest = Self::of(device, true);
        guest.activate(device).expect("the fake driver's queues are good");
        guest
    }

    /// Begins again with empty rings, as a driver does after it reset the device.
    pub fn restart(&mut self, queue_sizes: &[u16]) {
        self.interrupt.reset();
        self.queues.clear();
        self.done = vec![VecDeque::new(); queue_sizes.len()];
        let mut base = RINGS;
        for size in queue_sizes {
            self.queues.push(FakeQueue::new(&self.memory, base, *size, self.event_idx));
            base += 32 * u64::from((*size).max(16));
            assert!(base <= HEAP, "the rings fit into the memory before the heap");
        }
        for kick in &self.kicks {
            let _ = kick.read(); // What was pending was for the old rings.
        }
    }

    /// What the transport would hand over at `DRIVER_OK`.
    pub fn activation<D: VirtioDevice>(&self, device: &D) -> Activation {
        let states: Vec<QueueState> = self.queues.iter().map(FakeQueue::state).collect();
        self.activation_from::<D>(&states, device.features())
    }

    /// What the transport would hand over at `restore`.
    pub fn activation_from<D: VirtioDevice>(&self, states: &[QueueState], features: u64) -> Activation {
        let queue = |(index, state)| {
            Queue::new(state, &self.memory, self.interrupt.clone(), D::NAME, index)
                .expect("rings are in memory")
        };
        Activation {
            memory: self.memory.clone(),
            queues: states.iter().enumerate().map(queue).collect(),
            kicks: self.kicks.iter().map(|kick| kick.try_clone().unwrap()).collect(),
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    /// Sets the device up with all its features.
    pub fn activate<D: VirtioDevice>(&self, device: &mut D) -> Result<(), ActivateError> {
        let activation = self.activation(device);
        device.activate(activation)
    }

    /// Makes a request available, and notifies the device if it wants to know.
    pub fn send(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let head = self.queues[queue].add(&mut self.heap, buffers);
        self.notify(queue);
        head
    }

    /// Notifies the device of what was added, if it wants to know.
    pub fn notify(&mut self, queue: usize) {
        if self.queues[queue].must_notify() {
            self.kicks[queue].write(1).unwrap();
        }
    }

    /// One turn of the main loop: calls the device for what is ready. Tells whether anything was.
    pub fn pump<D: VirtioDevice>(&self, device: &mut D) -> bool {
        let mut busy = false;
        for (index, kick) in self.kicks.iter().enumerate() {
            if !D::OWN_THREADS && kick.read().is_ok() {
                device.on_queue(index);
                busy = true;
            }
        }
        if device.backend().is_some_and(readable) {
            device.on_backend();
            busy = true;
        }
        busy
    }

    /// Turns the main loop until nothing is ready. For a device with threads of its own, also gives them some time.
    pub fn settle<D: VirtioDevice>(&self, device: &mut D) {
        for _ in 0..1000 {
            if !self.pump(device) {
                break;
            }
        }
        if D::OWN_THREADS {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Turns the main loop until `queue` gives a chain back.
    pub fn wait<D: VirtioDevice>(&mut self, device: &mut D, queue: usize) -> Used {
        self.wait_until(device, |guest| guest.done[queue].pop_front())
    }

    /// Turns the main loop until `queue` gives this chain back.
    pub fn wait_for<D: VirtioDevice>(&mut self, device: &mut D, queue: usize, head: u16) -> Used {
        self.wait_until(device, |guest| {
            let at = guest.done[queue].iter().position(|used| used.head == head)?;
            guest.done[queue].remove(at)
        })
    }

    /// Sends a request and waits for its answer.
    pub fn ask<D: VirtioDevice>(&mut self, device: &mut D, queue: usize, buffers: &[Buffer]) -> Used {
        let head = self.send(queue, buffers);
        self.wait_for(device, queue, head)
    }

    /// Turns the main loop until `what` is there.
    pub fn wait_until<D: VirtioDevice, T>(
        &mut self,
        device: &mut D,
        mut what: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        let start = Instant::now();
        loop {
            self.take_interrupt();
            if let Some(found) = what(self) {
                return found;
            }
            if !self.pump(device) {
                assert!(
                    start.elapsed() < PATIENCE,
                    "no answer: {} interrupts, needs reset: {}, in flight: {:?}, used indices: {:?}",
                    self.line.count(),
                    self.interrupt.needs_reset(),
                    self.queues.iter().map(FakeQueue::in_flight).collect::<Vec<_>>(),
                    self.queues.iter().map(FakeQueue::used_idx).collect::<Vec<_>>(),
                );
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Interrupts so far.
    pub fn interrupts(&self) -> u64 {
        self.line.count()
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// What an interrupt handler does: if there was an interrupt, collects what all queues gave back.
    fn take_interrupt(&mut self) {
        let count = self.line.count();
        if count == self.interrupts_seen {
            return;
        }
        self.interrupts_seen = count;
        self.interrupt.acknowledge(self.interrupt.status());
        for (queue, done) in self.queues.iter_mut().zip(&mut self.done) {
            while let Some(used) = queue.take_used() {
                done.push_back(used);
            }
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    // A fuzzer's timer may interrupt even a poll that does not wait.
    retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))
        .expect("poll of one descriptor")
        > 0
}
