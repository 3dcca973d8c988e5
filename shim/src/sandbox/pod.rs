//! A pod that CRI has the shim itself make (`sandboxer = "shim"`): no pause container, no `config.json`, and the
//! files that containerd would have made for its containers are ours to make.
//!
//! What the pod's configuration says becomes what a sandbox container's `config.json` would have said, so that from
//! there on both ways are one.

use std::collections::HashMap;
use std::path::Path;

use agent_api::FILES_PATH;
use agent_api::users::IdMaps;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use protobuf::Message as _;
use serde_json::json;

use crate::container::overview::{Overview, OverviewNamespace};
use crate::container::spec::{SHM, SHM_SIZE, shm_mount};
use crate::container::users::{self, IdMapping};
use crate::error::TaskError;

#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction)]
mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

use cri::{DnsConfig, IDMapping, NamespaceMode, PodSandboxConfig, UserNamespace};

/// Ending of the `type_url` under which CRI passes a pod's configuration.
const CONFIG_TYPE: &str = "PodSandboxConfig";

/// Files of the pod, by the path at which containers have them.
const FILES: [(&str, &str); 3] =
    [("/etc/hostname", "hostname"), ("/etc/hosts", "hosts"), ("/etc/resolv.conf", "resolv.conf")];

/// What the guest gets beside a network and a name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    /// Kernel parameters.
    pub sysctls: HashMap<String, String>,
    /// Files for containers, by name.
    pub files: HashMap<String, Vec<u8>>,
    /// Users of its own.
    pub users: Option<IdMaps>,
}

/// Reads what containerd asks for.
///
/// # Errors
/// [`TaskError::Pod`] when it cannot be read, or asks for what a VM cannot have.
pub fn read(request: &CreateSandboxRequest) -> Result<(Overview, Extras), TaskError> {
    let wrong = |what: &str| TaskError::Pod(what.to_owned());
    let config = match request.options.as_ref() {
        Some(any) if any.type_url.ends_with(CONFIG_TYPE) => PodSandboxConfig::parse_from_bytes(&any.value)
            .map_err(|e| TaskError::Pod(format!("the pod's configuration: {e}")))?,
        Some(any) => return Err(TaskError::Pod(format!("options of type {:?}", any.type_url))),
        None => PodSandboxConfig::new(),
    };
    let options = config.linux.security_context.namespace_options.as_ref();
    if options.is_some_and(|o| o.pid.enum_value() == Ok(NamespaceMode::NODE)) {
        return Err(wrong("the host's processes cannot be seen from a VM (hostPID)"));
    }
    if options.is_some_and(|o| o.ipc.enum_value() == Ok(NamespaceMode::NODE)) {
        return Err(wrong("the host's IPC cannot be used from a VM (hostIPC)"));
    }
    let users = match options.and_then(|o| o.userns_options.as_ref()) {
        Some(users) => users_of(users).map_err(|e| TaskError::Pod(format!("user namespace: {e}")))?,
        None => None,
    };
    let hostname = if config.hostname.is_empty() { &request.sandbox_id } else { &config.hostname };
    let sysctls = config.linux.sysctls.clone();
    let extras = Extras { sysctls, files: files(hostname, &config.dns_config), users };
    Ok((overview(request, &config, hostname), extras))
}

fn users_of(users: &UserNamespace) -> Result<Option<IdMaps>, String> {
    match users.mode.enum_value() {
        Ok(NamespaceMode::NODE) => return Ok(None),
        Ok(NamespaceMode::POD) => {}
        _ => return Err("its mode is neither POD nor NODE".to_owned()),
    }
    let mappings = |list: &[IDMapping]| -> Vec<IdMapping> {
        let mapping =
            |m: &IDMapping| IdMapping { inside: m.container_id, outside: m.host_id, count: m.length };
        list.iter().map(mapping).collect()
    };
    users::namespace(&mappings(&users.uids), &mappings(&users.gids)).map(Some).map_err(|e| e.to_string())
}

