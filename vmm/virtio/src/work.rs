//! What a device without threads of its own holds while a driver uses it.

use crate::device::Activation;
use crate::queue::{Queue, QueueState};

/// The states of the diagram in [`crate::device`], and what belongs to them.
#[derive(Debug, Default)]
pub struct Work {
    activation: Option<Activation>,
    paused: bool,
}

impl Work {
    /// The driver has set the device up.
    pub fn begin(&mut self, activation: Activation) {
        self.activation = Some(activation);
    }

    /// Another device had come so far, and was paused.
    pub fn restore(&mut self, activation: Option<Activation>) {
        self.activation = activation;
        self.paused = true;
    }

    /// Nothing is given out by [`Work::running`] until `resume`.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Goes on. The caller looks at all queues then.
    pub fn resume(&mut self) {
        self.paused = false;
    }

    /// Forgets the driver.
    pub fn reset(&mut self) {
        *self = Work::default();
    }

    /// Memory, queues and so on, if there is something to do with them: the device is active and not paused.
    pub fn running(&mut self) -> Option<&mut Activation> {
        if self.paused { None } else { self.activation.as_mut() }
    }

    /// What the driver has set up, if it has, paused or not.
    pub fn activation(&self) -> Option<&Activation> {
        self.activation.as_ref()
    }

    /// The queues as they stand, empty when there are none.
    pub fn queues(&self) -> Vec<QueueState> {
        self.activation.iter().flat_map(|active| &active.queues).map(Queue::state).collect()
    }

    /// How many queues there are to look at.
    pub fn queue_count(&self) -> usize {
        self.activation.as_ref().map_or(0, |active| active.queues.len())
    }
}
