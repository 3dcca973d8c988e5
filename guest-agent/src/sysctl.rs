//! Kernel parameters that a container asks for and that are the whole sandbox's: the VM's kernel is its pod's alone.
//!
//! What belongs to a namespace that the container has to itself stays in its configuration, for the runtime library.
//! Everything else is set here; the library would refuse it, as it would have to on a host.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::users::Users;

const ROOT: &str = "/proc/sys";

/// Parameters of an IPC namespace (ipc_namespaces(7)).
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// A parameter that cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a parameter's name.
    #[error("sysctl {0:?} is not the name of a kernel parameter")]
    Name(String),
    /// The kernel refused.
    #[error("sysctl {name:?} cannot be set to {value:?}")]
    Set {
        /// Its name.
        name: String,
        /// What it was to be.
        value: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Sets what is the sandbox's and takes it out of the configuration.
pub fn apply(spec: &mut Spec, users: &Users) -> Result<(), SysctlError> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
    let own_ipc = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Ipc);
    let all = linux.sysctl().clone().unwrap_or_default();
    let (container, sandbox): (HashMap<_, _>, HashMap<_, _>) =
        all.into_iter().partition(|(name, _)| own_ipc && is_ipc(name));
    set(&sandbox, users)?;
    linux.set_sysctl(Some(container).filter(|container| !container.is_empty()));
    spec.set_linux(Some(linux));
    Ok(())
}

/// Sets parameters of the whole guest. Those of an IPC namespace are for the root of its users alone.
pub fn set(parameters: &HashMap<String, String>, users: &Users) -> Result<(), SysctlError> {
    for (name, value) in parameters {
        let file = file(name)?;
        let write = || std::fs::write(file, value);
        let written = if users.exist() && is_ipc(name) { users.as_root(write) } else { write() };
        written.map_err(|source| SysctlError::Set { name: name.clone(), value: value.clone(), source })?;
    }
    Ok(())
}

fn is_ipc(name: &str) -> bool {
    let name = name.replace('/', ".");
    IPC.contains(&name.as_str()) || name.starts_with("fs.mqueue.")
}

/// The file of `net.ipv4.ip_forward`. As sysctl(8) has it, a name whose first separator is a slash has slashes for
/// separators, and its dots are dots.
fn file(name: &str) -> Result<PathBuf, SysctlError> {
    let slashes = name.find(['.', '/']).is_some_and(|at| name[at..].starts_with('/'));
    let path = if slashes { name.to_owned() } else { name.replace('.', "/") };
    let path = Path::new(&path);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    if name.is_empty() || !plain {
        return Err(SysctlError::Name(name.to_owned()));
    }
    Ok(Path::new(ROOT).join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_files_below_one_directory() {
        let path = |name: &str| file(name).unwrap().display().to_string();
        assert_eq!(path("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(path("net/ipv4/conf/eth0.100/forwarding"), "/proc/sys/net/ipv4/conf/eth0.100/forwarding");
        for bad in ["", "/etc/passwd", "../x", "net/../../etc", "net/ipv4/../../x"] {
            assert!(matches!(file(bad), Err(SysctlError::Name(_))), "{bad}");
        }
    }

    #[test]
    fn the_containers_own_stay_with_the_container() {
        assert!(is_ipc("kernel.shm_rmid_forced") && is_ipc("fs.mqueue.msg_max") && is_ipc("kernel/sem"));
        assert!(!is_ipc("net.core.somaxconn") && !is_ipc("kernel.pid_max"));
        let json = |kind: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.1.0","linux":{{"namespaces":[{{"type":"{kind}"}}],"sysctl":{{"kernel.sem":"1 2 3 4"}}}}}}"#
            );
            serde_json::from_str::<Spec>(&text).unwrap()
        };
        let mut own = json("ipc");
        apply(&mut own, &Users::default()).unwrap();
        assert_eq!(own.linux().as_ref().unwrap().sysctl().as_ref().unwrap()["kernel.sem"], "1 2 3 4");
        let mut none: Spec = json("mount");
        let mut linux = none.linux().clone().unwrap();
        linux.set_sysctl(Some([("kernel/../x".to_owned(), "1".to_owned())].into()));
        none.set_linux(Some(linux));
        assert!(matches!(apply(&mut none, &Users::default()), Err(SysctlError::Name(_))));
    }
}