fn overview(request: &CreateSandboxRequest, config: &PodSandboxConfig, hostname: &str) -> Overview {
    let mut overview = Overview { hostname: hostname.to_owned(), ..Overview::default() };
    let asked = config.annotations.iter().chain(&request.annotations);
    overview.annotations.extend(asked.map(|(name, value)| (name.clone(), value.clone())));
    let mut note = |name: &str, value: String| {
        overview.annotations.insert(format!("io.kubernetes.cri.{name}"), value);
    };
    note("container-type", "sandbox".to_owned());
    note("sandbox-id", request.sandbox_id.clone());
    if let Some(limits) = config.linux.resources.as_ref() {
        note("sandbox-memory", limits.memory_limit_in_bytes.to_string());
        note("sandbox-cpu-quota", limits.cpu_quota.to_string());
        note("sandbox-cpu-period", limits.cpu_period.to_string());
    }
    let parent = config.linux.cgroup_parent.as_str();
    if !parent.is_empty() {
        overview.linux.cgroups_path = format!("{}/{}", parent.trim_end_matches('/'), request.sandbox_id);
    }
    // No path is no namespace of its own: the host's.
    if !request.netns_path.is_empty() {
        let path = Path::new(&request.netns_path).to_owned();
        overview.linux.namespaces.push(OverviewNamespace { kind: "network".into(), path });
    }
    overview
}

/// What containerd writes for a pod's containers when it makes the sandbox.
fn files(hostname: &str, dns: &DnsConfig) -> HashMap<String, Vec<u8>> {
    let resolv = if *dns == DnsConfig::default() {
        std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()
    } else {
        let list = |word: &str, values: &[String]| match values {
            [] => String::new(),
            values => format!("{word} {}\n", values.join(" ")),
        };
        let servers: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        list("search", &dns.searches) + &servers + &list("options", &dns.options)
    };
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    [("hostname", format!("{hostname}\n")), ("hosts", hosts), ("resolv.conf", resolv)]
        .map(|(name, text)| (name.to_owned(), text.into_bytes()))
        .into()
}

