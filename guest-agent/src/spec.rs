//! What a request asks a container to be: reads the OCI configuration and fits it to this guest.
//!
//! The shim has already made every path a guest path and taken out what belongs to the host (hooks, network
//! namespace, host devices). What only the guest can know is done here.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxCapabilities, LinuxNamespaceType, LinuxResources, Process, Spec};
use protobuf::well_known_types::any::Any;

use crate::cgroup;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The request has another kind of value, or none.
    #[error("value of type {found:?} given, {wanted:?} wanted")]
    Type {
        /// What came.
        found: String,
        /// What must come.
        wanted: &'static str,
    },
    /// No JSON, or no OCI configuration.
    #[error("configuration cannot be read")]
    Json(#[source] serde_json::Error),
    /// A section is missing without which there is no container.
    #[error("configuration has no {0:?}")]
    Missing(&'static str),
    /// The program could not be told where it starts.
    #[error("process.cwd {0:?} is not an absolute path")]
    Cwd(PathBuf),
    /// It becomes a file name.
    #[error("id {0:?} is not 1 to 128 of the letters A-Z a-z 0-9 _ + - . with another first than '.'")]
    Id(String),
}

/// A container's configuration, ready for the library.
#[derive(Debug)]
pub struct ContainerSpec {
    /// For `config.json`.
    pub spec: Spec,
    /// Who owns the standard streams.
    pub uid: u32,
    pub gid: u32,
    /// Whether the container's processes die with its first.
    pub own_pid_namespace: bool,
}

/// Checks that `id` is safe as a file name. containerd's own rule is stricter than this one.
pub fn check_id(id: &str) -> Result<(), SpecError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.chars().all(letter) {
        return Err(SpecError::Id(id.to_owned()));
    }
    Ok(())
}

/// Reads the configuration of container `id` from `CreateTaskRequest.options`.
pub fn container(options: Option<&Any>, id: &str, terminal: bool) -> Result<ContainerSpec, SpecError> {
    let mut spec: Spec = value(options, agent_api::SPEC_TYPE_URL)?;
    if spec.root().is_none() {
        return Err(SpecError::Missing("root"));
    }
    let mut process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    fit_process(&mut process, terminal)?;
    let (uid, gid) = (process.user().uid(), process.user().gid());
    spec.set_process(Some(process));

    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    // The host's path means nothing here, and systemd's notation cannot be used.
    linux.set_cgroups_path(Some(cgroup::path_in_hierarchy(id).into())).set_intel_rdt(None);
    if let Some(mut resources) = linux.resources().clone() {
        fit_resources(&mut resources, cgroup::has_swap());
        linux.set_resources(Some(resources));
    }
    let own_pid_namespace = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none());
    spec.set_linux(Some(linux));
    Ok(ContainerSpec { spec, uid, gid, own_pid_namespace })
}

/// Reads an exec's process from `ExecProcessRequest.spec`.
pub fn process(spec: Option<&Any>, terminal: bool) -> Result<Process, SpecError> {
    let mut process: Process = value(spec, agent_api::PROCESS_TYPE_URL)?;
    fit_process(&mut process, terminal)?;
    Ok(process)
}

/// Reads changed limits from `UpdateTaskRequest.resources`.
pub fn resources(any: Option<&Any>) -> Result<LinuxResources, SpecError> {
    value(any, agent_api::RESOURCES_TYPE_URL)
}

fn value<T: serde::de::DeserializeOwned>(any: Option<&Any>, wanted: &'static str) -> Result<T, SpecError> {
    let any = any.ok_or(SpecError::Type { found: String::new(), wanted })?;
    if any.type_url != wanted {
        return Err(SpecError::Type { found: any.type_url.clone(), wanted });
    }
    serde_json::from_slice(&any.value).map_err(SpecError::Json)
}

fn fit_process(process: &mut Process, terminal: bool) -> Result<(), SpecError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::Cwd(process.cwd().clone()));
    }
    process.set_terminal(Some(terminal));
    // The library takes "false" for set when it decides when to load the seccomp filter, and then may not load it.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // To the library no capabilities section means "keep all"; to containerd and runc it means none.
    if process.capabilities().is_none() {
        process.set_capabilities(Some(no_capabilities()));
    }
    // Profiles of the host's security modules; the guest's kernel has none.
    process.set_apparmor_profile(None).set_selinux_label(None);
    Ok(())
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_inheritable(None).set_permitted(None).set_ambient(None);
    none
}

/// A guest without swap keeps every limit on swap; a limit that cannot be written would fail the container.
fn fit_resources(resources: &mut LinuxResources, has_swap: bool) {
    if !has_swap && let Some(mut memory) = *resources.memory() {
        memory.set_swap(None).set_swappiness(None);
        resources.set_memory(Some(memory));
    }
}

