//! What is done to a container that exists: standing still and going on, its counters and its limits.

use agent_api::metrics::Metrics;
use oci_spec::runtime::LinuxResources;

use crate::container::{Container, PAUSED};
use crate::errors::TaskError;
use crate::process::Phase;
use crate::{resources, stats};

impl Container {
    /// Stops every process of the container where it is. Signals wait, save SIGKILL.
    pub async fn pause(&self) -> Result<(), TaskError> {
        let _none_starts = self.starting.write().await;
        self.must_run("pause")?;
        self.cgroup.freeze().await.map_err(TaskError::io("freeze the container's processes"))?;
        // A group without processes stands still, too.
        self.is_alive("pause")
    }

    /// Lets them go on.
    pub fn resume(&self) -> Result<(), TaskError> {
        self.is_alive("resume")?;
        if !self.is_paused() {
            return Err(TaskError::State { what: "resume", state: Phase::Running.name() });
        }
        self.cgroup.thaw().map_err(TaskError::io("let the container's processes go on"))
    }

    /// What it has used.
    pub fn stats(&self) -> Metrics {
        stats::of(self.cgroup.dir())
    }

    /// Changes its limits: all of them, or none.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), TaskError> {
        if let phase @ Phase::Stopped(_) = self.init.phase() {
            return Err(TaskError::State { what: "change the limits", state: phase.name() });
        }
        Ok(resources::update(self.cgroup.dir(), resources)?)
    }

    /// How many of its processes the kernel has killed for want of memory, and whether its first process has ended.
    /// With `beyond`: as soon as there are more than this, or it has ended.
    pub async fn oom_kills(&self, beyond: Option<u64>) -> Result<(u64, bool), TaskError> {
        const WHAT: &str = "count the processes killed for want of memory";
        if let Some(seen) = beyond {
            tokio::select! {
                kills = self.cgroup.oom_kills_beyond(seen) => {
                    return kills.map(|kills| (kills, false)).map_err(TaskError::io(WHAT));
                }
                _ = self.init.wait() => {}
            }
        }
        let ended = matches!(self.init.phase(), Phase::Stopped(_));
        Ok((self.cgroup.oom_kills().map_err(TaskError::io(WHAT))?, ended))
    }

    /// Whether its processes stand still, or are about to.
    pub fn is_paused(&self) -> bool {
        self.cgroup.is_frozen()
    }

    /// Refuses to do `what` to a container that is not running, or paused.
    pub(super) fn must_run(&self, what: &'static str) -> Result<(), TaskError> {
        self.is_alive(what)?;
        if self.is_paused() { Err(TaskError::State { what, state: PAUSED }) } else { Ok(()) }
    }

    fn is_alive(&self, what: &'static str) -> Result<(), TaskError> {
        match self.init.phase() {
            Phase::Running => Ok(()),
            phase => Err(TaskError::State { what, state: phase.name() }),
        }
    }
}
