//! The guest's log: one JSON object a line, `{"level":"info","source":"agent","msg":"…"}`, with
//! `"container":"ID"` before the text where the line is about one.
//!
//! Only the vocabulary and the writer are here; the shim reads with its own JSON parser and must take an unknown
//! level or source as it comes, since the guest is not trusted.

use std::fmt::Write as _;

/// Key of the severity.
pub const LEVEL: &str = "level";
/// Key of the part of the guest that speaks.
pub const SOURCE: &str = "source";
/// Key of the container that the line is about; absent where it is about none.
pub const CONTAINER: &str = "container";
/// Key of the text.
pub const MSG: &str = "msg";

/// Longest line that the agent writes, newline included; a longer message is cut and ends in `…`.
pub const MAX_LINE: usize = 4096;

/// Which part of the guest speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// PID 1.
    Agent,
    /// The kernel's log.
    Kernel,
    /// The container runtime, on behalf of one container.
    Container,
}

/// Severity, most severe first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something asked for did not happen.
    Error,
    /// Something is wrong but was survived.
    Warn,
    /// A step in the life of the sandbox.
    Info,
    /// For the developer.
    Debug,
}

impl Source {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Kernel => "kernel",
            Self::Container => "container",
        }
    }
}

impl Level {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

/// One line, with its newline, of at most [`MAX_LINE`] bytes. `container` is an id of containerd's, which needs no escapes
/// and has 200 bytes at most (one that does not is left out), or empty.
pub fn format(level: Level, source: Source, container: &str, msg: &str) -> String {
    const TAIL: &str = "\"}\n";
    const CUT: &str = "…";
    let mut line = format!("{{\"{LEVEL}\":\"{}\",\"{SOURCE}\":\"{}\",", level.as_str(), source.as_str());
    let is_id = container.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if is_id && (1..=200).contains(&container.len()) {
        write!(line, "\"{CONTAINER}\":\"{container}\",").expect("writing to a String cannot fail");
    }
    write!(line, "\"{MSG}\":\"").expect("writing to a String cannot fail");
    for c in msg.chars() {
        // The longest escape is six bytes, as is room for the cut's mark and a little more.
        if line.len() + 6 + CUT.len() + TAIL.len() > MAX_LINE {
            line.push_str(CUT);
            break;
        }
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            c if u32::from(c) < 0x20 => {
                write!(line, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
            }
            c => line.push(c),
        }
    }
    line.push_str(TAIL);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_json_on_one_line() {
        let line = format(Level::Warn, Source::Kernel, "", "a \"b\" \\ c\nd\te");
        assert_eq!(
            line,
            "{\"level\":\"warn\",\"source\":\"kernel\",\"msg\":\"a \\\"b\\\" \\\\ c\\nd\\u0009e\"}\n"
        );
    }

    #[test]
    fn a_container_is_named_if_that_is_a_name() {
        let line = |container| format(Level::Error, Source::Container, container, "m");
        let named = "{\"level\":\"error\",\"source\":\"container\",\"container\":\"app-1\",\"msg\":\"m\"}\n";
        assert_eq!(line("app-1"), named);
        for odd in ["a\"b", &"x".repeat(201), ""] {
            assert_eq!(line(odd), "{\"level\":\"error\",\"source\":\"container\",\"msg\":\"m\"}\n");
        }
    }

    #[test]
    fn long_message_is_cut_within_the_limit() {
        for c in ["x", "\u{1}", "é", "🦀"] {
            let line = format(Level::Info, Source::Agent, "", &c.repeat(5000));
            assert!(line.len() <= MAX_LINE, "{} bytes", line.len());
            assert!(line.len() > MAX_LINE - 16, "{} bytes", line.len());
            assert!(line.ends_with("…\"}\n"));
        }
    }
}
