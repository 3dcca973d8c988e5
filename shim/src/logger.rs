//! Log lines for containerd: it copies what we write into the bundle's `log` fifo to its own standard error.
//!
//! Every line is logfmt in the manner of containerd and its shims, fields in alphabetical order, so that one `grep`
//! in the journal finds all that concerns a sandbox or a container:
//!
//! ```text
//! time="2026-11-23T21:04:05.123456Z" level=warning msg="…" component=guest container=app namespace=k8s.io
//!     pid=4711 runtime=io.containerd.ctvm.v2 sandbox=web source=kernel                       (one line)
//! ```
//!
//! | field | |
//! | --- | --- |
//! | `component` | who speaks: `shim`, `vmm` (relayed from its standard error), `guest` (from its log stream) |
//! | `container`, `exec` | which one the line is about, where it is about one |
//! | `source` | of a guest's line: `agent`, `kernel`, `container` |
//! | `namespace`, `sandbox` | containerd's |
//! | `pid` | of the shim |
//!
//! The same lines are kept in [`ring`], for `ctvm logs`.
//!
//! The fifo is opened for reading and writing: opening it never blocks, and writing to it never fails because a
//! containerd went away. What does not fit into it is dropped; a log must not hold up a container.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::OnceLock;

use log::kv::{self, Key, Value, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};
use rustix::fs::OFlags;

use crate::clock;
use crate::ring::Ring;

static LOGGER: OnceLock<Logger> = OnceLock::new();
static RING: Ring = Ring::new();

/// Target of what the guest says.
pub const GUEST: &str = "guest";
/// Target of what the VMM says.
pub const VMM: &str = "vmm";

#[derive(Debug)]
struct Logger {
    sink: Option<File>,
    namespace: String,
    sandbox: String,
}

/// Opens the log in the working directory, a bundle. `None` where there is none, as in a bundle made by hand.
pub fn open(bundle: &Path) -> Option<File> {
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).expect("open flags fit an int");
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(bundle.join("log")).ok()
}

/// Sends log lines of this process to `sink` and to the ring, a panic's too. Only the first call of a process counts.
pub fn install(sink: Option<File>, namespace: &str, sandbox: &str, level: LevelFilter) {
    let logger =
        LOGGER.get_or_init(|| Logger { sink, namespace: namespace.to_owned(), sandbox: sandbox.to_owned() });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
        std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
    }
}

/// The last lines of this process.
pub fn ring() -> &'static Ring {
    &RING
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The RPC library reports each closed connection as an error; what matters of it is in our own lines.
        metadata.level() <= log::max_level()
            && (is_ours(metadata.target()) || metadata.level() <= log::Level::Warn)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.line(record);
        RING.push(line.as_bytes());
        if let Some(mut sink) = self.sink.as_ref() {
            // Dropped when the fifo is full: see the module's head.
            let _ = sink.write(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

fn is_ours(target: &str) -> bool {
    target.starts_with("shim") || target == GUEST || target == VMM
}

impl Logger {
    fn line(&self, record: &Record<'_>) -> String {
        let level = match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warning",
            log::Level::Info => "info",
            log::Level::Debug => "debug",
            log::Level::Trace => "trace",
        };
        let component = match record.target() {
            target @ (GUEST | VMM) => target,
            _ => "shim",
        };
        let pid = std::process::id().to_string();
        let mut fields = vec![
            ("component", component.to_owned()),
            ("namespace", self.namespace.clone()),
            ("pid", pid),
            ("runtime", "io.containerd.ctvm.v2".to_owned()),
            ("sandbox", self.sandbox.clone()),
        ];
        // Fails only when a visitor does, and ours does not.
        let _ = record.key_values().visit(&mut Own(&mut fields));
        fields.sort_by_key(|(key, _)| *key);
        let mut line = format!("time=\"{}\" level={level} msg=", clock::rfc3339());
        quote(&mut line, &record.args().to_string());
        for (key, value) in &fields {
            line.push(' ');
            line.push_str(key);
            line.push('=');
            if value.is_empty() || value.bytes().any(needs_quotes) {
                quote(&mut line, value);
            } else {
                line.push_str(value);
            }
        }
        line.push('\n');
        line
    }
}

/// Fields that a line of ours may have besides those that all have.
const OWN: &[&str] = &["container", "exec", "source"];

struct Own<'a>(&'a mut Vec<(&'static str, String)>);

impl<'kvs> VisitSource<'kvs> for Own<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        if let Some(key) = OWN.iter().find(|own| **own == key.as_str()) {
            let value = value.to_string();
            if !value.is_empty() {
                self.0.push((key, value));
            }
        }
        Ok(())
    }
}

/// logrus writes these bytes as they are, and any other value in quotes.
fn needs_quotes(byte: u8) -> bool {
    !(byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte))
}

/// Quotes text as Go does, which is what reads containerd's log: no byte of a guest's line can act on a terminal.
fn quote(line: &mut String, text: &str) {
    line.push('"');
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            // C0, C1, and what turns the direction of text.
            c if c.is_control()
                || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                let code = u32::from(c);
                let written = match code {
                    0..0x80 => write!(line, "\\x{code:02x}"),
                    _ => write!(line, "\\u{code:04x}"),
                };
                written.expect("writing to a String cannot fail");
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(target: &str, message: &str, fields: &[(&str, &str)]) -> String {
        let logger = Logger { sink: None, namespace: "k8s.io".into(), sandbox: "web".into() };
        let fields = fields.to_vec();
        let record = |args: std::fmt::Arguments<'_>| {
            let mut record = Record::builder();
            record.level(log::Level::Warn).target(target).key_values(&fields);
            logger.line(&record.args(args).build())
        };
        record(format_args!("{message}"))
    }

    #[test]
    fn a_line_has_containerds_form() {
        let text = line("shim::sandbox", "two\nlines \"quoted\"", &[]);
        let pid = std::process::id();
        assert!(text.starts_with("time=\"20"), "{text}");
        assert!(
            text.ends_with(&format!(
                "level=warning msg=\"two\\nlines \\\"quoted\\\"\" component=shim namespace=k8s.io pid={pid} \
                 runtime=io.containerd.ctvm.v2 sandbox=web\n"
            )),
            "{text}"
        );
    }

    #[test]
    fn a_line_about_a_container_names_it_and_unknown_fields_are_left_out() {
        let text = line(GUEST, "m", &[("source", "kernel"), ("container", "a p"), ("exec", ""), ("x", "y")]);
        assert!(text.contains(" component=guest container=\"a p\" namespace="), "{text}");
        assert!(text.ends_with(" sandbox=web source=kernel\n"), "{text}");
    }

    #[test]
    fn a_guests_bytes_cannot_act_on_a_terminal() {
        let text = line(GUEST, "\u{1b}[2Jé\u{9b}1\u{202e}", &[]);
        assert!(text.contains(r#"msg="\x1b[2Jé\u009b1\u202e""#), "{text}");
    }
}
