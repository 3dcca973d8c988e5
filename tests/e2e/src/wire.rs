//! The way from a node to its registry: it writes down what passes, and a test can hold answers back in the middle, or have a byte
//! of them changed. Only what nodes do with blobs and manifests of a registry passes: `GET` and `HEAD`, answers with a length.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};

/// Longest line and most lines of a message's head.
const MAX_HEAD: usize = 16 << 10;

/// A part of a blob that the registry was asked for, and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// The blob's digest.
    pub blob: String,
    /// Its first byte, and the first behind it.
    pub range: (u64, u64),
    /// Bytes of the blob that came.
    pub bytes: u64,
}

/// A wire between an address of its own and a registry; cut when dropped.
#[derive(Debug)]
pub struct Wire {
    own: SocketAddr,
    shared: Arc<Shared>,
    listens: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    registry: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    passed: Vec<Passed>,
    /// Answers stop in the middle.
    holding: bool,
    held: usize,
    /// So many answers to come have a wrong byte.
    wrong: usize,
    ends: bool,
    open: Vec<TcpStream>,
}

impl Wire {
    /// From `own` to `registry`, which need not listen yet.
    pub fn new(own: &str, registry: &str) -> Result<Wire> {
        let listener = TcpListener::bind(own).with_context(|| format!("listen at {own}"))?;
        let own = listener.local_addr()?;
        let shared = Arc::new(Shared {
            registry: registry.parse().context("an address")?,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let all = Arc::clone(&shared);
        let listens = std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut state = all.state();
                if state.ends {
                    return;
                }
                state.open.extend(client.try_clone());
                let one = Arc::clone(&all);
                std::thread::spawn(move || {
                    // One that ends in the middle of an answer is what tests are for.
                    let _ = one.carry(&client);
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(Wire { own, shared, listens: Some(listens) })
    }

    /// Parts of blobs that were asked for so far.
    pub fn passed(&self) -> Vec<Passed> {
        self.shared.state().passed.clone()
    }

    /// Bytes of such parts that came so far.
    pub fn bytes(&self) -> u64 {
        self.shared.state().passed.iter().map(|passed| passed.bytes).sum()
    }

    /// From now on answers with blobs stop in their middle.
    pub fn hold(&self) {
        self.shared.state().holding = true;
    }

    /// How many answers stand still.
    pub fn held(&self) -> usize {
        self.shared.state().held
    }

    /// What was held goes on.
    pub fn release(&self) {
        self.shared.state().holding = false;
        self.shared.changed.notify_all();
    }

    /// The next so many answers with blobs get a wrong byte.
    pub fn spoil(&self, answers: usize) {
        self.shared.state().wrong = answers;
    }

    /// Cuts all connections; new ones can be made.
    pub fn cut(&self) {
        for open in self.shared.state().open.drain(..) {
            let _ = open.shutdown(Shutdown::Both); // has ended already
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.state().ends = true;
        self.release();
        self.cut();
        let _ = TcpStream::connect(self.own); // wakes the one that listens
        if let Some(listens) = self.listens.take() {
            let _ = listens.join(); // it said why it panicked
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds this lock")
    }

    /// Carries the requests of one connection, one after the other.
    fn carry(&self, client: &TcpStream) -> Result<()> {
        let mut requests = BufReader::new(client);
        let mut registry = None;
        while let Some(request) = Head::read(&mut requests)? {
            let (method, rest) = request.first.split_once(' ').context("a request line")?;
            ensure!(matches!(method, "GET" | "HEAD"), "{method} does not pass");
            let path = rest.split(' ').next().unwrap_or_default();
            let registry = match &mut registry {
                Some(registry) => registry,
                none => none.insert(BufReader::new(TcpStream::connect(self.registry)?)),
            };
            registry.get_mut().write_all(&request.bytes)?;
            let answer = Head::read(registry)?.context("the registry ended")?;
            (&mut &*client).write_all(&answer.bytes)?;
            let good = answer.first.split(' ').nth(1).is_some_and(|status| status.starts_with('2'));
            let blob = path.split_once("/blobs/sha256:").filter(|_| good);
            if method == "GET" {
                let length = answer.value("content-length").context("an answer without a length")?;
                let asked = blob.zip(request.range());
                let asked = asked.map(|((_, blob), range)| Passed { blob: blob.to_owned(), range, bytes: 0 });
                self.body(registry, client, length.parse()?, asked)?;
            }
        }
        Ok(())
    }

    /// Carries an answer's body of `length` bytes.
    fn body(
        &self,
        registry: &mut impl Read,
        mut client: &TcpStream,
        length: u64,
        asked: Option<Passed>,
    ) -> Result<()> {
        let mut left = length;
        let mut row = None;
        if let Some(passed) = asked {
            let mut state = self.state();
            row = Some(state.passed.len());
            state.passed.push(passed);
        }
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let most = buffer.len().min(usize::try_from(left)?).min(usize::try_from(length / 2 + 1)?);
            let got = registry.read(&mut buffer[..most])?;
            if got == 0 {
                bail!("the registry ended with {left} bytes to come");
            }
            let piece = &mut buffer[..got];
            if let Some(row) = row {
                let mut state = self.state();
                if left == length && state.wrong > 0 {
                    state.wrong -= 1;
                    piece[got / 2] ^= 0x10;
                }
                state.passed[row].bytes += got as u64;
                if left > got as u64 && state.holding {
                    state.held += 1;
                    let mut state =
                        self.changed.wait_while(state, |state| state.holding).expect("a sound lock");
                    state.held -= 1;
                }
            }
            client.write_all(piece)?;
            left -= got as u64;
        }
        Ok(())
    }
}

/// The head of a request or an answer.
struct Head {
    first: String,
    /// Names in small letters.
    fields: Vec<(String, String)>,
    bytes: Vec<u8>,
}

impl Head {
    /// The next one, or nothing at the end.
    fn read(from: &mut impl BufRead) -> Result<Option<Head>> {
        let mut head = Head { first: String::new(), fields: Vec::new(), bytes: Vec::new() };
        loop {
            let before = head.bytes.len();
            from.by_ref().take(MAX_HEAD as u64).read_until(b'\n', &mut head.bytes)?;
            let line = String::from_utf8_lossy(&head.bytes[before..]).trim_end().to_owned();
            if head.bytes.len() == before {
                ensure!(before == 0, "half a head");
                return Ok(None);
            }
            ensure!(head.bytes.len() <= MAX_HEAD, "a head of more than {MAX_HEAD} bytes");
            match line.split_once(':') {
                _ if line.is_empty() => return Ok(Some(head)),
                _ if head.first.is_empty() => head.first = line,
                Some((name, value)) => {
                    head.fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
                None => bail!("{line:?} is no field"),
            }
        }
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = self.value("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A registry of one blob of 100 bytes.
    fn registry() -> Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut requests = BufReader::new(&client);
                while let Ok(Some(_)) = Head::read(&mut requests) {
                    let _ = (&client).write_all(b"HTTP/1.1 206 Partial\r\nContent-Length: 100\r\n\r\n");
                    let _ = (&client).write_all(&[7; 100]);
                }
            }
        });
        Ok(address)
    }

    fn ask(wire: &TcpStream) -> Result<Vec<u8>> {
        (&*wire).write_all(b"GET /v2/app/blobs/sha256:ab HTTP/1.1\r\nRange: bytes=50-149\r\n\r\n")?;
        let mut answers = BufReader::new(wire);
        Head::read(&mut answers)?.context("an answer")?;
        let mut body = vec![0; 100];
        answers.read_exact(&mut body)?;
        Ok(body)
    }

    #[test]
    fn what_passes_is_written_down_spoiled_and_held() -> Result<()> {
        let wire = Wire::new("127.0.0.1:0", &registry()?.to_string())?;
        let client = TcpStream::connect(wire.own)?;
        assert_eq!(ask(&client)?, [7; 100]);
        let passed = Passed { blob: "ab".into(), range: (50, 150), bytes: 100 };
        assert_eq!(wire.passed(), [passed]);
        wire.spoil(1);
        assert_eq!(ask(&client)?.iter().filter(|byte| **byte != 7).count(), 1);
        assert_eq!(ask(&client)?, [7; 100]);
        wire.hold();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| ask(&client));
            while wire.held() == 0 {
                std::thread::yield_now();
            }
            assert!(!waits.is_finished());
            wire.release();
            assert_eq!(waits.join().expect("no panic")?, [7; 100]);
            anyhow::Ok(())
        })?;
        wire.cut();
        assert!(ask(&client).is_err());
        assert_eq!(wire.bytes(), 400);
        Ok(())
    }
}
