//! What the shim itself reads from a container's `config.json`: whose it is, how large its pod wants to be, where it
//! sits on the host. Everything else is for the guest ([`spec`](super::spec)).

use std::path::{Path, PathBuf};

use agent_api::users::IdMaps;

use super::devices::{self, Device, DeviceError, HostDisk, Rule};
use super::hooks::Hooks;
use super::limits::Limits;
use super::spec::SpecError;
use super::users::{self, IdMapping};

/// What the shim itself reads from a configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Overview {
    /// Annotations: grouping and sizing.
    pub annotations: std::collections::BTreeMap<String, String>,
    /// Name of the host.
    pub hostname: String,
    /// Root file system.
    pub root: OverviewRoot,
    /// Parts for Linux.
    pub linux: OverviewLinux,
    /// The process.
    pub process: OverviewProcess,
    /// Programs to run beside it.
    pub hooks: Hooks,
}

/// `root`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct OverviewRoot {
    /// Absolute, or relative to the bundle.
    pub path: PathBuf,
}

/// `linux`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct OverviewLinux {
    /// The control group on the host.
    pub cgroups_path: String,
    /// Namespaces of its own, or of others.
    pub namespaces: Vec<OverviewNamespace>,
    /// Limits.
    pub resources: OverviewResources,
    /// Devices.
    pub devices: Vec<Device>,
    /// Users of its user namespace.
    pub uid_mappings: Vec<IdMapping>,
    /// Groups of it.
    pub gid_mappings: Vec<IdMapping>,
}

/// `linux.resources`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct OverviewResources {
    /// `memory`.
    pub memory: OverviewMemory,
    /// `cpu`.
    pub cpu: OverviewCpu,
    /// Which devices may be used, and how.
    pub devices: Vec<Rule>,
}

impl OverviewResources {
    /// The limits that they set where none were before.
    pub fn limits(&self) -> Limits {
        Limits::default().changed(self)
    }
}

/// `linux.resources.memory`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct OverviewMemory {
    /// In bytes; none, 0 and below for no limit.
    pub limit: Option<i64>,
}

/// `linux.resources.cpu`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct OverviewCpu {
    /// In microseconds each period; none, 0 and below for no limit.
    pub quota: Option<i64>,
    /// In microseconds.
    pub period: Option<u64>,
    /// A list of CPUs.
    pub cpus: String,
}

/// One of `linux.namespaces`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct OverviewNamespace {
    /// Which kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whose; empty for a new one.
    pub path: PathBuf,
}

/// `process`.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct OverviewProcess {
    /// How willing the host is to kill it.
    pub oom_score_adj: Option<i32>,
}

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// There is no pod: it has the VM to itself.
    Single,
    /// It stands for the pod: its network, IPC and host name are those of all.
    Pod,
    /// It is one of the pod's containers.
    Member,
}

/// Annotations, each as containerd and as CRI-O name it.
const SANDBOX_ID: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

