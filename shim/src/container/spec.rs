//! The OCI configuration as containerd wrote it for this host, turned into one for the guest.
//!
//! Works on JSON values, not on typed structures: what is not named here passes through untouched, so that a field
//! that is newer than this code reaches the agent. What is changed:
//!
//! | field | becomes | because |
//! | --- | --- | --- |
//! | `root.path` | the container's directory in the share | the guest has its own tree |
//! | `mounts` of kind bind | a share of their own; `/dev/shm` the pod's own tmpfs | host paths mean nothing in the guest |
//! | `linux.namespaces`: `network`, `ipc` and `uts` of a pod | removed: the guest's own are used | the VM is the pod, and has the interfaces of its network namespace |
//! | a `user` namespace, `uidMappings`, `gidMappings` | the sandbox's, which the agent makes with the same maps | the network and the like belong to it |
//! | a `pid` namespace of another container | named by that container's id | its number on this host is one the shim made up |
//! | no `pid`, no `ipc` namespace | refused | that asks for the host's processes and memory |
//! | a bind with `uidMappings` and `gidMappings`, or `idmap` | a share of an id-mapped mount | FUSE in the guest has none |
//! | `linux.cgroupsPath` | `/ctvm/<id>` | the guest's tree is flat |
//! | `linux.devices` | block devices become disks, others are the guest's own or refused ([`devices`](super::devices)) | host numbers |
//! | `linux.resources`: cpuset, block, network, rdma | removed | host numbers, or not in the guest |
//! | a bind of huge pages (hugetlbfs), `hugepageLimits` above 0 | the guest's own huge pages of that size | they are memory |
//! | `hooks` but `startContainer` | removed, and run on this host ([`hooks`](super::hooks)) | they are the host's |
//! | AppArmor, SELinux, `intelRdt`, seccomp `listenerPath` | removed, with a warning where they ask for something | they belong to the host |

use std::path::{Path, PathBuf};

use agent_api::users::{IdMapError, IdMaps};
use agent_api::{HUGE_PAGES, SANDBOX_SHM};
use serde_json::{Map, Value, json};

use super::devices::{DeviceError, HostDisk};
use super::overview::Role;

mod devices;
mod linux;
mod mounts;

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
        "config.json: mount of type {kind:?} at {destination:?} is not supported; supported are bind, proc, sysfs, tmpfs, devpts, mqueue, cgroup and hugetlbfs"
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
    /// A namespace that is left out, which asks for the host's.
    #[error(
        "config.json: the host's {kind} namespace cannot be used from a sandbox: give the pod one of its own"
    )]
    HostNamespace {
        /// Kind of namespace.
        kind: &'static str,
    },
    /// Maps that no user namespace can have.
    #[error("config.json: user namespace: {0}")]
    Users(#[from] IdMapError),
    /// Other users than those that the pod has.
    #[error("config.json: the container {asked}, and its pod {pod}: containers of a pod have the same users")]
    OtherUsers {
        /// What it asks for.
        asked: &'static str,
        /// What there is.
        pod: &'static str,
    },
    /// An id-mapped mount without a map, or with one that cannot be.
    #[error("config.json: the id-mapped mount at {destination:?} {why}")]
    IdMapped {
        /// Where it should go.
        destination: String,
        /// What is wrong.
        why: String,
    },
    /// A namespace of another process.
    #[error("config.json: joining the {kind} namespace {path:?} is not possible in a sandbox")]
    Namespace {
        /// Kind of namespace.
        kind: String,
        /// Whose.
        path: String,
    },
    /// A device that cannot be had in a VM.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A program of the host that should run in the container's namespaces.
    #[error(
        "config.json: createContainer hook {path:?} cannot be run: it is a program of the host, and the container's namespaces are in the VM"
    )]
    Hook {
        /// The program.
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
    /// What the host mounts below it later shows too.
    pub live: bool,
    /// Its files' owners are shifted.
    pub map: Option<IdMapped>,
}

/// How the owners of files are shifted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapped {
    /// From those of the files to those that are shown.
    pub maps: IdMaps,
    /// In the mounts below, too.
    pub recursive: bool,
}

/// Where containers have the pod's shared memory.
pub const SHM: &str = "/dev/shm";

/// Its size where the host does not say, in bytes: that of containerd and of Docker.
pub const SHM_SIZE: u64 = 64 << 20;

/// Where a container goes.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// Its id.
    pub id: &'a str,
    /// Where the guest mounts the share of host directories.
    pub share_path: &'a str,
    /// The container of this sandbox that has that process number on this host.
    pub container_of: &'a dyn Fn(u32) -> Option<String>,
    /// The sandbox's users, if they are not the guest's.
    pub users: Option<&'a IdMaps>,
}

impl std::fmt::Debug for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("id", &self.id).field("share_path", &self.share_path).finish()
    }
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
    /// The block devices in it, in their order: see [`GuestSpec::set_disk`].
    pub disks: Vec<HostDisk>,
    /// Position of each disk in `linux.devices`.
    disk_positions: Vec<usize>,
    /// The pod's shared memory: position in `mounts`, and its directory on the host.
    shm: Option<(usize, PathBuf)>,
    /// What was left out that someone may miss.
    pub warnings: Vec<String>,
}

