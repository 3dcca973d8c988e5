//! The Sandbox service: the guest as a whole.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_api::sandbox::{
    ForwardRequest, ForwardResponse, InfoRequest, InfoResponse, OomKillsRequest, OomKillsResponse, Sandbox,
    SetupRequest, SetupResponse, ShutdownRequest, ShutdownResponse,
};
use agent_api::ttrpc::r#async::TtrpcContext;
use agent_api::ttrpc::{self, Code};
use async_trait::async_trait;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use tokio::sync::Notify;

use crate::boot::Timeline;
use crate::container::Guest;
use crate::launch::chain;
use crate::tasks::Tasks;
use crate::users::UsersError;
use crate::{forward, log_stream, mounts, network, sys, sysctl};

/// How long the answer to Shutdown may take on its way before the machine goes.
const FAREWELL: Duration = Duration::from_millis(50);

/// The guest.
#[derive(Debug)]
pub struct GuestSandbox {
    /// When it started.
    pub timeline: Timeline,
    /// What its containers share.
    pub guest: Guest,
    /// Its containers.
    pub tasks: Arc<Tasks>,
    /// Told when the machine shall go.
    pub farewell: Arc<Notify>,
    kernel_log: AtomicBool,
    network: AtomicBool,
}

/// What Setup could not do.
#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error("cannot set the host name {name:?}")]
    Hostname { name: String, source: io::Error },
    #[error("cannot set the clock to {ns} ns")]
    Clock { ns: u64, source: io::Error },
    #[error("cannot add entropy")]
    Entropy(#[source] io::Error),
    #[error(transparent)]
    Share(#[from] mounts::MountError),
    #[error(transparent)]
    Network(#[from] network::NetworkError),
    #[error(transparent)]
    Users(#[from] UsersError),
    #[error(transparent)]
    Sysctl(#[from] sysctl::SysctlError),
    #[error("cannot write file {name:?} of the pod")]
    File { name: String, source: io::Error },
}

impl GuestSandbox {
    /// A guest that has just started.
    pub fn new(timeline: Timeline, guest: Guest, tasks: Arc<Tasks>, farewell: Arc<Notify>) -> Self {
        Self {
            timeline,
            guest,
            tasks,
            farewell,
            kernel_log: AtomicBool::new(false),
            network: AtomicBool::new(false),
        }
    }

    fn apply(&self, request: &SetupRequest) -> Result<(), SetupError> {
        if !request.entropy.is_empty() {
            std::fs::File::open("/dev/random")
                .and_then(|random| sys::add_entropy(std::os::fd::AsFd::as_fd(&random), &request.entropy))
                .map_err(SetupError::Entropy)?;
        }
        if request.realtime_ns != 0 {
            let now = TimeSpec::from_duration(Duration::from_nanos(request.realtime_ns));
            clock_settime(ClockId::CLOCK_REALTIME, now)
                .map_err(|errno| SetupError::Clock { ns: request.realtime_ns, source: errno.into() })?;
        }
        if !self.network.load(Ordering::Relaxed) {
            network::spread_over_cpus();
        }
        // The name and the network are theirs.
        if let Some(users) = request.users.as_ref() {
            self.guest.users.set_up(users)?;
        }
        if !request.hostname.is_empty() {
            nix::unistd::sethostname(&request.hostname).map_err(|errno| SetupError::Hostname {
                name: request.hostname.clone(),
                source: errno.into(),
            })?;
        }
        if !request.share_tag.is_empty() && !mounts::is_mount_point(Path::new(agent_api::SHARE_PATH)) {
            mounts::make(&request.share_tag, Path::new(agent_api::SHARE_PATH), "virtiofs", &[])?;
        }
        // Once: devices that are up cannot be renamed.
        if !self.network.swap(true, Ordering::Relaxed) {
            network::apply(&request.network)?;
        }
        sysctl::set(&request.sysctls, &self.guest.users)?;
        for (name, content) in &request.files {
            write_file(name, content)
                .and_then(|file| self.give_to_root(&file))
                .map_err(|source| SetupError::File { name: name.clone(), source })?;
        }
        Ok(())
    }

    /// Has the containers' root own a file.
    fn give_to_root(&self, file: &Path) -> io::Result<()> {
        match self.guest.users.outside(0, 0) {
            Ok((uid, gid)) => std::os::unix::fs::chown(file, Some(uid), Some(gid)),
            Err(_) => Ok(()),
        }
    }
}

#[async_trait]
impl Sandbox for GuestSandbox {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        self.apply(&request)
            .map_err(|error| ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, chain(&error))))?;
        // Not earlier: at boot there is nothing in it that is worth the time.
        if !self.kernel_log.swap(true, Ordering::Relaxed) {
            tokio::spawn(log_stream::run_kernel());
        }
        Ok(SetupResponse {
            kernel_release: kernel_release(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            started_us: self.timeline.started_us,
            dialled_us: self.timeline.dialled_us,
            ..Default::default()
        })
    }

    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let own = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let cpus =
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        Ok(InfoResponse {
            kernel_release: kernel_release(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            started_us: self.timeline.started_us,
            dialled_us: self.timeline.dialled_us,
            containers: u32::try_from(self.tasks.count()).unwrap_or(u32::MAX),
            memory_total_kib: field(&memory, "MemTotal"),
            memory_available_kib: field(&memory, "MemAvailable"),
            agent_rss_kib: field(&own, "VmRSS"),
            agent_threads: u32::try_from(field(&own, "Threads")).unwrap_or(u32::MAX),
            cpus,
            ..Default::default()
        })
    }

    async fn oom_kills(&self, _: &TtrpcContext, request: OomKillsRequest) -> ttrpc::Result<OomKillsResponse> {
        let (kills, ended) = self.tasks.container(&request.id)?.oom_kills(request.beyond).await?;
        Ok(OomKillsResponse { kills, ended, ..Default::default() })
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<ForwardResponse> {
        forward::open(&self.guest.host, &request)
            .await
            .map_err(|error| ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), chain(&error))))?;
        Ok(ForwardResponse::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        log::info!("shutting down on request");
        let farewell = self.farewell.clone();
        tokio::spawn(async move {
            tokio::time::sleep(FAREWELL).await;
            farewell.notify_one();
        });
        Ok(ShutdownResponse::new())
    }
}

/// Puts a file where containers can bind it.
fn write_file(name: &str, content: &[u8]) -> io::Result<PathBuf> {
    if name.is_empty() || name.starts_with('.') || name.contains('/') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let dir = Path::new(agent_api::FILES_PATH);
    std::fs::create_dir_all(dir)?;
    let file = dir.join(name);
    std::fs::write(&file, content)?;
    Ok(file)
}

fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| String::new(), |name| name.release().to_string_lossy().into_owned())
}

/// The number in a line `<name>: <number> …` of a proc file.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_fields_are_found_by_whole_name() {
        let text = "MemTotalX: 1 kB\nMemTotal:     123456 kB\nThreads:\t1\n";
        assert_eq!(field(text, "MemTotal"), 123_456);
        assert_eq!(field(text, "Threads"), 1);
        assert_eq!(field(text, "Mem"), 0);
    }
}
