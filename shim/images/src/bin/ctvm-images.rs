//! `ctvm-images`: the node's image service.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use images::cache;
use images::config::Config;
use images::service::{STAT_SOCKET, Service, chain};
use images::stats::Snapshot;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

/// The node's image service: images start before they are downloaded
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve image chunks to the VMs of this node
    Serve {
        /// Folder of the cache
        #[arg(long, default_value = "/var/lib/ctvm/images")]
        root: PathBuf,
        /// Socket that shims connect to
        #[arg(long, default_value = "/run/ctvm/images.sock")]
        socket: PathBuf,
        /// TOML file: cache, fetch, folders, registry
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Say what was fetched, from where, and how long VMs waited
    Stat {
        /// Folder of the cache
        #[arg(long, default_value = "/var/lib/ctvm/images")]
        root: PathBuf,
        /// All counters as JSON
        #[arg(long)]
        json: bool,
    },
    /// Verify every chunk in the cache, also while the service runs; fails if one is wrong
    Scrub {
        /// Folder of the cache
        #[arg(long, default_value = "/var/lib/ctvm/images")]
        root: PathBuf,
    },
}

fn main() -> ExitCode {
    images::logger::install();
    let done = match Arguments::parse().command {
        Command::Serve { root, socket, config } => serve(&root, &socket, config.as_deref()),
        Command::Stat { root, json } => stat(&root, json),
        Command::Scrub { root } => scrub(&root),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ctvm-images: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn stat(root: &Path, json: bool) -> Result<()> {
    let socket = root.join(STAT_SOCKET);
    let mut text = String::new();
    UnixStream::connect(&socket)
        .and_then(|mut stream| stream.read_to_string(&mut text))
        .with_context(|| format!("ask the image service at {}", socket.display()))?;
    if json {
        println!("{text}");
        return Ok(());
    }
    let counters: Snapshot = serde_json::from_str(&text).context("understand the image service")?;
    print!("{}", counters.report());
    Ok(())
}

fn scrub(root: &Path) -> Result<()> {
    let found = cache::scrub(root).with_context(|| format!("look at the cache {}", root.display()))?;
    for (folder, offset) in &found.wrong {
        println!("{}: the chunk at {offset} is not what was verified", folder.display());
    }
    let (files, chunks, mib, wrong) = (found.files, found.chunks, found.bytes >> 20, found.wrong.len());
    println!("{files} files, {chunks} chunks of {mib} MiB verified, {wrong} wrong");
    ensure!(
        wrong == 0,
        "files with wrong chunks are mended when they are next opened, not under VMs that read them now"
    );
    Ok(())
}

fn serve(root: &Path, socket: &Path, config: Option<&Path>) -> Result<()> {
    let config = match config {
        None => Config::default(),
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            toml::from_str(&text).with_context(|| format!("understand {}", path.display()))?
        }
    };
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Each reads, decompresses or writes one run of chunks, with its buffers.
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("start the runtime")?;
    // A descriptor for each blob in use. What the hard limit is, is the operator's affair.
    let files = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }); // the old limit holds
    runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
        let stop = async move {
            tokio::select! { _ = stop.recv() => (), _ = interrupt.recv() => () }
        };
        let service = Arc::new(Service::new(root, config)?);
        service.serve(socket, stop).await?;
        Ok(())
    })
}
