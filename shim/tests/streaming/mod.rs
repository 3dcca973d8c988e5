//! Standard streams over containerd's Streaming service, which a client dials before it makes a container.

use std::time::Duration;

use agent_api::task::CloseIORequest;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use shim::streaming::proto::{Data, StreamInit, WindowUpdate};
use shim::streaming::{DATA, SERVICE, WINDOW_UPDATE};
use ttrpc::Code;
use ttrpc::asynchronous::{Client, ClientStream};

use crate::daemon::{
    Daemon, code, create_request, ctx, delete, exec_request, kill_request, shutdown, start_request, started,
    wait,
};
use crate::is_root;

/// The most that is ever said of room, as containerd says it.
const WINDOW: i32 = 64 << 10;

/// A client's end of a stream, on a connection of its own.
struct Stream {
    stream: ClientStream<Any, Any>,
    _client: Client,
}

fn any(kind: &str, message: &impl Message) -> Any {
    Any { type_url: kind.to_owned(), value: message.write_to_bytes().unwrap(), ..Any::default() }
}

impl Stream {
    async fn dial(address: &str, id: &str) -> Stream {
        let client = Client::connect(address).await.unwrap();
        let mut request = ttrpc::Request::new();
        (request.service, request.method) = (SERVICE.to_owned(), "Stream".to_owned());
        let inner = client.new_stream(request, true, true).await.unwrap();
        let mut stream = ClientStream::new(inner);
        // As containerd's client, which is Go's, does unasked.
        stream.send(&Any::new()).await.unwrap();
        let init = StreamInit { id: id.to_owned(), ..StreamInit::default() };
        stream.send(&any("containerd.services.streaming.v1.StreamInit", &init)).await.unwrap();
        let _: Any = stream.recv().await.unwrap();
        Stream { stream, _client: client }
    }

    async fn grant(&self, bytes: i32) {
        let update = WindowUpdate { update: bytes, ..WindowUpdate::default() };
        self.stream.send(&any(WINDOW_UPDATE, &update)).await.unwrap();
    }

