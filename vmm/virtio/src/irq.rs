//! How a device gets the guest's attention.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Bit of `InterruptStatus`: a queue has used buffers (virtio 1.2, 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// Bit of `InterruptStatus`: the configuration changed (virtio 1.2, 4.2.2).
pub const CONFIG_CHANGE: u32 = 2;

/// An interrupt line into the guest. Edge triggered: each call is one interrupt.
pub trait IrqLine: Debug + Send + Sync {
    /// Raises the line once.
    fn raise(&self) -> io::Result<()>;
}

/// An irqfd.
impl IrqLine for EventFd {
    fn raise(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// What the driver can learn about why it was interrupted, shared between device and transport.
#[derive(Debug, Default)]
struct Reasons {
    status: AtomicU32,
    needs_reset: AtomicBool,
    breakages: AtomicU64,
    config_generation: AtomicU32,
}

/// The interrupt of one device: the line, and the registers that say why it was raised.
#[derive(Debug, Clone)]
pub struct Interrupt {
    reasons: Arc<Reasons>,
    line: Arc<dyn IrqLine>,
}

impl Interrupt {
    /// An interrupt with no reason pending.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Interrupt { reasons: Arc::default(), line }
    }

    /// Tells the driver that some queue has used buffers (virtio 1.2, 2.7.7 decides when to call this).
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver to read the configuration, or the status, again. Call it after the change.
    pub fn config_change(&self) {
        self.reasons.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    /// Tells the driver that the device met something it cannot go on after: `DEVICE_NEEDS_RESET` shows in the
    /// `Status` register until the driver resets the device (virtio 1.2, 2.1.2).
    pub fn device_needs_reset(&self) {
        if !self.reasons.needs_reset.swap(true, Ordering::SeqCst) {
            self.reasons.breakages.fetch_add(1, Ordering::Relaxed);
            self.config_change();
        }
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.reasons.needs_reset.load(Ordering::SeqCst)
    }

    /// How often the device asked for a reset since it was made.
    pub fn breakages(&self) -> u64 {
        self.reasons.breakages.load(Ordering::Relaxed)
    }

    /// `ConfigGeneration`: another value after each change (virtio 1.2, 2.5.1).
    pub fn config_generation(&self) -> u32 {
        self.reasons.config_generation.load(Ordering::SeqCst)
    }

    /// `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.reasons.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`: the driver has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.reasons.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// Puts back what a saved device had pending.
    pub fn restore(&self, status: u32, needs_reset: bool, config_generation: u32) {
        self.reasons.config_generation.store(config_generation, Ordering::SeqCst);
        self.reasons.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
        self.reasons.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The driver reset the device: nothing is pending.
    pub fn reset(&self) {
        self.restore(0, false, self.config_generation());
    }

    /// Raises the line again for what is pending, as an edge may have been lost (after a restore).
    pub fn raise_pending(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    fn raise(&self, reason: u32) {
        self.reasons.status.fetch_or(reason, Ordering::SeqCst);
        if let Err(e) = self.line.raise() {
            // An eventfd fails only when its counter is full: then an interrupt is pending anyway.
            log::debug!("interrupt not raised: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn interrupt() -> (Interrupt, Arc<EventFd>) {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (Interrupt::new(line.clone()), line)
    }

    #[test]
    fn reasons_stay_until_they_are_acknowledged() {
        let (interrupt, line) = interrupt();
        interrupt.used_buffer();
        interrupt.config_change();
        assert_eq!((line.read().unwrap(), interrupt.status()), (2, USED_BUFFER | CONFIG_CHANGE));
        interrupt.acknowledge(USED_BUFFER);
        assert_eq!((interrupt.status(), interrupt.config_generation()), (CONFIG_CHANGE, 1));
        assert!(line.read().is_err(), "an acknowledgement is no interrupt");
    }

    #[test]
    fn a_reset_is_asked_for_once_and_counted() {
        let (interrupt, line) = interrupt();
        interrupt.device_needs_reset();
        interrupt.device_needs_reset();
        assert_eq!((line.read().unwrap(), interrupt.breakages(), interrupt.needs_reset()), (1, 1, true));
        interrupt.reset();
        assert_eq!((interrupt.breakages(), interrupt.needs_reset(), interrupt.status()), (1, false, 0));
        interrupt.device_needs_reset();
        assert_eq!(interrupt.breakages(), 2);
    }

    #[test]
    fn what_was_pending_is_raised_again_after_a_restore() {
        let (interrupt, line) = interrupt();
        interrupt.raise_pending();
        assert!(line.read().is_err());
        interrupt.restore(USED_BUFFER | 0xf0, false, 7);
        interrupt.raise_pending();
        assert_eq!(
            (line.read().unwrap(), interrupt.status(), interrupt.config_generation()),
            (1, USED_BUFFER, 7)
        );
    }

    #[test]
    fn a_full_line_is_raised_already() {
        let (interrupt, line) = interrupt();
        line.write(u64::MAX - 1).unwrap();
        interrupt.used_buffer();
        assert_eq!(interrupt.status(), USED_BUFFER);
    }
}