/// Gives a container of such a pod the mounts that its configuration has not.
pub fn add_mounts(config: &mut serde_json::Value) {
    let read_only = config["root"]["readonly"] == true;
    let Some(config) = config.as_object_mut() else { return };
    let Some(mounts) = config.entry("mounts").or_insert_with(|| json!([])).as_array_mut() else { return };
    let access = if read_only { "ro" } else { "rw" };
    for (destination, name) in FILES {
        if !mounts.iter().any(|m| m["destination"] == destination) {
            let (source, options) = (format!("{FILES_PATH}/{name}"), ["rbind", "rprivate", access]);
            mounts.push(
                json!({"destination": destination, "type": "bind", "source": source, "options": options}),
            );
        }
    }
    let shm = shm_mount(SHM_SIZE);
    match mounts.iter_mut().find(|m| m["destination"] == SHM) {
        // The configuration of every container has a tmpfs there, which would be this container's alone.
        Some(mount) if mount["type"] == "tmpfs" => *mount = shm,
        Some(_) => {}
        None => mounts.push(shm),
    }
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    use agent_api::SANDBOX_SHM;

    use super::*;
    use crate::container::overview::Role;

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        let mut request = CreateSandboxRequest::new();
        request.sandbox_id = "pod1".into();
        request.netns_path = "/run/netns/x".into();
        let mut any = Any::new();
        any.type_url = "runtime.v1.PodSandboxConfig".into();
        any.value = config.write_to_bytes().unwrap();
        request.options = MessageField::some(any);
        request
    }

    #[test]
    fn a_pods_configuration_becomes_an_overview() {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".into();
        config.dns_config = MessageField::some(DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:5".into()],
            ..DnsConfig::default()
        });
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1/".into();
        linux.sysctls.insert("net.core.somaxconn".into(), "1024".into());
        linux.resources.mut_or_insert_default().memory_limit_in_bytes = 100 << 20;
        let (overview, extras) = read(&request(&config)).unwrap();
        assert_eq!((overview.role(), overview.group()), (Role::Pod, Some("pod1")));
        assert_eq!(overview.hostname, "web");
        assert_eq!(overview.linux.cgroups_path, "/kubepods/pod1/pod1");
        assert_eq!(overview.network(), Some(Path::new("/run/netns/x")));
        assert_eq!(overview.annotations["io.kubernetes.cri.sandbox-memory"], (100 << 20).to_string());
        assert_eq!(extras.sysctls["net.core.somaxconn"], "1024");
        let resolv = String::from_utf8(extras.files["resolv.conf"].clone()).unwrap();
        assert_eq!(resolv, "search a.example b.example\nnameserver 10.0.0.10\noptions ndots:5\n");
        assert_eq!(extras.files["hostname"], b"web\n");
    }

    #[test]
    fn a_pods_users_are_read() {
        let mapping = IDMapping { host_id: 100_000, length: 65_536, ..IDMapping::default() };
        let users = |mode: NamespaceMode, gids: Vec<IDMapping>| {
            let mut config = PodSandboxConfig::new();
            let context = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
            let options = context.namespace_options.mut_or_insert_default();
            let uids = vec![mapping.clone()];
            let users = UserNamespace { mode: mode.into(), uids, gids, ..UserNamespace::default() };
            options.userns_options = MessageField::some(users);
            read(&request(&config)).map(|(_, extras)| extras.users).map_err(|e| e.to_string())
        };
        let maps = users(NamespaceMode::POD, vec![mapping.clone()]).unwrap().unwrap();
        assert_eq!(maps.gids.outside(5), Some(100_005));
        assert_eq!(users(NamespaceMode::NODE, vec![]), Ok(None));
        assert!(users(NamespaceMode::POD, vec![]).unwrap_err().contains("a map of 0 ranges"));
        assert!(users(NamespaceMode::CONTAINER, vec![]).unwrap_err().contains("neither POD nor NODE"));
    }

    #[test]
    fn what_a_vm_cannot_have_is_refused() {
        let error = |change: &dyn Fn(&mut cri::NamespaceOption)| {
            let mut config = PodSandboxConfig::new();
            let linux = config.linux.mut_or_insert_default();
            let context = linux.security_context.mut_or_insert_default();
            change(context.namespace_options.mut_or_insert_default());
            read(&request(&config)).unwrap_err().to_string()
        };
        assert!(error(&|o| o.pid = NamespaceMode::NODE.into()).contains("hostPID"));
        assert!(error(&|o| o.ipc = NamespaceMode::NODE.into()).contains("hostIPC"));
        let mut other = request(&PodSandboxConfig::new());
        other.options.mut_or_insert_default().type_url = "other".into();
        assert!(read(&other).unwrap_err().to_string().contains("\"other\""));
        other.options.mut_or_insert_default().type_url = "runtime.v1.PodSandboxConfig".into();
        other.options.mut_or_insert_default().value = vec![0xff];
        assert!(read(&other).unwrap_err().to_string().contains("configuration"));
    }

    #[test]
    fn containers_get_the_files_that_they_lack() {
        let mut config = json!({"root": {"readonly": true}, "mounts": [
            {"destination": "/etc/hosts", "type": "bind", "source": "/host/hosts"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]});
        add_mounts(&mut config);
        let mounts = config["mounts"].as_array().unwrap();
        let of = |at: &str| mounts.iter().filter(|m| m["destination"] == at).collect::<Vec<_>>();
        assert_eq!(of("/etc/hosts")[0]["source"], "/host/hosts");
        assert_eq!((of("/etc/hosts").len(), mounts.len()), (1, 4));
        assert_eq!(of("/etc/hostname")[0]["source"], "/run/ctvm/pod/hostname");
        assert!(of("/etc/resolv.conf")[0]["options"].to_string().contains("\"ro\""));
        assert_eq!(of("/dev/shm")[0]["source"], SANDBOX_SHM);
    }
}
