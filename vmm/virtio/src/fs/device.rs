//! The device: configuration, activation, pause and resume.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::crew::{Crew, Work};
use super::{FsServer, FsState};
use crate::device::{ActivateError, Activation, Threads, VirtioDevice};
use crate::queue::QueueState;

/// Longest tag (virtio 1.2, 5.11.4).
const TAG_MAX: usize = 36;
/// Most request queues, and threads.
const THREADS_MAX: u16 = 4;
/// Descriptors in a request queue. One request has up to 256 pages of data and 4 buffers around them.
const QUEUE_SIZE: u16 = 512;
/// Descriptors in the high priority queue, which only carries short messages.
const HIPRIO_SIZE: u16 = 64;

/// How long the main loop may stand still for a request to end. Who asked for that is told to come again.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a device is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsConfig {
    /// Tag that the guest mounts by: 1 to 36 bytes, no NUL.
    pub tag: String,
    /// Threads, 1 to 4; there are as many request queues.
    pub threads: u16,
}

/// A device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit the device's configuration space.
    #[error("tag {tag:?} must be 1 to {TAG_MAX} bytes without NUL")]
    Tag {
        /// Tag asked for.
        tag: String,
    },
    /// Too many threads, or none.
    #[error("{threads} file server threads, where 1 to {THREADS_MAX} are possible")]
    Threads {
        /// Number asked for.
        threads: u16,
    },
    /// A thread could not be started, or refused to enter.
    #[error("starting the file server's threads")]
    Start(#[source] io::Error),
}

/// A virtio file system device.
#[derive(Debug)]
pub struct Fs {
    config: FsConfig,
    server: Arc<dyn FsServer>,
    crew: Crew,
    phase: Phase,
    /// The driver of an earlier life had a session.
    session_lost: bool,
    /// `crew.served()` when the driver last began anew.
    served_before: u64,
}

#[derive(Debug)]
enum Phase {
    Inactive,
    Active,
    Paused(Arc<Work>),
}

impl Fs {
    /// Makes a device, and its threads. Call it where threads may be made and inherit no filter.
    pub fn new(
        config: FsConfig,
        server: Arc<dyn FsServer>,
        threads: &Arc<dyn Threads>,
    ) -> Result<Self, FsError> {
        if config.tag.is_empty() || config.tag.len() > TAG_MAX || config.tag.contains('\0') {
            return Err(FsError::Tag { tag: config.tag });
        }
        if !(1..=THREADS_MAX).contains(&config.threads) {
            return Err(FsError::Threads { threads: config.threads });
        }
        let crew = Crew::new(config.threads, &server, threads).map_err(FsError::Start)?;
        Ok(Fs { config, server, crew, phase: Phase::Inactive, session_lost: false, served_before: 0 })
    }

    fn take_up(&self, activation: Activation) -> Result<Arc<Work>, ActivateError> {
        let wanted = self.queue_sizes().len();
        if activation.queues.len() != wanted || activation.kicks.len() != wanted {
            return Err(self.error(format!(
                "{} queues and {} events were given, {wanted} are needed",
                activation.queues.len(),
                activation.kicks.len()
            )));
        }
        let queues = activation.queues.into_iter().map(Mutex::new).collect();
        Ok(Arc::new(Work { memory: activation.memory, queues, kicks: activation.kicks }))
    }

    fn error(&self, reason: String) -> ActivateError {
        ActivateError { device: Self::NAME, reason }
    }
}

impl VirtioDevice for Fs {
    type State = FsState;

    const NAME: &'static str = "fs";
    const ID: u32 = 26;
    const OWN_THREADS: bool = true;

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 1 + usize::from(self.config.threads)];
        sizes[0] = HIPRIO_SIZE;
        sizes
    }

    fn features(&self) -> u64 {
        0
    }

    /// `tag`, padded with NULs, then `num_request_queues` (virtio 1.2, 5.11.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_MAX + 4];
        config[..self.config.tag.len()].copy_from_slice(self.config.tag.as_bytes());
        config[TAG_MAX..].copy_from_slice(&u32::from(self.config.threads).to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let len = data.len().min(config.len() - from);
        data[..len].copy_from_slice(&config[from..from + len]);
        data[len..].fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.crew.is_dead() {
            return Err(self.error("a thread of its server has died".to_owned()));
        }
        let work = self.take_up(activation)?;
        self.phase = Phase::Active;
        self.crew.run(work);
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) {}

    /// Blocks until each thread has finished the request it is at.
    fn pause(&mut self) {
        if let Some(work) = self.crew.stop() {
            self.phase = Phase::Paused(work);
        }
    }

    fn resume(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Active) {
            Phase::Paused(work) => self.crew.run(work),
            other => self.phase = other,
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        let Phase::Paused(work) = &self.phase else {
            return self.queue_sizes().into_iter().map(QueueState::unused).collect();
        };
        let queues = work.queues.iter();
        queues.map(|queue| queue.lock().expect("no thread panics while it holds a queue").state()).collect()
    }

    fn save(&self) -> FsState {
        FsState {
            tag: self.config.tag.clone(),
            request_queues: self.config.threads,
            session_lost: self.session_lost || self.crew.served() > self.served_before,
        }
    }

    fn restore(&mut self, state: &FsState, activation: Option<Activation>) -> Result<(), ActivateError> {
        let FsState { tag, request_queues, session_lost } = state;
        if (tag, *request_queues) != (&self.config.tag, self.config.threads) {
            return Err(self.error(format!(
                "saved were tag {tag:?} and {request_queues} request queues, this one has {:?} and {}",
                self.config.tag, self.config.threads
            )));
        }
        self.session_lost = *session_lost;
        if let Some(activation) = activation {
            self.phase = Phase::Paused(self.take_up(activation)?);
        }
        Ok(())
    }

    /// Blocks until each thread has finished the request it is at.
    fn reset(&mut self) {
        self.crew.stop();
        self.phase = Phase::Inactive;
        self.server.reset();
        self.session_lost = false;
        self.served_before = self.crew.served();
    }

    fn while_still<T>(&mut self, task: impl FnOnce() -> T) -> Option<T> {
        self.crew.while_still(PATIENCE, task)
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        let mut list = vec![("chains", self.crew.served()), ("session_lost", u64::from(self.session_lost))];
        list.extend(self.server.metrics());
        list
    }
}

#[cfg(test)]
mod tests;
