//! How far it is: a bar on a terminal, a line a step elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The progress of one step. Bytes, of so many.
#[derive(Debug)]
pub struct Progress {
    what: String,
    done: u64,
    total: u64,
    terminal: bool,
    drawn: Option<Instant>,
    began: Instant,
}

impl Progress {
    /// Of a step with `total` bytes, 0 if that is not known.
    pub fn new(what: impl Into<String>, total: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let mut progress =
            Self { what: what.into(), done: 0, total, terminal, drawn: None, began: Instant::now() };
        progress.draw();
        progress
    }

    /// So many bytes more.
    pub fn add(&mut self, bytes: u64) {
        self.done += bytes;
        if self.drawn.is_none_or(|drawn| drawn.elapsed() > Duration::from_millis(100)) {
            self.draw();
        }
    }

    /// The step is done.
    pub fn end(mut self) {
        if self.total > 0 {
            self.done = self.total;
        }
        self.draw();
        let seconds = self.began.elapsed().as_secs_f32();
        match (self.terminal, self.done) {
            (true, _) => eprintln!(),
            (false, 0) => eprintln!("{}: {seconds:.1} s", self.what),
            (false, done) => eprintln!("{}: {} in {seconds:.1} s", self.what, size(done)),
        }
    }

    fn draw(&mut self) {
        self.drawn = Some(Instant::now());
        if self.terminal {
            eprint!("\r{}\x1b[K", line(&self.what, self.done, self.total));
        }
    }
}

fn line(what: &str, done: u64, total: u64) -> String {
    const WIDTH: u64 = 24;
    if total == 0 {
        return if done == 0 { what.to_owned() } else { format!("{what}  {}", size(done)) };
    }
    let filled = (done.min(total) * WIDTH).checked_div(total).unwrap_or(0);
    let bar: String = (0..WIDTH).map(|at| if at < filled { '#' } else { '.' }).collect();
    format!("{what}  [{bar}] {} of {}", size(done), size(total))
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let tenths = |unit: u32| format!("{}.{}", bytes >> unit, ((bytes >> (unit - 10)) & 1023) * 10 / 1024);
    match bytes {
        0..0x400 => format!("{bytes} B"),
        0x400..0x10_0000 => format!("{} KiB", tenths(10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", tenths(20)),
        _ => format!("{} GiB", tenths(30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_and_sizes() {
        assert_eq!(line("x", 50, 100), "x  [############............] 50 B of 100 B");
        assert_eq!(line("x", 200, 100), "x  [########################] 200 B of 100 B");
        assert_eq!((line("x", 0, 0).as_str(), line("x", 1536, 0).as_str()), ("x", "x  1.5 KiB"));
        assert_eq!((size(5 << 20), size((3 << 30) + (1 << 29))), ("5.0 MiB".into(), "3.5 GiB".into()));
    }
}
