//! The guest's console: its end is kept, for the moment when the guest has nothing else to say.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;

use crate::watched::watch;

/// Bytes of console output kept.
const KEPT: usize = 16 * 1024;
/// Of them those that an error tells.
const LAST_WORDS: usize = 2048;

/// What the guest's console said last.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// A console and the descriptor for the VMM to write it to.
    ///
    /// # Errors
    /// When there is no pipe to be had.
    pub fn open() -> std::io::Result<(Self, OwnedFd)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let console = Console::default();
        tokio::spawn(console.clone().follow(watch(reader)?));
        Ok((console, writer))
    }

    /// The last lines, trimmed; empty when nothing was said.
    pub fn last_words(&self) -> String {
        self.tail(LAST_WORDS)
    }

    /// All that is kept, in the same form.
    pub fn text(&self) -> String {
        self.tail(KEPT)
    }

    fn tail(&self, length: usize) -> String {
        let kept = self.0.lock().expect("no code panics while it holds this lock");
        let bytes: Vec<u8> = kept.iter().skip(kept.len().saturating_sub(length)).copied().collect();
        drop(kept);
        // Terminals and kernels write CR LF, and firmware worse.
        let text = String::from_utf8_lossy(&bytes).replace(|c: char| c.is_control() && c != '\n', "");
        text.trim().to_owned()
    }

    fn keep(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().expect("no code panics while it holds this lock");
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(KEPT);
        kept.drain(..excess);
    }

    async fn follow(self, pipe: AsyncFd<OwnedFd>) {
        let mut buffer = [0; 512];
        loop {
            let Ok(mut ready) = pipe.readable().await else { return };
            match rustix::io::read(pipe.as_fd(), &mut buffer) {
                Ok(0) => return,
                Ok(n) => self.keep(&buffer[..n]),
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_kept_and_no_more() {
        let console = Console::default();
        assert_eq!(console.last_words(), "");
        console.keep(&[b'x'; 3 * KEPT]);
        console.keep(b"\r\nKernel panic - not syncing\r\n");
        let words = console.last_words();
        assert!(words.len() <= LAST_WORDS);
        let text = console.text();
        assert!(text.len() > LAST_WORDS && text.len() <= KEPT);
        assert!(words.ends_with("x\nKernel panic - not syncing"), "{words}");
    }
}
