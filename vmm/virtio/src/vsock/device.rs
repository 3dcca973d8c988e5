//! The virtio side: three queues, the configuration space, pausing, saving.

use std::io;
use std::os::fd::BorrowedFd;

use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::exchange::{ConnectError, Exchange, VsockEvent};
use super::state::VsockState;
use super::to_guest::Served;
use crate::GuestMemory;
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::queue::{Queue, QueueState};
use crate::rate::GUEST_ERRORS;

/// Packets to the guest, packets of the guest, events. Linux fills the first one with buffers of a page each when it
/// starts, so its size costs guest memory: half a MiB at 128.
const QUEUE_SIZES: [u16; 3] = [128, 256, 16];
/// Packets of the guest.
const TX: usize = 1;
/// Events.
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2, 5.10.3).
const F_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;
/// Context ids that a guest may have (virtio 1.2, 5.10.4): 0, 1 and 2 are taken, 2^32 - 1 means "any".
const CIDS: std::ops::Range<u32> = 3..u32::MAX;
/// Most packets of the guest taken in one go.
const PACKETS_AT_ONCE: usize = 256;
/// No more packets are taken in one go once they had so many bytes.
const BYTES_AT_ONCE: usize = 4 << 20;

/// A socket device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is not one for a guest.
    #[error("context id {0} is not between 3 and 4294967294")]
    Cid(u32),
    /// No descriptor or memory left.
    #[error("cannot make an epoll instance")]
    Poll(#[source] io::Error),
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queues: [Queue; 3],
    kicks: Vec<EventFd>,
}

/// A socket device. See the module's head for what it does.
#[derive(Debug)]
pub struct Vsock {
    exchange: Exchange,
    active: Option<Active>,
    paused: bool,
    /// The guest has to be told that its connections are gone.
    transport_reset_owed: bool,
}

impl Vsock {
    /// A device for the guest with this context id, which may dial these ports of the host.
    pub fn new(cid: u32, ports: &[u32]) -> Result<Self, VsockError> {
        if !CIDS.contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let exchange = Exchange::new(cid, ports.to_vec()).map_err(VsockError::Poll)?;
        Ok(Vsock { exchange, active: None, paused: false, transport_reset_owed: false })
    }

    /// Dials a port of the guest. The answer comes as an event that names `request`, which no other dial under way may
    /// have: [`VsockEvent::Connected`] or [`VsockEvent::Refused`]. A guest may never answer: keep a timer, and call
    /// [`Vsock::cancel`].
    pub fn connect(&mut self, port: u32, request: u64) -> Result<(), ConnectError> {
        if self.active.is_none() {
            return Err(ConnectError::NotActive);
        }
        self.exchange.connect(port, request)?;
        self.work();
        Ok(())
    }

    /// Gives up a dial; there will be no event of it. False if it has ended already: then its event is there.
    pub fn cancel(&mut self, request: u64) -> bool {
        let cancelled = self.exchange.cancel(request);
        self.work();
        cancelled
    }

    /// What happened. To be called after each of [`VirtioDevice::on_queue`], [`VirtioDevice::on_backend`],
    /// [`VirtioDevice::resume`], [`VirtioDevice::reset`], [`Vsock::connect`]; or later, for then the guest is held back.
    pub fn take_events(&mut self) -> Vec<VsockEvent> {
        let held = self.exchange.owes_too_many_events();
        if let Some(active) = self.active.as_ref().filter(|_| held) {
            active.come_back();
        }
        std::mem::take(&mut self.exchange.events)
    }

    /// Connections there are, those included that only wait for their end.
    pub fn connections(&self) -> usize {
        self.exchange.table.len()
    }

    /// Does what can be done now, a bounded amount of it.
    fn work(&mut self) {
        if self.paused {
            return;
        }
        let Some(active) = &mut self.active else { return };
        if self.transport_reset_owed {
            self.transport_reset_owed = !active.announce_transport_reset();
        }
        let mut again = active.take_packets(&mut self.exchange);
        let [rx, tx, _] = &mut active.queues;
        let held = self.exchange.owes_too_many_resets();
        match self.exchange.serve(rx, &active.memory) {
            // Packets were left for lack of room for their answers, which is there again.
            Served::All => again |= held,
            // The driver will say when it has given some.
            Served::NoBuffers => {}
            Served::More => again = true,
        }
        // Right after the other one, so that the guest takes both with one interrupt.
        tx.notify(&active.memory);
        if again {
            active.come_back();
        }
    }

