//! One device, whichever it is.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use imagefs::image::ImageDisk;
use virtio::balloon::Balloon;
use virtio::blk::Blk;
use virtio::console::Console;
use virtio::device::VirtioDevice;
use virtio::fs::Fs;
use virtio::mem::Mem;
use virtio::mmio::MmioTransport;
use virtio::net::Net;
use virtio::pmem::Pmem;
use virtio::rng::Rng;
use virtio::vsock::Vsock;

use super::make::Slot;
use crate::event_loop::{EventLoop, Token};

/// A device with its transport.
pub(super) type Shared<D> = Arc<Mutex<MmioTransport<D>>>;

/// What a device is.
#[derive(Debug, Clone)]
pub(super) enum Device {
    Blk(Shared<Blk>),
    Image(Shared<ImageDisk>),
    Net(Shared<Net>),
    Vsock(Shared<Vsock>),
    Fs(Shared<Fs>),
    Console(Shared<Console>),
    Rng(Shared<Rng>),
    Balloon(Shared<Balloon>),
    Mem(Shared<Mem>),
    Pmem(Shared<Pmem>),
}

/// Does the same with whatever device it is.
macro_rules! with {
    ($device:expr, |$transport:ident| $body:expr) => {
        with!($device, $transport, $body, Blk Image Net Vsock Fs Console Rng Balloon Mem Pmem)
    };
    ($device:expr, $transport:ident, $body:expr, $($kind:ident)+) => {
        match $device {
            $(Device::$kind(shared) => {
                let $transport = &mut *lock(shared);
                $body
            })+
        }
    };
}
pub(super) use with;

/// Devices that are to stand still while a block of memory goes: all but the memory device, which takes it away.
pub(super) type Bystanders = Arc<Mutex<Vec<Device>>>;

/// Does `task` while nothing holds a slice of guest memory on behalf of `devices`: their transports are locked, and their
/// threads wait between two requests. False if one would not in time; then `task` was not done.
pub(super) fn while_still(devices: &[Device], task: &mut dyn FnMut()) -> bool {
    let Some((first, others)) = devices.split_first() else {
        task();
        return true;
    };
    with!(first, |transport| transport
        .device_mut()
        .while_still(|| while_still(others, task))
        .unwrap_or(false))
}

pub(super) fn lock<D: VirtioDevice>(shared: &Shared<D>) -> MutexGuard<'_, MmioTransport<D>> {
    shared.lock().expect("a panic ends the process before anyone else takes the lock")
}

/// Has the main loop wait for what concerns a device.
pub(super) fn watch(events: &EventLoop, slot: &Slot) -> io::Result<()> {
    let index = slot.at.slot;
    with!(&slot.device, |transport| {
        for (queue, kick) in (0u16..).zip(transport.kicks()).filter(|_| !transport.has_own_threads()) {
            events.add(kick, Token::Queue { slot: index, queue })?;
        }
        if let Some(backend) = transport.backend() {
            events.add(&backend, Token::Backend { slot: index })?;
        }
        Ok(())
    })
}

/// The contrary.
pub(super) fn unwatch(events: &EventLoop, slot: &Slot) -> io::Result<()> {
    with!(&slot.device, |transport| {
        let kicks = transport.kicks().iter().filter(|_| !transport.has_own_threads());
        let kicks = kicks.map(|kick| events.remove(kick)).fold(Ok(()), Result::and);
        match transport.backend() {
            Some(backend) => kicks.and(events.remove(&backend)),
            None => kicks,
        }
    })
}