    /// The next bytes; none at the end.
    async fn data(&mut self) -> Option<Vec<u8>> {
        match self.stream.recv().await {
            Ok(message) => {
                assert_eq!(message.type_url, DATA);
                Some(Data::parse_from_bytes(&message.value).unwrap().data)
            }
            Err(ttrpc::Error::Eof) => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Reads to the end, never with more room than a window.
    async fn read(mut self) -> Vec<u8> {
        self.grant(WINDOW).await;
        let mut all = Vec::new();
        while let Some(bytes) = self.data().await {
            self.grant(i32::try_from(bytes.len()).unwrap()).await;
            all.extend(bytes);
        }
        all
    }

    /// Writes as much as there is room for, and then ends.
    async fn write(mut self, bytes: Vec<u8>) {
        let mut room = 0;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            while room == 0 {
                let update = self.stream.recv().await.unwrap();
                assert_eq!(update.type_url, WINDOW_UPDATE);
                room =
                    usize::try_from(WindowUpdate::parse_from_bytes(&update.value).unwrap().update).unwrap();
            }
            let part = rest.len().min(room).min(32 << 10);
            let data = Data { data: rest[..part].to_vec(), ..Data::default() };
            self.stream.send(&any(DATA, &data)).await.unwrap();
            (rest, room) = (&rest[part..], room - part);
        }
        self.stream.close_send().await.unwrap();
        // The connection ends with this, and what is on it has to be there first.
        while self.stream.recv().await.is_ok() {}
    }
}

fn uri(address: &str, id: &str) -> String {
    format!("ttrpc+{address}?streaming_id={id}")
}

#[tokio::test]
async fn a_processs_streams_are_dialled_before_it_is_made() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    daemon.make_bundle("cat", &["cat"], None);
    let address = daemon.start("cat");
    let task = agent_api::task::TaskClient::new(Client::connect(&address).await.unwrap());
    let (input, output) =
        (Stream::dial(&address, "cat-stdin").await, Stream::dial(&address, "cat-stdout").await);
    let mut request = create_request(&daemon, "cat");
    (request.stdin, request.stdout) = (uri(&address, "cat-stdin"), uri(&address, "cat-stdout"));
    task.create(ctx(), &request).await.unwrap();
    task.start(ctx(), &start_request("cat", "")).await.unwrap();
    let payload: Vec<u8> = (0..(8 << 20)).map(|i: u32| (i % 253) as u8).collect();
    let (writing, reading) = (tokio::spawn(input.write(payload.clone())), tokio::spawn(output.read()));
    writing.await.unwrap();
    let close = CloseIORequest { id: "cat".into(), stdin: true, ..Default::default() };
    task.close_io(ctx(), &close).await.unwrap();
    assert_eq!(wait(&task, "cat", "").await, 0);
    let got = reading.await.unwrap();
    assert!(got == payload, "{} bytes of {}", got.len(), payload.len());
    delete(&task, "cat", "").await.unwrap();
    shutdown(&task, "cat").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn an_execs_streams_end_with_it_and_a_client_may_come_back() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["sleep"]).await;
    let address = std::fs::read_to_string(daemon.bundle("web").join("address")).unwrap();
    // A client that breaks off before there was anything, as a containerd that is killed.
    drop(Stream::dial(&address, "e-stdout").await);
    let mut request = exec_request("e", &["say", "to stdout", "to stderr", "3"], uri(&address, "e-stdout"));
    request.stderr = uri(&address, "e-stderr");
    task.exec(ctx(), &request).await.unwrap();
    let (out, err) = (Stream::dial(&address, "e-stdout").await, Stream::dial(&address, "e-stderr").await);
    task.start(ctx(), &start_request("web", "e")).await.unwrap();
    assert_eq!(wait(&task, "web", "e").await, 3);
    // What it wrote waits until somebody grants room for it.
    assert_eq!(out.read().await, b"to stdout");
    assert_eq!(err.read().await, b"to stderr");
    delete(&task, "web", "e").await.unwrap();

    // One whose client never comes is deleted all the same, and its name can be used again.
    let request = exec_request("lone", &["say", "unread", "", "0"], uri(&address, "lone-stdout"));
    for _ in 0..2 {
        task.exec(ctx(), &request).await.unwrap();
        task.start(ctx(), &start_request("web", "lone")).await.unwrap();
        assert_eq!(wait(&task, "web", "lone").await, 0);
        delete(&task, "web", "lone").await.unwrap();
    }
    let foreign = exec_request("f", &["exit", "0"], "ttrpc+unix:///other?streaming_id=f-stdout".into());
    let (refused, text) = code(task.exec(ctx(), &foreign).await.unwrap_err());
    assert_eq!((refused, text.contains("this sandbox's socket")), (Code::UNIMPLEMENTED, true), "{text}");
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(&task, "web", "").await;
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}

#[tokio::test]
async fn no_more_is_sent_than_there_is_room_for() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &["sleep"]).await;
    let address = std::fs::read_to_string(daemon.bundle("web").join("address")).unwrap();
    let mut out = Stream::dial(&address, "e-stdout").await;
    let text = "0123456789";
    let request = exec_request("e", &["say", text, "", "0"], uri(&address, "e-stdout"));
    task.exec(ctx(), &request).await.unwrap();
    task.start(ctx(), &start_request("web", "e")).await.unwrap();
    assert_eq!(wait(&task, "web", "e").await, 0);
    out.grant(4).await;
    assert_eq!(out.data().await.unwrap(), b"0123");
    let more = tokio::time::timeout(Duration::from_millis(300), out.data()).await;
    assert!(more.is_err(), "there was no room: {more:?}");
    out.grant(100).await;
    assert_eq!(out.data().await.unwrap(), b"456789");
    assert_eq!(out.data().await, None);
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(&task, "web", "").await;
    delete(&task, "web", "e").await.unwrap();
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    daemon.nothing_left().await;
}
