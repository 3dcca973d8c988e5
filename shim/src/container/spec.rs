//! The OCI configuration as containerd wrote it for this host, turned into one for the guest.
//!
//! Works on JSON values, not on typed structures: what is not named here passes through untouched, so that a field
//! that is newer than this code reaches the agent. What is changed:
//!
//! | field | becomes | because |
//! | --- | --- | --- |
//! | `root.path` | the container's directory in the share | the guest has its own tree |
//! | `mounts` of kind bind | a share of their own; `/dev/shm` a tmpfs | host paths mean nothing in the guest |
//! | `linux.namespaces` with a `path`, and `network` | removed: the guest's own is used | the VM is the pod, and has the interfaces of its network namespace |
//! | a `pid` namespace with a `path` | refused | the guest's own would show the agent |
//! | `linux.cgroupsPath` | `/ctvm/<id>` | the guest's tree is flat |
//! | `linux.devices` beyond the guest's | removed | host numbers |
//! | `linux.resources`: cpuset, block, network, rdma, huge pages | removed | host numbers, or not in the guest |
//! | `hooks`, AppArmor, SELinux, `intelRdt`, seccomp `listenerPath` | removed, with a warning where they ask for something | they belong to the host |

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

/// A configuration that cannot be run in a sandbox.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Not JSON.
    #[error("config.json: {0}")]
    Json(String),
    /// A field is missing or of the wrong type.
    #[error("config.json: {field} is missing or not {expected}")]
    Field {
        /// Its path.
        field: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A kind of mount that there is no way to make in the guest.
    #[error(
        "config.json: mount of type {kind:?} at {destination:?} is not supported; supported are bind, proc, sysfs, tmpfs, devpts, mqueue and cgroup"
    )]
    MountKind {
        /// Its type.
        kind: String,
        /// Where it should go.
        destination: String,
    },
    /// A mount option that the file share cannot honour.
    #[error("config.json: mount option {option:?} at {destination:?} is not supported")]
    MountOption {
        /// The option.
        option: String,
        /// Where it should go.
        destination: String,
    },
    /// A namespace of another process.
    #[error("config.json: joining the {kind} namespace {path:?} is not possible in a sandbox")]
    Namespace {
        /// Kind of namespace.
        kind: String,
        /// Whose.
        path: String,
    },
}

/// A host file or directory that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// Name of its share.
    pub share: String,
    /// The container may not write.
    pub read_only: bool,
}

/// A configuration for the guest and what it needs from the host.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSpec {
    /// The configuration, but for the sources of binds: see [`GuestSpec::set_bind_source`].
    pub config: Value,
    /// The host's files in it, in the order of their mounts.
    pub binds: Vec<Bind>,
    /// Position of each bind in `mounts`.
    positions: Vec<usize>,
    /// What was left out that someone may miss.
    pub warnings: Vec<String>,
}

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

impl Overview {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// [`SpecError::Json`].
    pub fn parse(config: &[u8]) -> Result<Self, SpecError> {
        serde_json::from_slice(config).map_err(|e| SpecError::Json(e.to_string()))
    }

    /// The network namespace of the pod: none for the host's own, an empty path for a new one.
    pub fn network(&self) -> Option<&Path> {
        let mut namespaces = self.linux.namespaces.iter();
        namespaces.find(|namespace| namespace.kind == "network").map(|namespace| namespace.path.as_path())
    }

    /// The pod that the container belongs to, when it is not its own.
    pub fn group(&self) -> Option<&str> {
        ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"]
            .iter()
            .find_map(|name| self.annotations.get(*name))
            .map(String::as_str)
            .filter(|id| !id.is_empty())
    }
}

/// Kinds of mount that the guest's runtime makes by itself.
const GUEST_KINDS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// Character devices that exist in every guest: (major, minor), the latter `None` for all.
const GUEST_DEVICES: [(i64, Option<i64>); 4] = [(1, None), (5, None), (10, Some(200)), (10, Some(229))];

