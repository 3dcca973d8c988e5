//! `ctvm exec`: runs a command in a container of a sandbox, through the shim's own Task service.
//!
//! containerd does not know of it: its process is none that containerd lists, and the exec's events, which the shim
//! publishes like any other's, name an id that nobody asks for: CRI's handler of `TaskExit` finds no container of that id and
//! does nothing.
//!
//! The streams are fifos in a directory of the sandbox's state, which goes with this process, or else with the sandbox.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use agent_api::PROCESS_TYPE_URL;
use agent_api::task::{
    CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest,
    StateRequest, TaskClient, WaitRequest,
};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use rustix::termios::tcgetwinsize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use ttrpc::asynchronous::Client;
use ttrpc::context::{Context, with_duration};

use crate::cli::console::RawMode;
use crate::cli::exec::streams::Streams;
use crate::cli::node::{self, Found, NodeError};
use crate::paths;
use crate::sandbox::operator::status::{ContainerStatus, Status};

mod streams;

/// Exit status for failures of our own, like that of other tools that run commands elsewhere.
pub const FAILED: u8 = 125;
/// How long the shim has for one answer; it has limits of its own that are shorter.
const ANSWER: Duration = Duration::from_secs(90);
/// How long it has while the command runs, or on the way out: nobody at a terminal waits longer.
const BRIEF: Duration = Duration::from_secs(5);
/// How long the output has to come after the process was deleted.
const LAST_OUTPUT: Duration = Duration::from_secs(5);

/// What to run.
#[derive(Debug, Clone, Args)]
pub struct Exec {
    /// Id of the sandbox, or enough of it to be the only one; NAMESPACE/ID where it is in several
    pub sandbox: String,
    /// Which container, by id or by the pod's name for it, or enough of either [default: the only one beside the pod's
    /// own]
    #[arg(long, value_name = "ID")]
    pub container: Option<String>,
    /// Give it a terminal: this one
    #[arg(long, short)]
    pub tty: bool,
    /// Working directory [default: the container's]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// One more variable of its environment; may be given several times
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Run as this user [default: the container's]
    #[arg(long, short, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, Option<u32>)>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let (uid, gid) = text.split_once(':').map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    let number =
        |n: &str| n.parse::<u32>().map_err(|_| format!("{text:?} is not UID or UID:GID, in numbers"));
    Ok((number(uid)?, gid.map(number).transpose()?))
}

/// Why nothing was run, or nobody knows how it ended.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No such sandbox or container, or no answer.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A terminal is asked for where there is none.
    #[error("-t: standard input is no terminal")]
    NoTerminal,
    /// The container's configuration.
    #[error("{path}")]
    Bundle {
        /// The file.
        path: PathBuf,
        /// Why it cannot be used.
        #[source]
        source: io::Error,
    },
    /// The shim refused.
    #[error("the sandbox refused to {what}: {message}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its words.
        message: String,
    },
    /// Before the command ran.
    #[error("{0} came before the command ran")]
    Interrupted(Signal),
    /// Something of this process.
    #[error("{what}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn local(what: &'static str) -> impl FnOnce(io::Error) -> ExecError {
    move |source| ExecError::Local { what, source }
}

fn refused(what: &'static str) -> impl FnOnce(ttrpc::Error) -> ExecError {
    move |error| {
        let message = match error {
            ttrpc::Error::RpcStatus(status) => status.message,
            other => other.to_string(),
        };
        ExecError::Refused { what, message }
    }
}

