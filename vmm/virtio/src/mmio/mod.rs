//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2): a device's registers and status machine.
//!
//! One transport owns one device. It keeps what the driver writes (features, queue set-up), lets only legal steps
//! through ([`status`]), checks the queues when the driver says `DRIVER_OK`, and hands them to the device. On the data
//! path it does nothing: notifications come as events ([`MmioTransport::kicks`], made once, so that the VMM registers
//! them once), interrupts go out by the device's [`Interrupt`].
//!
//! What a driver may not do is ignored and counted. The transport knows no addresses and no KVM.
//!
//! Not offered: packed rings, `VIRTIO_F_RING_RESET`, shared memory regions, the legacy interface (version 1).

pub mod registers;
mod state;
pub mod status;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use state::{MmioState, StateError};

use crate::GuestMemory;
use crate::device::{Activation, VirtioDevice};
use crate::irq::{Interrupt, IrqLine};
use crate::queue::{Queue, QueueState};
use crate::rate::GUEST_ERRORS;
use registers as reg;
use status::Step;

/// Features of the transport and its rings, offered with every device (virtio 1.2, 6).
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Events since the transport was made.
#[derive(Debug, Default)]
struct Counters {
    bad_accesses: u64,
    bad_steps: u64,
    bad_queues: u64,
    resets: u64,
}

/// A device and its registers.
#[derive(Debug)]
pub struct MmioTransport<D: VirtioDevice> {
    device: D,
    memory: GuestMemory,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    /// As the driver wrote them. While the device is active, it has the true positions.
    queues: Vec<QueueState>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    active: bool,
    paused: bool,
    counters: Counters,
}

