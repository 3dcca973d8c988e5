//! Log lines on standard error, which the owner reads.
//!
//! A level is a promise to the reader: `error`: this VM is ending and why; `warn`: something is wrong and the VM goes
//! on; `info`: once in a VM's life; `debug`: for whoever works on the VMM. A line that a guest can cause at will is
//! `debug`, or goes through `virtio::rate`.

use std::io::{Write, stderr};
use std::str::FromStr;

use log::{LevelFilter, Log, Metadata, Record};

/// Levels by name, for the error that lists them.
pub const LEVELS: &str = "off, error, warn, info, debug, trace";

#[derive(Debug)]
struct StandardError;

impl Log for StandardError {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = record.level().as_str().to_ascii_lowercase();
        let line = format!("ctvm-vmm: {level}: {}: {}\n", record.target(), record.args());
        // One write, so that threads' lines do not mix. Nothing can be done about a reader that is gone.
        let _ = stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Starts logging at `level` and above; `None` if there is no such level.
pub fn start(level: &str) -> Option<()> {
    let level = LevelFilter::from_str(level).ok()?;
    log::set_max_level(level);
    // Fails only when called twice, and then the logger is the same.
    let _ = log::set_logger(&StandardError);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_names() {
        assert_eq!(start("loud"), None);
        for level in LEVELS.split(", ") {
            assert_eq!(start(level), Some(()), "{level}");
        }
        log::info!("a line");
        log::set_max_level(LevelFilter::Off);
    }
}
