//! Who may import whom, as a table. A package that needs a new edge changes the table in the same commit, where a
//! reader sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Direct dependencies a package may have, besides those listed for everyone.
const MAY: &[(&str, &[&str])] = &[
    ("vmm-api", &["rustix"]),
    ("agent-api", &["ttrpc", "protobuf", "containerd-shim-protos", "async-trait"]),
    ("virtio", &["vm-memory", "virtio-queue", "virtio-bindings", "vmm-sys-util", "zerocopy", "rustix"]),
    // What is said to the image service, and how a disk looks to a driver.
    ("imagefs", &["virtio", "vmm-api", "virtio-bindings", "vmm-sys-util", "rustix", "zerocopy"]),
    (
        "vmm",
        &[
            "vmm-api",
            "virtio",
            "imagefs",
            "vm-memory",
            "virtio-queue",
            "kvm-ioctls",
            "kvm-bindings",
            "vmm-sys-util",
            // The upcall channel's structures, which the guest's kernel lays out.
            "zerocopy",
            "vm-superio",
            "seccompiler",
            "rustix",
        ],
    ),
    (
        "guest-agent",
        &[
            "agent-api",
            "ttrpc",
            "protobuf",
            "containerd-shim-protos",
            "async-trait",
            "oci-spec",
            "libcontainer",
            "tokio",
            "tokio-vsock",
            "caps",
            "futures",
            "tracing",
            "nix",
            "rustix",
            "idmap",
        ],
    ),
    (
        "snapshotter",
        &["base64", "clap", "prost", "tokio", "tokio-stream", "tonic", "tonic-prost", "tonic-prost-build"],
    ),
    (
        "shim",
        &[
            "vmm-api",
            "agent-api",
            "ttrpc",
            "protobuf",
            "containerd-shim-protos",
            "async-trait",
            "oci-spec",
            "tokio",
            "rustix",
            "clap",
            "toml",
            "sha2",
            "command-fds",
            "idmap",
            "tap",
            "sk-lookup",
            "rtnetlink",
            "futures-util",
            "nix",
        ],
    ),
    (
        "images",
        &[
            "vmm-api",
            "tokio",
            "rustix",
            "reqwest",
            "rusty-s3",
            "hmac",
            "sha1",
            "httpdate",
            "futures-util",
            "base64",
            "lz4_flex",
            "zstd",
            "flate2",
            "blake3",
            "sha2",
            "clap",
            "toml",
        ],
    ),
    (
        "convert",
        &[
            "images",
            "reqwest",
            "futures-util",
            "tar",
            "memchr",
            "nydus-api",
            "nydus-builder",
            "nydus-rafs",
            "nydus-storage",
            "nydus-utils",
            "tokio",
            "sha2",
            "clap",
            "tempfile",
            "flate2",
            "zstd",
        ],
    ),
    ("idmap", &[]),
    ("tap", &[]),
    ("sk-lookup", &[]),
];

/// Plain libraries that carry no design with them.
const EVERYONE: &[&str] = &["anyhow", "libc", "log", "serde", "serde_json", "thiserror"];

/// What must not be reached at all, however indirectly.
const MUST_NOT_REACH: &[(&str, &[&str])] = &[
    ("vmm-api", &["tokio", "kvm-ioctls"]),
    ("agent-api", &["vmm-api", "kvm-ioctls"]),
    ("virtio", &["vmm", "vmm-api", "imagefs", "kvm-ioctls", "kvm-bindings", "tokio"]),
    ("imagefs", &["vmm", "kvm-ioctls", "kvm-bindings", "tokio"]),
    ("vmm", &["tokio", "ttrpc", "shim", "agent-api", "containerd-shim-protos"]),
    ("shim", &["vmm", "virtio", "kvm-ioctls", "kvm-bindings"]),
    // What the node's service does with an image, it does itself: neither a VMM's memory nor the builder's OpenSSL is near.
    ("images", &["vmm", "virtio", "imagefs", "kvm-ioctls", "vm-memory", "shim", "nydus-storage", "openssl"]),
    ("convert", &["vmm", "virtio", "imagefs", "kvm-ioctls", "shim"]),
    ("guest-agent", &["vmm", "vmm-api", "virtio", "shim"]),
];

struct Graph {
    /// Package id to (name, direct normal dependencies by id).
    packages: BTreeMap<String, (String, Vec<String>)>,
}

impl Graph {
    fn read() -> Graph {
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["metadata", "--format-version", "1", "--offline", "--locked"])
            // What other platforms need is not there on a machine that has only built.
            .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
        let names: BTreeMap<&str, &str> = array(&metadata["packages"])
            .map(|p| (p["id"].as_str().expect("id"), p["name"].as_str().expect("name")))
            .collect();
        let packages = array(&metadata["resolve"]["nodes"])
            .map(|node| {
                let id = node["id"].as_str().expect("id");
                let normal = array(&node["deps"])
                    .filter(|d| array(&d["dep_kinds"]).any(|k| k["kind"].is_null()))
                    .map(|d| d["pkg"].as_str().expect("pkg").to_owned())
                    .collect();
                (id.to_owned(), (names[id].to_owned(), normal))
            })
            .collect();
        Graph { packages }
    }

    fn id(&self, name: &str) -> &str {
        let found = self.packages.iter().find(|(_, (n, _))| n == name);
        found.unwrap_or_else(|| panic!("no package {name}")).0
    }

    fn name<'a>(&'a self, id: &str) -> &'a str {
        &self.packages[id].0
    }

    fn direct(&self, name: &str) -> BTreeSet<&str> {
        self.packages[self.id(name)].1.iter().map(|id| self.name(id)).collect()
    }

    fn reached(&self, name: &str) -> BTreeSet<&str> {
        let mut seen = BTreeSet::new();
        let mut open = vec![self.id(name)];
        while let Some(id) = open.pop() {
            for next in &self.packages[id].1 {
                if seen.insert(next.as_str()) {
                    open.push(next);
                }
            }
        }
        seen.into_iter().map(|id| self.name(id)).collect()
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("an array").iter()
}

#[test]
fn packages_import_only_what_the_table_allows() {
    let graph = Graph::read();
    let mut wrong = Vec::new();
    for (package, may) in MAY {
        for dependency in graph.direct(package) {
            if !may.contains(&dependency) && !EVERYONE.contains(&dependency) {
                wrong.push(format!("{package} -> {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that are not in the table: {wrong:#?}");
}

#[test]
fn packages_do_not_reach_what_is_forbidden_to_them() {
    let graph = Graph::read();
    let mut wrong = Vec::new();
    for (package, forbidden) in MUST_NOT_REACH {
        let reached = graph.reached(package);
        wrong.extend(forbidden.iter().filter(|f| reached.contains(*f)).map(|f| format!("{package} ~> {f}")));
    }
    assert!(wrong.is_empty(), "packages that must not be reached: {wrong:#?}");
}

#[test]
fn every_shipped_package_is_in_the_table() {
    let graph = Graph::read();
    let ours: BTreeSet<&str> = MAY.iter().map(|(name, _)| *name).collect();
    let tools = ["benches", "cri", "e2e", "exerciser", "lab-init", "xtask"];
    for (id, (name, _)) in &graph.packages {
        if id.starts_with("path+file") {
            assert!(ours.contains(name.as_str()) || tools.contains(&name.as_str()), "{name} has no row");
        }
    }
    assert!(graph.direct("vmm").contains("virtio"), "the graph was read wrongly");
}
