//! The guest's log: lines of JSON on a vsock connection, written to our own log with level, source and container.
//!
//! The guest is not trusted: see [`relay`] for the bounds; text that is no JSON is logged as what it is.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use serde::Deserialize;

use crate::logger::GUEST;
use crate::sandbox::relay::relay;

#[derive(Debug, Deserialize)]
struct Line<'a> {
    #[serde(default, borrow)]
    level: Cow<'a, str>,
    #[serde(default, borrow)]
    source: Cow<'a, str>,
    #[serde(default, borrow)]
    container: Cow<'a, str>,
    #[serde(default, borrow)]
    msg: Cow<'a, str>,
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
    let connection = tokio::net::UnixStream::from_std(connection)?;
    relay(
        Box::new(connection),
        pass_on,
        |n| log::warn!(target: GUEST, "{n} lines of the guest's log left out"),
    )
    .await
}

fn pass_on(text: &str) {
    match serde_json::from_str::<Line<'_>>(text) {
        Ok(Line { level, source, container, msg }) => {
            log::log!(target: GUEST, level_of(&level), container:% = container, source:% = source; "{msg}");
        }
        Err(_) => log::info!(target: GUEST, "{text}"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use agent_api::log_line::{self, Level, Source};

    #[test]
    fn lines_of_the_agent_are_understood() {
        let line = log_line::format(Level::Warn, Source::Kernel, "", "a \"b\"\n");
        let parsed: Line<'_> = serde_json::from_str(&line).unwrap();
        assert_eq!((&*parsed.level, &*parsed.source, &*parsed.msg), ("warn", "kernel", "a \"b\"\n"));
        assert_eq!(parsed.container, "");
        let line = log_line::format(Level::Warn, Source::Container, "app", "m");
        assert_eq!(serde_json::from_str::<Line<'_>>(&line).unwrap().container, "app");
        assert_eq!(level_of("warn"), log::Level::Warn);
        assert_eq!(level_of("shouting"), log::Level::Info);
    }
}
