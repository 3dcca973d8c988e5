//! OCI hooks: programs that somebody wants run beside a container's life.
//!
//! | hook | here |
//! | --- | --- |
//! | `prestart`, `createRuntime` | run on the host when the container is made and not yet started; one that fails undoes it |
//! | `poststart`, `poststop` | run on the host when it was started, when it was deleted; one that fails is logged |
//! | `startContainer` | a program of the container's, run in the guest before the container's own |
//! | `createContainer` | refused: a program of the host in the container's namespaces, which are in another kernel |
//!
//! As with Kata Containers, a hook runs in the pod's network namespace, and the process number it is told is that of the
//! thread that waits for it: `/proc/<pid>/ns/net` is the pod's, and everything else the host's. A container whose network
//! namespace has no name has none on this host, and a hook that would configure one would configure the host's: refused.
//! Interfaces are found when the VM boots; what such a hook adds is not seen.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{LinkNameSpaceType, gettid, move_into_link_name_space};
use rustix::time::Timespec;
use serde::Deserialize;
use serde_json::json;

/// How long a hook has that says nothing of it. The specification sets no bound, and everything here has one.
const LONGEST: Duration = Duration::from_secs(30);
/// Most of what it says that becomes part of an error, in bytes.
const SAID: usize = 1024;

/// `hooks` of a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Hooks {
    /// The older word for what comes next.
    pub prestart: Vec<Hook>,
    /// When the container is made.
    pub create_runtime: Vec<Hook>,
    /// In its namespaces, before its root is.
    pub create_container: Vec<Hook>,
    /// When it was started.
    pub poststart: Vec<Hook>,
    /// When it was deleted.
    pub poststop: Vec<Hook>,
}

/// One program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// Absolute.
    pub path: PathBuf,
    /// With its own name first.
    pub args: Vec<String>,
    /// Its environment, whole.
    pub env: Vec<String>,
    /// In seconds, above 0.
    pub timeout: Option<i64>,
}

/// What hooks are told of a container.
#[derive(Debug, Clone, Default)]
pub struct Subject {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: String,
    /// Its annotations.
    pub annotations: std::collections::BTreeMap<String, String>,
    /// Its pod's network namespace; none for a new one, without a name.
    pub network: Option<PathBuf>,
}

/// Where in the container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It is made, and its program does not run.
    Made,
    /// Its program runs.
    Started,
    /// It is no more.
    Deleted,
}

impl Moment {
    /// The specification's word for the container's state.
    fn status(self) -> &'static str {
        match self {
            Moment::Made => "creating",
            Moment::Started => "running",
            Moment::Deleted => "stopped",
        }
    }
}

/// A hook that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("hook {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It failed.
    #[error("hook {path} failed ({status}){}", quoted(.said))]
    Failed {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        said: String,
    },
    /// It was killed.
    #[error("hook {path} did not end within {after:?}")]
    Late {
        /// The program.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// There is no namespace for it.
    #[error(
        "hook {path}: the container's network namespace has no name on this host that a hook could find it by; give the container a namespace with a path"
    )]
    NoNetwork {
        /// The program.
        path: PathBuf,
    },
}

fn quoted(said: &str) -> String {
    if said.is_empty() { String::new() } else { format!(": {said:?}") }
}

impl Hooks {
    fn at(&self, moment: Moment) -> impl Iterator<Item = &Hook> {
        let (first, second): (&[Hook], &[Hook]) = match moment {
            Moment::Made => (&self.prestart, &self.create_runtime),
            Moment::Started => (&self.poststart, &[]),
            Moment::Deleted => (&self.poststop, &[]),
        };
        first.iter().chain(second)
    }

    /// Runs what is to be run at this moment, one after the other, to the first that fails.
    ///
    /// # Errors
    /// [`HookError`].
    pub async fn run(&self, moment: Moment, subject: &Subject) -> Result<(), HookError> {
        for hook in self.at(moment) {
            hook.run(moment, subject).await?;
        }
        Ok(())
    }
}

impl Hook {
    async fn run(&self, moment: Moment, subject: &Subject) -> Result<(), HookError> {
        if subject.network.is_none() && moment == Moment::Made {
            return Err(HookError::NoNetwork { path: self.path.clone() });
        }
        let (hook, subject) = (self.clone(), subject.clone());
        let (done, result) = tokio::sync::oneshot::channel();
        // A thread of its own, which does not come back from the pod's namespace.
        let started = std::thread::Builder::new().name("hook".into()).spawn(move || {
            // Whoever waits may have been given up with the sandbox.
            let _ = done.send(hook.run_here(moment, &subject));
        });
        started.map_err(|source| self.not_started(source))?;
        result.await.expect("a hook's thread does not panic")
    }

    fn run_here(&self, moment: Moment, subject: &Subject) -> Result<(), HookError> {
        let child = self.start(moment, subject).map_err(|source| self.not_started(source))?;
        let after = match self.timeout.map(u64::try_from) {
            Some(Ok(seconds)) if seconds > 0 => Duration::from_secs(seconds),
            _ => LONGEST,
        };
        match finish(child, after).map_err(|source| self.not_started(source))? {
            Some((status, _)) if status.success() => Ok(()),
            Some((status, said)) => Err(HookError::Failed { path: self.path.clone(), status, said }),
            None => Err(HookError::Late { path: self.path.clone(), after }),
        }
    }

