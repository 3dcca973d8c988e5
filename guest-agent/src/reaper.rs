//! Collects the dead. PID 1 is the parent of every process whose own parent is gone, so it must wait for all of
//! them, known or not.
//!
//! ```text
//! SIGCHLD ─> run ─> waitpid(-1) until none is left ─┬─ watched: its watcher gets the Exit
//!                                                   ├─ a launch is under way: kept, the pid may be claimed soon
//!                                                   └─ else: an orphan, forgotten
//! ```
//!
//! A pid is freed by nobody but [`Reaper::reap`], which marks its watcher in the same step: code on this (single)
//! thread that finds a watcher unmarked may send a signal to its pid without hitting a stranger.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When it was collected.
    pub at: SystemTime,
}

/// Tells when one process has ended.
pub type Watch = watch::Receiver<Option<Exit>>;

/// Waits for `watch` to have its exit.
pub async fn ended(watch: &mut Watch) -> Exit {
    loop {
        if let Some(exit) = *watch.borrow_and_update() {
            return exit;
        }
        if watch.changed().await.is_err() {
            // The reaper keeps the sender until it has sent.
            std::future::pending::<()>().await;
        }
    }
}

/// The agent's children.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    watched: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: HashMap<i32, Exit>,
    launches: usize,
}

/// While one of these lives, exits of unknown processes are kept, since [`Reaper::watch`] may yet ask for them.
#[derive(Debug)]
pub struct Launching(Arc<Reaper>);

impl Reaper {
    /// Announces that a child is about to be made whose pid will be known only later.
    pub fn launching(self: &Arc<Self>) -> Launching {
        self.table().launches += 1;
        Launching(self.clone())
    }

    /// Tells when `pid`, a child (or a child of a child that is gone), ends.
    pub fn watch(&self, pid: i32) -> Watch {
        let mut table = self.table();
        let (sender, receiver) = watch::channel(table.unclaimed.remove(&pid));
        if receiver.borrow().is_none() {
            table.watched.insert(pid, sender);
        }
        receiver
    }

    /// Collects everyone who has ended.
    pub fn reap(&self) {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code.cast_unsigned() & 0xff),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + (signal as i32).cast_unsigned()),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            self.note(pid, Exit { status, at: SystemTime::now() });
        }
    }

    fn note(&self, pid: Pid, exit: Exit) {
        let mut table = self.table();
        if let Some(watcher) = table.watched.remove(&pid.as_raw()) {
            watcher.send_replace(Some(exit));
        } else if table.launches > 0 {
            table.unclaimed.insert(pid.as_raw(), exit);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no code panics while it holds this lock")
    }
}

impl Drop for Launching {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Reaps for as long as the agent runs.
///
/// # Errors
/// When SIGCHLD cannot be handled.
pub async fn run(reaper: Arc<Reaper>) -> io::Result<()> {
    let mut children = signal(SignalKind::child())?;
    loop {
        reaper.reap();
        children.recv().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn watched_process_gets_its_exit() {
        let reaper = Reaper::default();
        let watch = reaper.watch(7);
        assert_eq!(*watch.borrow(), None);
        reaper.note(Pid::from_raw(7), exit(3));
        assert_eq!(*watch.borrow(), Some(exit(3)));
    }

    #[test]
    fn exit_before_the_pid_is_known_is_kept_during_a_launch() {
        let reaper = Arc::new(Reaper::default());
        let launching = reaper.launching();
        reaper.note(Pid::from_raw(7), exit(3));
        assert_eq!(*reaper.watch(7).borrow(), Some(exit(3)));
        reaper.note(Pid::from_raw(8), exit(4));
        drop(launching);
        assert_eq!(*reaper.watch(8).borrow(), None, "an old pid's exit is not a new process's");
    }

    #[test]
    fn orphans_are_forgotten() {
        let reaper = Reaper::default();
        reaper.note(Pid::from_raw(9), exit(0));
        assert!(reaper.table().unclaimed.is_empty());
    }
}