/// Writes `value` where the library reads it.
pub fn save(value: &impl serde::Serialize, path: &Path) -> std::io::Result<()> {
    std::fs::write(path, serde_json::to_vec(value).map_err(std::io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"ociVersion":"1.1.0","root":{"path":"/run/ctvm/share/c1"},
        "process":{"cwd":"/","args":["sh"],"user":{"uid":5,"gid":6},"noNewPrivileges":false,
                   "apparmorProfile":"cri-containerd.apparmor.d"},
        "linux":{"cgroupsPath":"system.slice:cri-containerd:c1","namespaces":[{"type":"pid"}]}}"#;

    fn any(type_url: &str, json: &str) -> Any {
        Any { type_url: type_url.into(), value: json.as_bytes().to_vec(), ..Any::default() }
    }

    fn spec_any(json: &str) -> Any {
        any(agent_api::SPEC_TYPE_URL, json)
    }

    #[test]
    fn configuration_is_fitted_to_the_guest() {
        let container = container(Some(&spec_any(MINIMAL)), "c1", false).unwrap();
        assert_eq!((container.uid, container.gid, container.own_pid_namespace), (5, 6, true));
        let process = container.spec.process().as_ref().unwrap();
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(*process.apparmor_profile(), None);
        assert_eq!(*process.capabilities().as_ref().unwrap().bounding(), None, "none, not all");
        let path = container.spec.linux().as_ref().unwrap().cgroups_path().clone().unwrap();
        assert_eq!(path, Path::new("/ctvm/c1"));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (json, part) in [
            (r#"{"ociVersion":"1.1.0"}"#, "root"),
            (r#"{"ociVersion":"1.1.0","root":{"path":"/x"}}"#, "process"),
            (
                r#"{"ociVersion":"1.1.0","root":{"path":"/x"},"process":{"cwd":"/","args":[],"user":{"uid":0,"gid":0}}}"#,
                "process.args",
            ),
            (
                r#"{"ociVersion":"1.1.0","root":{"path":"/x"},"process":{"cwd":"/","args":["a"],"user":{"uid":0,"gid":0}}}"#,
                "linux",
            ),
        ] {
            let error = container(Some(&spec_any(json)), "c1", false).expect_err(part);
            assert!(error.to_string().contains(&format!("{part:?}")), "{error}");
        }
    }

    #[test]
    fn other_values_are_refused() {
        assert!(matches!(container(None, "c1", false), Err(SpecError::Type { .. })));
        let other = any("types.containerd.io/runc.Options", "{}");
        assert!(matches!(container(Some(&other), "c1", false), Err(SpecError::Type { .. })));
        assert!(matches!(container(Some(&spec_any("{")), "c1", false), Err(SpecError::Json(_))));
    }

    #[test]
    fn changed_limits_are_ocis_resources() {
        let memory = any(agent_api::RESOURCES_TYPE_URL, r#"{"memory":{"limit":4096},"new":{}}"#);
        assert_eq!(resources(Some(&memory)).unwrap().memory().unwrap().limit(), Some(4096));
        let windows = any("types.containerd.io/opencontainers/runtime-spec/1/WindowsResources", "{}");
        assert!(matches!(resources(Some(&windows)), Err(SpecError::Type { .. })));
        let text = any(agent_api::RESOURCES_TYPE_URL, r#"{"memory":{"limit":"4096"}}"#);
        assert!(matches!(resources(Some(&text)), Err(SpecError::Json(_))));
    }

    #[test]
    fn relative_working_directory_is_refused() {
        let json = MINIMAL.replace(r#""cwd":"/""#, r#""cwd":"tmp""#);
        let error = container(Some(&spec_any(&json)), "c1", false).unwrap_err();
        assert_eq!(error.to_string(), "process.cwd \"tmp\" is not an absolute path");
    }

    #[test]
    fn ids_are_file_names() {
        for id in ["a", "k8s.io_pod-1", &"x".repeat(128)] {
            check_id(id).unwrap();
        }
        for id in ["", ".", "..", ".hidden", "a/b", "a b", "a\0", "ä", &"x".repeat(129)] {
            check_id(id).expect_err(id);
        }
    }

    #[test]
    fn swap_limit_goes_where_there_is_no_swap() {
        let json = r#"{"memory":{"limit":1000,"swap":2000}}"#;
        let mut resources: LinuxResources = serde_json::from_str(json).unwrap();
        fit_resources(&mut resources, true);
        assert_eq!(resources.memory().unwrap().swap(), Some(2000));
        fit_resources(&mut resources, false);
        assert_eq!(resources.memory().unwrap().swap(), None);
        assert_eq!(resources.memory().unwrap().limit(), Some(1000));
    }
}
