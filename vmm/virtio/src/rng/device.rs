//! The device: one queue of buffers to fill.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::backend::{CHUNK, fill};
use super::{RngMetrics, RngState};
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::queue::{QueueState, Writer};
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// Bytes given for one request at most; a driver asks again (virtio 1.2, 5.4.6.1).
const MAX_REQUEST: usize = 4096;
/// Requests answered at a stretch, before other devices have their turn.
const BUDGET: usize = 16;

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    work: Work,
    metrics: RngMetrics,
}

impl Rng {
    /// A device over the host's `getrandom`.
    pub fn new() -> Self {
        Self::default()
    }

    fn serve(&mut self) {
        let Some(active) = self.work.running() else { return };
        let queue = &mut active.queues[0];
        for turn in 0.. {
            if turn == BUDGET {
                // Fails only when it is raised already.
                let _ = active.kicks[0].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            let head = chain.head();
            let (_, writer) = chain.split();
            let len = answer(writer, &mut self.metrics);
            queue.push_used(&active.memory, head, len);
        }
        queue.notify(&active.memory);
    }
}

/// Fills a request as far as its limit goes. Tells how many bytes were written.
fn answer(mut writer: Writer<'_>, metrics: &mut RngMetrics) -> u32 {
    let mut bytes = [0; CHUNK];
    while writer.left() > 0 && writer.written() < MAX_REQUEST {
        if let Err(e) = fill(&mut bytes) {
            metrics.failures += 1;
            GUEST_ERRORS.warn(format_args!("rng: the host gives no random bytes: {e}"));
            break;
        }
        writer.write(&bytes);
    }
    metrics.requests += 1;
    metrics.bytes += writer.written() as u64;
    u32::try_from(writer.written()).expect("at most MAX_REQUEST")
}

impl VirtioDevice for Rng {
    type State = RngState;
    const NAME: &'static str = "rng";
    const ID: u32 = VIRTIO_ID_RNG;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.work.begin(activation);
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) {
        self.serve();
    }

    fn pause(&mut self) {
        self.work.pause();
    }

    fn resume(&mut self) {
        self.work.resume();
        self.serve();
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> RngState {
        RngState {}
    }

    fn restore(&mut self, _state: &RngState, activation: Option<Activation>) -> Result<(), ActivateError> {
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::contract::Fixture;
    use crate::testing::{Buffer, Guest};

    #[derive(Default)]
    struct RngFixture;

    impl Fixture for RngFixture {
        type Device = Rng;

        fn device(&mut self) -> Rng {
            Rng::new()
        }

        fn submit(&mut self, guest: &mut Guest, _n: u32) {
            guest.send(0, &[Buffer::In(40), Buffer::In(24)]);
        }

        fn complete(&mut self, guest: &mut Guest, device: &mut Rng, _n: u32) {
            let used = guest.wait(device, 0);
            assert_eq!(used.len, 64);
            // 64 times the byte that the buffers had before: once in 2^512 tries.
            assert_ne!(used.data, [0xa5; 64]);
        }
    }

    crate::device_contract_tests!(contract, RngFixture);

    #[test]
    fn a_large_request_is_answered_in_part() {
        let mut rng = Rng::new();
        let mut guest = Guest::with(&mut rng);
        let used = guest.ask(&mut rng, 0, &[Buffer::In(1 << 20)]);
        assert_eq!(used.len as usize, MAX_REQUEST);
        assert_eq!(used.data[MAX_REQUEST..], vec![0xa5; (1 << 20) - MAX_REQUEST]);
        assert_eq!(rng.metrics, RngMetrics { requests: 1, bytes: MAX_REQUEST as u64, failures: 0 });
    }

    #[test]
    fn two_answers_differ_and_nothing_is_asked_for_nothing() {
        let mut rng = Rng::new();
        let mut guest = Guest::with(&mut rng);
        let first = guest.ask(&mut rng, 0, &[Buffer::In(300)]).data;
        let second = guest.ask(&mut rng, 0, &[Buffer::In(300)]).data;
        assert_ne!(first, second);
        assert_ne!(first[..20], first[256..276], "chunks differ, too");
        assert_eq!(guest.ask(&mut rng, 0, &[Buffer::Out(vec![1])]).len, 0);
    }
}
