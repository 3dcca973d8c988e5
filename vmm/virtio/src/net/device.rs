//! The device: pairs of receive and transmit queues, and a control queue if there is more than one pair.

use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use super::control;
use super::receive::{Received, Rules, receive};
use super::transmit::{Sent, transmit};
use super::{NetMetrics, NetState, Taps};
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::queue::QueueState;
use crate::work::Work;

/// Descriptors of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Commands done at a stretch.
const BUDGET_COMMANDS: usize = 16;

/// The configuration space up to the last field that a feature of ours shows (virtio 1.2, 5.1.4).
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
}

/// A network device of the guest.
#[derive(Debug)]
pub struct Net {
    work: Work,
    taps: Taps,
    mac: [u8; 6],
    mtu: u16,
    driver: Driver,
    metrics: NetMetrics,
}

/// What the driver chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Driver {
    rules: Rules,
    /// Queue pairs that it may use: all, or the first one.
    pairs: usize,
    /// Of them, those that it uses (virtio 1.2, 5.1.6.5.5).
    in_use: usize,
    /// The control queue, if it uses one.
    control: Option<usize>,
}

impl Driver {
    fn new(features: u64, mtu: u16, pairs: usize) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        let pairs = if has(VIRTIO_NET_F_MQ) { pairs } else { 1 };
        Driver {
            rules: Rules::new(features, mtu),
            pairs,
            in_use: 1,
            // 5.1.2: behind the pairs that the driver may use, not behind those that there are.
            control: has(VIRTIO_NET_F_CTRL_VQ).then_some(2 * pairs),
        }
    }
}

const fn receive_queue(pair: usize) -> usize {
    2 * pair
}

const fn transmit_queue(pair: usize) -> usize {
    2 * pair + 1
}

impl Net {
    /// A device with a queue pair for each of the taps' descriptors, at least one. `mac` is the guest's address, unicast;
    /// `mtu` the longest payload of a frame, 68 bytes at least (virtio 1.2, 5.1.4.1).
    pub fn new(taps: Taps, mac: [u8; 6], mtu: u16) -> Self {
        let driver = Driver::new(0, mtu, taps.len());
        Net { work: Work::default(), taps, mac, mtu, driver, metrics: NetMetrics::default() }
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.taps.len()).expect("few taps")
    }

    /// Takes frames from the tap of a pair, for the queue that they go to now.
    fn receive(&mut self, pair: usize) {
        let Some(active) = self.work.running() else { return };
        let queue = &mut active.queues[receive_queue(pair % self.driver.in_use)];
        let fd = self.taps.fd(pair);
        match receive(fd, queue, &active.memory, self.driver.rules, &mut self.metrics) {
            // The main loop comes again by itself while there are frames.
            Received::All | Received::More => self.taps.want_frames(pair, true),
            Received::NoBuffers => self.taps.want_frames(pair, false),
            Received::Ended => self.taps.end(pair),
        }
    }

    fn receive_all(&mut self) {
        for pair in 0..self.taps.len() {
            self.receive(pair);
        }
    }

    fn transmit(&mut self, pair: usize) {
        let Some(active) = self.work.running() else { return };
        let index = transmit_queue(pair);
        let queue = &mut active.queues[index];
        let sent = transmit(self.taps.fd(pair), queue, &active.memory, &mut self.metrics);
        if sent == Sent::More {
            // Fails only when it is raised already.
            let _ = active.kicks[index].write(1);
        }
        self.taps.want_room(pair, sent == Sent::Full);
    }

    fn control(&mut self, index: usize) {
        let Some(active) = self.work.running() else { return };
        let queue = &mut active.queues[index];
        let max = if self.driver.pairs > 1 { u16::try_from(self.driver.pairs).expect("few taps") } else { 0 };
        let mut in_use = self.driver.in_use;
        for turn in 0.. {
            if turn == BUDGET_COMMANDS {
                // Fails only when it is raised already.
                let _ = active.kicks[index].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            let head = chain.head();
            let (command, mut room) = chain.split();
            let pairs = control::pairs_set(command, max);
            if !control::answer(&mut room, pairs.is_some()) {
                queue.break_off("command without room for a status");
                break;
            }
            match pairs {
                Some(pairs) => {
                    in_use = pairs.into();
                    self.metrics.commands += 1;
                }
                None => self.metrics.bad_commands += 1,
            }
            queue.push_used(&active.memory, head, 1);
        }
        queue.notify(&active.memory);
        if in_use != self.driver.in_use {
            self.driver.in_use = in_use;
            self.receive_all();
        }
    }

    fn begin(&mut self, features: u64) -> Result<(), ActivateError> {
        self.driver = Driver::new(features, self.mtu, self.taps.len());
        self.taps.set_offloads_for(features).map_err(|e| ActivateError {
            device: Self::NAME,
            reason: format!("the tap's offloads cannot be set: {e}"),
        })
    }
}

