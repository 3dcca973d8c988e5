//! What containers of a sandbox have of each other: process numbers where asked, and one `/dev/shm`.

use std::path::{Path, PathBuf};

use agent_api::{CONTAINER_NAMESPACE, SANDBOX_SHM, SHM_PATH};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::errors::TaskError;
use crate::mounts;
use crate::users::{self, Users, UsersError};

/// Turns the names of containers in `linux.namespaces` into files: for process numbers that which `pids_of` tells, for
/// users the sandbox's. Says whether the container is among the sandbox's users.
pub fn join(
    spec: &mut Spec,
    users: &Users,
    pids_of: impl Fn(&str) -> Result<PathBuf, TaskError>,
) -> Result<bool, TaskError> {
    let mut own_users = false;
    let Some(mut linux) = spec.linux().clone() else { return Ok(own_users) };
    let Some(mut namespaces) = linux.namespaces().clone() else { return Ok(own_users) };
    for namespace in &mut namespaces {
        let name =
            namespace.path().as_ref().and_then(|path| path.to_str()?.strip_prefix(CONTAINER_NAMESPACE));
        let Some(name) = name else { continue };
        let file = match (namespace.typ(), name) {
            (LinuxNamespaceType::Pid, name) => pids_of(name)?,
            (LinuxNamespaceType::User, "") if users.exist() => {
                own_users = true;
                users::namespace("user")
            }
            (LinuxNamespaceType::User, "") => return Err(UsersError::None.into()),
            (kind, name) => {
                return Err(TaskError::Join { kind: kind.to_string(), container: name.to_owned() });
            }
        };
        namespace.set_path(Some(file));
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(own_users)
}

/// Turns a mount of the sandbox's shared memory into a bind of it, which is made when first asked for.
pub fn share_memory(spec: &mut Spec) -> Result<(), TaskError> {
    let Some(options) = bind_memory(spec) else { return Ok(()) };
    if !mounts::is_mount_point(Path::new(SHM_PATH)) {
        mounts::make(SANDBOX_SHM, Path::new(SHM_PATH), "tmpfs", &options)?;
    }
    Ok(())
}

/// The options of the tmpfs, if there is such a mount.
fn bind_memory(spec: &mut Spec) -> Option<Vec<String>> {
    let mut mounts = spec.mounts().clone()?;
    let shm = mounts.iter_mut().find(|m| m.source().as_deref() == Some(Path::new(SANDBOX_SHM)))?;
    let options = shm.options().clone().unwrap_or_default();
    shm.set_typ(Some("bind".to_owned())).set_source(Some(SHM_PATH.into()));
    shm.set_options(Some(["rbind", "rprivate", "nosuid", "noexec", "nodev"].map(str::to_owned).to_vec()));
    spec.set_mounts(Some(mounts));
    Some(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        serde_json::from_str(
            r#"{"ociVersion":"1.1.0","root":{"path":"/x"},
                "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
                          {"destination":"/dev/shm","type":"tmpfs","source":"ctvm-sandbox-shm","options":["nodev","size=8m"]}],
                "linux":{"namespaces":[{"type":"mount"},{"type":"pid","path":"container:db"}]}}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_containers_name_becomes_a_file_of_its_first_process() {
        let mut spec = spec();
        let file = |name: &str| {
            assert_eq!(name, "db");
            Ok("/proc/77/ns/pid".into())
        };
        assert!(!join(&mut spec, &Users::default(), file).unwrap());
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        assert_eq!(namespaces[1].path().as_deref(), Some(Path::new("/proc/77/ns/pid")));
        assert_eq!(*namespaces[0].path(), None);
    }

    #[test]
    fn other_namespaces_of_a_container_are_not_joined() {
        let json = serde_json::to_string(&spec()).unwrap().replace(r#""type":"pid""#, r#""type":"user""#);
        let join_json = |json: &str| {
            join(&mut serde_json::from_str(json).unwrap(), &Users::default(), |_| Ok("/x".into()))
                .unwrap_err()
        };
        let error = join_json(&json);
        assert!(error.to_string().contains("user namespace of container \"db\""), "{error}");
        let error = join_json(&json.replace("container:db", "container:"));
        assert!(error.to_string().contains("the sandbox has none"), "{error}");
        let none = |name: &str| Err(TaskError::NoContainer(name.to_owned()));
        let error = join(&mut spec(), &Users::default(), none).unwrap_err();
        assert!(matches!(error, TaskError::NoContainer(_)));
    }

    #[test]
    fn shared_memory_is_bound_and_its_size_kept() {
        let mut spec = spec();
        assert_eq!(bind_memory(&mut spec).unwrap(), ["nodev", "size=8m"]);
        let shm = &spec.mounts().as_ref().unwrap()[1];
        assert_eq!(
            (shm.typ().as_deref(), shm.source().as_deref()),
            (Some("bind"), Some(Path::new(SHM_PATH)))
        );
        assert_eq!(bind_memory(&mut spec), None);
    }
}
