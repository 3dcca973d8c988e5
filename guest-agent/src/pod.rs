//! What containers of a sandbox have of each other: process numbers where asked, and one `/dev/shm`.

use std::path::{Path, PathBuf};

use agent_api::{CONTAINER_NAMESPACE, SANDBOX_SHM, SHM_PATH};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use crate::errors::TaskError;
use crate::mounts;

/// Turns the names of containers in `linux.namespaces` into files of their first processes, whose numbers `pid_of`
/// tells.
pub fn join(spec: &mut Spec, pid_of: impl Fn(&str) -> Result<u32, TaskError>) -> Result<(), TaskError> {
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
    let Some(mut namespaces) = linux.namespaces().clone() else { return Ok(()) };
    for namespace in &mut namespaces {
        let name =
            namespace.path().as_ref().and_then(|path| path.to_str()?.strip_prefix(CONTAINER_NAMESPACE));
        let Some(name) = name else { continue };
        if namespace.typ() != LinuxNamespaceType::Pid {
            return Err(TaskError::Join { kind: namespace.typ().to_string(), container: name.to_owned() });
        }
        let file = PathBuf::from(format!("/proc/{}/ns/pid", pid_of(name)?));
        namespace.set_path(Some(file));
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(())
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
        join(&mut spec, |name| if name == "db" { Ok(77) } else { panic!("asked for {name}") }).unwrap();
        let namespaces = spec.linux().as_ref().unwrap().namespaces().clone().unwrap();
        assert_eq!(namespaces[1].path().as_deref(), Some(Path::new("/proc/77/ns/pid")));
        assert_eq!(*namespaces[0].path(), None);
    }

    #[test]
    fn other_namespaces_of_a_container_are_not_joined() {
        let json = serde_json::to_string(&spec()).unwrap().replace(r#""type":"pid""#, r#""type":"user""#);
        let error = join(&mut serde_json::from_str(&json).unwrap(), |_| Ok(1)).unwrap_err();
        assert!(error.to_string().contains("user namespace of container \"db\""), "{error}");
        let error = join(&mut spec(), |name| Err(TaskError::NoContainer(name.to_owned()))).unwrap_err();
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
