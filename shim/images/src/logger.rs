//! Lines on standard error, for whoever runs the service to keep.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Lines;

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What HTTP and TLS say below a warning is about their own insides.
        metadata.level()
            <= if metadata.target().starts_with("images") { LevelFilter::Info } else { LevelFilter::Warn }
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            let line = record.args().to_string().replace('\n', " ");
            let _ = writeln!(std::io::stderr(), "level={level} {line}"); // nowhere to say that it cannot be said
        }
    }

    fn flush(&self) {}
}

/// Sends this process's log to standard error.
pub fn install() {
    if log::set_logger(&Lines).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
