//! The agent's log: `log` records, the kernel's messages and the container library's complaints, one JSON line each,
//! to the host's port 1026.
//!
//! Lines wait in a bounded queue until the connection takes them; when it is full, new ones are counted and
//! dropped, since the guest must not run out of memory or stop because nobody reads. An error said before there is
//! a connection goes to the console as well.

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::fd::RawFd;
use std::sync::{Mutex, OnceLock};

use agent_api::log_line::{self, Level, Source};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tokio::sync::Notify;

use crate::fd::Fd;
use crate::host::Host;

/// Most bytes that wait for the host.
const QUEUE: usize = 32 * 1024;

static STREAM: OnceLock<Stream> = OnceLock::new();

#[derive(Debug, Default)]
struct Stream {
    queue: Mutex<Queue>,
    more: Notify,
    /// In a launcher: where its lines go instead.
    diverted: OnceLock<RawFd>,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<String>,
    bytes: usize,
    dropped: usize,
    connected: bool,
}

impl Queue {
    fn push(&mut self, line: String) {
        if self.bytes + line.len() > QUEUE {
            self.dropped += 1;
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line);
    }

    fn pop(&mut self) -> Option<String> {
        if let Some(line) = self.lines.pop_front() {
            self.bytes -= line.len();
            return Some(line);
        }
        let dropped = std::mem::take(&mut self.dropped);
        (dropped > 0).then(|| {
            log_line::format(Level::Warn, Source::Agent, "", &format!("{dropped} log lines dropped"))
        })
    }
}

/// Makes this the process's logger.
pub fn install() {
    struct Logger;
    impl log::Log for Logger {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            let level = match record.level() {
                log::Level::Error => Level::Error,
                log::Level::Warn => Level::Warn,
                log::Level::Info => Level::Info,
                log::Level::Debug | log::Level::Trace => Level::Debug,
            };
            let container = record.key_values().get(log::kv::Key::from_str(log_line::CONTAINER));
            let container = container.map(|id| id.to_string()).unwrap_or_default();
            write(level, Source::Agent, &container, &record.args().to_string());
        }
        fn flush(&self) {}
    }
    // Only `main` installs a logger.
    let _ = log::set_logger(&Logger);
    log::set_max_level(log::LevelFilter::Info);
}

/// Says one line, about a container or "".
pub fn write(level: Level, source: Source, container: &str, msg: &str) {
    let stream = STREAM.get_or_init(Stream::default);
    if let Some(&agent) = stream.diverted.get() {
        tell_agent(agent, level, msg);
        return;
    }
    let line = log_line::format(level, source, container, msg);
    let mut queue = stream.queue.lock().expect("no code panics while it holds this lock");
    if level == Level::Error && !queue.connected {
        // The console is the last resort; if it fails, too, there is nowhere left to say so.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    queue.push(line);
    drop(queue);
    stream.more.notify_one();
}

/// In a launcher: from now on errors go to the agent, through its packet socket. The library's warnings are not
/// worth a line on the host: it has one for each controller that it does not know.
pub fn divert(agent: RawFd) {
    log::set_max_level(log::LevelFilter::Error);
    // A launcher does this once.
    let _ = STREAM.get_or_init(Stream::default).diverted.set(agent);
}

fn tell_agent(agent: RawFd, level: Level, msg: &str) {
    if level > Level::Error {
        return;
    }
    let text = format!("L{msg}");
    let end = text.floor_char_boundary(log_line::MAX_LINE);
    let flags = nix::sys::socket::MsgFlags::MSG_NOSIGNAL | nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    // A launcher's agent that no longer listens has what it wants to know.
    let _ = nix::sys::socket::send(agent, &text.as_bytes()[..end], flags);
}

/// Sends the log to the host for as long as it takes it, beginning with what the kernel has said so far.
pub async fn run(host: Host) {
    let stream = STREAM.get_or_init(Stream::default);
    let connection = match host.dial(agent_api::LOG_PORT).await {
        Ok(connection) => connection,
        Err(error) => {
            log::error!("no log stream: {error}");
            return;
        }
    };
    stream.queue.lock().expect("no code panics while it holds this lock").connected = true;
    loop {
        let line = stream.queue.lock().expect("no code panics while it holds this lock").pop();
        match line {
            Some(line) => {
                if connection.write_all(line.as_bytes()).await.is_err() {
                    return;
                }
            }
            None => stream.more.notified().await,
        }
    }
}

/// Passes the kernel's messages on: of those from before now warnings and worse, then informational ones too.
pub async fn run_kernel() {
    let opened = open("/dev/kmsg", OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty());
    let Ok(kmsg) = opened.map_err(std::io::Error::from).and_then(Fd::new) else {
        log::warn!("no kernel log");
        return;
    };
    let mut least = Level::Warn;
    let mut record = [0; 2048];
    loop {
        match kmsg.try_read(&mut record) {
            Ok(Some(0)) => return,
            Ok(Some(n)) => {
                if let Some((level, text)) = kernel_record(&record[..n])
                    && level <= least
                {
                    write(level, Source::Kernel, "", &text);
                }
            }
            // EPIPE: records were overwritten before they were read; the next read goes on behind the gap.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Ok(None) => {
                least = Level::Info;
                if kmsg.wait_readable().await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

/// Reads `<priority>,<sequence>,<microseconds>,<flags>[,…];<text>` and the lines of properties after it
/// (Documentation/ABI/testing/dev-kmsg). What user space wrote there, facility not 0, is left out.
fn kernel_record(record: &[u8]) -> Option<(Level, String)> {
    let text = String::from_utf8_lossy(record);
    let (prefix, rest) = text.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    if priority >> 3 != 0 {
        return None;
    }
    let level = match priority & 7 {
        0..=3 => Level::Error,
        4 => Level::Warn,
        5 | 6 => Level::Info,
        _ => Level::Debug,
    };
    Some((level, rest.lines().next()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_records_are_read() {
        let warning = b"4,339,5140900,-;NET: things happened\n SUBSYSTEM=net\n";
        assert_eq!(kernel_record(warning), Some((Level::Warn, "NET: things happened".to_owned())));
        let from_user_space = b"12,340,5140901,-;systemd says";
        assert_eq!(kernel_record(from_user_space), None);
        assert_eq!(kernel_record(b"6,1,2,-;a;b"), Some((Level::Info, "a;b".to_owned())));
        for garbage in [&b""[..], b"x", b"x;y", b"4,1"] {
            assert_eq!(kernel_record(garbage), None);
        }
    }

    #[test]
    fn full_queue_drops_and_counts() {
        let mut queue = Queue::default();
        for _ in 0..QUEUE / 8 + 5 {
            queue.push("12345678".to_owned());
        }
        for _ in 0..QUEUE / 8 {
            assert_eq!(queue.pop().as_deref(), Some("12345678"));
        }
        assert!(queue.pop().expect("the count").contains("5 log lines dropped"));
        assert_eq!(queue.pop(), None);
    }
}
