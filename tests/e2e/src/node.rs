//! What a node with Nydus images has beside containerd: a registry, the image service and the snapshotter, all of them real.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{BIN, Service, run};

/// Where the registry listens.
pub const REGISTRY: &str = "127.0.0.1:5000";
/// Where shims look for the image service.
pub const IMAGES: &str = "/run/ctvm/images.sock";
/// Where containerd looks for the snapshotter, unless a test says otherwise.
pub const SNAPSHOTTER: &str = "/run/ctvm/snapshotter.sock";

/// Where nydus-snapshotter serves containerd.
pub const NYDUS_SNAPSHOTTER: &str = "/run/containerd-nydus/containerd-nydus-grpc.sock";

/// A program of ours.
pub fn program(name: &str) -> Command {
    Command::new(Path::new(BIN).join(name))
}

/// Debian's `docker-registry` where nodes look for it, with its store in `folder`.
pub fn registry(folder: &Path) -> Result<Service> {
    registry_at(folder, REGISTRY, Command::new("docker-registry"))
}

/// The same at another address, by a command that may run it elsewhere. What it was asked is in `folder/registry.log`.
pub fn registry_at(folder: &Path, address: &str, mut program: Command) -> Result<Service> {
    let (config, store) = (folder.join("registry.yml"), folder.join("registry"));
    let storage = format!("{{filesystem: {{rootdirectory: {}}}}}", store.display());
    let text = format!("version: 0.1\nlog: {{level: warn}}\nstorage: {storage}\nhttp: {{addr: {address}}}\n");
    fs::write(&config, text)?;
    let log = append(&folder.join("registry.log"))?;
    program.arg("serve").arg(config).stdout(log).stderr(Stdio::null());
    Service::start(&mut program, || TcpStream::connect(address).is_ok())
}

/// The image service as it is without a configuration, with its cache in `folder/cache`.
pub fn image_service(folder: &Path) -> Result<Service> {
    let mut serve = program("ctvm");
    serve.args(["image", "serve", "--root"]).arg(folder.join("cache"));
    Service::start(&mut serve, || answers(Path::new(IMAGES)))
}

/// The image service with a configuration, its cache in `cache`, and its lines behind those that are in `log`.
pub fn image_service_with(config: &str, cache: &Path, log: &Path) -> Result<Service> {
    let file = log.with_extension("toml");
    fs::write(&file, config)?;
    let mut serve = program("ctvm");
    serve.args(["image", "serve", "--root"]).arg(cache).arg("--config").arg(file).stderr(append(log)?);
    Service::start(&mut serve, || answers(Path::new(IMAGES)))
}

fn append(path: &Path) -> Result<File> {
    File::options().create(true).append(true).open(path).with_context(|| path.display().to_string())
}

/// The snapshotter at `address`, with its snapshots in `folder/snapshots`.
pub fn snapshotter(folder: &Path, address: &Path) -> Result<Service> {
    snapshotter_for(REGISTRY, folder, address)
}

/// The same, for a registry that is elsewhere.
pub fn snapshotter_for(registry: &str, folder: &Path, address: &Path) -> Result<Service> {
    let mut serve = program("ctvm");
    serve.args(["snapshotter", "--plain-http", registry]);
    serve.arg("--address").arg(address).arg("--root").arg(folder.join("snapshots"));
    Service::start(&mut serve, || answers(address))
}

/// Debian's nydus-snapshotter, with its files in `folder/nydus`, told what `shim/snapshotter/README.md` says; `driver` is its
/// `fs_driver`.
pub fn nydus_snapshotter(folder: &Path, driver: &str) -> Result<Service> {
    let (config, daemon, root) =
        (folder.join("nydus.toml"), folder.join("nydusd.json"), folder.join("nydus"));
    let backend = r#"{"type": "registry", "config": {"scheme": "http"}}"#;
    let cache = r#"{"type": "blobcache"}"#;
    fs::write(
        &daemon,
        format!("{{\"device\": {{\"backend\": {backend}, \"cache\": {cache}}}, \"mode\": \"direct\"}}"),
    )?;
    let text = format!(
        r#"version = 1
root = "{}"
address = "{NYDUS_SNAPSHOTTER}"
daemon_mode = "shared"
[daemon]
fs_driver = "{driver}"
nydusd_path = "{BIN}/ctvm-nydusd"
nydusd_config = "{}"
recover_policy = "restart"
[snapshot]
enable_nydus_overlayfs = true
[system]
enable = false
[metrics]
address = ""
[cgroup]
enable = false
[log]
log_to_stdout = true
"#,
        root.display(),
        daemon.display(),
    );
    fs::write(&config, text)?;
    let mut serve = Command::new("containerd-nydus-grpc");
    serve.arg("--config").arg(config);
    Service::start(&mut serve, || answers(Path::new(NYDUS_SNAPSHOTTER)))
}

/// Whether something listens there. The image service wants packets, not a stream: its refusal is an answer.
fn answers(socket: &Path) -> bool {
    fs::metadata(socket).is_ok()
        && !matches!(UnixStream::connect(socket), Err(e) if e.kind() == ErrorKind::ConnectionRefused)
}

/// What `ctvm image stat` says of the cache in `folder/cache`.
pub fn counters(folder: &Path) -> Result<Value> {
    counters_of(&folder.join("cache"))
}

/// The same of the cache in `cache`.
pub fn counters_of(cache: &Path) -> Result<Value> {
    let text = run(program("ctvm").args(["image", "stat", "--json", "--root"]).arg(cache))?.ok()?;
    Ok(serde_json::from_str(&text)?)
}

/// Bytes of chunks that came to the cache in `folder/cache`.
pub fn fetched(folder: &Path) -> Result<u64> {
    counters(folder)?["chunk_bytes"].as_u64().context("chunk_bytes")
}
