//! A program that takes a process's output: `binary://PATH?KEY=VALUE…`, in containerd's contract for it, or `binary-v2://…`,
//! in that of containerd 2.2.
//!
//! | what | the program gets |
//! | --- | --- |
//! | descriptors 3 and 4 | the process's stdout and stderr, to be read until they end |
//! | descriptor 5 | to be written to, a byte, when it is ready: the process is made only then. Closing it is as good, but not by `binary-v2` |
//! | arguments | each key and its value, in their order; nothing of them is secret |
//! | environment | `CONTAINER_ID` (of an exec: its id) and `CONTAINER_NAMESPACE`, and nothing else |
//!
//! One program takes both outputs, that of stdout's URI. It is expected to end with its input, and a process's exit is
//! told after it has; one that has not when the process is deleted gets SIGTERM.

use std::io::PipeReader;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::watched::watch;

/// What the URIs of programs begin with that have to write to descriptor 5.
const STRICT: &str = "binary-v2://";

/// Whether `uri` names a program.
pub fn is_logger(uri: &str) -> bool {
    ["binary://", STRICT].iter().any(|scheme| uri.starts_with(scheme))
}

/// How long a program may take to be ready.
const READY: Duration = Duration::from_secs(10);

/// Whose output it is.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The container, or the exec.
    pub id: &'a str,
}

/// A program that does not take the output.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// The URI names no program.
    #[error("no absolute path of a program in it")]
    Path,
    /// A `%` without two digits behind it, or what is no text.
    #[error("{0:?} is not the encoding of a text")]
    Encoding(String),
    /// It does not run.
    #[error("starting {program:?}")]
    Start {
        /// Its path.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It closed its descriptor without a word, as one does that fails.
    #[error(
        "{program:?} did not say that it is ready: it has to write to descriptor 5 before that is closed"
    )]
    NotReady {
        /// Its path.
        program: String,
    },
    /// It runs and does not say that it is ready.
    #[error("{program:?} was not ready within {READY:?}")]
    Late {
        /// Its path.
        program: String,
    },
}

/// The program, until it has ended.
#[derive(Debug)]
pub struct Logger {
    pidfd: Arc<AsyncFd<OwnedFd>>,
    ended: JoinHandle<()>,
}

/// What it reads: our ends of descriptors 3 and 4.
#[derive(Debug)]
pub struct Inputs {
    /// For stdout.
    pub stdout: OwnedFd,
    /// For stderr.
    pub stderr: OwnedFd,
}

impl Logger {
    /// Starts what `uri` names and waits for it to be ready.
    ///
    /// # Errors
    /// See [`LoggerError`]; it does not run then.
    pub async fn start(uri: &str, owner: Owner<'_>) -> Result<(Self, Inputs), LoggerError> {
        let (program, args) = parse(uri)?;
        let failed = |source| LoggerError::Start { program: program.clone(), source };
        let (stdout, for_stdout) = std::io::pipe().map_err(failed)?;
        let (stderr, for_stderr) = std::io::pipe().map_err(failed)?;
        let (ready, for_ready) = std::io::pipe().map_err(failed)?;
        let mut command = Command::new(&program);
        command
            .args(args)
            .env_clear()
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let theirs = [OwnedFd::from(stdout), OwnedFd::from(stderr), OwnedFd::from(for_ready)];
        let mappings =
            theirs.into_iter().zip(3..).map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).expect("three different numbers");
        let mut child = command.spawn().map_err(failed)?;
        // Our copies of its ends are in there, and would keep the ready pipe open.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a child's process number");
        let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(std::io::Error::from);
        let pidfd = Arc::new(pidfd.and_then(watch).map_err(failed)?);
        let process = pidfd.clone();
        let ended = tokio::spawn(async move {
            // Readable is ended.
            if process.readable().await.is_ok() {
                match child.wait() {
                    Ok(status) if status.success() => {}
                    outcome => log::warn!("a logger ended: {outcome:?}"),
                }
            }
        });
        let logger = Logger { pidfd, ended };
        let Ok(said) = tokio::time::timeout(READY, written(ready)).await else {
            return Err(LoggerError::Late { program });
        };
        if !said.map_err(failed)? && uri.starts_with(STRICT) {
            return Err(LoggerError::NotReady { program });
        }
        let writable = |end: std::io::PipeWriter| -> std::io::Result<OwnedFd> {
            rustix::io::ioctl_fionbio(&end, true)?;
            Ok(end.into())
        };
        let inputs =
            writable(for_stdout).and_then(|stdout| Ok(Inputs { stdout, stderr: writable(for_stderr)? }));
        Ok((logger, inputs.map_err(failed)?))
    }

    /// Waits for it to end.
    pub async fn ended(&mut self) {
        if !self.ended.is_finished() {
            // A task that panicked has ended as well.
            let _ = (&mut self.ended).await;
        }
    }
}

