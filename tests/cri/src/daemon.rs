//! A containerd with CRI, a CNI network of its own, and runtimes: ours with a pause container (`ctvm`), without (`ctvm-pod`,
//! the Sandbox API; `ctvm-stream`, the same with streams in place of fifos) and with variants, and runc.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result};
use e2e::{Containerd, Setup};

use crate::Cri;

/// The network's file below the daemon's folder.
const NETWORK: &str = "cni/10-bridge.conflist";

/// Numbers the networks, so that daemons of one machine do not meet.
static NETWORKS: AtomicU8 = AtomicU8::new(0);

/// A running containerd and a client of its CRI.
#[derive(Debug)]
pub struct Daemon {
    /// The daemon.
    pub containerd: Containerd,
    /// The client.
    pub cri: Cri,
}

impl Daemon {
    /// Starts the given release (`1.6`, `1.7`, `2.1`), or the lab's own.
    pub fn start(release: Option<&str>) -> Result<Daemon> {
        Self::start_from(Setup { release: release.map(str::to_owned), ..Setup::default() })
    }

    /// Starts the lab's own with all of its files in `parent`.
    pub fn start_in(parent: &Path) -> Result<Daemon> {
        Self::start_from(Setup { parent: parent.to_owned(), ..Setup::default() })
    }

    /// Starts the given release with all of its files in `parent`.
    pub fn start_release_in(release: &str, parent: &Path) -> Result<Daemon> {
        Self::start_from(Setup {
            release: Some(release.to_owned()),
            parent: parent.to_owned(),
            ..Setup::default()
        })
    }

    /// The same, with a network that knows ports of the host, which the conformance cases ask for.
    pub fn start_with_host_ports_in(release: &str, parent: &Path) -> Result<Daemon> {
        Self::start_as(Setup {
            release: Some(release.to_owned()),
            parent: parent.to_owned(),
            config: with_host_ports,
            ..Setup::default()
        })
    }

    /// The given release, or the lab's own, with `ctvm-snapshotter`, which has to serve at its usual socket.
    pub fn start_with_snapshotter(release: Option<&str>) -> Result<Daemon> {
        let setup = Setup { release: release.map(str::to_owned), ..Setup::default() };
        Self::start_as(Setup { config: with_snapshotter, ..setup })
    }

    /// The same with all of its files in `parent`.
    pub fn start_with_snapshotter_in(release: Option<&str>, parent: &Path) -> Result<Daemon> {
        let setup =
            Setup { release: release.map(str::to_owned), parent: parent.to_owned(), ..Setup::default() };
        Self::start_as(Setup { config: with_snapshotter, ..setup })
    }

    /// The given release, or the lab's own, with Debian's nydus-snapshotter, which has to serve at
    /// [`node::NYDUS_SNAPSHOTTER`](e2e::node::NYDUS_SNAPSHOTTER).
    pub fn start_with_nydus_snapshotter(release: Option<&str>) -> Result<Daemon> {
        let setup = Setup { release: release.map(str::to_owned), ..Setup::default() };
        Self::start_as(Setup { config: with_nydus_snapshotter, ..setup })
    }

    fn start_from(setup: Setup) -> Result<Daemon> {
        Self::start_as(Setup { config: configuration, ..setup })
    }

    fn start_as(setup: Setup) -> Result<Daemon> {
        let setup = Setup { namespace: "k8s.io", ..setup };
        let containerd = setup.start()?;
        let cri = Cri::connect(&containerd.socket())?;
        for image in [e2e::IMAGE, "ctvm.local/pause:latest"] {
            e2e::command::wait_until("CRI sees the imported image", || cri.has_image(image))?;
        }
        Ok(Daemon { containerd, cri })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // CNI's bridge outlives its pods, and another with the same addresses would take its traffic.
        let conflist = std::fs::read(self.containerd.folder().join(NETWORK));
        let network = conflist.ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
        if let Some(name) = network.as_ref().and_then(|network| network["name"].as_str()) {
            let _ = e2e::run(std::process::Command::new("ip").args(["link", "del", name]));
        }
    }
}

impl Daemon {
    /// A new containerd in the place of one that has ended, and a new client for it.
    pub fn reconnect(&mut self) -> Result<()> {
        self.containerd.start_again()?;
        self.cri = Cri::connect(&self.containerd.socket())?;
        // The socket is there before CRI has found its pods again.
        e2e::command::wait_until("CRI answers", || Ok(self.cri.pods().is_ok()))
    }
}

/// As [`configuration`], with a network in which pods have ports of the host. Most tests' pods do without: a plugin is two more
/// programs to run for each pod, and those are a fifth of what a pod takes in an emulated machine.
fn with_host_ports(folder: &Path) -> Result<String> {
    let text = configuration(folder)?;
    let path = folder.join(NETWORK);
    let mut network: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    let plugins = network["plugins"].as_array_mut().context("a network without plugins")?;
    plugins.push(serde_json::json!({"type": "portmap", "capabilities": {"portMappings": true}}));
    fs::write(path, serde_json::to_vec_pretty(&network)?)?;
    Ok(text)
}

