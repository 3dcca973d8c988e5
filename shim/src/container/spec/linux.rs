//! `linux` of a configuration: namespaces, devices and limits that are about the host.

use agent_api::CONTAINER_NAMESPACE;
use serde_json::{Map, Value, json};

use super::devices::{self, Disks};
use super::{Place, SpecError, field, object};
use crate::container::overview::Role;
use crate::container::users;

pub(super) fn rewrite(
    linux: &mut Map<String, Value>,
    role: Role,
    place: Place<'_>,
    warnings: &mut Vec<String>,
) -> Result<Disks, SpecError> {
    linux.insert("cgroupsPath".into(), format!("/ctvm/{}", place.id).into());
    linux.remove("mountLabel");
    linux.remove("intelRdt");
    // The container's tree has no peers in the guest, and shares do what can be done (`Bind::live`).
    linux.remove("rootfsPropagation");
    rewrite_users(linux, role, place)?;
    rewrite_namespaces(linux, role, place)?;
    let disks = devices::rewrite(linux, warnings)?;
    if let Some(resources) = linux.get_mut("resources") {
        let resources = object(resources, "linux.resources")?;
        for (name, what) in
            [("blockIO", "block I/O limits"), ("network", "network classes"), ("rdma", "RDMA limits")]
        {
            let asked = |v: &Value| {
                v.as_object().is_some_and(|o| !o.is_empty()) || v.as_array().is_some_and(|a| !a.is_empty())
            };
            if resources.remove(name).as_ref().is_some_and(asked) {
                warnings.push(format!("{what} are left out: they are about the host"));
            }
        }
        // Kubernetes names every size of the host's pages, most of them with none.
        if let Some(Value::Array(limits)) = resources.get_mut("hugepageLimits") {
            limits.retain(|limit| limit["limit"] != 0);
            if limits.is_empty() {
                resources.remove("hugepageLimits");
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
    Ok(disks)
}

/// The VM is the pod: what containers of a pod share of each other are the guest's own namespaces.
fn rewrite_namespaces(linux: &mut Map<String, Value>, role: Role, place: Place<'_>) -> Result<(), SpecError> {
    let entry = linux.entry("namespaces").or_insert_with(|| json!([]));
    let list = entry.as_array_mut().ok_or_else(|| field("linux.namespaces", "a list"))?;
    for kind in ["pid", "ipc"] {
        if !list.iter().any(|namespace| namespace["type"] == kind) {
            return Err(SpecError::HostNamespace { kind });
        }
    }
    let mut kept = Vec::new();
    for mut namespace in std::mem::take(list) {
        let kind = namespace.get("type").and_then(Value::as_str);
        let kind = kind.ok_or_else(|| field("linux.namespaces[].type", "text"))?.to_owned();
        let path = namespace.get("path").and_then(Value::as_str).unwrap_or_default().to_owned();
        match (kind.as_str(), path.as_str()) {
            ("network", _) => {}
            ("user", _) => {
                namespace["path"] = CONTAINER_NAMESPACE.into();
                kept.push(namespace);
            }
            ("ipc" | "uts", _) if role != Role::Single => {}
            (_, "") => kept.push(namespace),
            ("pid", path) => {
                let container = pid_of(path).and_then(place.container_of);
                let container = container
                    .ok_or_else(|| SpecError::Namespace { kind: kind.clone(), path: path.into() })?;
                namespace["path"] = format!("{CONTAINER_NAMESPACE}{container}").into();
                kept.push(namespace);
            }
            ("mount", _) => return Err(SpecError::Namespace { kind, path }),
            _ => {}
        }
    }
    *list = kept;
    Ok(())
}

/// The agent has made the users, with the sandbox; a container has those, or the guest's like the others.
fn rewrite_users(linux: &mut Map<String, Value>, role: Role, place: Place<'_>) -> Result<(), SpecError> {
    const NONE: &str = "has no user namespace";
    let maps = users::take(linux);
    let mut list = linux.get("namespaces").and_then(Value::as_array).into_iter().flatten();
    let asked = list.find(|namespace| namespace["type"] == "user");
    let Some(namespace) = asked else {
        return match place.users {
            Some(_) => Err(SpecError::OtherUsers { asked: NONE, pod: "has one" }),
            None => Ok(()),
        };
    };
    // In a pod it is the pod's, whose number on this host says nothing.
    let path = namespace["path"].as_str().unwrap_or_default();
    if role == Role::Single && !path.is_empty() {
        return Err(SpecError::Namespace { kind: "user".into(), path: path.to_owned() });
    }
    let pods =
        place.users.ok_or(SpecError::OtherUsers { asked: "asks for a user namespace", pod: "has none" })?;
    match maps {
        Some((uids, gids)) if users::namespace(&uids, &gids)? != *pods => {
            Err(SpecError::OtherUsers { asked: "has other id mappings", pod: "has some" })
        }
        _ => Ok(()),
    }
}

/// `N` of `/proc/N/ns/pid`.
fn pid_of(path: &str) -> Option<u32> {
    path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?.parse().ok()
}