impl<D: VirtioDevice> MmioTransport<D> {
    /// A transport in reset. `line` interrupts the guest. Fails if there are no more file descriptors.
    pub fn new(device: D, memory: GuestMemory, line: Arc<dyn IrqLine>) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        Ok(MmioTransport {
            kicks: sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?,
            queues: sizes.into_iter().map(QueueState::unused).collect(),
            device,
            memory,
            interrupt: Interrupt::new(line),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            active: false,
            paused: false,
            counters: Counters::default(),
        })
    }

    /// For each queue, the event that stands for a write of its index to `QueueNotify`: an ioeventfd on
    /// [`registers::QUEUE_NOTIFY`] with the index as data. The main loop waits for them and calls
    /// [`MmioTransport::on_queue`], unless the device has [`VirtioDevice::OWN_THREADS`]. The same for the transport's life.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, for what its own owner asks of it (as to open a connection). Rings are the transport's business.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// See [`VirtioDevice::backend`].
    pub fn backend(&self) -> Option<BorrowedFd<'_>> {
        self.device.backend()
    }

    /// Whether the device waits for its queues' events itself ([`VirtioDevice::OWN_THREADS`]).
    pub fn has_own_threads(&self) -> bool {
        D::OWN_THREADS
    }

    /// The status register as the driver would read it (virtio 1.2, 2.1).
    pub fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.needs_reset() { status::NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    /// Whether the driver has set the device up and it is at work (or paused in it).
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The guest reads `data.len()` bytes at `offset`. What is not there reads as zero.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= reg::CONFIG {
            if offset < reg::SIZE {
                self.device.read_config(offset - reg::CONFIG, data);
            }
            return;
        }
        let value = if is_register(offset, data.len()) { self.read_register(offset) } else { None };
        match value {
            Some(value) => data.copy_from_slice(&value.to_le_bytes()),
            None => self.counters.bad_accesses += 1,
        }
    }

    /// The guest writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= reg::CONFIG {
            // 2.4.1: before DRIVER the driver may only read.
            if offset < reg::SIZE && self.status & status::DRIVER != 0 {
                self.device.write_config(offset - reg::CONFIG, data);
            } else {
                self.counters.bad_accesses += 1;
            }
            return;
        }
        let accepted = match data.try_into().map(u32::from_le_bytes) {
            Ok(value) if is_register(offset, data.len()) => self.write_register(offset, value),
            _ => false,
        };
        if !accepted {
            self.counters.bad_accesses += 1;
        }
    }

    /// The kick of queue `index` was raised. Takes it back and lets the device work. Spurious calls are harmless.
    pub fn on_queue(&mut self, index: usize) {
        if D::OWN_THREADS {
            return;
        }
        let Some(kick) = self.kicks.get(index) else { return };
        // Empty is no error: the call may be spurious. A paused device looks at all queues in `resume`.
        let _ = kick.read();
        if self.is_working() {
            self.device.on_queue(index);
        }
    }

    /// The device's backend descriptor is readable. A paused device leaves it so: do not wait for it then.
    pub fn on_backend(&mut self) {
        if !self.paused {
            self.device.on_backend();
        }
    }

    /// Stops the device between two requests. The vCPUs must have been stopped before.
    pub fn pause(&mut self) {
        if !self.paused {
            self.paused = true;
            self.device.pause();
        }
    }

    /// Lets the device go on, after `pause` or `restore`.
    pub fn resume(&mut self) {
        if self.paused {
            self.paused = false;
            self.interrupt.raise_pending();
            self.device.resume();
        }
    }

    /// Counters of transport and device, by name.
    pub fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut metrics = vec![
            ("bad_accesses", self.counters.bad_accesses),
            ("bad_status_steps", self.counters.bad_steps),
            ("bad_queues", self.counters.bad_queues),
            ("breakages", self.interrupt.breakages()),
            ("resets", self.counters.resets),
        ];
        metrics.extend(self.device.metrics());
        metrics
    }

    fn is_working(&self) -> bool {
        self.active && !self.paused && self.status & status::FAILED == 0
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The queue that the driver selected, if there is one.
    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        Some(match offset {
            reg::MAGIC_VALUE => reg::MAGIC,
            reg::VERSION => 2,
            reg::DEVICE_ID => D::ID,
            reg::VENDOR_ID => reg::VENDOR,
            reg::DEVICE_FEATURES => half(self.offered_features(), self.device_features_sel),
            reg::QUEUE_SIZE_MAX => self.selected().map_or(0, |queue| queue.max_size.into()),
            reg::QUEUE_READY => self.selected().map_or(0, |queue| queue.ready.into()),
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS => self.status(),
            // 4.2.2: a region that is not there has length -1.
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => u32::MAX,
            reg::CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => return None,
        })
    }

    /// Tells whether the driver may write that there and now.
    fn write_register(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES => return self.accept_features(value),
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_NOTIFY => return self.notify(value),
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => return self.set_status(value & !status::NEEDS_RESET),
            reg::SHM_SEL => {}
            _ => return self.set_up_queue(offset, value),
        }
        true
    }

    fn accept_features(&mut self, value: u32) -> bool {
        // 3.1.1: between DRIVER and FEATURES_OK.
        if self.status != status::ACKNOWLEDGE | status::DRIVER {
            return false;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return value == 0,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
        true
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) -> bool {
        // 3.1.1: queues are set up between FEATURES_OK and DRIVER_OK.
        let may = self.status == status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        let Some(queue) = usize::try_from(self.queue_sel).ok().and_then(|sel| self.queues.get_mut(sel))
        else {
            return false;
        };
        if offset == reg::QUEUE_READY && value == 0 && !queue.ready {
            return true; // Linux does so after a reset.
        }
        if offset == reg::QUEUE_READY && value & 1 == 0 && self.status & status::DRIVER_OK != 0 {
            // 4.2.2: "to stop using the queue". Linux's driver of pmem does so before its reset. What the device would be without
            // one of its queues nobody says, so it stops whole.
            queue.ready = false;
            if self.active {
                self.device.reset();
                self.active = false;
            }
            return true;
        }
        // 4.2.2.2: nothing but `QueueReady` may change while the queue is ready.
        if !may || (queue.ready && offset != reg::QUEUE_READY) {
            return false;
        }
        match offset {
            // A size that does not fit in 16 bits is none that `check` will accept.
            reg::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            reg::QUEUE_READY => queue.ready = value & 1 == 1,
            reg::QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.avail_ring, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail_ring, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => return false,
        }
        true
    }

    /// A notification that came as a register write: without an ioeventfd, or as an index beyond the queues.
    fn notify(&mut self, index: u32) -> bool {
        let kick = usize::try_from(index).ok().and_then(|index| self.kicks.get(index));
        match kick {
            // An event fails to be raised only if it is raised already.
            Some(kick) if self.active => kick.write(1).is_ok(),
            _ => false,
        }
    }

    fn set_status(&mut self, to: u32) -> bool {
        match status::step(self.status, to) {
            Ok(Step::Stay) => {}
            Ok(Step::Reset) => self.reset(),
            Ok(Step::Record) => self.status = to,
            Ok(Step::CheckFeatures) => {
                // 2.2.2: a refusal shows by FEATURES_OK not being set.
                if self.features_are_good() {
                    self.status = to;
                } else {
                    self.counters.bad_steps += 1;
                }
            }
            Ok(Step::Start) => {
                self.status = to;
                self.activate();
            }
            Err(e) => {
                self.counters.bad_steps += 1;
                GUEST_ERRORS.warn(format_args!("{}: {e}", D::NAME));
                return false;
            }
        }
        true
    }

    fn features_are_good(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.event_idx = event_idx;
        }
        let result = match self.activation() {
            Ok(activation) => self.device.activate(activation).map_err(StateError::from),
            Err(e) => Err(e),
        };
        match result {
            Ok(()) => {
                self.active = true;
                if self.paused {
                    self.device.pause();
                }
            }
            Err(e) => {
                self.counters.bad_queues += 1;
                self.interrupt.device_needs_reset();
                let cause =
                    std::error::Error::source(&e).map(|cause| format!(": {cause}")).unwrap_or_default();
                GUEST_ERRORS.warn(format_args!("{} needs a reset: {e}{cause}", D::NAME));
            }
        }
    }

    fn activation(&self) -> Result<Activation, StateError> {
        let device = D::NAME;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, state) in self.queues.iter().enumerate() {
            let queue = Queue::new(state, &self.memory, self.interrupt.clone(), device, index)
                .map_err(|source| StateError::Queue { device, index, source })?;
            queues.push(queue);
        }
        let kicks =
            self.kicks.iter().map(EventFd::try_clone).collect::<io::Result<_>>().map_err(StateError::Kick)?;
        Ok(Activation {
            memory: self.memory.clone(),
            queues,
            kicks,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        })
    }

    /// Resets the device as its driver would. Nothing touches guest memory or rings any more when it returns.
    pub fn reset(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueState::unused(queue.max_size);
        }
        self.interrupt.reset();
        for kick in &self.kicks {
            let _ = kick.read(); // Empty is no error: what was pending was about the old rings.
        }
        self.counters.resets += 1;
    }
}

/// 4.2.2.2: control registers are accessed 32 bits wide and aligned.
fn is_register(offset: u64, len: usize) -> bool {
    len == 4 && offset.is_multiple_of(4)
}

/// Bits 0 to 31 of `features` for a selector of 0, 32 to 63 for 1, none beyond.
fn half(features: u64, selector: u32) -> u32 {
    let half = match selector {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(half & u64::from(u32::MAX)).expect("masked to 32 bits")
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
