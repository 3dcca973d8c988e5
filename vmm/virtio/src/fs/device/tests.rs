use std::collections::{BTreeMap, BTreeSet};
use std::sync::Condvar;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::*;
use crate::device_contract_tests;
use crate::queue::{Reader, Writer};
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Guest};

/// Answers with the request's bytes. "panic" panics; "wait" waits until the gate is opened.
#[derive(Debug, Default)]
struct Echo {
    resets: AtomicU64,
    waiting: AtomicU64,
    gate: Mutex<bool>,
    opened: Condvar,
}

impl Echo {
    fn open(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn await_waiting(&self, count: u64) {
        while self.waiting.load(Ordering::SeqCst) < count {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl FsServer for Echo {
    fn handle(&self, mut request: Reader<'_>, mut reply: Writer<'_>) -> u32 {
        let mut bytes = vec![0; request.left().min(4096)];
        request.read_exact(&mut bytes).unwrap();
        match bytes.as_slice() {
            b"panic" => panic!("asked for by the test"),
            b"wait" => {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                let mut open = self.gate.lock().unwrap();
                while !*open {
                    open = self.opened.wait(open).unwrap();
                }
            }
            _ => {}
        }
        u32::try_from(reply.write(&bytes)).unwrap()
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        vec![("resets", self.resets.load(Ordering::SeqCst))]
    }
}

#[derive(Debug, Default)]
struct Names {
    entered: Mutex<BTreeSet<String>>,
    died: Mutex<Vec<String>>,
    refuse: Option<&'static str>,
}

impl Threads for Names {
    fn enter(&self, name: &str) -> io::Result<()> {
        assert_eq!(std::thread::current().name(), Some(name));
        self.entered.lock().unwrap().insert(name.to_owned());
        if self.refuse == Some(name) { Err(io::Error::other("no")) } else { Ok(()) }
    }

    fn died(&self, name: &str) {
        self.died.lock().unwrap().push(name.to_owned());
    }
}

fn config(threads: u16) -> FsConfig {
    FsConfig { tag: "ctvm".to_owned(), threads }
}

fn device(threads: u16, server: &Arc<Echo>, names: &Arc<Names>) -> Fs {
    Fs::new(config(threads), server.clone(), &(names.clone() as Arc<dyn Threads>)).unwrap()
}

/// One thread and several are held to the same contract. Several answer in any order.
#[derive(Debug, Default)]
struct WithThreads<const N: u16> {
    server: Arc<Echo>,
    heads: BTreeMap<u32, u16>,
}

impl<const N: u16> Fixture for WithThreads<N> {
    type Device = Fs;

    fn device(&mut self) -> Fs {
        device(N, &self.server, &Arc::default())
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        // All queues in turn, the one for urgent requests too.
        let queue = n as usize % guest.queues.len();
        let head = guest.send(queue, &[Buffer::Out(n.to_le_bytes().to_vec()), Buffer::In(8)]);
        self.heads.insert(n, head);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Fs, n: u32) {
        let queue = n as usize % guest.queues.len();
        let used = guest.wait_for(device, queue, self.heads[&n]);
        assert_eq!(used.len, 4);
        assert_eq!(used.data, [n.to_le_bytes(), [0xa5; 4]].concat());
    }
}

device_contract_tests!(with_one_thread, WithThreads<1>);
device_contract_tests!(with_four_threads, WithThreads<4>);

#[test]
fn the_configuration_is_the_tag_and_the_number_of_queues() {
    let device = device(3, &Arc::default(), &Arc::default());
    let mut config = [0xff; 48];
    device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"ctvm\0\0\0\0");
    assert_eq!(config[36..40], [3, 0, 0, 0]);
    assert_eq!(config[40..], [0; 8]);
    let mut byte = [0xff];
    device.read_config(36, &mut byte);
    assert_eq!(byte, [3]);
    device.read_config(u64::MAX, &mut byte);
    assert_eq!(byte, [0]);
    assert_eq!(device.queue_sizes(), [64, 512, 512, 512]);
}

#[test]
fn wrong_configurations_are_refused_with_value_and_limit() {
    let make = |tag: &str, threads| {
        let config = FsConfig { tag: tag.to_owned(), threads };
        let names: Arc<dyn Threads> = Arc::new(Names::default());
        Fs::new(config, Arc::new(Echo::default()), &names).map(drop).map_err(|e| e.to_string())
    };
    assert!(make(&"t".repeat(36), 4).is_ok());
    assert!(make("", 1).unwrap_err().contains("36 bytes"));
    assert!(make(&"t".repeat(37), 1).unwrap_err().contains("36 bytes"));
    assert!(make("a\0b", 1).is_err());
    assert_eq!(make("t", 0).unwrap_err(), "0 file server threads, where 1 to 4 are possible");
    assert!(make("t", 5).is_err());
}

#[test]
fn every_thread_enters_before_the_device_is_there() {
    let names = Arc::new(Names::default());
    let device = device(3, &Arc::default(), &names);
    let expected: BTreeSet<String> = ["fs0", "fs1", "fs2"].map(str::to_owned).into();
    assert_eq!(*names.entered.lock().unwrap(), expected);
    drop(device);

    let names: Arc<dyn Threads> = Arc::new(Names { refuse: Some("fs1"), ..Names::default() });
    let refused = Fs::new(config(3), Arc::new(Echo::default()), &names).unwrap_err();
    assert!(matches!(refused, FsError::Start(e) if e.to_string() == "no"));
}

#[test]
fn a_slow_request_does_not_hold_up_the_next_in_its_queue() {
    let server = Arc::new(Echo::default());
    let mut device = device(2, &server, &Arc::default());
    let mut guest = Guest::with(&mut device);
    for round in 1..=50 {
        *server.gate.lock().unwrap() = false;
        let slow = guest.send(1, &[Buffer::Out(b"wait".to_vec()), Buffer::In(8)]);
        server.await_waiting(round);
        guest.ask(&mut device, 1, &[Buffer::Out(b"fast".to_vec()), Buffer::In(8)]);
        server.open();
        guest.wait_for(&mut device, 1, slow);
    }
}

#[test]
fn pause_waits_for_the_request_in_flight() {
    let server = Arc::new(Echo::default());
    let mut device = device(1, &server, &Arc::default());
    let mut guest = Guest::with(&mut device);
    let slow = guest.send(1, &[Buffer::Out(b"wait".to_vec()), Buffer::In(8)]);
    server.await_waiting(1);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| device.pause());
        std::thread::sleep(Duration::from_millis(30));
        assert!(!pausing.is_finished(), "paused in the midst of a request");
        server.open();
        pausing.join().unwrap();
    });
    assert_eq!(guest.queues[1].used_idx(), 1, "the request was finished before the pause");
    guest.wait_for(&mut device, 1, slow);
    assert!(device.save().session_lost);
    device.resume();
    guest.ask(&mut device, 1, &[Buffer::Out(b"go on".to_vec()), Buffer::In(8)]);
}

