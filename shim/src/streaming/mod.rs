//! containerd's Streaming service: standard streams over ttrpc in place of fifos.
//!
//! With `io_type = "streaming"` (containerd 2.1, `internal/cri/io/streaming.go`), CRI does not make fifos: it dials the
//! sandbox's own socket, once for each stream, names the stream (`<container or exec>-stdin`, `-stdout`, `-stderr`), and
//! then creates the container or exec with `ttrpc+unix://<that socket>?streaming_id=<that name>` in the place of a fifo.
//! A containerd that was restarted dials again under the same name.
//!
//! ```text
//! containerd ── Stream, StreamInit{id} ──> Handler ── Client ──> Desk ── whoever claimed the id ──> pump ── pipe ── io
//! ```
//!
//! Bytes pass under a window that their receiver grants: `WindowUpdate` from it, `Data` to it.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::{mpsc, oneshot};
use ttrpc::Response;
use ttrpc::r#async::{ServerStream, Service, StreamHandler, StreamInner, TtrpcContext};

pub mod pump;

/// Messages, generated from `proto/streaming.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/streaming.rs"));
}

use proto::{Data, StreamInit, WindowUpdate};

/// Name of the service.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
/// Type of bytes of a stream.
pub const DATA: &str = "containerd.types.transfer.Data";
/// Type of a receiver's word that it has room.
pub const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// Clients that wait for someone to create what they named. CRI makes three for a container; those of one that it then
/// did not create stay, so the oldest goes.
const WAITING: usize = 64;

/// How long what a client says is still heard after the end of its call, to no effect: it may grant room for what is none.
const FAREWELL: Duration = Duration::from_secs(5);

/// One client's end of a stream.
#[derive(Debug)]
pub struct Client {
    /// Until it is dropped.
    stream: Option<ServerStream<Any, Any>>,
    /// Ends the call, which gets the stream.
    call: Option<oneshot::Sender<ServerStream<Any, Any>>>,
}

impl Drop for Client {
    fn drop(&mut self) {
        if let (Some(stream), Some(call)) = (self.stream.take(), self.call.take()) {
            // Nobody takes it where the connection is gone.
            let _ = call.send(stream);
        }
    }
}

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// Bytes.
    Data(Vec<u8>),
    /// It has room for more bytes.
    Room(u32),
    /// It has no more to say.
    End,
    /// It is gone, or talks of something else.
    Lost,
}

impl Client {
    /// Waits for what it says next. Nothing is lost when this is dropped.
    async fn says(&mut self) -> Said {
        let Some(stream) = &mut self.stream else { return Said::Lost };
        match stream.recv().await {
            Ok(Some(any)) => said(&any).unwrap_or(Said::Lost),
            Ok(None) => Said::End,
            Err(_) => Said::Lost,
        }
    }

    /// Says whether it could be told.
    async fn send_data(&self, data: &[u8]) -> bool {
        self.send(DATA, &Data { data: data.to_vec(), ..Data::default() }).await
    }

    /// Lets it send that many more bytes.
    async fn send_room(&self, bytes: usize) -> bool {
        let update = i32::try_from(bytes).expect("a window is small");
        self.send(WINDOW_UPDATE, &WindowUpdate { update, ..WindowUpdate::default() }).await
    }

    async fn send(&self, kind: &str, message: &impl Message) -> bool {
        let mut any = Any::new();
        any.type_url = kind.to_owned();
        any.value = message.write_to_bytes().expect("our own messages serialise");
        match &self.stream {
            Some(stream) => stream.send(&any).await.is_ok(),
            None => false,
        }
    }
}

/// Reads a message; none for one of another kind.
fn said(any: &Any) -> Option<Said> {
    // With or without a host before it.
    match any.type_url.rsplit('/').next()? {
        DATA => Some(Said::Data(Data::parse_from_bytes(&any.value).ok()?.data)),
        WINDOW_UPDATE => {
            let update = WindowUpdate::parse_from_bytes(&any.value).ok()?.update;
            Some(Said::Room(update.try_into().ok()?))
        }
        _ => None,
    }
}

/// Where clients and those that have something to say to them meet.
#[derive(Debug)]
pub struct Desk {
    socket: PathBuf,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    waiting: VecDeque<(String, Client)>,
    claimed: HashMap<String, mpsc::UnboundedSender<Client>>,
}

impl Desk {
    /// One at the sandbox's socket.
    pub fn new(socket: &Path) -> Arc<Self> {
        Arc::new(Desk { socket: socket.to_owned(), places: Mutex::default() })
    }

    /// The stream that `uri` names, if it is one of this desk.
    pub fn id_in(&self, uri: &str) -> Option<String> {
        let (path, query) = uri.strip_prefix("ttrpc+unix://")?.split_once('?')?;
        // containerd says `streaming_id`; its comments say `stream_id`.
        let id = query.split('&').find_map(|part| {
            part.strip_prefix("streaming_id=").or_else(|| part.strip_prefix("stream_id="))
        })?;
        (Path::new(path) == self.socket && !id.is_empty()).then(|| id.to_owned())
    }