/// Rewrites `config` for container `id`, whose root file system is shown at `root` in the guest.
///
/// # Errors
/// See [`SpecError`].
pub fn for_guest(config: &[u8], id: &str, share_path: &str, root: &str) -> Result<GuestSpec, SpecError> {
    let mut config: Value = serde_json::from_slice(config).map_err(|e| SpecError::Json(e.to_string()))?;
    let mut warnings = Vec::new();
    let top = object(&mut config, "the configuration")?;
    // The agent would say it too, but with less context.
    let args = top.get("process").and_then(|p| p.get("args")).and_then(Value::as_array);
    if args.is_none_or(|args| args.is_empty() || !args.iter().all(Value::is_string)) {
        return Err(SpecError::Field {
            field: "process.args".into(),
            expected: "a list of at least one string",
        });
    }
    let cwd = top.get("process").and_then(|p| p.get("cwd"));
    if cwd.is_some_and(|cwd| !cwd.as_str().is_some_and(|path| path.starts_with('/'))) {
        return Err(SpecError::Field { field: "process.cwd".into(), expected: "an absolute path" });
    }
    let cwd = top.get("process").and_then(|p| p.get("cwd")).and_then(Value::as_str);
    if cwd.is_none_or(|cwd| !cwd.starts_with('/')) {
        return Err(field("process.cwd", "an absolute path"));
    }
    if top.remove("hooks").is_some_and(|h| h.as_object().is_some_and(|h| !h.is_empty())) {
        warnings.push("hooks are not run: they are programs of the host".to_owned());
    }
    let root_entry = top.entry("root").or_insert_with(|| json!({}));
    object(root_entry, "root")?.insert("path".into(), root.into());

    if let Some(process) = top.get_mut("process") {
        let process = object(process, "process")?;
        for (field, what) in [("apparmorProfile", "AppArmor profile"), ("selinuxLabel", "SELinux label")] {
            if let Some(Value::String(value)) = process.remove(field)
                && !value.is_empty()
            {
                warnings.push(format!("{what} {value:?} is left out: the guest kernel has none"));
            }
        }
    }
    if let Some(linux) = top.get_mut("linux") {
        rewrite_linux(object(linux, "linux")?, id, &mut warnings)?;
    }
    let mut spec = GuestSpec { config, binds: Vec::new(), positions: Vec::new(), warnings };
    spec.rewrite_mounts(id, share_path)?;
    Ok(spec)
}

impl GuestSpec {
    /// Says where in the guest bind `index` of [`GuestSpec::binds`] is found: the share itself for a directory, a
    /// name in it for a file.
    pub fn set_bind_source(&mut self, index: usize, guest_path: &Path) {
        let mount = &mut self.config["mounts"][self.positions[index]];
        mount["source"] = guest_path.to_string_lossy().into_owned().into();
    }

