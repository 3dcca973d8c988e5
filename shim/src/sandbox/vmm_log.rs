//! What the VMM says on its standard error, relayed to our own log: there it gets the sandbox's name, and a VMM that a
//! guest took over cannot write lines in somebody else's.
//!
//! Its last words after the shim was killed are lost with the pipe, and its end is told by `delete`.

use std::process::Stdio;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe::Receiver;

use crate::logger::VMM;
use crate::sandbox::relay::relay;

/// What its own lines begin with: `ctvm-vmm: LEVEL: …`.
const PREFIX: &str = "ctvm-vmm: ";

/// A standard error for the VMM, followed until its end. A VMM never waits for a shim that does not read: what does not
/// fit into the pipe is dropped.
///
/// # Errors
/// When there is no pipe to be had.
pub fn open() -> std::io::Result<Stdio> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let reader = Receiver::from_owned_fd(reader)?;
    tokio::spawn(async move {
        let left_out = |n| log::warn!(target: VMM, "{n} lines of the VMM's left out");
        if let Err(e) = relay(Box::new(reader), pass_on, left_out).await {
            log::debug!("the VMM's log ended: {e}");
        }
    });
    Ok(writer.into())
}

fn pass_on(text: &str) {
    let (level, text) = parse(text);
    log::log!(target: VMM, level, "{text}");
}

/// Level and text. What is in another form was not meant to be said: a panic.
fn parse(text: &str) -> (log::Level, &str) {
    let own = text.strip_prefix(PREFIX).and_then(|rest| rest.split_once(": "));
    own.and_then(|(level, rest)| Some((level.parse().ok()?, rest))).unwrap_or((log::Level::Error, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_its_level_and_a_panic_is_an_error() {
        assert_eq!(parse("ctvm-vmm: warn: vmm::x: odd"), (log::Level::Warn, "vmm::x: odd"));
        assert_eq!(parse("ctvm-vmm: error: gone"), (log::Level::Error, "gone"));
        for text in ["thread 'main' panicked at x", "ctvm-vmm: loud: x", "ctvm-vmm: warn", ""] {
            assert_eq!(parse(text), (log::Level::Error, text));
        }
    }
}
