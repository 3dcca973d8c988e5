//! The guest's log: lines of JSON on a vsock connection, written to our own log with level and source.
//!
//! The guest is not trusted: a line is cut at a length, text that is no JSON is logged as what it is, and a guest
//! that writes without end is passed on at a bounded rate, with a count of what was left out.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_api::log_line::MAX_LINE;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

/// Lines passed on in each [`PERIOD`].
const MAX_LINES: u32 = 200;
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Debug, Deserialize)]
struct Line<'a> {
    #[serde(default)]
    level: &'a str,
    #[serde(default)]
    source: &'a str,
    #[serde(default, borrow)]
    msg: std::borrow::Cow<'a, str>,
}

/// Passes the log on until the guest closes it.
pub async fn follow(connection: OwnedFd) {
    if let Err(e) = try_follow(connection).await {
        log::debug!("the guest's log ended: {e}");
    }
}

async fn try_follow(connection: OwnedFd) -> std::io::Result<()> {
    let connection = UnixStream::from(connection);
    connection.set_nonblocking(true)?;
    let mut lines = BufReader::with_capacity(1024, tokio::net::UnixStream::from_std(connection)?);
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
                log::warn!(target: "guest", "{dropped} lines of the guest's log left out");
            }
            pass_on(&line);
        }
    }
}

fn pass_on(line: &[u8]) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end();
    match serde_json::from_str::<Line<'_>>(text) {
        Ok(Line { level, source, msg }) => log::log!(target: "guest", level_of(level), "{source}: {msg}"),
        Err(_) if text.is_empty() => {}
        Err(_) => log::info!(target: "guest", "{text}"),
    }
}

fn level_of(word: &str) -> log::Level {
    match word {
        "error" => log::Level::Error,
        "warn" => log::Level::Warn,
        "debug" => log::Level::Debug,
        "trace" => log::Level::Trace,
        _ => log::Level::Info,
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

    #[test]
    fn lines_of_the_agent_are_understood() {
        let line = agent_api::log_line::format(
            agent_api::log_line::Level::Warn,
            agent_api::log_line::Source::Kernel,
            "a \"b\"\n",
        );
        let parsed: Line<'_> = serde_json::from_str(&line).unwrap();
        assert_eq!((parsed.level, parsed.source, &*parsed.msg), ("warn", "kernel", "a \"b\"\n"));
        assert_eq!(level_of("warn"), log::Level::Warn);
        assert_eq!(level_of("shouting"), log::Level::Info);
    }
}
