//! The last lines of this process's log, in memory, for whoever asks later: the bundle's `log` is a fifo, and what
//! containerd did with its lines is containerd's affair.
//!
//! Bounded and lossy at the old end: a reader that follows too slowly is told how much it missed, and nobody waits
//! for it.

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// Bytes kept.
pub const SIZE: usize = 64 * 1024;
/// Most bytes of one reading.
const CHUNK: usize = 16 * 1024;

/// Lines, the oldest first.
#[derive(Debug)]
pub struct Ring {
    kept: Mutex<Kept>,
    more: Notify,
}

#[derive(Debug)]
struct Kept {
    bytes: VecDeque<u8>,
    /// Bytes dropped so far: the position of the first that is kept.
    start: u64,
}

/// What a reader gets.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Bytes that were dropped before the reader came for them.
    pub missed: u64,
    /// What follows; empty when there is nothing new.
    pub bytes: Vec<u8>,
}

impl Ring {
    /// An empty one.
    pub const fn new() -> Self {
        Ring { kept: Mutex::new(Kept { bytes: VecDeque::new(), start: 0 }), more: Notify::const_new() }
    }

    /// Adds a line, with its newline; the oldest ones make room. One that is longer than the ring is dropped itself.
    pub fn push(&self, line: &[u8]) {
        let mut kept = self.kept.lock().expect("no code panics while it holds this lock");
        if line.len() > SIZE {
            return;
        }
        let needed = (kept.bytes.len() + line.len()).min(SIZE);
        if kept.bytes.capacity() < needed {
            // Most sandboxes say little; and growing by itself could end at twice the size.
            let more = (2 * needed).min(SIZE) - kept.bytes.len();
            kept.bytes.reserve_exact(more);
        }
        let excess = (kept.bytes.len() + line.len()).saturating_sub(SIZE);
        if excess > 0 {
            let rest = kept.bytes.iter().skip(excess - 1).position(|b| *b == b'\n');
            let drop = rest.map_or(kept.bytes.len(), |rest| excess + rest);
            kept.bytes.drain(..drop);
            kept.start += drop as u64;
        }
        kept.bytes.extend(line);
        drop(kept);
        self.more.notify_waiters();
    }

    /// What there is from `position` on, 16 KiB at most; moves the position behind it. Zero is the oldest there is.
    pub fn read(&self, position: &mut u64) -> Part {
        let kept = self.kept.lock().expect("no code panics while it holds this lock");
        let from = if *position == 0 { kept.start } else { *position };
        let missed = kept.start.saturating_sub(from);
        let skip = usize::try_from(from.saturating_sub(kept.start)).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = kept.bytes.iter().skip(skip).take(CHUNK).copied().collect();
        *position = from.max(kept.start) + bytes.len() as u64;
        Part { missed, bytes }
    }

    /// Completes at the next [`Ring::push`] after it was first polled or enabled.
    pub fn more(&self) -> Notified<'_> {
        self.more.notified()
    }
}

impl Default for Ring {
    fn default() -> Self {
        Ring::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(ring: &Ring, position: &mut u64) -> String {
        let mut text = Vec::new();
        loop {
            let part = ring.read(position);
            if part.bytes.is_empty() {
                return String::from_utf8(text).unwrap();
            }
            text.extend(part.bytes);
        }
    }

    #[test]
    fn a_reader_gets_what_is_new_to_it() {
        let ring = Ring::new();
        let mut position = 0;
        assert_eq!(ring.read(&mut position), Part::default());
        ring.push(b"one\n");
        assert_eq!(all(&ring, &mut position), "one\n");
        ring.push(b"two\n");
        ring.push(b"three\n");
        assert_eq!(all(&ring, &mut position), "two\nthree\n");
        assert_eq!(all(&ring, &mut 0), "one\ntwo\nthree\n");
    }

    #[test]
    fn old_lines_go_whole_and_are_counted() {
        let ring = Ring::new();
        ring.push(b"first\n");
        let mut slow = 0;
        assert_eq!(ring.read(&mut slow).bytes, b"first\n");
        for n in 0..10_000 {
            ring.push(format!("line {n:05} of a flood\n").as_bytes());
        }
        let kept = all(&ring, &mut 0);
        assert!(kept.len() <= SIZE && kept.len() > SIZE - 100, "{} bytes", kept.len());
        assert!(kept.starts_with("line 0") && kept.ends_with("line 09999 of a flood\n"));
        assert!(kept.lines().all(|line| line.len() == "line 00000 of a flood".len()));
        let missed = ring.read(&mut slow).missed;
        assert_eq!(missed + kept.len() as u64, 10_000 * 22);
    }

    #[test]
    fn a_line_longer_than_the_ring_does_not_empty_it() {
        let ring = Ring::new();
        ring.push(b"kept\n");
        ring.push(&[b'x'; SIZE + 1]);
        assert_eq!(all(&ring, &mut 0), "kept\n");
        let mut exact = vec![b'y'; SIZE - 1];
        exact.push(b'\n');
        ring.push(&exact);
        assert_eq!(all(&ring, &mut 0).len(), SIZE);
    }
}
