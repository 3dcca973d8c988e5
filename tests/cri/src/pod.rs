//! A pod of a test: made with usual settings, removed with all that is in it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::command::{LIMIT, wait_at_most, wait_until};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, IdMapping, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, UserNamespace,
};
use tempfile::TempDir;

use crate::Cri;
use crate::client::Output;

/// Numbers names, so that no two pods or containers share one.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Runs until the first request to stop, which it obeys from the moment that it is ready.
const FOREVER: &str = "trap 'exit 0' TERM; echo ready; while :; do sleep 3600 & wait $!; done";

/// A running pod.
#[derive(Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
    cri: Cri,
    folder: TempDir,
    // Dropped after the pod's end.
    _group: Group,
}

/// The control group that the kubelet makes for a pod, and removes when it has removed the pod.
#[derive(Debug)]
struct Group(PathBuf);

impl Group {
    fn make(parent: &str) -> Result<Group> {
        let path = Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/'));
        std::fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Group(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What is left of a pod keeps it, and the census tells.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Removes the control groups of pods that are gone, as the kubelet does it for those that it does not know.
pub fn remove_empty_groups() {
    for entry in std::fs::read_dir("/sys/fs/cgroup/kubepods").into_iter().flatten().flatten() {
        // Fails for one that is in use, and for what is no group.
        let _ = std::fs::remove_dir(entry.path());
    }
}

impl Pod {
    /// Starts a pod under the given runtime.
    pub fn run(cri: &Cri, handler: &str) -> Result<Pod> {
        Self::run_with(cri, handler, |_| ())
    }

    /// The same, with `change` made to its configuration.
    pub fn run_with(cri: &Cri, handler: &str, change: impl FnOnce(&mut PodSandboxConfig)) -> Result<Pod> {
        let folder = tempfile::Builder::new().prefix("pod").tempdir_in("/var/tmp")?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let uid = format!("{}-{number}", std::process::id());
        let mut config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: format!("pod-{number}"),
                uid: uid.clone(),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: format!("pod-{number}"),
            log_directory: folder.path().display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/pod{uid}"),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(own_pids()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        change(&mut config);
        let group = Group::make(config.linux.as_ref().map_or("", |linux| &linux.cgroup_parent))?;
        let id = match cri.run_pod(&config, handler) {
            // The CNI plugins of Debian do not take up what a signal interrupts, which slow machines show.
            Err(e) if format!("{e:#}").contains("interrupted system call") => {
                cri.run_pod(&config, handler)?
            }
            other => other?,
        };
        Ok(Pod { id, config, cri: cri.clone(), folder, _group: group })
    }

    /// The configuration of a container that runs `command`.
    pub fn container(&self, command: &[&str]) -> ContainerConfig {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: format!("container-{number}"), attempt: 0 }),
            image: Some(ImageSpec { image: e2e::IMAGE.into(), ..ImageSpec::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{number}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(NamespaceOption { userns_options: self.users(), ..own_pids() }),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        }
    }

    /// The pod's users, which are those of its containers.
    fn users(&self) -> Option<UserNamespace> {
        let linux = self.config.linux.as_ref()?.security_context.as_ref()?;
        linux.namespace_options.as_ref()?.userns_options.clone()
    }

    /// The configuration of a container that runs until it is stopped.
    pub fn forever(&self) -> ContainerConfig {
        self.container(&["sh", "-c", FOREVER])
    }

    /// Makes and starts a container; its id.
    pub fn start(&self, config: &ContainerConfig) -> Result<String> {
        let id = self.cri.create(&self.id, config, &self.config)?;
        self.cri.start(&id)?;
        Ok(id)
    }

    /// Starts a container that runs until it is stopped.
    pub fn start_forever(&self) -> Result<String> {
        let config = self.forever();
        let id = self.start(&config)?;
        self.wait_until_ready(&config)?;
        Ok(id)
    }

    /// Waits for a container of [`Pod::forever`] to obey requests.
    pub fn wait_until_ready(&self, config: &ContainerConfig) -> Result<()> {
        wait_until("the container is ready", || Ok(self.log(config).is_ok_and(|(out, _)| out == "ready\n")))
    }

    /// Runs a container to its end: its exit code, and its log.
    pub fn finish(&self, config: &ContainerConfig) -> Result<Output> {
        self.finish_within(LIMIT, config)
    }

    /// The same with a limit of one's own.
    pub fn finish_within(&self, limit: Duration, config: &ContainerConfig) -> Result<Output> {
        let id = self.start(config)?;
        let code = self.exit_code_within(limit, &id)?;
        let (stdout, stderr) = self.log(config)?;
        Ok(Output { stdout, stderr, code })
    }

    /// Runs a shell script in a container of its own to its end; its standard output.
    pub fn script(&self, script: &str) -> Result<String> {
        self.finish(&self.container(&["sh", "-c", script]))?.ok()
    }

    /// Waits for a container's end.
    pub fn exit_code(&self, id: &str) -> Result<i32> {
        self.exit_code_within(LIMIT, id)
    }

    fn exit_code_within(&self, limit: Duration, id: &str) -> Result<i32> {
        let exited = i32::from(ContainerState::ContainerExited);
        wait_at_most(limit, "the container has ended", || Ok(self.cri.status(id)?.state == exited))?;
        Ok(self.cri.status(id)?.exit_code)
    }

    /// Where a container's log is.
    pub fn log_path(&self, config: &ContainerConfig) -> PathBuf {
        self.folder.path().join(&config.log_path)
    }

    /// What a container wrote to its standard output and error, taken out of CRI's log format.
    pub fn log(&self, config: &ContainerConfig) -> Result<(String, String)> {
        let text = std::fs::read_to_string(self.log_path(config)).context("read the container's log")?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        for line in text.lines() {
            // TIME STREAM TAG TEXT; tag P is for a part of a line.
            let mut parts = line.splitn(4, ' ');
            let (_, stream, tag, content) = (parts.next(), parts.next(), parts.next(), parts.next());
            let to = match stream {
                Some("stdout") => &mut stdout,
                Some("stderr") => &mut stderr,
                _ => anyhow::bail!("a log line without a stream: {line:?}"),
            };
            to.push_str(content.unwrap_or_default());
            if tag == Some("F") {
                to.push('\n');
            }
        }
        Ok((stdout, stderr))
    }

    /// A new folder of the host that is removed with the pod.
    pub fn host_folder(&self, name: &str) -> Result<PathBuf> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.path().join(format!("folder-{number}")).join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// The pod's first address.
    pub fn address(&self) -> Result<String> {
        let status = self.cri.pod_status(&self.id)?;
        let network = status.network.context("the pod has no network status")?;
        ensure!(!network.ip.is_empty(), "the pod has no address");
        Ok(network.ip)
    }

    /// Removes its containers, those that run too.
    pub fn remove_containers(&self) -> Result<()> {
        self.cri.containers_of(&self.id)?.iter().try_for_each(|id| self.cri.remove(id))
    }

    /// Stops and removes it, saying what went wrong.
    pub fn end(self) -> Result<()> {
        self.cri.stop_pod(&self.id)?;
        self.cri.remove_pod(&self.id)
    }

    /// The same for one that has lost its shim or VMM, as the kubelet does it: until it works. CRI takes a container that ends
    /// just now for stopped, and then does not remove it because it runs.
    pub fn end_within(self, limit: Duration) -> Result<()> {
        let mut last = None;
        let ended = wait_at_most(limit, "the pod is removed", || {
            last = self.cri.stop_pod(&self.id).and_then(|()| self.cri.remove_pod(&self.id)).err();
            Ok(last.is_none())
        });
        ended.with_context(|| format!("{last:?}"))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // After a failed case there is nothing to do about a second failure.
        let _ = self.cri.stop_pod(&self.id);
        let _ = self.cri.remove_pod(&self.id);
    }
}

/// What the kubelet asks for unless a pod says otherwise: the pod's network and IPC, process numbers of one's own.
fn own_pids() -> NamespaceOption {
    NamespaceOption { pid: NamespaceMode::Container.into(), ..NamespaceOption::default() }
}

/// The security settings of a container, to be changed.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

/// Gives a pod users of its own, as the kubelet does it for `hostUsers: false`: ids 0 to 65535 of its containers are those
/// from `first` on of the host.
pub fn own_users(config: &mut PodSandboxConfig, first: u32) {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options.get_or_insert_default().userns_options = Some(UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: id_mappings(first),
        gids: id_mappings(first),
    });
}

/// The mappings of such users.
pub fn id_mappings(first: u32) -> Vec<IdMapping> {
    vec![IdMapping { host_id: first, container_id: 0, length: 65_536 }]
}

/// A host folder in a container.
pub fn mount(host: &Path, container: &str) -> Mount {
    Mount { host_path: host.display().to_string(), container_path: container.into(), ..Mount::default() }
}
