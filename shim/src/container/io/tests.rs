use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::container::logger::Owner;
use crate::streaming::Desk;

const OWNER: Owner<'_> = Owner { namespace: "test", id: "web" };

fn desk() -> Arc<Desk> {
    Desk::new("/run/containerd/s/test".as_ref())
}

fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path
}

fn text(path: &std::path::Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Both directions, with a client that comes late, leaves in between, and reads slowly.
#[tokio::test]
async fn bytes_arrive_whole_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (fifo(&dir, "in"), fifo(&dir, "out"));
    let stdio = Stdio { stdin: text(&input), stdout: text(&output), ..Stdio::default() };
    let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
    let (guest_in, shim_in) = UnixStream::pair().unwrap();
    let (guest_out, shim_out) = UnixStream::pair().unwrap();
    let streams = Streams { stdin: Some(shim_in), stdout: Some(shim_out), stderr: None };
    let mut copying = Copying::start(fifos, streams, false).unwrap();

    let payload: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    // The guest echoes its input until it ends.
    let guest = std::thread::spawn(move || {
        let (mut from, mut to) = (guest_in, guest_out);
        std::io::copy(&mut from, &mut to).unwrap()
    });
    let to_send = payload.clone();
    let client = std::thread::spawn(move || {
        for part in to_send.chunks(to_send.len() / 2) {
            // A client that reconnects between two halves does not end the input.
            std::fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(part).unwrap();
        }
    });
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        std::fs::File::open(&output).unwrap().read_to_end(&mut got).unwrap();
        got
    });
    tokio::task::spawn_blocking(move || client.join().unwrap()).await.unwrap();
    copying.close_stdin();
    assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
    copying.stop();
    let got = tokio::task::spawn_blocking(move || reader.join().unwrap()).await.unwrap();
    assert_eq!(guest.join().unwrap(), payload.len() as u64);
    assert!(got == payload, "{} bytes of {}", got.len(), payload.len());
}

#[tokio::test]
async fn a_terminal_has_one_stream_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (fifo(&dir, "in"), fifo(&dir, "out"));
    let stdio = Stdio {
        stdin: text(&input),
        stdout: text(&output),
        stderr: "/nonexistent, and not opened with a terminal".into(),
        terminal: true,
    };
    let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
    let (mut guest, shim) = UnixStream::pair().unwrap();
    let streams = Streams { stdout: Some(shim), ..Streams::default() };
    let _copying = Copying::start(fifos, streams, true).unwrap();
    let done = tokio::task::spawn_blocking(move || {
        std::fs::OpenOptions::new().write(true).open(&input).unwrap().write_all(b"hello").unwrap();
        let mut got = [0; 5];
        guest.read_exact(&mut got).unwrap();
        guest.write_all(b"HELLO").unwrap();
        let mut back = [0; 5];
        std::fs::File::open(&output).unwrap().read_exact(&mut back).unwrap();
        (got, back)
    });
    let (got, back) = done.await.unwrap();
    assert_eq!((&got, &back), (b"hello", b"HELLO"));
}

#[tokio::test]
async fn a_stream_held_open_does_not_hold_up_the_exit() {
    let dir = tempfile::tempdir().unwrap();
    let output = fifo(&dir, "out");
    let stdio = Stdio { stdout: text(&output), ..Stdio::default() };
    let (mut guest, shim) = UnixStream::pair().unwrap();
    let streams = Streams { stdout: Some(shim), ..Streams::default() };
    let mut copying =
        Copying::start(Fifos::open(&stdio, OWNER, &desk()).await.unwrap(), streams, false).unwrap();
    // Opened while we hold the other end, as clients do.
    let mut client = std::fs::File::open(&output).unwrap();
    guest.write_all(b"before").unwrap();
    assert!(!copying.drain(Duration::from_secs(60), Duration::from_millis(50)).await);
    // And it goes on copying.
    guest.write_all(b" after").unwrap();
    drop(guest);
    assert!(copying.drain(Duration::from_secs(60), Duration::from_secs(60)).await);
    let read = move || {
        let mut got = String::new();
        client.read_to_string(&mut got).unwrap();
        got
    };
    // The end comes when all is read.
    assert_eq!(tokio::task::spawn_blocking(read).await.unwrap(), "before after");
}

