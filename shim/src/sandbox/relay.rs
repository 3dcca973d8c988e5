//! Lines of a process that is not trusted to log by itself, passed on to our own log within bounds.
//!
//! A line is cut at a length, and a speaker without end is passed on at a bounded rate, with a count of what was left
//! out.

use std::time::{Duration, Instant};

use agent_api::log_line::MAX_LINE;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};

/// Lines passed on in each [`PERIOD`].
const MAX_LINES: u32 = 200;
const PERIOD: Duration = Duration::from_secs(1);

/// Passes lines on to `say` until their end; lines that are left out are counted by `left_out`.
///
/// # Errors
/// When reading fails.
pub async fn relay(
    from: Box<dyn AsyncRead + Unpin + Send>,
    say: fn(&str),
    left_out: fn(u64),
) -> std::io::Result<()> {
    let mut lines = BufReader::with_capacity(1024, from);
    let mut line = Vec::new();
    let mut rate = Rate { since: Instant::now(), lines: 0, dropped: 0 };
    loop {
        line.clear();
        let limit = u64::try_from(MAX_LINE).expect("a small constant");
        if (&mut lines).take(limit).read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        if let Some(dropped) = rate.admits(Instant::now()) {
            if dropped > 0 {
                left_out(dropped);
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end();
            if !text.is_empty() {
                say(text);
            }
        }
    }
}

struct Rate {
    since: Instant,
    lines: u32,
    dropped: u64,
}

impl Rate {
    /// Whether another line may pass now; if so, how many before it did not.
    fn admits(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) >= PERIOD {
            self.since = now;
            self.lines = 0;
        }
        if self.lines >= MAX_LINES {
            self.dropped += 1;
            return None;
        }
        self.lines += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut rate = Rate { since: start, lines: 0, dropped: 0 };
        for _ in 0..MAX_LINES {
            assert_eq!(rate.admits(start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(rate.admits(start), None);
        }
        assert_eq!(rate.admits(start + PERIOD), Some(5));
        assert_eq!(rate.admits(start + PERIOD), Some(0));
    }

    static SAID: Mutex<Vec<usize>> = Mutex::new(Vec::new());

    #[tokio::test]
    async fn lines_are_cut_at_their_limit_and_empty_ones_are_none() {
        let mut text = b"one\n\n".to_vec();
        text.extend([b'x'; MAX_LINE + 10]);
        text.extend(b"\nlast");
        let from = Box::new(std::io::Cursor::new(text));
        relay(from, |line| SAID.lock().unwrap().push(line.len()), |_| panic!("none is left out"))
            .await
            .unwrap();
        assert_eq!(*SAID.lock().unwrap(), [3, MAX_LINE, 10, 4]);
    }
}