/// As [`configuration`], with the lines that an operator adds (`shim/snapshotter/README.md`).
fn with_snapshotter(folder: &Path) -> Result<String> {
    with_plugin(folder, "ctvm", e2e::node::SNAPSHOTTER)
}

/// The same for nydus-snapshotter.
fn with_nydus_snapshotter(folder: &Path) -> Result<String> {
    with_plugin(folder, "nydus", e2e::node::NYDUS_SNAPSHOTTER)
}

fn with_plugin(folder: &Path, name: &str, address: &str) -> Result<String> {
    const CONTAINERD: &str = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n";
    let ours = format!("snapshotter = \"{name}\"\ndisable_snapshot_annotations = false\n");
    let usual = configuration(folder)?.replace(CONTAINERD, &format!("{CONTAINERD}{ours}"));
    let plugin = format!("type = \"snapshot\"\naddress = \"{address}\"\ncapabilities = [\"remap-ids\"]\n");
    Ok(format!("{usual}\n[proxy_plugins.{name}]\n{plugin}"))
}

fn configuration(folder: &Path) -> Result<String> {
    let cni = folder.join("cni");
    fs::create_dir_all(&cni).context("make the CNI folder")?;
    let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
    let name = format!("cni{}x{number}", std::process::id());
    let network = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": name,
        "plugins": [
            {
                "type": "bridge", "bridge": name, "isGateway": true, "ipMasq": false, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": folder.join("ipam"),
                    "ranges": [[{"subnet": format!("10.{}.{number}.0/24", 100 + std::process::id() % 100)}],
                               [{"subnet": format!("fd{:02x}:{number:x}::/64", std::process::id() % 256)}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
        ],
    });
    fs::write(folder.join(NETWORK), serde_json::to_vec_pretty(&network)?)?;
    let config = fs::read_to_string("/etc/ctvm/config.toml").context("read the shim's configuration")?;
    let more = "annotations = [\"vcpus\", \"memory_mib\", \"cmdline\", \"image_dax\"]\n";
    let patience = |ms: u32| format!("[timeouts]\nagent_ms = {ms}\n");
    fs::write(folder.join("ctvm-lenient.toml"), format!("{more}{config}{}", patience(20_000)))?;
    fs::write(folder.join("ctvm-impatient.toml"), format!("{config}{}", patience(8_000)))?;
    write_logged(folder, &config)?;
    // containerd 2.1 ends when it cannot bind NRI's socket, and two that start at once would race for the one in /run.
    Ok(format!(
        r#"
[plugins."io.containerd.nri.v1.nri"]
  socket_path = "{}/nri.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "ctvm.local/pause:latest"
  disable_apparmor = true
  disable_hugetlb_controller = false
  restrict_oom_score_adj = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "ctvm"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.ctvm]
      runtime_type = "io.containerd.ctvm.v2"
      privileged_without_host_devices = true
      pod_annotations = ["io.ctvm.*", "io.katacontainers.*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.ctvm-pod]
      runtime_type = "io.containerd.ctvm.v2"
      sandboxer = "shim"
      sandbox_mode = "shim"
      privileged_without_host_devices = true
      pod_annotations = ["io.ctvm.*", "io.katacontainers.*"]
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.ctvm-stream]
      runtime_type = "io.containerd.ctvm.v2"
      sandboxer = "shim"
      io_type = "streaming"
{}    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#,
        folder.display(),
        cni.display(),
        ["lenient", "impatient", "logged"].map(|name| variant(name, folder)).concat(),
    ))
}

/// One more runtime of ours, with a configuration of its own: `ctvm-lenient` lets pods change the guest kernel's command
/// line and how they have their images, and gives an agent 20 s; `ctvm-impatient` gives it 8 s; `ctvm-logged` has system calls that the VMM's filters do not list written to the host's log.
fn variant(name: &str, folder: &Path) -> String {
    let table = format!("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.ctvm-{name}");
    format!(
        r#"    {table}]
      runtime_type = "io.containerd.ctvm.v2"
      privileged_without_host_devices = true
      pod_annotations = ["io.ctvm.*", "io.katacontainers.*"]
      {table}.options]
        ConfigPath = "{}/ctvm-{name}.toml"
"#,
        folder.display()
    )
}

/// The configuration of `ctvm-logged`: a VMM that is told so by a script, as there is no key for it.
fn write_logged(folder: &Path, config: &str) -> Result<()> {
    let vmm = folder.join("ctvm-vmm-logged");
    fs::write(&vmm, format!("#!/bin/sh\nexec {}/ctvm-vmm --seccomp log\n", e2e::BIN))?;
    fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755))?;
    let rest = config.lines().filter(|line| !line.starts_with("vmm ")).collect::<Vec<_>>().join("\n");
    fs::write(folder.join("ctvm-logged.toml"), format!("vmm = \"{}\"\n{rest}\n", vmm.display()))?;
    Ok(())
}