/// Runs it; the command's own exit status.
///
/// # Errors
/// See [`ExecError`].
pub fn run(options: &Exec) -> Result<ExitCode, ExecError> {
    if options.tty && !io::stdin().is_terminal() {
        return Err(ExecError::NoTerminal);
    }
    let found = node::find(&options.sandbox)?;
    let status = found.status()?;
    let container = choose(&found, status, options.container.as_deref())?;
    let signals = signals().map_err(|e| local("taking signals")(e.into()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(local("an event loop"))?;
    let code = runtime.block_on(attend(options, &found, &container, signals))?;
    // Threads that still read end with the process.
    runtime.shutdown_background();
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// The container that is meant: by id or name, else the only one besides that which holds the pod together.
fn choose(found: &Found, status: Status, wanted: Option<&str>) -> Result<String, NodeError> {
    const WHAT: (&str, &str) = ("container", "containers");
    let all = status.containers;
    let told = |c: &ContainerStatus| match c.name == c.id {
        true => format!("{} ({})", c.id, c.state),
        false => format!("{} = {} ({})", c.name, c.id, c.state),
    };
    if let Some(wanted) = wanted {
        let by_name = |c: &ContainerStatus| c.name.starts_with(wanted) && !c.id.starts_with(wanted);
        return match all.iter().any(by_name) {
            // Both would be a name and an id that begin alike: told as several.
            true if !all.iter().any(|c| c.id.starts_with(wanted)) => {
                node::pick(WHAT, wanted, all, |c| (&c.name, told(c))).map(|c| c.id)
            }
            _ => node::pick(WHAT, wanted, all, |c| (&c.id, told(c))).map(|c| c.id),
        };
    }
    let candidates: Vec<_> = match all.len() {
        0 | 1 => all.iter().collect(),
        _ => all.iter().filter(|c| c.id != found.id).collect(),
    };
    match candidates.as_slice() {
        [one] => Ok(one.id.clone()),
        [] => {
            Err(NodeError::NoSuch { what: "container in", name: found.id.clone(), candidates: "none".into() })
        }
        several => Err(NodeError::Several {
            what: "containers (name one with --container)",
            name: found.id.clone(),
            candidates: several.iter().map(|c| told(c)).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// Signals for the command, and of the terminal's new size, as they come.
fn signals() -> nix::Result<mpsc::UnboundedReceiver<Signal>> {
    let taken = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGWINCH];
    let taken: SigSet = taken.into_iter().collect();
    // Of this thread, and so of those that it starts from here on.
    taken.thread_block()?;
    let fd = SignalFd::new(&taken)?;
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        while let Ok(Some(info)) = fd.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if let Ok(signal) = Signal::try_from(number)
                && sender.send(signal).is_err()
            {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The shim, and the process there.
struct Remote<'a> {
    task: TaskClient,
    container: &'a str,
    exec_id: String,
}

impl Remote<'_> {
    fn context() -> Context {
        with_duration(ANSWER)
    }

    async fn kill(&self, signal: Signal) -> Result<(), ExecError> {
        let request = KillRequest {
            id: self.container.to_owned(),
            exec_id: self.exec_id.clone(),
            signal: u32::try_from(signal as i32).expect("signals are positive"),
            ..KillRequest::default()
        };
        match tokio::time::timeout(BRIEF, self.task.kill(Self::context(), &request)).await {
            // One that has just ended has no use for it.
            Ok(_) => Ok(()),
            Err(_) => Err(ExecError::Refused {
                what: "send a signal",
                message: format!("no answer within {BRIEF:?}; the command may still run"),
            }),
        }
    }

    async fn resize(&self) {
        let Ok(size) = tcgetwinsize(io::stdin()) else { return };
        let request = ResizePtyRequest {
            id: self.container.to_owned(),
            exec_id: self.exec_id.clone(),
            width: size.ws_col.into(),
            height: size.ws_row.into(),
            ..ResizePtyRequest::default()
        };
        // A size is not worth the command.
        let _ = tokio::time::timeout(BRIEF, self.task.resize_pty(Self::context(), &request)).await;
    }

    async fn wait(&self) -> Result<u32, ExecError> {
        let request = WaitRequest {
            id: self.container.to_owned(),
            exec_id: self.exec_id.clone(),
            ..WaitRequest::default()
        };
        let answer = self.task.wait(Context::default(), &request).await;
        answer.map(|r| r.exit_status).map_err(refused("wait for the command"))
    }

    async fn delete(&self) {
        let request = DeleteRequest {
            id: self.container.to_owned(),
            exec_id: self.exec_id.clone(),
            ..DeleteRequest::default()
        };
        // What is gone with its container needs no deleting.
        let _ = tokio::time::timeout(BRIEF, self.task.delete(Self::context(), &request)).await;
    }
}

async fn attend(
    options: &Exec,
    found: &Found,
    container: &str,
    mut signals: mpsc::UnboundedReceiver<Signal>,
) -> Result<u32, ExecError> {
    let client = Client::connect(&paths::address(&found.state.socket)).await;
    let task = TaskClient::new(client.map_err(refused("take a connection"))?);
    let remote = Remote { task, container, exec_id: format!("ctvm-{}", std::process::id()) };
    let bundle = unless_interrupted(&mut signals, bundle(&remote)).await?;
    let process = process(&bundle, options)?;
    let streams = Streams::make(&found.dir, &remote.exec_id, options.tty).map_err(local("making fifos"))?;

    let spec =
        Any { type_url: PROCESS_TYPE_URL.to_owned(), value: process.to_string().into(), ..Any::default() };
    let request = ExecProcessRequest {
        id: container.to_owned(),
        exec_id: remote.exec_id.clone(),
        terminal: options.tty,
        stdin: streams.name("stdin"),
        stdout: streams.name("stdout"),
        stderr: if options.tty { String::new() } else { streams.name("stderr") },
        spec: MessageField::some(spec),
        ..ExecProcessRequest::default()
    };
    let made = async {
        remote.task.exec(Remote::context(), &request).await.map(drop).map_err(refused("make the exec"))
    };
    let run = match unless_interrupted(&mut signals, made).await {
        Ok(()) => started(&remote, options, streams, &mut signals).await,
        Err(e) => Err(e),
    };
    if run.is_err() {
        remote.delete().await;
    }
    run
}

async fn started(
    remote: &Remote<'_>,
    options: &Exec,
    streams: Streams,
    signals: &mut mpsc::UnboundedReceiver<Signal>,
) -> Result<u32, ExecError> {
    let start = StartRequest {
        id: remote.container.to_owned(),
        exec_id: remote.exec_id.clone(),
        ..StartRequest::default()
    };
    let stdin = io::stdin();
    let raw = match options.tty {
        true => RawMode::enter(&stdin).map_err(local("the terminal"))?,
        false => None,
    };
    let (mut outputs, mut input_ended, _dir) = streams.run().map_err(local("the command's streams"))?;
    let running = async {
        remote.task.start(Remote::context(), &start).await.map(drop).map_err(refused("run the command"))
    };
    unless_interrupted(signals, running).await?;
    if options.tty {
        remote.resize().await;
    }
    let mut ended = std::pin::pin!(remote.wait());
    let code = loop {
        tokio::select! {
            code = &mut ended => break code?,
            Some(signal) = signals.recv() => match signal {
                Signal::SIGWINCH if options.tty => remote.resize().await,
                Signal::SIGWINCH => {}
                signal => remote.kill(signal).await?,
            },
            Some(()) = input_ended.recv() => {
                let close = CloseIORequest {
                    id: remote.container.to_owned(),
                    exec_id: remote.exec_id.clone(),
                    stdin: true,
                    ..CloseIORequest::default()
                };
                // One that has just ended has no use for it.
                let _ = tokio::time::timeout(BRIEF, remote.task.close_io(Remote::context(), &close)).await;
            }
        }
    };
    remote.delete().await;
    // Each output tells its end by hanging up.
    let _ = tokio::time::timeout(LAST_OUTPUT, async { while outputs.recv().await.is_some() {} }).await;
    drop(raw);
    Ok(code)
}

/// Does what comes before the command runs; a signal, which then is for nobody else, ends it.
async fn unless_interrupted<T>(
    signals: &mut mpsc::UnboundedReceiver<Signal>,
    work: impl Future<Output = Result<T, ExecError>>,
) -> Result<T, ExecError> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(signal) = signals.recv() => {
                if signal != Signal::SIGWINCH {
                    return Err(ExecError::Interrupted(signal));
                }
            }
        }
    }
}

/// The container's bundle.
async fn bundle(remote: &Remote<'_>) -> Result<PathBuf, ExecError> {
    let request = StateRequest { id: remote.container.to_owned(), ..StateRequest::default() };
    let answer = remote.task.state(Remote::context(), &request).await;
    Ok(answer.map_err(refused("tell of the container"))?.bundle.into())
}

/// The container's own process with another command: its user, capabilities, environment and directory.
fn process(bundle: &Path, options: &Exec) -> Result<Value, ExecError> {
    let path = bundle.join("config.json");
    let failed = |source| ExecError::Bundle { path: path.clone(), source };
    let config = std::fs::read(&path).map_err(failed)?;
    let mut config: Value = serde_json::from_slice(&config).map_err(|e| failed(e.into()))?;
    let mut process = config["process"].take();
    let Some(fields) = process.as_object_mut() else {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it has no process")));
    };
    fields.remove("commandLine");
    fields.remove("consoleSize");
    fields.insert("args".into(), json!(options.command));
    fields.insert("terminal".into(), json!(options.tty));
    if let Some(cwd) = &options.cwd {
        fields.insert("cwd".into(), json!(cwd));
    }
    if let Some((uid, gid)) = options.user {
        // Groups and rights were another user's.
        fields.insert("user".into(), json!({ "uid": uid, "gid": gid.unwrap_or(0) }));
    }
    let env = fields.entry("env").or_insert_with(|| json!([]));
    if let Some(env) = env.as_array_mut() {
        if options.tty && !env.iter().any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM="))) {
            env.push(json!("TERM=xterm"));
        }
        env.extend(options.env.iter().map(|e| json!(e)));
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        exec: Exec,
    }

    fn parse(line: &str) -> Result<Exec, String> {
        let words = std::iter::once("ctvm").chain(line.split(' '));
        Line::try_parse_from(words).map(|l| l.exec).map_err(|e| e.to_string())
    }

    fn container(id: &str, name: &str) -> ContainerStatus {
        ContainerStatus {
            id: id.into(),
            name: name.into(),
            state: "running".into(),
            exit_code: None,
            execs: 0,
            image: None,
        }
    }

    fn chosen(wanted: Option<&str>, containers: &[(&str, &str)]) -> Result<String, String> {
        let found = Found {
            namespace: "k8s.io".into(),
            id: "pod".into(),
            dir: PathBuf::new(),
            state: crate::sandbox::state_file::State::default(),
        };
        let containers = containers.iter().map(|(id, name)| container(id, name)).collect();
        let status = Status { state: "running".into(), containers, ..Status::default() };
        choose(&found, status, wanted).map_err(|e| e.to_string())
    }

    #[test]
    fn the_container_is_the_only_one_or_named() {
        assert_eq!(chosen(None, &[("pod", "pod")]).unwrap(), "pod");
        assert_eq!(chosen(None, &[("pod", "pod"), ("a1", "app")]).unwrap(), "a1");
        let pod = [("pod", "pod"), ("a1", "app"), ("b2", "db")];
        let several = chosen(None, &pod).unwrap_err();
        assert!(
            several.contains("--container") && several.contains("app = a1 (running), db = b2"),
            "{several}"
        );
        assert_eq!(chosen(Some("db"), &pod).unwrap(), "b2");
        assert_eq!(chosen(Some("a1"), &pod).unwrap(), "a1");
        assert_eq!(chosen(Some("pod"), &pod).unwrap(), "pod");
        assert!(
            chosen(Some("x"), &pod).unwrap_err().contains("no container \"x\"; there are: pod (running)")
        );
        assert!(chosen(None, &[]).unwrap_err().starts_with("no container in \"pod\""));
    }

    #[test]
    fn the_process_is_the_containers_own_with_another_command() {
        let bundle = tempfile::tempdir().unwrap();
        let exec = parse("pod -t -e A=b --cwd /tmp -u 7:8 -- ls -l").unwrap();
        let error = process(bundle.path(), &exec).unwrap_err();
        assert!(error.to_string().ends_with("/config.json"), "{error}");
        let config = json!({"process": {
            "args": ["sleep"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "additionalGids": [1]},
            "capabilities": {"bounding": ["CAP_CHOWN"]}, "consoleSize": {"height": 1, "width": 1}
        }});
        std::fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        let process = |line: &str| super::process(bundle.path(), &parse(line).unwrap()).unwrap();
        assert_eq!(
            super::process(bundle.path(), &exec).unwrap(),
            json!({
                "args": ["ls", "-l"], "cwd": "/tmp", "env": ["PATH=/bin", "TERM=xterm", "A=b"],
                "user": {"uid": 7, "gid": 8}, "capabilities": {"bounding": ["CAP_CHOWN"]}, "terminal": true
            })
        );
        let plain = process("pod -- true");
        assert_eq!((&plain["cwd"], &plain["env"]), (&json!("/"), &json!(["PATH=/bin"])));
        assert_eq!(plain["user"]["additionalGids"], json!([1]));
        std::fs::write(bundle.path().join("config.json"), "{}").unwrap();
        super::process(bundle.path(), &exec).unwrap_err();
    }

    #[tokio::test]
    async fn a_signal_before_the_command_runs_ends_it_and_a_new_size_does_not() {
        let (sender, mut signals) = mpsc::unbounded_channel();
        sender.send(Signal::SIGWINCH).unwrap();
        assert_eq!(unless_interrupted(&mut signals, async { Ok(1) }).await.unwrap(), 1);
        sender.send(Signal::SIGWINCH).unwrap();
        sender.send(Signal::SIGTERM).unwrap();
        let error =
            unless_interrupted(&mut signals, std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert_eq!(error.to_string(), "SIGTERM came before the command ran");
    }

    #[test]
    fn users_are_numbers_and_a_command_is_needed() {
        assert_eq!((user("7"), user("7:8")), (Ok((7, None)), Ok((7, Some(8)))));
        assert!(user("root").unwrap_err().contains("in numbers"));
        assert!(parse("pod").unwrap_err().contains("<COMMAND>"));
    }
}