/// What `Streams` and a guest that says `out` and `err` make of `stdio`.
async fn said(stdio: &Stdio, out: &[u8], err: &[u8]) {
    let (mut guest_out, shim_out) = UnixStream::pair().unwrap();
    let (mut guest_err, shim_err) = UnixStream::pair().unwrap();
    let fifos = Fifos::open(stdio, OWNER, &desk()).await.unwrap();
    let streams = Streams { stdin: None, stdout: Some(shim_out), stderr: Some(shim_err) };
    let mut copying = Copying::start(fifos, streams, false).unwrap();
    guest_out.write_all(out).unwrap();
    guest_err.write_all(err).unwrap();
    drop((guest_out, guest_err));
    assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
}

#[tokio::test]
async fn a_file_is_made_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new dir/log");
    let uri = format!("file://{}", text(&path).replace(' ', "%20"));
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
    assert_eq!(stdio.paths().count(), 0, "what a client cleans up");
    said(&stdio, b"first\n", b"").await;
    said(&stdio, b"", b"second\n").await;
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "first\nsecond\n");
}

#[tokio::test]
async fn a_logger_is_given_both_outputs_and_whose_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $* $HOME\" > \"$1/args\"; exec 5>&-; \
                  cat <&4 > \"$1/err\" & cat <&3 4<&- > \"$1/out\"; wait";
    let script: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let uri = format!("binary:///bin/sh?-c={script}&to={}&flag", text(dir.path()));
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Stdio::default() };
    let out = "x".repeat(1 << 20);
    // More than the streams hold: it is copied while it comes.
    let (mut guest_out, shim_out) = UnixStream::pair().unwrap();
    let (mut guest_err, shim_err) = UnixStream::pair().unwrap();
    let fifos = Fifos::open(&stdio, OWNER, &desk()).await.unwrap();
    let streams = Streams { stdin: None, stdout: Some(shim_out), stderr: Some(shim_err) };
    let mut copying = Copying::start(fifos, streams, false).unwrap();
    let bytes = out.clone();
    let guest = std::thread::spawn(move || {
        guest_err.write_all(b"err").unwrap();
        guest_out.write_all(bytes.as_bytes()).unwrap();
    });
    assert!(copying.drain(Duration::from_secs(20), Duration::from_secs(20)).await);
    guest.join().unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(read("out") == out && read("err") == "err", "the program has ended, with all of it");
    assert_eq!(read("args").trim_end(), format!("test/web {} flag", text(dir.path())));
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_by_name() {
    let open = async |stdout: &str, stderr: &str| {
        let stdio = Stdio { stdout: stdout.into(), stderr: stderr.into(), ..Stdio::default() };
        crate::error::chain(&Fifos::open(&stdio, OWNER, &desk()).await.unwrap_err())
    };
    for other in ["ttrpc+unix:///run/x?streaming_id=a", "grpc+unix:///run/x", "binary-v3:///a"] {
        assert!(open(other, "").await.contains("supported are a fifo's path"), "{other}");
    }
    assert!(open("/dev/null", "").await.contains("stdout \"/dev/null\" is not a fifo"));
    assert!(open("/nonexistent/fifo", "").await.starts_with("opening stdout"));
    assert!(open("file://relative", "").await.contains("supported are"));
    assert!(open("file:///proc/no/such", "").await.starts_with("opening stdout \"/proc/no/such\""));
    assert!(open("binary:///a", "binary:///b").await.contains("one logger takes both"));
    let text = open("binary:///no/such?a=b", "").await;
    assert!(text.contains("starting \"/no/such\": No such file"), "{text}");
    let stdin = Stdio { stdin: "file:///etc/passwd".into(), ..Stdio::default() };
    assert!(matches!(
        Fifos::open(&stdin, OWNER, &desk()).await,
        Err(IoError::Scheme { stream: "stdin", .. })
    ));
}

#[tokio::test]
async fn output_waits_for_a_reader_that_comes_after_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "out");
    let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
    let fifos = Fifos::open(&stdio, Owner { namespace: "n", id: "c" }, &desk()).await.unwrap();
    let (ours, mut guests) = UnixStream::pair().unwrap();
    let streams = Streams { stdout: Some(ours), ..Streams::default() };
    let mut copying = Copying::start(fifos, streams, false).unwrap();
    guests.write_all(b"last words").unwrap();
    drop(guests);
    assert!(copying.drain(Duration::from_secs(10), Duration::from_secs(10)).await);
    // Opening waits for a writer, which is still there, and reading ends, so it is gone then.
    let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(&path).unwrap());
    let text = tokio::time::timeout(Duration::from_secs(10), text).await.unwrap().unwrap();
    assert_eq!(text, "last words");
    copying.stop();
}