    /// Takes the clients of a stream, now and to come, until it is given up.
    fn claim(&self, id: &str) -> Clients {
        let (sender, clients) = mpsc::unbounded_channel();
        let mut places = self.places.lock().expect("no code panics while it holds this lock");
        let (mine, rest): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut places.waiting).into_iter().partition(|(of, _)| of == id);
        places.waiting = rest;
        for (_, client) in mine {
            // Its receiver is here.
            let _ = sender.send(client);
        }
        places.claimed.insert(id.to_owned(), sender);
        clients
    }

    fn arrive(&self, id: String, client: Client) {
        let mut places = self.places.lock().expect("no code panics while it holds this lock");
        let client = match places.claimed.get(&id) {
            Some(claimed) => match claimed.send(client) {
                Ok(()) => return,
                Err(returned) => returned.0,
            },
            None => client,
        };
        if places.waiting.len() == WAITING {
            places.waiting.pop_front();
        }
        places.waiting.push_back((id, client));
    }

    fn give_up(&self, id: &str) {
        self.places.lock().expect("no code panics while it holds this lock").claimed.remove(id);
    }
}

/// The clients of a stream, as they come; they end when the stream is given up.
type Clients = mpsc::UnboundedReceiver<Client>;

/// The service.
struct Handler(Arc<Desk>);

/// The table of methods to serve.
pub fn service(desk: &Arc<Desk>) -> HashMap<String, Service> {
    let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Handler(desk.clone()));
    let streams = [("Stream".to_owned(), handler)].into();
    [(SERVICE.to_owned(), Service { methods: HashMap::new(), streams })].into()
}

#[async_trait]
impl StreamHandler for Handler {
    async fn handler(&self, _: TtrpcContext, inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let mut stream = ServerStream::<Any, Any>::new(inner);
        // Go's client opens the call with an empty message, and ours with none.
        let mut first = stream.recv().await?;
        if first.as_ref().is_some_and(|any| any.type_url.is_empty()) {
            first = stream.recv().await?;
        }
        let Some(first) = first else { return Ok(None) };
        let init = StreamInit::parse_from_bytes(&first.value);
        let id = init.ok().map(|init| init.id).filter(|id| !id.is_empty()).ok_or_else(|| {
            let text = "the first message of a stream names it";
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, text))
        })?;
        // It waits for a word before it goes on, whatever the word.
        stream.send(&Any::new()).await?;
        let (call, end) = oneshot::channel();
        self.0.arrive(id, Client { stream: Some(stream), call: Some(call) });
        // Comes when whoever has the client is done with it. The answer ends the call. What the client says before it
        // knows that, of a stream that is no more, the library would answer with an error, which could overtake the end.
        if let Ok(mut stream) = end.await {
            tokio::spawn(async move {
                let last_words = async { while let Ok(Some(_)) = stream.recv().await {} };
                let _ = tokio::time::timeout(FAREWELL, last_words).await;
            });
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_named_by_socket_and_id() {
        let desk = Desk::new("/run/containerd/s/abc".as_ref());
        let id = |uri: &str| desk.id_in(uri);
        assert_eq!(
            id("ttrpc+unix:///run/containerd/s/abc?streaming_id=web-stdout").as_deref(),
            Some("web-stdout")
        );
        assert_eq!(id("ttrpc+unix:///run/containerd/s/abc?x=y&stream_id=e-1").as_deref(), Some("e-1"));
        for other in [
            "ttrpc+unix:///run/containerd/s/other?streaming_id=x",
            "grpc+unix:///run/containerd/s/abc?streaming_id=x",
            "ttrpc+vsock://3:1024?streaming_id=x",
            "ttrpc+unix:///run/containerd/s/abc",
            "ttrpc+unix:///run/containerd/s/abc?streaming_id=",
            "/run/fifo",
        ] {
            assert_eq!(id(other), None, "{other}");
        }
    }

    #[test]
    fn messages_are_told_by_the_last_part_of_their_type() {
        let any = |kind: &str, value: Vec<u8>| {
            let mut any = Any::new();
            any.type_url = kind.to_owned();
            any.value = value;
            any
        };
        let data = Data { data: b"x".to_vec(), ..Data::default() }.write_to_bytes().unwrap();
        let url = format!("type.googleapis.com/{DATA}");
        assert_eq!(said(&any(&url, data)), Some(Said::Data(b"x".to_vec())));
        let room = |update| WindowUpdate { update, ..WindowUpdate::default() }.write_to_bytes().unwrap();
        assert_eq!(said(&any(WINDOW_UPDATE, room(65536))), Some(Said::Room(65536)));
        assert_eq!(said(&any(WINDOW_UPDATE, room(-1))), None, "no window shrinks");
        assert_eq!(said(&any("containerd.types.transfer.Progress", Vec::new())), None);
        assert_eq!(said(&any(DATA, vec![0xff])), None);
    }
}
