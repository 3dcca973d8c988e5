//! Task events to containerd, in the order in which they happened.
//!
//! One queue and one task that empties it from the front: an event leaves the queue when containerd has taken it,
//! so none overtakes another, across reconnects too. containerd may be away (a restart); events wait for it, within
//! bounds.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::events::task;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::sync::Notify;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::{clock, paths};

/// Events that wait for a containerd that is away. When there are more, the newest are dropped.
const BACKLOG: usize = 1024;
/// How often one event is tried, with pauses that double from [`FIRST_PAUSE`] to [`LONGEST_PAUSE`]: 40 s in all.
const TRIES: u32 = 12;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// How long containerd has to take one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// An event and where it belongs.
#[derive(Debug, Clone)]
pub enum Event {
    /// A container was created.
    Create(task::TaskCreate),
    /// Its first process runs.
    Start(task::TaskStart),
    /// A process ended.
    Exit(task::TaskExit),
    /// A container was deleted.
    Delete(task::TaskDelete),
    /// A further process was made ready.
    ExecAdded(task::TaskExecAdded),
    /// It runs.
    ExecStarted(task::TaskExecStarted),
    /// A container's processes stand still.
    Paused(task::TaskPaused),
    /// They go on.
    Resumed(task::TaskResumed),
    /// The kernel killed some for want of memory.
    Oom(task::TaskOOM),
}

impl Event {
    /// The topic containerd expects it under.
    pub fn topic(&self) -> &'static str {
        match self {
            Event::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Event::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Event::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Event::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
            Event::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Event::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Event::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Event::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
            Event::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
        }
    }

    fn to_any(&self) -> Any {
        match self {
            Event::Create(m) => pack("containerd.events.TaskCreate", m),
            Event::Start(m) => pack("containerd.events.TaskStart", m),
            Event::Exit(m) => pack("containerd.events.TaskExit", m),
            Event::Delete(m) => pack("containerd.events.TaskDelete", m),
            Event::ExecAdded(m) => pack("containerd.events.TaskExecAdded", m),
            Event::ExecStarted(m) => pack("containerd.events.TaskExecStarted", m),
            Event::Paused(m) => pack("containerd.events.TaskPaused", m),
            Event::Resumed(m) => pack("containerd.events.TaskResumed", m),
            Event::Oom(m) => pack("containerd.events.TaskOOM", m),
        }
    }
}

/// containerd's type URLs are bare names, without a host. They are spelled out since asking the message for its name
/// builds the descriptors of its whole file, in memory that is then never given back.
fn pack(name: &str, message: &impl Message) -> Any {
    let mut any = Any::new();
    any.type_url = name.to_owned();
    any.value = message.write_to_bytes().expect("a message of plain fields is always complete");
    any
}

/// The queue of one sandbox.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Mutex<VecDeque<Envelope>>,
    changed: Notify,
}

impl Publisher {
    /// A publisher that sends to the ttrpc socket at `address`; nowhere when that is empty, as by hand.
    pub fn start(address: &str, namespace: &str) -> Arc<Self> {
        let publisher = Arc::new(Publisher {
            namespace: namespace.to_owned(),
            queue: Mutex::default(),
            changed: Notify::new(),
        });
        if address.is_empty() {
            log::warn!("no TTRPC_ADDRESS: events go nowhere");
        } else {
            tokio::spawn(publisher.clone().run(paths::socket_of(address).to_owned()));
        }
        publisher
    }

    /// Queues an event. Returns at once.
    pub fn publish(&self, event: &Event) {
        let mut envelope = Envelope::new();
        envelope.timestamp = MessageField::some(clock::timestamp());
        envelope.namespace.clone_from(&self.namespace);
        envelope.topic = event.topic().to_owned();
        envelope.event = MessageField::some(event.to_any());
        let mut queue = self.queue.lock().expect("no code panics while it holds this lock");
        if queue.len() >= BACKLOG {
            log::error!("{BACKLOG} events wait for containerd: dropping {}", event.topic());
            return;
        }
        log::debug!("event {}", event.topic());
        queue.push_back(envelope);
        drop(queue);
        self.changed.notify_waiters();
        self.changed.notify_one();
    }

    /// Waits until containerd has all events, or `timeout` passes.
    pub async fn flush(&self, timeout: Duration) {
        let emptied = tokio::time::timeout(timeout, async {
            while !self.is_empty() {
                self.changed.notified().await;
            }
        });
        if emptied.await.is_err() {
            log::warn!("containerd did not take all events within {timeout:?}");
        }
    }

    fn is_empty(&self) -> bool {
        self.queue.lock().expect("no code panics while it holds this lock").is_empty()
    }

    fn front(&self) -> Option<Envelope> {
        self.queue.lock().expect("no code panics while it holds this lock").front().cloned()
    }

    fn pop(&self) {
        self.queue.lock().expect("no code panics while it holds this lock").pop_front();
        self.changed.notify_waiters();
    }

    async fn run(self: Arc<Self>, socket: String) {
        let mut client: Option<EventsClient> = None;
        loop {
            let Some(envelope) = self.front() else {
                self.changed.notified().await;
                continue;
            };
            let topic = envelope.topic.clone();
            let mut request = ForwardRequest::new();
            request.envelope = MessageField::some(envelope);
            let mut pause = FIRST_PAUSE;
            for attempt in 1..=TRIES {
                match forward(&mut client, &socket, &request).await {
                    Ok(()) => break,
                    Err(e) if attempt == TRIES => {
                        log::error!("event {topic} given up after {TRIES} tries: {e}");
                    }
                    Err(e) => {
                        log::debug!("event {topic}, try {attempt}: {e}");
                        client = None;
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
            }
            self.pop();
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    socket: &str,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let connected = match client {
        Some(client) => client,
        None => {
            let socket = Socket::connect_unix(socket).await;
            let socket = socket.map_err(|e| ttrpc::Error::Socket(e.to_string()))?;
            client.insert(EventsClient::new(Client::new(socket)))
        }
    };
    connected.forward(ttrpc::context::with_duration(FORWARD_TIMEOUT), request).await.map(drop)
}