/// Nobody is interested any more.
impl Drop for Logger {
    fn drop(&mut self) {
        if !self.ended.is_finished() {
            // It may end of itself in this moment. Its task goes on, to reap it.
            let _ = pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::TERM);
        }
    }
}

/// Waits for a byte or the end. Whether there was one.
async fn written(ready: PipeReader) -> std::io::Result<bool> {
    let ready = OwnedFd::from(ready);
    rustix::io::ioctl_fionbio(&ready, true)?;
    let ready = watch(ready)?;
    loop {
        let mut guard = ready.readable().await?;
        let read = guard.try_io(|ready| Ok(rustix::io::read(ready.get_ref(), &mut [0_u8])?));
        if let Ok(read) = read {
            return read.map(|bytes| bytes > 0);
        }
    }
}

/// The program and its arguments.
fn parse(uri: &str) -> Result<(String, Vec<String>), LoggerError> {
    let rest = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let program = decode(path)?;
    if !program.starts_with('/') {
        return Err(LoggerError::Path);
    }
    let mut args: Vec<String> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        // In a query a plus is a space, in a path it is not.
        args.push(decode(&key.replace('+', " "))?);
        args.push(decode(&value.replace('+', " "))?);
    }
    Ok((program, args))
}

/// Undoes a URI's percent-encoding (RFC 3986, 2.1).
pub fn decode(text: &str) -> Result<String, LoggerError> {
    let bad = || LoggerError::Encoding(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first == b'%' {
            let digits =
                after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(bad)?;
            let hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| hex).ok_or_else(bad)?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_of_the_second_kind_has_to_say_that_it_is_ready() {
        let start = async |scheme: &str, script: &str| {
            let script: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let uri = format!("{scheme}:///bin/sh?-c={script}");
            let started = Logger::start(&uri, Owner { namespace: "n", id: "c" }).await;
            started.map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(start("binary-v2", "printf x >&5; exec 5>&-; cat <&3").await, Ok(()));
        for silent in ["exec 5>&-; cat <&3", "exit 1"] {
            assert_eq!(start("binary", silent).await, Ok(()));
            let error = start("binary-v2", silent).await.unwrap_err();
            assert!(error.contains("\"/bin/sh\" did not say that it is ready"), "{error}");
        }
        assert!(is_logger("binary:///a") && is_logger("binary-v2:///a") && !is_logger("binary-v3:///a"));
    }

    #[test]
    fn a_uri_is_a_program_and_its_arguments() {
        let parsed = |uri| parse(uri).map_err(|error| error.to_string());
        let args = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>();
        assert_eq!(parsed("binary:///bin/log"), Ok(("/bin/log".into(), vec![])));
        assert_eq!(
            parsed("binary:///a%20b/log?file=%2Ftmp%2Fx&level=in+fo&flag#part"),
            Ok(("/a b/log".into(), args(&["file", "/tmp/x", "level", "in fo", "flag", ""])))
        );
        assert!(parsed("binary://log").unwrap_err().contains("no absolute path"));
        for wrong in ["binary:///a%2", "binary:///a?b=%zz", "binary:///a?%ff", "binary:///a?%+1"] {
            assert!(parsed(wrong).unwrap_err().contains("encoding"), "{wrong}");
        }
    }
}
