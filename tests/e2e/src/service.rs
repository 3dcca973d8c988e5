//! Processes of the node that tests talk to: started until they answer, gone when dropped.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::wait_until;
use crate::run;

/// A process of the node, killed when dropped.
#[derive(Debug)]
pub struct Service(Child);

impl Service {
    /// Starts it, and waits until it is `ready`. One that ends first is an error.
    pub fn start(command: &mut Command, mut ready: impl FnMut() -> bool) -> Result<Service> {
        let what = format!("{command:?}");
        let mut service = Service(command.stdin(Stdio::null()).spawn().with_context(|| what.clone())?);
        wait_until(&format!("{what} is ready"), || {
            let ended = service.0.try_wait()?;
            ensure!(ended.is_none(), "{what} has ended: {ended:?}");
            Ok(ready())
        })?;
        Ok(service)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Ends it in order, as an operator does.
    pub fn stop(mut self) -> Result<()> {
        run(Command::new("kill").arg(self.pid().to_string()))?.ok()?;
        let status = self.0.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
