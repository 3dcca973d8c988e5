//! A network namespace by name, as a CNI plugin makes one for a pod, and work in it as containerd does it there.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// A named network namespace with a loopback, which is down. Its name goes when this is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it.
    pub fn make(name: &str) -> Result<Netns> {
        run(Command::new("ip").args(["netns", "add", name]))?.ok()?;
        Ok(Netns { name: name.into() })
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// The option of `ctr run` that puts a container into it.
    pub fn option(&self) -> String {
        format!("network:{}", self.path().display())
    }

    /// A command that runs in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs a command in it, and gives its output.
    pub fn run(&self, command: &str) -> Result<String> {
        let words = ["netns", "exec", &self.name].into_iter().chain(command.split(' '));
        run(Command::new("ip").args(words))?.ok().with_context(|| command.to_owned())
    }

    /// Does `work` on a thread that is in it.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = File::open(self.path())?;
        let thread = || {
            // SAFETY: setns takes a descriptor, which `namespace` keeps open, and a flag; it changes this thread alone.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                bail!("entering {}: {}", self.name, std::io::Error::last_os_error());
            }
            work()
        };
        std::thread::scope(|scope| scope.spawn(thread).join().expect("work in a namespace does not panic"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = run(Command::new("ip").args(["netns", "del", &self.name])); // nothing can be done about it here
    }
}
