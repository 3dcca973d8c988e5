//! `start`: answers containerd with the address of a serving process, which it starts unless the container belongs
//! to a pod that has one.
//!
//! The socket is bound here, before the serving process exists, and handed to it as its standard input: whoever is
//! told the address can connect at once, and there is nothing to poll. containerd takes everything this process
//! writes for the answer (it reads standard output and error together), so nothing else is written, and the serving
//! process inherits neither.

use std::fs::File;
use std::io::{IsTerminal as _, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Resource, getrlimit};

use crate::args::Args;
use crate::bootstrap::{self, Bootstrap};
use crate::config::Config;
use crate::container::overview::Overview;
use crate::sandbox::state_file::{self, State};
use crate::{clock, delete, dirs, logger, paths};

/// Most bytes of standard input that are read: a configuration may be in them.
const MAX_INPUT: u64 = 4 << 20;

/// Carries `start` out in the working directory, a bundle; the bytes to answer.
///
/// # Errors
/// When there is no address to answer with; nothing is left of the attempt then.
pub fn run(args: &Args) -> Result<Vec<u8>> {
    let started_us = clock::monotonic_us();
    let max_version = std::env::var("MAX_SHIM_VERSION").ok();
    let asked = bootstrap::read(&standard_input()?, args, max_version.as_deref());
    // Without one there is no container: containerd will ask for a pod (Sandbox API).
    let overview = Overview::of_bundle(Path::new("."))?.unwrap_or_default();

    let group = overview.group().unwrap_or(&args.id);
    if !crate::args::is_name(group) {
        bail!("sandbox id {group:?} in the annotations is not a name");
    }
    let socket = paths::socket_path(asked.socket_dir.as_deref(), &args.address, &args.namespace, group);
    let address = paths::address(&socket);
    // Alive: a pod's shim, or our own from an earlier call.
    if UnixStream::connect(&socket).is_err() {
        if group != args.id {
            bail!("sandbox {group} of container {} does not run: no shim answers at {address}", args.id);
        }
        launch(args, &asked, &overview, &socket, started_us)?;
    }
    // containerd 1.6 finds a running shim by this file when it is restarted.
    std::fs::write(".address", &address).context("writing the bundle's address file")?;
    std::fs::rename(".address", "address").context("writing the bundle's address file")?;
    Ok(bootstrap::answer(asked.dialect, &address))
}

fn standard_input() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(MAX_INPUT).read_to_end(&mut bytes).context("standard input")?;
    }
    Ok(bytes)
}

fn launch(args: &Args, asked: &Bootstrap, overview: &Overview, socket: &Path, started_us: u64) -> Result<()> {
    let state_dir = paths::state_dir(&args.namespace, &args.id);
    // What a dead shim of the same name may have left.
    delete::clean(&state_dir, None)?;
    dirs::make(&state_dir).with_context(|| state_dir.display().to_string())?;
    let launched = try_launch(args, asked, overview, socket, started_us, &state_dir);
    if launched.is_err() {
        // Whatever there is of it; the error that matters is the first.
        let _ = std::fs::remove_file(socket);
        let _ = state_file::remove_dir(&state_dir);
    }
    launched
}

fn try_launch(
    args: &Args,
    asked: &Bootstrap,
    overview: &Overview,
    socket: &Path,
    started_us: u64,
    state_dir: &Path,
) -> Result<()> {
    enough_files(getrlimit(Resource::Nofile).current)?;
    let named = config_file(asked, state_dir)?;
    // Read here too: what is wrong with it is then the answer to the operator's command.
    Config::load(named.as_deref())?.fit_to_pod(overview)?;
    let state = State { socket: socket.to_owned(), ..State::default() };
    state.write(state_dir).with_context(|| state_dir.display().to_string())?;
    let listener = bind(socket)?;

    let mut serve = Command::new(std::env::current_exe().context("finding this binary")?);
    serve.args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address]);
    serve.arg("-started-us").arg(started_us.to_string());
    if let Some(path) = &named {
        serve.arg("-config").arg(path);
    }
    if args.debug || asked.debug {
        serve.arg("-debug");
    }
    if let Some(address) = &asked.ttrpc_address {
        serve.env("TTRPC_ADDRESS", address);
    }
    let log = logger::open(Path::new(".")).map_or_else(Stdio::null, Stdio::from);
    serve.arg("serve").stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(log);
    raise_oom_score();
    serve.spawn().context("starting the serving process")?;
    Ok(())
}

/// Descriptors with which a serving process can answer, and say what it lacks. With fewer it would end without a word.
const LEAST_FILES: u64 = 16;

fn enough_files(limit: Option<u64>) -> Result<()> {
    match limit {
        Some(limit) if limit < LEAST_FILES => bail!(
            "{limit} file descriptors are allowed (RLIMIT_NOFILE), and {LEAST_FILES} are the least for a sandbox"
        ),
        _ => Ok(()),
    }
}

/// The configuration that the runtime options name or hold.
fn config_file(asked: &Bootstrap, state_dir: &Path) -> Result<Option<PathBuf>> {
    if let Some(path) = &asked.options.config_path {
        return Ok(Some(path.clone()));
    }
    let Some(body) = &asked.options.config_body else { return Ok(None) };
    let path = state_dir.join("config.toml");
    std::fs::write(&path, body).with_context(|| path.display().to_string())?;
    Ok(Some(path))
}

fn bind(socket: &Path) -> Result<UnixListener> {
    let dir = socket.parent().context("the socket has no directory")?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(dir)
        .with_context(|| dir.display().to_string())?;
    // Nobody answered at it.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).with_context(|| format!("binding {}", socket.display()))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protecting {}", socket.display()))?;
    Ok(listener)
}

/// One more than containerd's, which we inherited: the host kills shims before it kills containerd.
fn raise_oom_score() {
    const FILE: &str = "/proc/self/oom_score_adj";
    const HIGHEST: i32 = 1000;
    let Ok(Ok(score)) = std::fs::read_to_string(FILE).map(|s| s.trim().parse::<i32>()) else { return };
    // Where it may not be changed it stays as it is: a matter of taste, not of function.
    let _ = File::options().write(true).open(FILE).and_then(|mut file| {
        use std::io::Write as _;
        write!(file, "{}", (score + 1).min(HIGHEST))
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_is_said_with_what_is_enough() {
        assert!(enough_files(None).is_ok() && enough_files(Some(16)).is_ok());
        let text = enough_files(Some(15)).unwrap_err().to_string();
        assert_eq!(
            text,
            "15 file descriptors are allowed (RLIMIT_NOFILE), and 16 are the least for a sandbox"
        );
    }
}
