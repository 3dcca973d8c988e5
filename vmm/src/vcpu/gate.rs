//! Where a vCPU thread and the main thread meet: one says what it wants, the other where it is.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What the main thread wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wanted {
    /// Be still; a new thread parks.
    #[default]
    Pause,
    /// Run the guest.
    Run,
    /// End.
    Finish,
}

/// Where the thread is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    /// Has not run yet.
    #[default]
    Parked,
    /// In, or on its way into, the guest.
    Running,
    /// Between two instructions of the guest.
    Paused,
    /// Will not run any more.
    Finished,
}

#[derive(Debug, Default)]
pub struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inside {
    wanted: Wanted,
    phase: Phase,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().expect("no thread panics while it holds this lock")
    }

    /// Main thread: from now on `wanted`. `Finish` is final.
    pub fn want(&self, wanted: Wanted) {
        let mut inside = self.lock();
        if inside.wanted != Wanted::Finish {
            inside.wanted = wanted;
        }
        self.changed.notify_all();
    }

    /// Main thread: waits until the vCPU's phase is `there`; false after `patience`.
    pub fn wait(&self, patience: Duration, there: impl Fn(Phase) -> bool) -> bool {
        let inside = self.lock();
        let (inside, _) = self
            .changed
            .wait_timeout_while(inside, patience, |inside| !there(inside.phase))
            .expect("no thread panics while it holds this lock");
        there(inside.phase)
    }

    /// vCPU thread: says where it is.
    pub fn enter(&self, phase: Phase) {
        self.lock().phase = phase;
        self.changed.notify_all();
    }

    /// vCPU thread: what it should do.
    pub fn wanted(&self) -> Wanted {
        self.lock().wanted
    }

    /// vCPU thread: waits until it is wanted elsewhere. The phase changes under the same lock, so that a pause right
    /// after a run waits for this thread.
    pub fn wait_to_leave(&self) -> Wanted {
        let inside = self.lock();
        let mut inside = self
            .changed
            .wait_while(inside, |inside| inside.wanted == Wanted::Pause)
            .expect("no thread panics while it holds this lock");
        if inside.wanted == Wanted::Run {
            inside.phase = Phase::Running;
            self.changed.notify_all();
        }
        inside.wanted
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_thread_goes_where_it_is_wanted() {
        let gate = Arc::new(Gate::default());
        let vcpu = {
            let gate = Arc::clone(&gate);
            thread::spawn(move || {
                assert_eq!(gate.wait_to_leave(), Wanted::Run);
                while gate.wanted() == Wanted::Run {
                    thread::yield_now();
                }
                gate.enter(Phase::Paused);
                let next = gate.wait_to_leave();
                gate.enter(Phase::Finished);
                next
            })
        };
        gate.want(Wanted::Run);
        assert!(gate.wait(LONG, |phase| phase == Phase::Running));
        gate.want(Wanted::Pause);
        assert!(gate.wait(LONG, |phase| phase == Phase::Paused));
        gate.want(Wanted::Finish);
        gate.want(Wanted::Run);
        assert!(gate.wait(LONG, |phase| phase == Phase::Finished));
        assert_eq!(vcpu.join().unwrap(), Wanted::Finish);
    }

    #[test]
    fn waiting_ends() {
        assert!(!Gate::default().wait(Duration::from_millis(5), |phase| phase == Phase::Running));
    }
}
