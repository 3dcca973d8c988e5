//! The device: a queue of buffers to fill with input, and one of output.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::backend::{Input, Output};
use super::tail::Tail;
use super::{ConsoleMetrics, ConsoleState};
use crate::device::{ActivateError, Activation, VirtioDevice};
use crate::queue::QueueState;
use crate::work::Work;

/// Queue of buffers for the guest's input (virtio 1.2, 5.3.2).
const RECEIVE: usize = 0;
/// Queue of the guest's output.
const TRANSMIT: usize = 1;

/// Bytes moved through our memory at once.
const CHUNK: usize = 2048;
/// Bytes taken from one output chain at most; a kernel's are of a page. What is more is dropped.
const MAX_OUTPUT: usize = 64 * 1024;
/// Bytes given to one input chain at most.
const MAX_INPUT: usize = 4096;
/// Chains handled at a stretch, before other devices have their turn.
const BUDGET: usize = 16;

/// A console cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The output descriptor does not work.
    #[error("console output cannot be used")]
    Output(#[source] io::Error),
    /// The input descriptor does not work.
    #[error("console input cannot be used")]
    Input(#[source] io::Error),
}

/// A console with one port.
#[derive(Debug)]
pub struct Console {
    work: Work,
    output: Option<Output>,
    input: Option<Input>,
    tail: Tail,
    metrics: ConsoleMetrics,
}

impl Console {
    /// A console over these descriptors, which become non-blocking for all who share the open files.
    pub fn new(output: Option<OwnedFd>, input: Option<OwnedFd>) -> Result<Self, ConsoleError> {
        Ok(Console {
            work: Work::default(),
            output: output.map(Output::new).transpose().map_err(ConsoleError::Output)?,
            input: input.map(Input::new).transpose().map_err(ConsoleError::Input)?,
            tail: Tail::default(),
            metrics: ConsoleMetrics::default(),
        })
    }

    /// The last 4 KiB that the guest wrote.
    pub fn last_words(&self) -> Vec<u8> {
        self.tail.bytes()
    }

    /// Whether the guest ever wrote "Kernel panic - not syncing".
    pub fn panicked(&self) -> bool {
        self.tail.panicked()
    }

    fn transmit(&mut self) {
        let Some(active) = self.work.running() else { return };
        let Some(queue) = active.queues.get_mut(TRANSMIT) else { return };
        for turn in 0.. {
            if turn == BUDGET {
                // Fails only when it is raised already.
                let _ = active.kicks[TRANSMIT].write(1);
                break;
            }
            let Some(chain) = queue.pop(&active.memory) else { break };
            let head = chain.head();
            let (mut reader, _) = chain.split();
            self.metrics.output_bytes += reader.left() as u64;
            self.metrics.dropped_bytes += reader.left().saturating_sub(MAX_OUTPUT) as u64;
            let mut room = MAX_OUTPUT;
            while reader.left() > 0 && room > 0 {
                let mut chunk = [0; CHUNK];
                let len = reader.read(&mut chunk[..CHUNK.min(room)]);
                room -= len;
                self.tail.push(&chunk[..len]);
                if let Some(output) = &self.output {
                    self.metrics.dropped_bytes += (len - output.write(&chunk[..len])) as u64;
                }
            }
            queue.push_used(&active.memory, head, 0);
        }
        queue.notify(&active.memory);
    }

    fn receive(&mut self) {
        let Some(input) = &mut self.input else { return };
        let Some(active) = self.work.running() else {
            input.want(false);
            return;
        };
        let Some(queue) = active.queues.get_mut(RECEIVE) else { return };
        let mut turn = 0;
        while !input.ended() {
            if turn == BUDGET {
                let _ = active.kicks[RECEIVE].write(1);
                break;
            }
            turn += 1;
            let Some(chain) = queue.pop(&active.memory) else {
                // The driver notifies us of the next buffer; until then the input waits where it is.
                input.want(false);
                break;
            };
            let head = chain.head();
            let (_, mut writer) = chain.split();
            if writer.left() == 0 {
                queue.push_used(&active.memory, head, 0);
                continue;
            }
            match writer.read_from(input.fd(), MAX_INPUT) {
                Ok(0) => {
                    queue.undo_pop();
                    input.end();
                }
                Ok(len) => {
                    self.metrics.input_bytes += len as u64;
                    queue.push_used(&active.memory, head, u32::try_from(len).expect("at most MAX_INPUT"));
                }
                Err(e) => {
                    queue.undo_pop();
                    if e.kind() == io::ErrorKind::WouldBlock {
                        if !input.want(true) {
                            break;
                        }
                    } else {
                        log::debug!("console input ends: {e}");
                        input.end();
                    }
                }
            }
        }
        queue.notify(&active.memory);
    }
}

impl VirtioDevice for Console {
    type State = ConsoleState;
    const NAME: &'static str = "console";
    const ID: u32 = VIRTIO_ID_CONSOLE;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // 5.3.4: each field belongs to a feature that is not offered.
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.work.begin(activation);
        self.receive();
        Ok(())
    }

    fn on_queue(&mut self, index: usize) {
        match index {
            RECEIVE => self.receive(),
            _ => self.transmit(),
        }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(Input::epoll)
    }

    fn on_backend(&mut self) {
        self.receive();
    }

    fn pause(&mut self) {
        self.work.pause();
        self.receive();
    }

    fn resume(&mut self) {
        self.work.resume();
        self.transmit();
        self.receive();
    }

    fn queues(&self) -> Vec<QueueState> {
        self.work.queues()
    }

    fn save(&self) -> ConsoleState {
        ConsoleState { last_words: self.tail.bytes(), panicked: self.tail.panicked() }
    }

    fn restore(&mut self, state: &ConsoleState, activation: Option<Activation>) -> Result<(), ActivateError> {
        self.tail = Tail::restore(&state.last_words, state.panicked);
        self.work.restore(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.work.reset();
        self.receive();
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}

#[cfg(test)]
mod tests;
