//! `-v` and `-info`: what this runtime is and can do.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};

/// Type of the features in a `RuntimeInfo`.
const FEATURES_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The text of `-v`.
pub fn version() -> String {
    format!("containerd-shim-ctvm-v2:\n  Version:  {}\n", env!("CARGO_PKG_VERSION"))
}

/// The protobuf of `-info`. The features name only what the agent does: CRI offers a pod what it finds here.
pub fn runtime_info() -> Vec<u8> {
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": [
            "bind", "rbind", "ro", "rro", "rw", "nosuid", "nodev", "noexec", "private", "rprivate", "slave", "rslave"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } }
        }
    });
    let mut any = Any::new();
    any.type_url = FEATURES_URL.to_owned();
    any.value = features.to_string().into_bytes();
    let mut info = RuntimeInfo::new();
    info.name = "io.containerd.ctvm.v2".to_owned();
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").to_owned();
    info.version = MessageField::some(version);
    info.features = MessageField::some(any);
    info.write_to_bytes().expect("a message of plain fields is always complete")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_a_runtime_info() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info()).unwrap();
        assert_eq!(info.name, "io.containerd.ctvm.v2");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        // By this one CRI offers recursively read-only mounts.
        assert!(features["mountOptions"].as_array().unwrap().contains(&"rro".into()));
        // And by these two the kubelet gives it pods with users of their own.
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&"user".into()));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
    }
}
