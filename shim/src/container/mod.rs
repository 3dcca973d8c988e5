//! A container and its processes, as containerd sees them.
//!
//! ```text
//!           Create/Exec          Start            process ends, its output has arrived
//! (nothing) ───────────> Created ─────> Running ───────────────────────────────────────> Stopped ── Delete ─> (nothing)
//!                           └────────────── killed, or the VM is gone ──────────────────────^
//! ```
//!
//! The events of a process are published in the order of these arrows: `Start` holds the process's turn until its
//! event is queued, and the end waits for that turn.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::container::hooks::{Hooks, Subject};
use crate::container::io::{Copying, Stdio};

pub mod devices;
pub mod hooks;
pub mod image;
pub mod io;
pub mod limits;
pub mod logger;
pub mod overview;
pub mod rootfs;
pub mod spec;
pub mod stats_v1;
pub mod users;

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit {
    /// Its exit code, 128 and the signal's number if it was killed.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Stopped(Exit),
}

impl Phase {
    /// The word for it in an error.
    pub fn name(&self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Running => "running",
            Phase::Stopped(_) => "stopped",
        }
    }
}

/// A process of a container: its first, or an exec.
#[derive(Debug)]
pub struct Process {
    /// containerd's name for an exec; empty for the first process.
    pub exec_id: String,
    /// Its streams as containerd named them.
    pub stdio: Stdio,
    /// Held by whoever publishes events of this process.
    pub turn: tokio::sync::Mutex<()>,
    /// The copying of its streams.
    pub copying: tokio::sync::Mutex<Copying>,
    phase: watch::Sender<Phase>,
    started: AtomicBool,
}

impl Process {
    /// A process that was just made.
    pub fn new(exec_id: &str, stdio: Stdio, copying: Copying) -> Arc<Self> {
        Arc::new(Process {
            exec_id: exec_id.to_owned(),
            stdio,
            turn: tokio::sync::Mutex::default(),
            copying: tokio::sync::Mutex::new(copying),
            phase: watch::Sender::new(Phase::Created),
            started: AtomicBool::new(false),
        })
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// Its program runs now.
    pub fn mark_started(&self) {
        self.started.store(true, Ordering::Relaxed);
        self.phase.send_if_modified(|phase| {
            let moves = *phase == Phase::Created;
            if moves {
                *phase = Phase::Running;
            }
            moves
        });
    }

    /// It has ended. Says whether that is news.
    pub fn mark_stopped(&self, exit: Exit) -> bool {
        self.phase.send_if_modified(|phase| {
            let news = !matches!(phase, Phase::Stopped(_));
            if news {
                *phase = Phase::Stopped(exit);
            }
            news
        })
    }

    /// Whether its program ever ran.
    pub fn was_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        loop {
            if let Phase::Stopped(exit) = &*phase.borrow_and_update() {
                return exit.clone();
            }
            phase.changed().await.expect("the sender is in `self`");
        }
    }
}

/// A container of a sandbox.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle, as the create request named it.
    pub bundle: String,
    /// Held while the container is made, changed or deleted.
    pub turn: Arc<tokio::sync::Mutex<()>>,
    init: Mutex<Option<Arc<Process>>>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    shares: Mutex<Vec<String>>,
    pid: AtomicU32,
    paused: AtomicBool,
    oom_kills: AtomicU64,
    oom_exits: AtomicU64,
    name: OnceLock<String>,
    hooks: OnceLock<(Hooks, Subject)>,
}

impl Container {
    /// A container that is about to be made.
    pub fn new(id: &str, bundle: &str) -> Arc<Self> {
        Arc::new(Container {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            turn: Arc::default(),
            init: Mutex::default(),
            execs: Mutex::default(),
            shares: Mutex::default(),
            pid: AtomicU32::new(0),
            paused: AtomicBool::new(false),
            oom_kills: AtomicU64::new(0),
            oom_exits: AtomicU64::new(0),
            name: OnceLock::new(),
            hooks: OnceLock::new(),
        })
    }

    /// Its first process is made.
    pub fn set_init(&self, init: Arc<Process>) {
        *self.init.lock().expect("no code panics while it holds this lock") = Some(init);
    }

