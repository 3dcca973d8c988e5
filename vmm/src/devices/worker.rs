//! The thread that makes devices while the VM runs, and takes them apart.
//!
//! The main thread is confined to what its devices' data path needs. Making a device takes more: KVM has to be told of
//! doorbells and interrupts, a tap to be set up, a file server's threads to be started, and threads inherit the filter of who
//! makes them. So a thread that is there before the main thread confines itself does it, under a list of its own (`seccomp/plug.json`
//! and, for the threads that it starts, `seccomp/fs.json`). The main thread waits for it: a device is made in less than a
//! millisecond.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread;

use crate::seccomp::{Role, confine};
use crate::vcpu::{End, Ends};

/// Names it in logs and to the kernel.
const NAME: &str = "plug";
/// No recursion, no buffers on the stack.
const STACK: usize = 256 << 10;

type Task = Box<dyn FnOnce() + Send>;

/// The thread. It ends with this handle.
#[derive(Debug)]
pub struct Worker {
    tasks: Sender<Task>,
}

impl Worker {
    /// Starts it; call it where no filter is inherited. It confines itself first.
    pub fn spawn(ends: &Arc<Ends>) -> io::Result<Self> {
        let (tasks, todo) = channel::<Task>();
        let ends = Arc::clone(ends);
        thread::Builder::new().name(NAME.to_owned()).stack_size(STACK).spawn(move || {
            if let Err(error) = confine(Role::Plug) {
                log::error!("thread {NAME}: install the system call filter: {error}");
                return ends.report(End::ThreadDied { name: NAME.to_owned() });
            }
            todo.into_iter().for_each(|task| task());
        })?;
        Ok(Worker { tasks })
    }

    /// Has it do `task`, and waits for what comes of it.
    pub fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = sync_channel(1);
        let task = Box::new(move || {
            // The one who asked waits.
            let _ = tell.send(task());
        });
        self.tasks.send(task).expect("the thread lives as long as its handle, or the VM ends");
        told.recv().expect("a panic of the thread ends the process")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_done_elsewhere_and_its_result_comes_back() {
        let here = thread::current().id();
        // Confining a test's thread is no harm: it has no other use.
        let worker = Worker::spawn(&Arc::new(Ends::new().unwrap())).unwrap();
        for round in 0..3 {
            let (there, doubled) = worker.run(move || (thread::current().id(), 2 * round));
            assert_eq!(doubled, 2 * round);
            assert_ne!(there, here);
        }
    }
}
