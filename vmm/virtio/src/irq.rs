//! How a device gets the guest's attention.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

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

/// The interrupt of one device: the line and the `InterruptStatus` register that says why it was raised.
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<dyn IrqLine>,
}

impl Interrupt {
    /// An interrupt with no reason pending.
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Interrupt { status: Arc::default(), line }
    }

    /// Tells the driver that some queue has used buffers (virtio 1.2, 2.7.7 decides when to call this).
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver to read the configuration, or the status, again.
    pub fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// `InterruptACK`: the driver has seen these reasons.
    pub fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    /// Puts back the pending reasons of a saved device.
    pub fn restore(&self, status: u32) {
        self.status.store(status & (USED_BUFFER | CONFIG_CHANGE), Ordering::SeqCst);
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        if let Err(e) = self.line.raise() {
            // An eventfd fails only when its counter is full: then an interrupt is pending anyway.
            log::debug!("interrupt not raised: {e}");
        }
    }
}
