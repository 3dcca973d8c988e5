//! Log lines for containerd: it copies what we write into the bundle's `log` fifo to its own standard error.
//!
//! The fifo is opened for reading and writing: opening it never blocks, and writing to it never fails because a
//! containerd went away. What does not fit into it is dropped; a log must not hold up a container.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::OnceLock;

use log::{LevelFilter, Log, Metadata, Record};
use rustix::fs::OFlags;

use crate::clock;

static LOGGER: OnceLock<Logger> = OnceLock::new();

#[derive(Debug)]
struct Logger {
    sink: Option<File>,
    sandbox: String,
}

/// Opens the log in the working directory, a bundle. `None` where there is none, as in a bundle made by hand.
pub fn open(bundle: &Path) -> Option<File> {
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).expect("open flags fit an int");
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(bundle.join("log")).ok()
}

/// Sends log lines of this process to `sink`. Only the first call of a process counts.
pub fn install(sink: Option<File>, sandbox: &str, level: LevelFilter) {
    let logger = LOGGER.get_or_init(|| Logger { sink, sandbox: sandbox.to_owned() });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The RPC library reports each closed connection as an error; what matters of it is in our own lines.
        metadata.level() <= log::max_level()
            && (is_ours(metadata.target()) || metadata.level() <= log::Level::Warn)
    }

    fn log(&self, record: &Record<'_>) {
        let Some(mut sink) = self.sink.as_ref().filter(|_| self.enabled(record.metadata())) else { return };
        let line = line(record.level(), &record.args().to_string(), &self.sandbox);
        // Dropped when the fifo is full: see the module's head.
        let _ = sink.write(line.as_bytes());
    }

    fn flush(&self) {}
}

fn is_ours(target: &str) -> bool {
    target.starts_with("shim") || target.starts_with("guest")
}

/// One line in the form of containerd's own.
fn line(level: log::Level, message: &str, sandbox: &str) -> String {
    let level = match level {
        log::Level::Error => "error",
        log::Level::Warn => "warning",
        log::Level::Info => "info",
        log::Level::Debug => "debug",
        log::Level::Trace => "trace",
    };
    format!(
        "time=\"{}\" level={level} msg={message:?} runtime=io.containerd.ctvm.v2 sandbox={sandbox}\n",
        clock::rfc3339()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_containerds_form() {
        let line = line(log::Level::Warn, "two\nlines \"quoted\"", "web");
        assert!(line.contains("level=warning msg=\"two\\nlines \\\"quoted\\\"\" runtime="), "{line}");
        assert!(line.ends_with("sandbox=web\n"));
        assert_eq!(line.matches('\n').count(), 1);
    }
}