    fn start(&self, moment: Moment, subject: &Subject) -> std::io::Result<Child> {
        if let Some(network) = &subject.network {
            let namespace = File::open(network)?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        }
        let mut command = Command::new(&self.path);
        if let Some((name, args)) = self.args.split_first() {
            command.arg0(name).args(args);
        }
        command.env_clear().envs(self.env.iter().filter_map(|pair| pair.split_once('=')));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.current_dir(&subject.bundle).spawn()?;
        let mut state = json!({
            "ociVersion": "1.1.0",
            "id": subject.id,
            "status": moment.status(),
            "bundle": subject.bundle,
            "annotations": subject.annotations,
        });
        if moment != Moment::Deleted {
            state["pid"] = gettid().as_raw_nonzero().get().into();
        }
        // Less than a pipe holds, and one that does not read it has no need of it.
        let _ = child.stdin.take().expect("it is piped").write_all(state.to_string().as_bytes());
        Ok(child)
    }

    fn not_started(&self, source: std::io::Error) -> HookError {
        HookError::Start { path: self.path.clone(), source }
    }
}

/// Waits for a program's end, and kills it when it does not come: its status, and what it said last.
fn finish(mut child: Child, after: Duration) -> std::io::Result<Option<(ExitStatus, String)>> {
    let deadline = Instant::now() + after;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a child's process number");
    let ended: OwnedFd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut stderr = child.stderr.take().expect("it is piped");
    rustix::io::ioctl_fionbio(&stderr, true)?;
    let (mut said, mut open) = (Vec::new(), true);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // It may end in this moment.
            let _ = child.kill();
            child.wait()?;
            return Ok(None);
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut ready = vec![PollFd::new(&ended, PollFlags::IN)];
        if open {
            ready.push(PollFd::new(&stderr, PollFlags::IN));
        }
        match poll(&mut ready, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let has_ended = !ready[0].revents().is_empty();
        // Before its end is taken, all that it said. What a child of its says later is nobody's.
        let mut bytes = [0; 4096];
        while let Ok(count) = stderr.read(&mut bytes) {
            if count == 0 {
                open = false;
                break;
            }
            said.extend(&bytes[..count.min(SAID - said.len().min(SAID))]);
        }
        if has_ended {
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            return Ok(Some((child.wait()?, said)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: serde_json::Value) -> Hooks {
        serde_json::from_value(json).unwrap()
    }

    fn subject(bundle: &tempfile::TempDir) -> Subject {
        Subject {
            id: "web".into(),
            bundle: bundle.path().to_str().unwrap().into(),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            // Our own, which needs no privilege to be left alone.
            network: None,
        }
    }

    fn shell(script: &str) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["X=y"]})
    }

    #[tokio::test]
    async fn a_hook_is_told_the_state_and_has_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let script = "cat > state; echo \"$X ${HOME-none}\" > env";
        let hooks = hooks(json!({"poststart": [shell(script)], "poststop": [shell("cat > last")]}));
        hooks.run(Moment::Started, &subject(&dir)).await.unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let state: serde_json::Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!((&state["id"], &state["status"]), (&json!("web"), &json!("running")));
        assert_eq!((&state["annotations"]["a"], &state["bundle"]), (&json!("b"), &json!(dir.path())));
        assert!(state["pid"].as_i64().unwrap() > 0);
        assert_eq!(read("env"), "y none\n");
        hooks.run(Moment::Deleted, &subject(&dir)).await.unwrap();
        let last: serde_json::Value = serde_json::from_str(&read("last")).unwrap();
        assert!(last["status"] == "stopped" && last.get("pid").is_none(), "{last}");
    }

    #[tokio::test]
    async fn the_first_that_fails_ends_it_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let run = async |script: &str| {
            let hooks = hooks(json!({"poststart": [shell(script), shell("touch second")]}));
            crate::error::chain(&hooks.run(Moment::Started, &subject(&dir)).await.unwrap_err())
        };
        assert_eq!(run("echo why >&2; exit 3").await, "hook /bin/sh failed (exit status: 3): \"why\"");
        // More than a pipe holds, of which the beginning is kept.
        let long = run("head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1").await;
        assert!(long.len() < 1200 && long.contains("xxx"), "{long}");
        assert!(!dir.path().join("second").exists());
        let missing = hooks(json!({"poststart": [{"path": "/no/such"}]}));
        let error = missing.run(Moment::Started, &subject(&dir)).await.unwrap_err();
        assert!(crate::error::chain(&error).starts_with("hook /no/such: No such file"), "{error}");
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut slow = shell("exec sleep 1000");
        slow["timeout"] = 1.into();
        let hooks = hooks(json!({"poststart": [slow]}));
        let begun = Instant::now();
        let error = hooks.run(Moment::Started, &subject(&dir)).await.unwrap_err();
        assert_eq!(error.to_string(), "hook /bin/sh did not end within 1s");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[tokio::test]
    async fn a_hook_without_a_namespace_is_not_let_loose_on_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        for kind in ["prestart", "createRuntime"] {
            let hooks = hooks(json!({kind: [shell("touch ran")]}));
            let error = hooks.run(Moment::Made, &subject(&dir)).await.unwrap_err();
            assert!(matches!(error, HookError::NoNetwork { .. }), "{error}");
        }
        assert!(!dir.path().join("ran").exists());
    }
}