/// Reads `config.json`.
///
/// # Errors
/// [`SpecError::Json`].
pub fn parse(config: &[u8]) -> Result<Value, SpecError> {
    serde_json::from_slice(config).map_err(|e| SpecError::Json(e.to_string()))
}

/// Rewrites `config` for a container at its place.
///
/// # Errors
/// See [`SpecError`].
pub fn for_guest(mut config: Value, role: Role, place: Place<'_>) -> Result<GuestSpec, SpecError> {
    let mut warnings = Vec::new();
    let top = object(&mut config, "the configuration")?;
    // The agent would say it too, but with less context.
    let args = top.get("process").and_then(|p| p.get("args")).and_then(Value::as_array);
    if args.is_none_or(|args| args.is_empty() || !args.iter().all(Value::is_string)) {
        return Err(field("process.args", "a list of at least one string"));
    }
    let cwd = top.get("process").and_then(|p| p.get("cwd")).and_then(Value::as_str);
    if cwd.is_none_or(|cwd| !cwd.starts_with('/')) {
        return Err(field("process.cwd", "an absolute path"));
    }
    if role != Role::Single {
        // The guest has the pod's name already, and there is one for all.
        top.remove("hostname");
        top.remove("domainname");
    }
    rewrite_hooks(top)?;
    let root_entry = top.entry("root").or_insert_with(|| json!({}));
    let root = format!("{}/{}", place.share_path, place.id);
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
    let (disk_positions, disks) = match top.get_mut("linux") {
        Some(linux) => linux::rewrite(object(linux, "linux")?, role, place, &mut warnings)?,
        None => Vec::new(),
    }
    .into_iter()
    .unzip();
    let mut spec = GuestSpec {
        config,
        binds: Vec::new(),
        positions: Vec::new(),
        disks,
        disk_positions,
        shm: None,
        warnings,
    };
    spec.rewrite_mounts(place)?;
    Ok(spec)
}

impl GuestSpec {
    /// The container's root directory is elsewhere in the guest than in the file share.
    pub fn set_root(&mut self, path: &str) {
        self.config["root"]["path"] = path.into();
    }
}

/// Leaves what runs in the container.
fn rewrite_hooks(top: &mut Map<String, Value>) -> Result<(), SpecError> {
    let Some(mut hooks) = top.remove("hooks") else { return Ok(()) };
    let first = hooks["createContainer"].get(0);
    if let Some(hook) = first {
        let path = hook["path"].as_str().unwrap_or_default().to_owned();
        return Err(SpecError::Hook { path });
    }
    let of_container = hooks.get_mut("startContainer").map(Value::take);
    if let Some(hooks) = of_container.filter(|hooks| hooks.as_array().is_some_and(|list| !list.is_empty())) {
        top.insert("hooks".into(), json!({ "startContainer": hooks }));
    }
    Ok(())
}

impl GuestSpec {
    /// Says where in the guest bind `index` of [`GuestSpec::binds`] is found: the share itself for a directory, a
    /// name in it for a file.
    pub fn set_bind_source(&mut self, index: usize, guest_path: &Path) {
        let mount = &mut self.config["mounts"][self.positions[index]];
        mount["source"] = guest_path.to_string_lossy().into_owned().into();
    }

    /// Makes bind `index` of [`GuestSpec::binds`] one of the guest's huge pages of `page` bytes, the same for every
    /// container of the pod that says `volume`.
    pub fn set_huge_pages(&mut self, index: usize, volume: &str, page: u64) {
        let mount = &mut self.config["mounts"][self.positions[index]];
        let access = if self.binds[index].read_only { "ro" } else { "rw" };
        *mount = json!({
            "destination": mount["destination"],
            "type": "hugetlbfs",
            "source": format!("{HUGE_PAGES}{volume}"),
            "options": [format!("pagesize={page}"), access, "nosuid", "nodev"],
        });
    }

    /// The host's directory for the pod's shared memory, if the container has it.
    pub fn shm(&self) -> Option<&Path> {
        self.shm.as_ref().map(|(_, source)| source.as_path())
    }

    /// Says how large the pod's shared memory is, in bytes.
    pub fn set_shm_size(&mut self, bytes: u64) {
        if let Some((position, _)) = self.shm {
            self.config["mounts"][position] = shm_mount(bytes);
        }
    }

    /// `config.json` for the agent.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).expect("a JSON value serialises")
    }
}

/// A container's mount of the pod's shared memory of this size, in bytes.
pub fn shm_mount(bytes: u64) -> Value {
    let options = json!(["nosuid", "noexec", "nodev", "mode=1777", format!("size={bytes}")]);
    json!({ "destination": SHM, "type": "tmpfs", "source": SANDBOX_SHM, "options": options })
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
mod tests;