impl VirtioDevice for Net {
    type State = NetState;
    const NAME: &'static str = "net";
    const ID: u32 = VIRTIO_ID_NET;

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * self.taps.len()];
        if self.taps.len() > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        sizes
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_MTU,
            VIRTIO_NET_F_STATUS,
        ];
        if self.taps.len() > 1 {
            bits.extend([VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ]);
        }
        bits.into_iter().map(|bit| 1 << bit).sum()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            mac: self.mac,
            status: u16::try_from(VIRTIO_NET_S_LINK_UP).expect("1").into(),
            max_virtqueue_pairs: self.pairs().into(),
            mtu: self.mtu.into(),
        };
        read_config_bytes(config.as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.begin(activation.features)?;
        self.work.begin(activation);
        // This is a vCPU's thread: the main loop shall look for frames, and for buffers that are there already.
        for pair in 0..self.taps.len() {
            self.taps.want_frames(pair, true);
        }
        Ok(())
    }

    fn on_queue(&mut self, index: usize) {
        let Driver { pairs, in_use, control, .. } = self.driver;
        if control == Some(index) {
            self.control(index);
        } else if index >= 2 * pairs {
            // A queue that the driver did not ask for.
        } else if index % 2 == 1 {
            self.transmit(index / 2);
        } else {
            // None if the pair is not in use.
            for pair in (index / 2..self.taps.len()).step_by(in_use).filter(|_| index / 2 < in_use) {
                self.receive(pair);
            }
        }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.taps.epoll())
    }

    fn on_backend(&mut self) {
        for pair in 0..self.taps.len() {
            if self.taps.waits_for_frames(pair) {
                self.receive(pair);
            }
            if self.taps.waits_for_room(pair) {
                self.transmit(pair);
            }
        }
    }

    fn pause(&mut self) {
        self.work.pause();
        self.taps.quiet();
    }

    fn resume(&mut self) {
        self.work.resume();
        if self.work.queue_count() == 0 {
            return;
        }
        if let Some(index) = self.driver.control {
            self.control(index);
        }
        for pair in 0..self.driver.pairs {
            self.transmit(pair);
        }
        self.receive_all();
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> NetState {
        let pairs_in_use = u16::try_from(self.driver.in_use).expect("few taps");
        NetState { mac: self.mac, mtu: self.mtu, pairs: self.pairs(), pairs_in_use }
    }

    fn restore(&mut self, state: &NetState, activation: Option<Activation>) -> Result<(), ActivateError> {
        let refused = |reason| ActivateError { device: Self::NAME, reason };
        let own = NetState { pairs_in_use: state.pairs_in_use, ..self.save() };
        if own != *state {
            return Err(refused(format!("state is of another device: {state:?}, not {own:?}")));
        }
        self.begin(activation.as_ref().map_or(0, |activation| activation.features))?;
        let in_use = usize::from(state.pairs_in_use);
        if !(1..=self.driver.pairs).contains(&in_use) {
            return Err(refused(format!(
                "state has {in_use} queue pairs in use, must be 1 to {}",
                self.driver.pairs
            )));
        }
        self.driver.in_use = in_use;
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
        self.taps.quiet();
        if let Err(e) = self.begin(0) {
            // Set anew when a driver comes.
            log::warn!("{e}");
        }
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = self.metrics.list();
        list.push(("pairs_in_use", self.driver.in_use as u64));
        list
    }
}

#[cfg(test)]
mod tests;