    /// The process that a request means: the first by "", an exec by its id.
    pub fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() {
            return self.init.lock().expect("no code panics while it holds this lock").clone();
        }
        self.execs.lock().expect("no code panics while it holds this lock").get(exec_id).cloned()
    }

    /// Takes an exec in; false when its name is taken.
    pub fn add_exec(&self, process: Arc<Process>) -> bool {
        let mut execs = self.execs.lock().expect("no code panics while it holds this lock");
        let free = !execs.contains_key(&process.exec_id);
        if free {
            execs.insert(process.exec_id.clone(), process);
        }
        free
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs.lock().expect("no code panics while it holds this lock").remove(exec_id);
    }

    /// All its processes.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let init = self.process("");
        let execs = self.execs.lock().expect("no code panics while it holds this lock");
        init.into_iter().chain(execs.values().cloned()).collect()
    }

    /// Its process number for containerd; 0 until it is made.
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// It has this process number for containerd.
    pub fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Whether its processes stand still, as far as the agent told. One that has ended does not, whatever this says.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Its processes stand still now, or go on.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// How many of its processes were killed for want of memory, as far as was told.
    pub fn oom_kills(&self) -> u64 {
        self.oom_kills.load(Ordering::Relaxed)
    }

    /// Notes that there were `kills` of them in all. Says whether that is news.
    pub fn note_oom_kills(&self, kills: u64) -> bool {
        self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills
    }

    /// Whether a process that SIGKILL ended now was killed for want of memory: there were more such kills than ends that
    /// were put down to one.
    pub fn ends_by_oom(&self) -> bool {
        let kills = self.oom_kills();
        self.oom_exits
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ends| (ends < kills).then_some(ends + 1))
            .is_ok()
    }

    /// The pod's name for it. Only the first one counts.
    pub fn set_name(&self, name: &str) {
        // A second would be the same, from the same configuration.
        let _ = self.name.set(name.to_owned());
    }

    /// The pod's name for it; its id where it has none.
    pub fn name(&self) -> &str {
        self.name.get().map_or(&self.id, String::as_str)
    }

    /// It wants these run, and told of what. Only the first ones count.
    pub fn set_hooks(&self, hooks: Hooks, subject: Subject) {
        // Second ones would be the same, from the same configuration.
        let _ = self.hooks.set((hooks, subject));
    }

    /// What it wants run.
    pub fn hooks(&self) -> Option<&(Hooks, Subject)> {
        self.hooks.get()
    }

    /// Remembers a directory shown to the guest for it.
    pub fn add_share(&self, name: &str) {
        self.shares.lock().expect("no code panics while it holds this lock").push(name.to_owned());
    }

    /// The directories shown to the guest for it, which then are forgotten.
    pub fn take_shares(&self) -> Vec<String> {
        std::mem::take(&mut self.shares.lock().expect("no code panics while it holds this lock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: Timestamp::new() }
    }

    #[tokio::test]
    async fn a_process_ends_once_and_never_starts_again() {
        let process = Process::new("", Stdio::default(), Copying::default());
        assert_eq!(process.phase().name(), "created");
        process.mark_started();
        assert_eq!(process.phase(), Phase::Running);
        assert!(process.mark_stopped(exit(3)));
        assert!(!process.mark_stopped(exit(4)));
        process.mark_started();
        assert_eq!(process.ended().await.status, 3);
    }

    #[test]
    fn a_kill_for_want_of_memory_is_news_once() {
        let container = Container::new("web", "/b");
        assert!(!container.note_oom_kills(0));
        assert!(container.note_oom_kills(2));
        assert!(!container.note_oom_kills(2) && !container.note_oom_kills(1));
        assert!(container.note_oom_kills(3));
        assert_eq!(container.oom_kills(), 3);
        assert_eq!([(); 4].map(|()| container.ends_by_oom()), [true, true, true, false]);
    }

    #[test]
    fn an_execs_name_is_taken_until_it_is_removed() {
        let container = Container::new("web", "/b");
        assert!(container.process("").is_none());
        let exec = || Process::new("e", Stdio::default(), Copying::default());
        assert!(container.add_exec(exec()));
        assert!(!container.add_exec(exec()));
        container.remove_exec("e");
        assert!(container.add_exec(exec()));
        assert_eq!(container.processes().len(), 1);
    }
}
