//! PID 1 of the guest: runs containers for the shim.
//!
//! ```text
//! main ─ boot (marks, mounts, the end) ─ connection ─┬─ sandbox ─ forward   the guest as a whole
//!                                                    └─ tasks ─ container ─┬─ process ─ reaper
//!                                                                          ├─ stdio ─ host, fd
//!                                                                          └─ launch ─ payload ─ libcontainer
//! ```
//!
//! One thread, one connection, no listening socket: the agent dials the host when it is ready and lives as long as
//! that connection does. What is said on it is in `agent-api`; why things are as they are, in README.md beside this
//! package.

mod boot;
mod cgroup;
mod connection;
mod container;
mod devices;
mod errors;
mod fd;
mod forward;
mod host;
mod huge_pages;
mod images;
mod launch;
mod log_stream;
mod mounts;
mod network;
mod pause;
mod payload;
mod pod;
mod process;
mod reaper;
mod resources;
mod sandbox;
mod spec;
mod stats;
mod stdio;
mod sys;
mod sysctl;
mod tasks;
mod users;
mod verdict;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::boot::Timeline;
use crate::container::Guest;
use crate::fd::Fd;
use crate::host::Host;
use crate::reaper::Reaper;
use crate::sandbox::GuestSandbox;
use crate::tasks::Tasks;
use crate::users::Users;

/// How long the host may take to be there. The VMM answers for its ports before the guest runs; a test's peer may
/// be slower.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let started_us = boot::now_us();
    boot::mark(agent_api::INIT_MARK);
    // The end of this program kills every process it can see, so it must be in a world of its own.
    if std::process::id() != 1 {
        eprintln!("ctvm-agent runs as PID 1 only, this is {}", std::process::id());
        return ExitCode::from(2);
    }
    log_stream::install();
    let host = host();
    let (connection, dialled_us) = match reach(&host) {
        Ok(connection) => connection,
        Err(error) => {
            log::error!("no host on port {}: {error}", agent_api::AGENT_PORT);
            boot::power_off();
        }
    };
    let timeline = Timeline { started_us, dialled_us };
    boot::mark(agent_api::READY_MARK);
    boot::furnish();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = runtime.and_then(|runtime| runtime.block_on(serve(connection, &host, timeline)));
    if let Err(error) = ended {
        log::error!("cannot serve: {error}");
    }
    boot::power_off();
}

/// Where the host is: vsock, or for tests `--connect unix:DIRECTORY`.
fn host() -> Host {
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--connect"
            && let Some(dir) = args.next().as_deref().and_then(|to| to.strip_prefix("unix:"))
        {
            return Host::Unix(PathBuf::from(dir));
        }
    }
    Host::Vsock
}

/// A connection to the host, and when it was asked for.
fn reach(host: &Host) -> std::io::Result<(OwnedFd, u64)> {
    let since = Instant::now();
    loop {
        let dialled_us = boot::now_us();
        match host.dial_now(agent_api::AGENT_PORT) {
            Err(_) if since.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
            done => return done.map(|connection| (connection, dialled_us)),
        }
    }
}

/// Serves until the host hangs up or asks for the end.
async fn serve(connection: OwnedFd, host: &Host, timeline: Timeline) -> std::io::Result<()> {
    let reaper = Arc::new(Reaper::default());
    let end = Arc::new(Notify::new());
    let guest = Guest { host: host.clone(), reaper: reaper.clone(), users: Arc::new(Users::default()) };
    let tasks = Arc::new(Tasks::new(guest.clone()));
    let sandbox = Arc::new(GuestSandbox::new(timeline, guest, tasks.clone(), end.clone()));
    let services = [agent_api::task::create_task(tasks), agent_api::sandbox::create_sandbox(sandbox)];
    let _server = connection::serve(Fd::new(connection)?, services, end.clone())
        .await
        .map_err(std::io::Error::other)?;
    tokio::spawn(log_stream::run(host.clone()));
    tokio::select! {
        () = end.notified() => Ok(()),
        done = reaper::run(reaper) => done,
    }
}
