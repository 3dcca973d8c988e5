//! The device: two numbers, and a queue on which a driver may ask for a flush.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use zerocopy::little_endian::U32;

use super::{PmemMetrics, PmemState};
use crate::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use crate::queue::{Chain, QueueState};
use crate::rate::GUEST_ERRORS;
use crate::work::Work;

/// The one type of request (virtio 1.2, 5.19.6: `VIRTIO_PMEM_REQ_TYPE_FLUSH`).
const FLUSH: u32 = 0;
/// Answers: done, and not (5.19.6).
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;
/// Requests answered at a stretch, before other devices have their turn.
const BUDGET: usize = 16;

/// Where the guest finds it.
#[derive(Debug, Clone)]
pub struct PmemConfig {
    /// First guest physical address. Linux wants a multiple of 2 MiB (`memremap_pages`).
    pub start: u64,
    /// Length in bytes; likewise.
    pub size: u64,
    /// How often the guest tried to write there; who stops it counts.
    pub writes: Arc<AtomicU64>,
}

/// A range of read-only memory.
#[derive(Debug)]
pub struct Pmem {
    config: PmemConfig,
    work: Work,
    metrics: PmemMetrics,
}

impl Pmem {
    /// A device of what is mapped at `config`'s addresses.
    pub fn new(config: PmemConfig) -> Self {
        Pmem { config, work: Work::default(), metrics: PmemMetrics::default() }
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
            let len = answer(chain, &mut self.metrics);
            queue.push_used(&active.memory, head, len);
        }
        queue.notify(&active.memory);
    }
}

/// Answers a request; how many bytes were written.
fn answer(chain: Chain<'_>, metrics: &mut PmemMetrics) -> u32 {
    let (mut request, mut reply) = chain.split();
    let kind = request.read_obj::<U32>().map(U32::get);
    let status = if kind == Ok(FLUSH) { DONE } else { FAILED };
    let answered = reply.write_obj(&U32::new(status));
    match (&kind, &answered) {
        (Ok(FLUSH), Ok(())) => metrics.flushes += 1,
        _ => {
            metrics.bad_requests += 1;
            GUEST_ERRORS.warn(format_args!("pmem: request {kind:?}, answer {answered:?}"));
        }
    }
    u32::try_from(reply.written()).expect("four bytes")
}

impl VirtioDevice for Pmem {
    type State = PmemState;
    const NAME: &'static str = "pmem";
    const ID: u32 = VIRTIO_ID_PMEM;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // 5.19.4: `le64 start`, `le64 size`.
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.config.start.to_le_bytes());
        config[8..].copy_from_slice(&self.config.size.to_le_bytes());
        read_config_bytes(&config, offset, data);
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

    fn save(&self) -> PmemState {
        PmemState { start: self.config.start, size: self.config.size }
    }

    fn restore(&mut self, state: &PmemState, activation: Option<Activation>) -> Result<(), ActivateError> {
        let own = self.save();
        if *state != own {
            let reason = format!("it was {state:x?} when it was saved, and is {own:x?}");
            return Err(ActivateError { device: Self::NAME, reason });
        }
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let PmemMetrics { flushes, bad_requests } = self.metrics;
        vec![
            ("bytes", self.config.size),
            ("flushes", flushes),
            ("bad_requests", bad_requests),
            ("refused_writes", self.config.writes.load(Ordering::Relaxed)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::contract::Fixture;
    use crate::testing::{Buffer, Guest};

    const START: u64 = 0x2_0000_0000;
    const SIZE: u64 = 6 << 20;

    fn pmem() -> Pmem {
        Pmem::new(PmemConfig { start: START, size: SIZE, writes: Arc::default() })
    }

    #[derive(Default)]
    struct PmemFixture;

    impl Fixture for PmemFixture {
        type Device = Pmem;

        fn device(&mut self) -> Pmem {
            pmem()
        }

        fn submit(&mut self, guest: &mut Guest, _n: u32) {
            guest.send(0, &[Buffer::Out(FLUSH.to_le_bytes().into()), Buffer::In(4)]);
        }

        fn complete(&mut self, guest: &mut Guest, device: &mut Pmem, _n: u32) {
            let used = guest.wait(device, 0);
            assert_eq!((used.len, used.data), (4, vec![0; 4]));
        }
    }

    crate::device_contract_tests!(contract, PmemFixture);

    #[test]
    fn a_driver_reads_where_it_lies() {
        let pmem = pmem();
        let mut config = [0xff; 20];
        pmem.read_config(0, &mut config);
        assert_eq!(config[..8], START.to_le_bytes());
        assert_eq!(config[8..16], SIZE.to_le_bytes());
        assert_eq!(config[16..], [0; 4]);
        pmem.read_config(12, &mut config[..4]);
        assert_eq!(config[..4], [0; 4]);
        pmem.read_config(u64::MAX, &mut config);
        assert_eq!(config, [0; 20]);
    }

    #[test]
    fn what_is_no_flush_fails_and_is_counted() {
        let mut pmem = pmem();
        let mut guest = Guest::with(&mut pmem);
        let mut ask = |request: Vec<u8>, room| {
            let used = guest.ask(&mut pmem, 0, &[Buffer::Out(request), Buffer::In(room)]);
            (used.len, used.data)
        };
        assert_eq!(ask(vec![1, 0, 0, 0], 4), (4, vec![0xff; 4]));
        // Too short, of no bytes, with nowhere to answer, with room for half an answer.
        assert_eq!(ask(vec![0; 3], 4), (4, vec![0xff; 4]));
        assert_eq!(ask(vec![], 4), (4, vec![0xff; 4]));
        assert_eq!(ask(vec![0; 4], 0).0, 0);
        assert_eq!(ask(vec![0; 4], 3), (0, vec![0xa5; 3]));
        // What comes behind the type is not looked at.
        assert_eq!(ask(vec![0; 4096], 8), (4, vec![0, 0, 0, 0, 0xa5, 0xa5, 0xa5, 0xa5]));
        assert_eq!(pmem.metrics, PmemMetrics { flushes: 1, bad_requests: 5 });
    }

    #[test]
    fn one_that_lies_elsewhere_does_not_take_over() {
        let mut other = Pmem::new(PmemConfig { start: START + 4096, ..pmem().config });
        let error = other.restore(&pmem().save(), None).unwrap_err().to_string();
        assert!(
            error.starts_with("pmem cannot be activated: it was PmemState { start: 200000000"),
            "{error}"
        );
    }
}
