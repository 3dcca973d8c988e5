//! The host's ends of streams.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::{IoError, Stdio};
use crate::container::logger::{self, Logger, Owner, is_logger};
use crate::streaming::Desk;
use crate::streaming::pump::{self, Pump};

/// The host's ends of a process's streams, opened before anything is asked of the guest.
#[derive(Debug, Default)]
pub struct Fifos {
    pub(super) stdin: Option<(OwnedFd, OwnedFd)>,
    pub(super) stdout: Option<Output>,
    pub(super) stderr: Option<Output>,
    pub(super) logger: Option<Logger>,
    pub(super) pumps: Vec<Pump>,
}

/// Where an output goes.
#[derive(Debug)]
pub(super) enum Output {
    /// A client's fifo, or a logger's pipe.
    Pipe(OwnedFd),
    /// A file, to its end.
    File(File),
}

impl Fifos {
    /// Opens what `stdio` names, and starts its logger. Streams are those of `desk`.
    ///
    /// # Errors
    /// See [`IoError`].
    pub async fn open(stdio: &Stdio, owner: Owner<'_>, desk: &Arc<Desk>) -> Result<Self, IoError> {
        let mut pumps = Vec::new();
        let stdin = match (stdio.stdin.as_str(), desk.id_in(&stdio.stdin)) {
            ("", _) => None,
            (uri, Some(id)) => {
                let made = pump::input(desk, &id);
                let (reader, writer, pump) = made.map_err(|source| failed("stdin", uri, source))?;
                pumps.push(pump);
                Some((reader, writer))
            }
            (path, None) => {
                let read = open_fifo("stdin", path, true, false)?;
                Some((read, open_fifo("stdin", path, false, true)?))
            }
        };
        let (stdout, stderr) = (stdio.stdout.as_str(), stdio.used_stderr());
        if is_logger(stdout) && is_logger(stderr) && stdout != stderr {
            return Err(IoError::Loggers { stdout: stdout.to_owned(), stderr: stderr.to_owned() });
        }
        let mut to = |stream, uri: &str| match desk.id_in(uri) {
            Some(id) => {
                let (pipe, pump) = pump::output(desk, &id).map_err(|source| failed(stream, uri, source))?;
                pumps.push(pump);
                Ok(Some(Output::Pipe(pipe)))
            }
            None => output(stream, uri),
        };
        let (to_stdout, to_stderr) = (to("stdout", stdout)?, to("stderr", stderr)?);
        let mut fifos = Fifos { stdin, stdout: to_stdout, stderr: to_stderr, logger: None, pumps };
        if let Some(uri) = [stdout, stderr].into_iter().find(|uri| is_logger(uri)) {
            let started = Logger::start(uri, owner).await;
            let (logger, inputs) =
                started.map_err(|source| IoError::Logger { uri: uri.to_owned(), source })?;
            fifos.logger = Some(logger);
            if is_logger(stdout) {
                fifos.stdout = Some(Output::Pipe(inputs.stdout));
            }
            if is_logger(stderr) {
                fifos.stderr = Some(Output::Pipe(inputs.stderr));
            }
        }
        Ok(fifos)
    }
}

fn failed(stream: &'static str, uri: &str, source: std::io::Error) -> IoError {
    IoError::Open { stream, path: uri.to_owned(), source }
}

/// Opens a fifo or a file.
fn output(stream: &'static str, uri: &str) -> Result<Option<Output>, IoError> {
    if uri.is_empty() || is_logger(uri) {
        return Ok(None);
    }
    let Some(path) = uri.strip_prefix("file://") else {
        return open_fifo(stream, uri, true, true).map(|fifo| Some(Output::Pipe(fifo)));
    };
    let path = logger::decode(path).ok().filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| IoError::Scheme { stream, uri: uri.to_owned() })?;
    let opened = Path::new(&path)
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| OpenOptions::new().append(true).create(true).mode(0o644).open(&path));
    let file = opened.map_err(|source| IoError::Open { stream, path, source })?;
    Ok(Some(Output::File(file)))
}

/// Opens a fifo without waiting for a peer.
fn open_fifo(stream: &'static str, path: &str, read: bool, write: bool) -> Result<OwnedFd, IoError> {
    if !path.starts_with('/') {
        return Err(IoError::Scheme { stream, uri: path.to_owned() });
    }
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("open flags fit an int");
    let file = OpenOptions::new()
        .read(read)
        .write(write)
        .custom_flags(flags)
        .open(path)
        .map_err(|source| IoError::Open { stream, path: path.to_owned(), source })?;
    let is_fifo = file.metadata().is_ok_and(|m| m.file_type().is_fifo());
    if is_fifo { Ok(file.into()) } else { Err(IoError::NotFifo { stream, path: path.to_owned() }) }
}