impl Overview {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`SpecError::Json`].
    pub fn parse(config: &[u8]) -> Result<Self, SpecError> {
        serde_json::from_slice(config).map_err(|e| SpecError::Json(e.to_string()))
    }

    /// Takes it from what is read already.
    ///
    /// # Errors
    /// [`SpecError::Json`].
    pub fn of(config: &serde_json::Value) -> Result<Self, SpecError> {
        serde::Deserialize::deserialize(config).map_err(|e: serde_json::Error| SpecError::Json(e.to_string()))
    }

    /// That of the bundle, which has none where a pod is made by the Sandbox API.
    ///
    /// # Errors
    /// [`SpecError::Json`].
    pub fn of_bundle(bundle: &Path) -> Result<Option<Self>, SpecError> {
        match std::fs::read(bundle.join("config.json")) {
            Ok(config) => Self::parse(&config).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(SpecError::Json(e.to_string())),
        }
    }

    /// The pod's name for the container.
    pub fn name(&self) -> Option<&str> {
        let name = self.annotations.get("io.kubernetes.cri.container-name")?;
        Some(name.as_str()).filter(|name| !name.is_empty())
    }

    /// The network namespace of the pod: none for the host's own, an empty path for a new one.
    pub fn network(&self) -> Option<&Path> {
        let mut namespaces = self.linux.namespaces.iter();
        namespaces.find(|namespace| namespace.kind == "network").map(|namespace| namespace.path.as_path())
    }

    /// Whether it is a pod whose network is made once its task has a process number, in that process's namespace: with
    /// users of its own, up to containerd 1.7.
    pub fn network_comes_late(&self) -> bool {
        let has_users = self.linux.namespaces.iter().any(|namespace| namespace.kind == "user");
        let is_new = self.network().is_some_and(|path| path.as_os_str().is_empty());
        self.role() == Role::Pod && has_users && is_new
    }

    /// The users and groups that it has to itself, if it is to have some.
    ///
    /// # Errors
    /// [`SpecError::Users`].
    pub fn users(&self) -> Result<Option<IdMaps>, SpecError> {
        let asked = self.linux.namespaces.iter().any(|namespace| namespace.kind == "user");
        let maps = asked.then(|| users::namespace(&self.linux.uid_mappings, &self.linux.gid_mappings));
        Ok(maps.transpose()?)
    }

    /// The block devices that it asks for.
    ///
    /// # Errors
    /// [`DeviceError`] for a device that cannot be had in a VM.
    pub fn disks(&self) -> Result<Vec<HostDisk>, DeviceError> {
        devices::disks(&self.linux.devices, &self.linux.resources.devices)
    }

    /// The pod that the container belongs to, when it is not its own.
    pub fn group(&self) -> Option<&str> {
        self.annotation(SANDBOX_ID).filter(|id| !id.is_empty())
    }

    /// What the container is in its pod.
    pub fn role(&self) -> Role {
        match self.annotation(CONTAINER_TYPE) {
            Some("sandbox") => Role::Pod,
            Some("container") => Role::Member,
            _ => Role::Single,
        }
    }

    /// The value under containerd's or CRI-O's name.
    fn annotation(&self, names: [&str; 2]) -> Option<&str> {
        names.iter().find_map(|name| self.annotations.get(*name)).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_and_the_containers_role_in_it() {
        let parse = |text: &str| Overview::parse(text.as_bytes()).unwrap();
        let web = parse(
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod1","io.kubernetes.cri.container-type":"container"},
                "hostname":"web","process":{"oomScoreAdj":-998},"linux":{"cgroupsPath":"/default/web"}}"#,
        );
        assert_eq!((web.group(), web.role()), (Some("pod1"), Role::Member));
        assert_eq!(web.hostname, "web");
        assert_eq!(web.process.oom_score_adj, Some(-998));
        assert_eq!(web.linux.cgroups_path, "/default/web");
        let crio = parse(
            r#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"p","io.kubernetes.cri-o.ContainerType":"sandbox"}}"#,
        );
        assert_eq!((crio.group(), crio.role()), (Some("p"), Role::Pod));
        assert_eq!((parse("{}").group(), parse("{}").role()), (None, Role::Single));
    }

    #[test]
    fn the_network_of_a_pod_with_users_may_come_late() {
        let late = |kind: &str, namespaces: &str| {
            let annotation = format!(r#"{{"io.kubernetes.cri.container-type":"{kind}"}}"#);
            let text = format!(r#"{{"annotations":{annotation},"linux":{{"namespaces":[{namespaces}]}}}}"#);
            Overview::parse(text.as_bytes()).unwrap().network_comes_late()
        };
        let (user, new) = (r#"{"type":"user"}"#, r#"{"type":"network"}"#);
        assert!(late("sandbox", &format!("{user},{new}")));
        assert!(!late("container", &format!("{user},{new}")));
        assert!(!late("sandbox", new) && !late("sandbox", user));
        assert!(!late("sandbox", &format!(r#"{user},{{"type":"network","path":"/run/netns/x"}}"#)));
    }
}
