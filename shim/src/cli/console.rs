//! The terminal of `ctvm run`: raw while the VM runs, with a key to leave.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Ctrl-A.
const ESCAPE: u8 = 1;

/// A terminal in raw mode; as it was before when dropped.
#[derive(Debug)]
pub struct RawMode<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> RawMode<'a> {
    /// Makes it raw; `None` for what is no terminal.
    ///
    /// # Errors
    /// When a terminal refuses.
    pub fn enter(terminal: &'a impl AsFd) -> io::Result<Option<Self>> {
        let terminal = terminal.as_fd();
        let Ok(before) = tcgetattr(terminal) else { return Ok(None) };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Some(RawMode { terminal, before }))
    }
}

impl Drop for RawMode<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(self.terminal, OptionalActions::Now, &self.before);
    }
}

/// What typed bytes mean: Ctrl-A x leaves, Ctrl-A Ctrl-A is one Ctrl-A, and Ctrl-A before anything else is lost.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

/// What to do after some bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Typed {
    /// For the guest.
    pub bytes: Vec<u8>,
    /// The user wants to leave.
    pub leave: bool,
}

impl Keys {
    /// Reads what was typed.
    pub fn read(&mut self, typed: &[u8]) -> Typed {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'x' | b'X') => return Typed { bytes, leave: true },
                (false, ESCAPE) => self.escaped = true,
                (_, byte) => bytes.push(byte),
            }
        }
        Typed { bytes, leave: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_even_in_two_reads() {
        let mut keys = Keys::default();
        assert_eq!(keys.read(b"ls\x01"), Typed { bytes: b"ls".to_vec(), leave: false });
        assert_eq!(keys.read(b"xmore"), Typed { bytes: vec![], leave: true });
    }

    #[test]
    fn ctrl_a_twice_is_one() {
        let mut keys = Keys::default();
        assert_eq!(keys.read(b"\x01\x01x"), Typed { bytes: b"\x01x".to_vec(), leave: false });
    }

    #[test]
    fn a_file_is_no_terminal() {
        let file = tempfile::tempfile().unwrap();
        assert!(RawMode::enter(&file).unwrap().is_none());
    }
}
