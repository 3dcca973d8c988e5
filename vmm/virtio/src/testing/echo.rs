//! The simplest device: it answers each request with the request's own bytes. For tests of what surrounds a device.

use serde::{Deserialize, Serialize};

use super::contract::Fixture;
use super::{Buffer, Guest};
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::queue::QueueState;
use crate::work::Work;

/// Copies the readable part of each chain to its writable part, as far as it has room. Refuses to be activated with
/// the feature [`Echo::REFUSE`].
#[derive(Debug, Default)]
pub struct Echo {
    work: Work,
    config: [u8; 8],
    answered: u64,
}

/// What a guest could tell two echoes apart by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EchoState {
    config: [u8; 8],
}

impl Echo {
    /// A feature bit (of the 24 that belong to the kind of device) with which activation fails.
    pub const REFUSE: u64 = 1 << 3;

    fn serve(&mut self, index: usize) {
        let Some(active) = self.work.running() else { return };
        let Some(queue) = active.queues.get_mut(index) else { return };
        while let Some(chain) = queue.pop(&active.memory) {
            let head = chain.head();
            let (mut reader, mut writer) = chain.split();
            let mut bytes = vec![0; reader.left().min(writer.left()).min(4096)];
            reader.read(&mut bytes);
            writer.write(&bytes);
            let len = u32::try_from(writer.written()).expect("at most 4,096");
            queue.push_used(&active.memory, head, len);
            self.answered += 1;
        }
        queue.notify(&active.memory);
    }
}

impl VirtioDevice for Echo {
    type State = EchoState;
    const NAME: &'static str = "echo";
    const ID: u32 = 42;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 64]
    }

    fn features(&self) -> u64 {
        1 | Self::REFUSE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(place) = at.checked_add(data.len()).and_then(|end| self.config.get_mut(at..end)) {
            place.copy_from_slice(data);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.features & Self::REFUSE != 0 && activation.features & 1 == 0 {
            return Err(ActivateError { device: Self::NAME, reason: "asked to refuse".into() });
        }
        self.work.begin(activation);
        Ok(())
    }

    fn on_queue(&mut self, index: usize) {
        self.serve(index);
    }

    fn pause(&mut self) {
        self.work.pause();
    }

    fn resume(&mut self) {
        self.work.resume();
        for index in 0..self.work.queue_count() {
            self.serve(index);
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> EchoState {
        EchoState { config: self.config }
    }

    fn restore(&mut self, state: &EchoState, activation: Option<Activation>) -> Result<(), ActivateError> {
        self.config = state.config;
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("answered", self.answered)]
    }
}

/// How the contract tests use an [`Echo`].
#[derive(Debug, Default)]
pub struct EchoFixture;

impl Fixture for EchoFixture {
    type Device = Echo;

    fn device(&mut self) -> Echo {
        Echo::default()
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        let queue = (n % 2) as usize;
        guest.send(queue, &[Buffer::Out(n.to_le_bytes().into()), Buffer::In(6)]);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Echo, n: u32) {
        let used = guest.wait(device, (n % 2) as usize);
        assert_eq!(used.len, 4);
        assert_eq!(used.data[..4], n.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    crate::device_contract_tests!(contract, EchoFixture);
}
