//! The serving process: one sandbox, from its boot to containerd's `Shutdown`.
//!
//! Standard input is the listening socket, which `start` bound; standard error is the bundle's log. One thread.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::stream::unfold;
use tokio::net::UnixListener as TokioListener;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::args::Args;
use crate::config::Config;
use crate::container::overview::Overview;
use crate::events::Publisher;
use crate::sandbox::pod::Extras;
use crate::sandbox::timeline::SHIM_START;
use crate::sandbox::{Sandbox, operator};
use crate::vmm::ControlSlot;
use crate::{clock, logger, paths, pod_service, service, streaming};

/// How long the answer to `Shutdown` and the last events have to leave.
const LAST_ANSWER: Duration = Duration::from_millis(50);
const LAST_EVENTS: Duration = Duration::from_secs(3);

/// How long nobody is let in when there is no descriptor left for anyone.
const FULL: Duration = Duration::from_millis(100);

/// A listener that waits when it cannot accept: the library tries again at once, and says so each time.
fn patient(listener: UnixListener) -> std::io::Result<Listener> {
    listener.set_nonblocking(true)?;
    let listener = TokioListener::from_std(listener)?;
    let connections = unfold((listener, true), |(listener, mut is_news)| async move {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), (listener, true))),
                Err(e) => {
                    if is_news {
                        log::warn!("no more connections for now: {e}");
                    }
                    is_news = false;
                    tokio::time::sleep(FULL).await;
                }
            }
        }
    });
    Ok(Listener::new(Box::pin(connections)))
}

/// Serves until `Shutdown`.
///
/// # Errors
/// When it cannot begin to.
pub fn run(args: &Args) -> Result<()> {
    // First: the lowest free descriptors are given out from here on.
    let slot = ControlSlot::reserve().context("reserving a descriptor")?;
    let serving_us = clock::monotonic_us();
    // Out of containerd's session, so that no terminal's signal reaches us. Fails where `start` did it already.
    let _ = rustix::process::setsid();
    let listener = UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned().context("the socket")?);
    let null = std::fs::File::open("/dev/null").context("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("standard input")?;
    let socket = listener.local_addr().context("the socket's name")?;
    let socket = socket.as_pathname().context("the socket has no name")?.to_owned();

    let overview = Overview::of_bundle(Path::new("."))?;
    let mut config = Config::load(args.config.as_deref())?;
    if let Some(overview) = &overview {
        config.fit_to_pod(overview)?;
    }
    let level = if args.debug { log::LevelFilter::Debug } else { config.log_level.into() };
    logger::install(logger::open(Path::new(".")), &args.namespace, &args.id, level);
    // A bundle's directory is removed while we still run.
    std::env::set_current_dir("/").context("entering /")?;

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("event loop")?;
    let result = runtime.block_on(serve(args, listener, &socket, config, overview, slot, serving_us));
    if let Err(e) = &result {
        log::error!("{e:#}");
    }
    // Tasks that still wait for something (a stream, a sleep) end with the process.
    runtime.shutdown_background();
    result
}

async fn serve(
    args: &Args,
    listener: UnixListener,
    socket: &Path,
    config: Config,
    overview: Option<Overview>,
    mut slot: ControlSlot,
    serving_us: u64,
) -> Result<()> {
    let state_dir = paths::state_dir(&args.namespace, &args.id);
    let daemon = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let events = Publisher::start(&daemon, &args.namespace);
    let sandbox = Sandbox::new(&args.namespace, &args.id, config, &state_dir, socket, events.clone())
        .with_context(|| format!("state in {}", state_dir.display()))?;
    sandbox.timeline.reached_at(SHIM_START, args.started_us);
    sandbox.timeline.reached_at("shim serving", serving_us);

    let mut server = Server::new().add_listener(patient(listener).context("the socket")?);
    for table in service::services(&sandbox) {
        server = server.register_service(table);
    }
    server = server.register_service(pod_service::service(&sandbox));
    server = server.register_service(streaming::service(&sandbox.streaming));
    if let Some(overview) = overview {
        let (booting, config) = (sandbox.clone(), sandbox.config.clone());
        // Maps that cannot be are `Create`'s to refuse.
        let extras = Extras { users: overview.users().unwrap_or_default(), ..Extras::default() };
        sandbox.have_users(extras.users.as_ref());
        if overview.network_comes_late() {
            sandbox.await_network();
        }
        tokio::spawn(async move { booting.boot(&overview, extras, config, &mut slot).await });
    } else {
        sandbox.await_pod(slot);
    }
    server.start().await.context("serving")?;
    match operator::listen(&state_dir) {
        Ok(listener) => drop(tokio::spawn(operator::serve(sandbox.clone(), listener))),
        // Containers matter more.
        Err(e) => log::warn!("no metrics: {} in {}: {e}", operator::SOCKET, state_dir.display()),
    }
    sandbox.closed().await;
    events.flush(LAST_EVENTS).await;
    tokio::time::sleep(LAST_ANSWER).await;
    Ok(())
}
