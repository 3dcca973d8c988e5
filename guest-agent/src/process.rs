//! One process of a container: its first, or an exec.
//!
//! ```text
//!            launched            start              exit          output passed on
//! (nothing) ─────────> created ─────────> running ────────> stopped ─────────────> finished
//!     exec: one step, at Start ───────────^                    `Wait` answers here ^
//! ```
//!
//! `Kill` and `State` go by the exit itself. `Wait` answers when what the process had written by then is on its way
//! to the host too, or one second later if the host does not take it: so the last bytes are ahead of the news of
//! the exit, and a reader that stalls or a child that keeps the pipe open cannot hold that news back.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::errors::TaskError;
use crate::reaper::{self, Exit, Watch};
use crate::stdio::{Flow, Names};

/// A process, existing or to be.
#[derive(Debug)]
pub struct Process {
    /// Its standard streams as the request named them.
    pub names: Names,
    live: Mutex<Option<Live>>,
    started: AtomicBool,
    finished: watch::Sender<Option<Exit>>,
}

#[derive(Debug)]
struct Live {
    pid: i32,
    exit: Watch,
    flow: Flow,
}

/// Where a process is in its life, for `State`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Created,
    Running,
    Stopped(Exit),
}

impl Phase {
    /// The word for it in an error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

impl Process {
    /// A process that does not exist yet.
    pub fn planned(names: Names) -> Self {
        let finished = watch::Sender::new(None);
        Self { names, live: Mutex::new(None), started: AtomicBool::new(false), finished }
    }

    /// The process now exists; `after` is done at its exit, before that is announced.
    pub fn launched(&self, pid: i32, exit: Watch, mut flow: Flow, after: impl FnOnce(Exit) + Send + 'static) {
        let drained = flow.drain();
        let (mut watch, finished) = (exit.clone(), self.finished.clone());
        tokio::spawn(async move {
            let exit = reaper::ended(&mut watch).await;
            after(exit);
            drained.await;
            finished.send_replace(Some(exit));
        });
        *self.lock() = Some(Live { pid, exit, flow });
    }

    /// The process runs its program now.
    pub fn mark_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// There will be no process: whoever waits for its end is told of one.
    pub fn failed(&self) {
        self.finished.send_replace(Some(Exit { status: 255, at: SystemTime::now() }));
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        let exit = match &*self.lock() {
            Some(live) => *live.exit.borrow(),
            None => *self.finished.borrow(),
        };
        match exit {
            Some(exit) => Phase::Stopped(exit),
            None if self.started.load(Ordering::Relaxed) => Phase::Running,
            None => Phase::Created,
        }
    }

    /// Its pid in the guest; 0 when it never had one.
    pub fn pid(&self) -> u32 {
        self.lock().as_ref().map_or(0, |live| live.pid.cast_unsigned())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`TaskError::Finished`] when it has ended, [`TaskError::Signal`] for a number that is no signal.
    pub fn signal(&self, signal: u32) -> Result<(), TaskError> {
        let live = self.lock();
        let Some(live) = &*live else {
            return Err(TaskError::State { what: "signal", state: self.phase_without_process() });
        };
        if live.exit.borrow().is_some() {
            return Err(TaskError::Finished);
        }
        let number = signal_number(signal)?;
        // The pid is still this process's: see `reaper`.
        crate::sys::kill(live.pid, number).map_err(TaskError::io("send the signal"))
    }

    /// Waits for the end; see the module's head for when that is.
    pub async fn wait(&self) -> Exit {
        reaper::ended(&mut self.finished.subscribe()).await
    }

    /// Ends its stdin.
    pub fn close_stdin(&self) {
        if let Some(live) = &*self.lock() {
            live.flow.close_stdin();
        }
    }

    /// Sets its terminal's size in characters.
    ///
    /// # Errors
    /// When it has no terminal, or no longer.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), TaskError> {
        match &*self.lock() {
            Some(live) => live.flow.resize(columns, rows).map_err(TaskError::io("resize the terminal")),
            None => Err(TaskError::State { what: "resize", state: self.phase_without_process() }),
        }
    }

    fn phase_without_process(&self) -> &'static str {
        if self.finished.borrow().is_some() { "stopped" } else { "created" }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Live>> {
        self.live.lock().expect("no code panics while it holds this lock")
    }
}

/// Checks that `signal` is one of Linux's 64.
pub fn signal_number(signal: u32) -> Result<i32, TaskError> {
    i32::try_from(signal).ok().filter(|number| (1..=64).contains(number)).ok_or(TaskError::Signal(signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_that_could_not_be_made_is_stopped() {
        let process = Process::planned(Names::default());
        assert_eq!(process.phase(), Phase::Created);
        assert!(matches!(process.signal(9), Err(TaskError::State { state: "created", .. })));
        process.failed();
        assert!(matches!(process.phase(), Phase::Stopped(Exit { status: 255, .. })));
    }

    #[test]
    fn signals_are_1_to_64() {
        assert_eq!(signal_number(9).unwrap(), 9);
        assert_eq!(signal_number(34 + 3).unwrap(), 37, "SIGRTMIN+3 stops a systemd in a container");
        for number in [0, 65, u32::MAX] {
            assert!(matches!(signal_number(number), Err(TaskError::Signal(_))));
        }
    }
}
