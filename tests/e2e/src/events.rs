//! What containerd publishes of its tasks, followed from a moment on.

use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Result, ensure};
use containerd_client::events::{TaskExit, TaskOom};
use prost::Message as _;

use crate::api::Envelope;
use crate::command::wait_until;
use crate::{Containerd, IMAGE};

/// All events of a containerd's namespace since this was made, until the daemon ends.
#[derive(Debug)]
pub struct Events(Arc<Mutex<Vec<Envelope>>>);

impl Events {
    /// Follows a daemon's events.
    pub fn follow(containerd: &Containerd) -> Result<Events> {
        let events = Events(Arc::default());
        let heard = events.0.clone();
        containerd.api().subscribe(move |event| lock(&heard).push(event));
        // There is no other sign that the subscription has begun than an event, so one is caused.
        wait_until("containerd's events arrive", || {
            for value in ["1", ""] {
                containerd.api().label_image(IMAGE, "ctvm.local/heard", value)?;
            }
            Ok(!lock(&events.0).is_empty())
        })?;
        Ok(events)
    }

    /// What has happened to the task of a container so far: its topics' last words, in their order.
    pub fn of(&self, container: &str) -> Vec<String> {
        let heard = lock(&self.0);
        let tasks = heard.iter().filter_map(|event| Some((event.topic.strip_prefix("/tasks/")?, event)));
        // All events of tasks begin with the container's id, and that is all that this one has.
        let its = tasks.filter(|(_, event)| {
            let told = event.event.as_ref().and_then(|event| TaskOom::decode(&*event.value).ok());
            told.is_some_and(|told| told.container_id == container)
        });
        its.map(|(topic, _)| topic.to_owned()).collect()
    }

    /// Waits for as many events of a container's task as `expected`, which they must be.
    pub fn expect(&self, container: &str, expected: &[&str]) -> Result<()> {
        let enough = || Ok(self.of(container).len() >= expected.len());
        wait_until(&format!("{expected:?} of {container}"), enough)?;
        let told = self.of(container);
        ensure!(told == expected, "{container}: {told:?}, and not {expected:?}");
        Ok(())
    }

    /// Exit codes of the ends of a container's first process that were told so far.
    pub fn exits(&self, container: &str) -> Vec<u32> {
        let heard = lock(&self.0);
        let exits = heard.iter().filter(|event| event.topic == "/tasks/exit");
        exits
            .filter_map(|event| TaskExit::decode(&*event.event.as_ref()?.value).ok())
            .filter(|exit| exit.container_id == container && exit.id == container)
            .map(|exit| exit.exit_status)
            .collect()
    }
}

fn lock(heard: &Mutex<Vec<Envelope>>) -> MutexGuard<'_, Vec<Envelope>> {
    heard.lock().expect("no code panics while it holds this lock")
}