    /// `config.json` for the agent.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).expect("a JSON value serialises")
    }

    fn rewrite_mounts(&mut self, id: &str, share_path: &str) -> Result<(), SpecError> {
        let Some(mounts) = self.config.get_mut("mounts") else { return Ok(()) };
        let mounts = mounts.as_array_mut().ok_or_else(|| field("mounts", "a list"))?;
        for (position, mount) in mounts.iter_mut().enumerate() {
            let mount = object(mount, "mounts[]")?;
            let destination = text(mount, "destination")
                .ok_or_else(|| field(&format!("mounts[{position}].destination"), "text"))?;
            let kind = text(mount, "type").unwrap_or_default();
            let options = strings(mount, "options");
            let is_bind = matches!(kind.as_str(), "bind" | "rbind")
                || options.iter().any(|o| o == "bind" || o == "rbind");
            if !is_bind {
                if GUEST_KINDS.contains(&kind.as_str()) {
                    continue;
                }
                return Err(SpecError::MountKind { kind, destination });
            }
            if destination == "/dev/shm" {
                // A host's tmpfs over a file share would be neither shared memory nor quick.
                mount.insert("type".into(), "tmpfs".into());
                mount.insert("source".into(), "shm".into());
                mount.insert(
                    "options".into(),
                    json!(["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
                );
                continue;
            }
            let source = text(mount, "source")
                .filter(|s| !s.is_empty())
                .ok_or_else(|| field(&format!("mounts[{position}].source"), "a path"))?;
            let mut kept = Vec::new();
            let mut read_only = false;
            for option in options {
                match option.as_str() {
                    "ro" | "rro" => {
                        read_only = true;
                        kept.push("ro".to_owned());
                    }
                    // The guest's mount cannot reach the host's peers in either direction.
                    "shared" | "rshared" | "slave" | "rslave" => {
                        self.warnings.push(format!(
                            "mount propagation {option:?} at {destination:?} becomes private in the guest"
                        ));
                        kept.push("rprivate".to_owned());
                    }
                    "z" | "Z" => {}
                    o if ["idmap", "ridmap"].contains(&o)
                        || ["uidmap=", "gidmap=", "idmap="].iter().any(|p| o.starts_with(p)) =>
                    {
                        return Err(SpecError::MountOption { option, destination });
                    }
                    _ => kept.push(option),
                }
            }
            // A colon is in no container's id, so no container's root has this name.
            let share = format!("{id}:mnt{}", self.binds.len());
            mount.insert("type".into(), "bind".into());
            mount.insert("source".into(), format!("{share_path}/{share}").into());
            mount.insert("options".into(), kept.into());
            self.binds.push(Bind { source: source.into(), share, read_only });
            self.positions.push(position);
        }
        Ok(())
    }
}

fn rewrite_linux(
    linux: &mut Map<String, Value>,
    id: &str,
    warnings: &mut Vec<String>,
) -> Result<(), SpecError> {
    linux.insert("cgroupsPath".into(), format!("/ctvm/{id}").into());
    linux.remove("mountLabel");
    linux.remove("intelRdt");
    if let Some(namespaces) = linux.get_mut("namespaces") {
        let list = namespaces.as_array_mut().ok_or_else(|| field("linux.namespaces", "a list"))?;
        for namespace in list.iter() {
            let kind = namespace.get("type").and_then(Value::as_str);
            let kind = kind.ok_or_else(|| field("linux.namespaces[].type", "text"))?;
            let path = namespace.get("path").and_then(Value::as_str).unwrap_or_default();
            if matches!(kind, "pid" | "user" | "mount") && !path.is_empty() {
                return Err(SpecError::Namespace { kind: kind.to_owned(), path: path.to_owned() });
            }
        }
        // The VM is the pod: its network is the pod's, and so is what containers of a pod join of each other.
        list.retain(|n| n["type"] != "network" && n["path"].as_str().is_none_or(str::is_empty));
    }
    if let Some(devices) = linux.get_mut("devices") {
        let list = devices.as_array_mut().ok_or_else(|| field("linux.devices", "a list"))?;
        let before = list.len();
        list.retain(is_in_every_guest);
        if list.len() < before {
            warnings.push(format!("{} device(s) of the host are left out", before - list.len()));
        }
        if list.is_empty() {
            linux.remove("devices");
        }
    }
    if let Some(resources) = linux.get_mut("resources") {
        let resources = object(resources, "linux.resources")?;
        for (name, what) in [
            ("blockIO", "block I/O limits"),
            ("network", "network classes"),
            ("rdma", "RDMA limits"),
            ("hugepageLimits", "huge page limits"),
        ] {
            let asked = |v: &Value| {
                v.as_object().is_some_and(|o| !o.is_empty()) || v.as_array().is_some_and(|a| !a.is_empty())
            };
            if resources.remove(name).as_ref().is_some_and(asked) {
                warnings.push(format!("{what} are left out: they are about the host"));
            }
        }
        if let Some(Value::Object(cpu)) = resources.get_mut("cpu") {
            cpu.remove("cpus");
            cpu.remove("mems");
        }
    }
    if let Some(Value::Object(seccomp)) = linux.get_mut("seccomp") {
        seccomp.remove("listenerPath");
        seccomp.remove("listenerMetadata");
    }
    Ok(())
}

fn is_in_every_guest(device: &Value) -> bool {
    let number = |name| device.get(name).and_then(Value::as_i64).unwrap_or(-1);
    let kind = device.get("type").and_then(Value::as_str).unwrap_or_default();
    matches!(kind, "c" | "u")
        && GUEST_DEVICES
            .iter()
            .any(|(major, minor)| *major == number("major") && minor.is_none_or(|m| m == number("minor")))
}

fn field(field: &str, expected: &'static str) -> SpecError {
    SpecError::Field { field: field.to_owned(), expected }
}

fn object<'a>(value: &'a mut Value, name: &str) -> Result<&'a mut Map<String, Value>, SpecError> {
    value.as_object_mut().ok_or_else(|| field(name, "an object"))
}

