//! The console between a fake driver and real pipes.

use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Guest};

/// The guest's output is its request, the socket's other end has the answer. Its input is one, too: every third
/// request goes that way.
struct ConsoleFixture {
    console: (UnixStream, UnixStream),
    host: (UnixStream, UnixStream),
    heads: std::collections::HashMap<u32, u16>,
}

impl Default for ConsoleFixture {
    fn default() -> Self {
        let (output, from_guest) = UnixStream::pair().unwrap();
        let (input, to_guest) = UnixStream::pair().unwrap();
        ConsoleFixture { console: (output, input), host: (from_guest, to_guest), heads: Default::default() }
    }
}

impl Fixture for ConsoleFixture {
    type Device = Console;

    fn device(&mut self) -> Console {
        let dup = |stream: &UnixStream| Some(OwnedFd::from(stream.try_clone().unwrap()));
        Console::new(dup(&self.console.0), dup(&self.console.1)).unwrap()
    }

    fn prepare(&mut self, _guest: &mut Guest) {
        // What the last driver did not take, and what it wrote, is nobody's.
        drain(&mut self.console.1);
        drain(&mut self.host.0);
        self.host.0.set_nonblocking(false).unwrap();
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        let head = if n % 3 == 2 {
            self.host.1.write_all(&n.to_le_bytes()).unwrap();
            guest.send(RECEIVE, &[Buffer::In(4)])
        } else {
            guest.send(
                TRANSMIT,
                &[Buffer::Out(n.to_le_bytes()[..1].into()), Buffer::Out(n.to_le_bytes()[1..].into())],
            )
        };
        self.heads.insert(n, head);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Console, n: u32) {
        let head = self.heads.remove(&n).unwrap();
        if n % 3 == 2 {
            let used = guest.wait_for(device, RECEIVE, head);
            assert_eq!((used.len, &used.data[..]), (4, &n.to_le_bytes()[..]));
        } else {
            assert_eq!(guest.wait_for(device, TRANSMIT, head).len, 0);
            let mut word = [0; 4];
            self.host.0.read_exact(&mut word).unwrap();
            assert_eq!(u32::from_le_bytes(word), n);
        }
    }
}

fn drain(stream: &mut UnixStream) {
    let mut scrap = [0; 4096];
    stream.set_nonblocking(true).unwrap();
    while stream.read(&mut scrap).is_ok_and(|len| len > 0) {}
}

crate::device_contract_tests!(contract, ConsoleFixture);

fn say(guest: &mut Guest, console: &mut Console, text: &[u8]) {
    guest.ask(console, TRANSMIT, &[Buffer::Out(text.into())]);
}

#[test]
fn output_goes_to_the_descriptor_and_its_tail_is_kept() {
    let mut file = tempfile::tempfile().unwrap();
    let mut console = Console::new(Some(file.try_clone().unwrap().into()), None).unwrap();
    let mut guest = Guest::with(&mut console);
    say(&mut guest, &mut console, b"hello ");
    say(&mut guest, &mut console, &[b'x'; 5000]);
    say(&mut guest, &mut console, b"Kernel panic - not");
    assert!(!console.panicked());
    say(&mut guest, &mut console, b" syncing: Attempted to kill init!");
    assert!(console.panicked());
    let mut written = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut written).unwrap();
    assert_eq!(written.len(), 6 + 5000 + 18 + 33);
    assert_eq!(console.last_words(), written[written.len() - 4096..]);
    assert_eq!(console.metrics.output_bytes, written.len() as u64);
    assert_eq!(console.metrics.dropped_bytes, 0);
}

#[test]
fn a_reader_that_does_not_read_holds_nothing_up() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut console = Console::new(Some(writer.into()), None).unwrap();
    let mut guest = Guest::with(&mut console);
    for _ in 0..100 {
        say(&mut guest, &mut console, &[b'x'; 4096]);
    }
    let metrics = console.metrics;
    assert_eq!(metrics.output_bytes, 100 * 4096);
    assert!(metrics.dropped_bytes > 0 && metrics.dropped_bytes < metrics.output_bytes, "{metrics:?}");
    drop(reader);
    say(&mut guest, &mut console, b"nobody is there");
    assert_eq!(console.metrics.dropped_bytes, metrics.dropped_bytes + 15);
    assert!(console.last_words().ends_with(b"nobody is there"));
}

#[test]
fn a_huge_chain_is_cut() {
    let mut console = Console::new(None, None).unwrap();
    let mut guest = Guest::with(&mut console);
    say(&mut guest, &mut console, &vec![b'x'; MAX_OUTPUT + 1000]);
    assert_eq!(console.metrics.dropped_bytes, 1000);
    assert_eq!(console.last_words(), [b'x'; 4096]);
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut console = Console::new(None, Some(ours.into())).unwrap();
    theirs.write_all(b"early").unwrap();
    let quiet = Guest::of(&console, true);
    assert!(!quiet.pump(&mut console), "inactive: the main loop must not spin");

    let mut guest = Guest::with(&mut console);
    guest.settle(&mut console);
    assert!(!guest.pump(&mut console), "no buffers: the main loop must not spin");
    let used = guest.ask(&mut console, RECEIVE, &[Buffer::In(3), Buffer::In(60)]);
    assert_eq!(used.data[..used.len as usize], *b"early");

    let head = guest.send(RECEIVE, &[Buffer::In(64)]);
    guest.settle(&mut console);
    console.pause();
    theirs.write_all(b"later").unwrap();
    assert!(!guest.pump(&mut console), "paused: the main loop must not spin");
    console.resume();
    let used = guest.wait_for(&mut console, RECEIVE, head);
    assert_eq!(used.data[..used.len as usize], *b"later");

    // The end of the input is no input.
    let head = guest.send(RECEIVE, &[Buffer::In(64)]);
    drop(theirs);
    guest.settle(&mut console);
    assert!(!guest.pump(&mut console), "ended: the main loop must not spin");
    assert_eq!(guest.queues[RECEIVE].take_used(), None, "chain {head} stays with the device");
    assert_eq!(console.metrics.input_bytes, 10);
}

#[test]
fn a_file_is_read_without_waiting() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'y'; 10_000]).unwrap();
    file.rewind().unwrap();
    let mut console = Console::new(None, Some(file.into())).unwrap();
    let mut guest = Guest::with(&mut console);
    let mut read = 0;
    while read < 10_000 {
        let used = guest.ask(&mut console, RECEIVE, &[Buffer::In(1000)]);
        read += used.len;
    }
    assert_eq!(read, 10_000);
}
