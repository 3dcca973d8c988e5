//! `ctvm-snapshotter`: serves containerd's Snapshots on a Unix socket.

#![forbid(unsafe_code)]

use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use snapshotter::nydus::Config;
use snapshotter::service::Service;
use snapshotter::store::Store;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

/// containerd's snapshots, with Nydus images that are not unpacked
///
/// containerd finds it by these lines of its configuration:
///
///     [proxy_plugins.ctvm]
///       type = "snapshot"
///       address = "/run/ctvm/snapshotter.sock"
///       capabilities = ["remap-ids"]
///     [plugins."io.containerd.grpc.v1.cri".containerd]
///       snapshotter = "ctvm"
///       disable_snapshot_annotations = false
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
struct Arguments {
    /// Where snapshots are kept
    #[arg(long, default_value = "/var/lib/ctvm/snapshots")]
    root: PathBuf,
    /// Where containerd finds the service
    #[arg(long, default_value = "/run/ctvm/snapshotter.sock")]
    address: PathBuf,
    /// A registry (HOST or HOST:PORT) whose blobs are asked for without TLS; may be given several times
    #[arg(long, value_name = "HOST")]
    plain_http: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    log::set_logger(&ToStderr).expect("nobody else sets one");
    log::set_max_level(log::LevelFilter::Info);
    let store = Store::open(&arguments.root)
        .with_context(|| format!("cannot open the snapshots in {}", arguments.root.display()))?;
    let listener = listen(&arguments.address).await?;
    let config = Config { plain_http: arguments.plain_http };
    log::info!("{} snapshots; serving {}", store.all().count(), arguments.address.display());
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let stop = async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    tonic::transport::Server::builder()
        .add_service(Service::new(store, config).server())
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .context("serving containerd")?;
    let _ = std::fs::remove_file(&arguments.address); // the next one would remove it too
    Ok(())
}

/// Takes the place of a socket that nobody serves any more.
async fn listen(address: &Path) -> Result<UnixListener> {
    let shown = address.display();
    if UnixStream::connect(address).await.is_ok() {
        bail!("{shown} is served by another process");
    }
    if let Some(folder) = address.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let _ = std::fs::remove_file(address); // bind says what is wrong
    let listener = UnixListener::bind(address).with_context(|| format!("cannot listen at {shown}"))?;
    std::fs::set_permissions(address, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct ToStderr;

impl log::Log for ToStderr {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("snapshotter") || record.target().starts_with("ctvm") {
            let mut stderr = std::io::stderr().lock();
            let name = if stderr.is_terminal() { "" } else { "ctvm-snapshotter: " };
            // A log that cannot be written is no reason to end.
            let _ = writeln!(stderr, "{name}{}: {}", record.level().as_str().to_lowercase(), record.args());
        }
    }

    fn flush(&self) {}
}