#[test]
fn while_still_is_between_two_requests_or_not_at_all() {
    let server = Arc::new(Echo::default());
    let mut device = device(2, &server, &Arc::default());
    assert_eq!(device.while_still(|| 1), Some(1), "an inactive device is still");
    let mut guest = Guest::with(&mut device);
    for round in 1..=20 {
        *server.gate.lock().unwrap() = false;
        let slow = guest.send(1, &[Buffer::Out(b"wait".to_vec()), Buffer::In(8)]);
        server.await_waiting(round);
        assert_eq!(device.while_still(|| unreachable!("a request is being served")), None::<()>);
        // Nobody was stopped for good.
        guest.ask(&mut device, 1, &[Buffer::Out(b"fast".to_vec()), Buffer::In(8)]);
        server.open();
        guest.wait_for(&mut device, 1, slow);
        let during = device.while_still(|| {
            let head = guest.send(1, &[Buffer::Out(b"later".to_vec()), Buffer::In(8)]);
            std::thread::sleep(Duration::from_millis(2));
            (head, guest.queues[1].used_idx())
        });
        let (head, used) = during.expect("no request is being served");
        guest.wait_for(&mut device, 1, head);
        assert_eq!(guest.queues[1].used_idx(), used.wrapping_add(1), "served while all was still");
    }
    device.pause();
    assert_eq!(device.while_still(|| 1), Some(1));
    guest.send(1, &[Buffer::Out(b"paused".to_vec()), Buffer::In(8)]);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(device.queues()[1].next_avail, guest.queues[1].used_idx(), "still paused afterwards");
}

#[test]
fn a_panic_is_told_and_nothing_hangs() {
    let (server, names) = (Arc::default(), Arc::new(Names::default()));
    let mut device = device(2, &server, &names);
    let mut guest = Guest::with(&mut device);
    guest.send(1, &[Buffer::Out(b"panic".to_vec()), Buffer::In(8)]);
    while names.died.lock().unwrap().is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(names.died.lock().unwrap()[0].starts_with("fs"));
    device.pause();
    device.reset();
    assert!(guest.activate(&mut device).is_err(), "a device whose server died must not claim to work");
}

#[test]
fn a_reset_begins_a_new_session() {
    let server = Arc::new(Echo::default());
    let mut device = device(1, &server, &Arc::default());
    let mut guest = Guest::with(&mut device);
    assert!(!device.save().session_lost);
    guest.ask(&mut device, 1, &[Buffer::Out(b"hello".to_vec()), Buffer::In(8)]);
    device.pause();
    assert!(device.save().session_lost);
    device.reset();
    assert!(!device.save().session_lost);
    assert_eq!(server.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn another_devices_state_is_refused() {
    let mut device = device(2, &Arc::default(), &Arc::default());
    let state = FsState { tag: "other".to_owned(), ..device.save() };
    assert!(device.restore(&state, None).unwrap_err().to_string().contains("\"other\""));
    let state = FsState { request_queues: 1, ..device.save() };
    assert!(device.restore(&state, None).is_err());
}
