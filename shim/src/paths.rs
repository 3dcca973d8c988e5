//! Where things are on the host.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// State of running sandboxes.
const RUN_DIR: &str = "/run/ctvm";
/// Where containerd expects shim sockets.
const SOCKET_DIR: &str = "/run/containerd/s";

/// Where the state directories are. `$CTVM_RUN_DIR` moves it, for tests: it reaches `start`, `serve` and `delete`
/// alike, since containerd passes its environment on.
pub fn run_dir() -> PathBuf {
    let run = std::env::var_os("CTVM_RUN_DIR").filter(|d| !d.is_empty());
    run.map_or_else(|| PathBuf::from(RUN_DIR), PathBuf::from)
}

/// The state directory of a sandbox.
pub fn state_dir(namespace: &str, id: &str) -> PathBuf {
    run_dir().join(namespace).join(id)
}

/// The socket of a sandbox: one name for one daemon, namespace and sandbox, whoever computes it.
pub fn socket_path(dir: Option<&Path>, daemon: &str, namespace: &str, group: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{daemon}/{namespace}/{group}"));
    let mut name = String::with_capacity(64);
    for byte in digest {
        write!(name, "{byte:02x}").expect("writing to a String cannot fail");
    }
    dir.unwrap_or(SOCKET_DIR.as_ref()).join(name)
}

/// A socket's address in containerd's notation.
pub fn address(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// The path in an address of containerd's, which may lack the scheme (`TTRPC_ADDRESS` does).
pub fn socket_of(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_follow_containerds_convention() {
        // printf '%s' /run/containerd/containerd.sock/default/web | sha256sum
        let path = socket_path(None, "/run/containerd/containerd.sock", "default", "web");
        assert_eq!(
            path.to_str().unwrap(),
            "/run/containerd/s/2cde4450fa38c74f53603e01d2afd903b315a27a596f12a151414cd59897d883"
        );
        assert_ne!(path, socket_path(None, "/run/containerd/containerd.sock", "k8s.io", "web"));
        assert_eq!(address(&path), format!("unix://{}", path.display()));
        // `sun_path` holds 108 bytes.
        assert!(path.as_os_str().len() < 108);
    }

    #[test]
    fn both_notations_name_a_socket() {
        assert_eq!(socket_of("unix:///run/c.sock"), "/run/c.sock");
        assert_eq!(socket_of("/run/c.sock"), "/run/c.sock");
    }
}