fn text(object: &Map<String, Value>, name: &str) -> Option<String> {
    object.get(name).and_then(Value::as_str).map(str::to_owned)
}

fn strings(object: &Map<String, Value>, name: &str) -> Vec<String> {
    let list = object.get(name).and_then(Value::as_array);
    list.into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `ctr run` of containerd 1.7 writes, shortened, with some of what CRI adds.
    const CTR: &str = r#"{
        "ociVersion": "1.1.0",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh", "-c", "echo hi"], "env": ["PATH=/bin"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true, "apparmorProfile": "cri-containerd.apparmor.d", "oomScoreAdj": -998
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "web",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/sandboxes/x/shm", "options": ["rbind", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/pod/hosts", "options": ["rbind", "rprivate", "rw"]},
            {"destination": "/data", "type": "none", "source": "/srv/data", "options": ["rbind", "ro", "rshared"]}
        ],
        "hooks": {"createRuntime": [{"path": "/usr/bin/hook"}]},
        "annotations": {"io.kubernetes.cri.sandbox-id": "pod1"},
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}], "cpu": {"shares": 2, "cpus": "0-3"}, "memory": {"limit": 1048576},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]},
            "cgroupsPath": "/default/web",
            "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/9/ns/ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network", "path": "/var/run/netns/x"}],
            "devices": [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}, {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "listenerPath": "/run/s", "syscalls": []},
            "maskedPaths": ["/proc/kcore"], "newerField": {"kept": true}
        }
    }"#;

    fn rewritten() -> GuestSpec {
        for_guest(CTR.as_bytes(), "web", "/run/ctvm/share", "/run/ctvm/share/web").unwrap()
    }

    fn with(change: impl Fn(&mut Value)) -> Result<GuestSpec, SpecError> {
        let mut config: Value = serde_json::from_str(CTR).unwrap();
        change(&mut config);
        for_guest(config.to_string().as_bytes(), "web", "/run/ctvm/share", "/run/ctvm/share/web")
    }

    #[test]
    fn the_result_is_a_valid_oci_configuration() {
        // The agent reads it with the same crate.
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&rewritten().to_json()).unwrap();
        assert_eq!(spec.root().as_ref().unwrap().path().to_str(), Some("/run/ctvm/share/web"));
        assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
        assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some("/ctvm/web".as_ref()));
        assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), Some(true));
    }

    #[test]
    fn what_belongs_to_the_host_is_gone() {
        let spec = rewritten();
        let text = spec.config.to_string();
        for host in [
            "/usr/bin/hook",
            "/var/run/netns",
            "/proc/9",
            "apparmor.d",
            "0-3",
            "/dev/kvm",
            "/run/s\"",
            "/srv/data",
        ] {
            assert!(!text.contains(host), "{host} in {text}");
        }
        let namespaces = spec.config["linux"]["namespaces"].to_string();
        assert_eq!(namespaces, r#"[{"type":"pid"},{"type":"uts"},{"type":"mount"}]"#);
        assert_eq!(spec.config["linux"]["devices"].as_array().unwrap().len(), 1);
        assert!(spec.warnings.iter().any(|w| w.contains("hooks")), "{:?}", spec.warnings);
        assert!(spec.warnings.iter().any(|w| w.contains("AppArmor")), "{:?}", spec.warnings);
        assert!(spec.warnings.iter().any(|w| w.contains("1 device(s)")), "{:?}", spec.warnings);
    }

    #[test]
    fn what_is_not_named_passes_through() {
        let config = rewritten().config;
        assert_eq!(config["linux"]["newerField"]["kept"], true);
        assert_eq!(config["linux"]["resources"]["memory"]["limit"], 1_048_576);
        assert_eq!(config["linux"]["resources"]["cpu"]["shares"], 2);
        assert_eq!(config["linux"]["maskedPaths"][0], "/proc/kcore");
        assert_eq!(config["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(config["mounts"][0]["type"], "proc");
        assert_eq!(config["mounts"][2]["type"], "cgroup");
    }

    #[test]
    fn binds_become_shares() {
        let mut spec = rewritten();
        assert_eq!(
            spec.binds,
            [
                Bind { source: "/var/lib/pod/hosts".into(), share: "web:mnt0".into(), read_only: false },
                Bind { source: "/srv/data".into(), share: "web:mnt1".into(), read_only: true },
            ]
        );
        spec.set_bind_source(0, "/run/ctvm/share/web:mnt0/hosts".as_ref());
        assert_eq!(spec.config["mounts"][4]["source"], "/run/ctvm/share/web:mnt0/hosts");
        assert_eq!(spec.config["mounts"][5]["source"], "/run/ctvm/share/web:mnt1");
        assert_eq!(spec.config["mounts"][5]["type"], "bind");
        assert_eq!(spec.config["mounts"][5]["options"].to_string(), r#"["rbind","ro","rprivate"]"#);
        // Shared memory is the guest's own.
        assert_eq!(spec.config["mounts"][3]["type"], "tmpfs");
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let e = with(|c| c["mounts"][0]["type"] = "nfs".into()).unwrap_err();
        assert!(e.to_string().contains("type \"nfs\" at \"/proc\" is not supported"), "{e}");
        let e = with(|c| c["mounts"][5]["options"][0] = "rbind".into());
        assert!(e.is_ok());
        let e = with(|c| c["mounts"][5]["options"][2] = "idmap".into()).unwrap_err();
        assert!(e.to_string().contains("option \"idmap\" at \"/data\""), "{e}");
        let e = with(|c| c["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into()).unwrap_err();
        assert!(e.to_string().contains("joining the pid namespace \"/proc/1/ns/pid\""), "{e}");
        let e = with(|c| c["mounts"][5]["source"] = "".into()).unwrap_err();
        assert!(e.to_string().contains("mounts[5].source is missing or not a path"), "{e}");
        let e = with(|c| c["process"]["args"] = json!([])).unwrap_err();
        assert!(e.to_string().contains("process.args"), "{e}");
        let relative = CTR.replace(r#""cwd": "/""#, r#""cwd": "usr""#);
        let e = for_guest(relative.as_bytes(), "web", "/run/ctvm/share", "/").unwrap_err();
        assert!(e.to_string().contains("process.cwd"), "{e}");
        let e = with(|c| c["process"]["cwd"] = "relative".into()).unwrap_err();
        assert!(e.to_string().contains("process.cwd is missing or not an absolute path"), "{e}");
        let e = with(|c| c["linux"] = json!("x")).unwrap_err();
        assert!(e.to_string().contains("linux is missing or not an object"), "{e}");
        let e = for_guest(b"{", "web", "/s", "/s/web").unwrap_err();
        assert!(matches!(e, SpecError::Json(_)));
    }

    #[test]
    fn a_small_configuration_will_do() {
        let spec =
            for_guest(br#"{"ociVersion":"1.0.2","process":{"args":["/x"],"cwd":"/"}}"#, "a", "/s", "/s/a")
                .unwrap();
        assert_eq!(spec.config["root"]["path"], "/s/a");
        assert!(spec.binds.is_empty() && spec.warnings.is_empty());
    }

    #[test]
    fn the_overview_finds_the_pod() {
        let overview = Overview::parse(CTR.as_bytes()).unwrap();
        assert_eq!(overview.group(), Some("pod1"));
        assert_eq!(overview.hostname, "web");
        assert_eq!(overview.process.oom_score_adj, Some(-998));
        assert_eq!(overview.linux.cgroups_path, "/default/web");
        let crio = Overview::parse(br#"{"annotations":{"io.kubernetes.cri-o.SandboxID":"p"}}"#).unwrap();
        assert_eq!(crio.group(), Some("p"));
        assert_eq!(Overview::parse(b"{}").unwrap().group(), None);
    }
}