    fn take_up(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, kicks, .. } = activation;
        let count = queues.len();
        let queues: [Queue; 3] = queues.try_into().map_err(|_| ActivateError {
            device: Self::NAME,
            reason: format!("{count} queues in place of {}", QUEUE_SIZES.len()),
        })?;
        self.active = Some(Active { memory, queues, kicks });
        Ok(())
    }
}

impl Active {
    /// Takes packets of the guest, which is not notified of it yet. True if some may be left.
    fn take_packets(&mut self, exchange: &mut Exchange) -> bool {
        let queue = &mut self.queues[TX];
        let mut bytes = 0;
        let mut left = true;
        for _ in 0..PACKETS_AT_ONCE {
            // Buffers of the guest for the resets make us look again (see `work`), as does `take_events`.
            if exchange.owes_too_many_resets() || exchange.owes_too_many_events() {
                left = false;
                break;
            }
            if bytes >= BYTES_AT_ONCE {
                break;
            }
            let Some(chain) = queue.pop(&self.memory) else {
                left = false;
                break;
            };
            let head = chain.head();
            let (mut packet, _) = chain.split();
            bytes += packet.left();
            exchange.take(&mut packet);
            queue.push_used(&self.memory, head, 0);
        }
        left
    }

    /// False if the guest has given no buffer for it. The next one makes us look again.
    fn announce_transport_reset(&mut self) -> bool {
        let queue = &mut self.queues[EVENT];
        let mut announced = false;
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop(&self.memory) else { break };
            let head = chain.head();
            let (_, mut event) = chain.split();
            announced = event.write_obj(&U32::new(TRANSPORT_RESET)).is_ok();
            queue.push_used(&self.memory, head, if announced { 4 } else { 0 });
            if announced {
                break;
            }
            GUEST_ERRORS.warn(format_args!("vsock: event buffer {head} is smaller than 4 bytes"));
        }
        queue.notify(&self.memory);
        announced
    }

    /// Has the main loop call us again after it has looked at others.
    fn come_back(&self) {
        if let Some(kick) = self.kicks.get(TX) {
            // An eventfd fails only when its counter is full: then we are called anyway.
            let _ = kick.write(1);
        }
    }
}

impl VirtioDevice for Vsock {
    type State = VsockState;

    const NAME: &'static str = "vsock";
    const ID: u32 = 19;

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let guest_cid = U64::new(u64::from(self.exchange.cid));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = guest_cid.as_bytes().get(from..).unwrap_or_default();
        let count = bytes.len().min(data.len());
        data[..count].copy_from_slice(&bytes[..count]);
        data[count..].fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.take_up(activation)?;
        self.work();
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) {
        // Any of them may be what something of the others waits for.
        self.work();
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.exchange.poll_fd())
    }

    fn on_backend(&mut self) {
        // When paused, this only takes note of what is ready and sends what we hold already.
        self.exchange.look();
        self.work();
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.work();
    }

    fn queues(&self) -> Vec<QueueState> {
        self.active.iter().flat_map(|active| active.queues.iter().map(Queue::state)).collect()
    }

    fn save(&self) -> VsockState {
        VsockState { cid: self.exchange.cid, ports: self.exchange.ports.clone() }
    }

    fn restore(&mut self, state: &VsockState, activation: Option<Activation>) -> Result<(), ActivateError> {
        if !CIDS.contains(&state.cid) {
            return Err(ActivateError { device: Self::NAME, reason: VsockError::Cid(state.cid).to_string() });
        }
        self.exchange.cid = state.cid;
        self.exchange.ports.clone_from(&state.ports);
        self.paused = true;
        if let Some(activation) = activation {
            self.take_up(activation)?;
            self.transport_reset_owed = true;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.exchange.drop_all();
        self.active = None;
        self.paused = false;
        self.transport_reset_owed = false;
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.exchange.metrics.list();
        list.push(("connections", self.exchange.table.len() as u64));
        list
    }
}
