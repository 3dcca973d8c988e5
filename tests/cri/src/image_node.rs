//! A node whose images start before they are downloaded: registry, snapshotter, image service and containerd, each of which a test
//! can end and have again, and a wire between node and registry that can be bad.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use e2e::command::{wait_at_most, wait_until};
use e2e::oci::{self, Layer, Layout};
use e2e::wire::Wire;
use e2e::{Census, Link, Service, node, run};
use k8s_cri::v1::{ContainerConfig, ImageSpec};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{Cri, Daemon, Pod};

/// Where the registry listens, behind the wire.
const REGISTRY: &str = "127.0.0.1:5001";
/// Bytes of a chunk of its images.
pub const CHUNK: usize = 256 << 10;

/// The node. What is dropped first is what needs the rest.
#[derive(Debug)]
pub struct ImageNode {
    /// containerd, with the snapshotter.
    pub daemon: Daemon,
    /// The snapshotter, if it runs.
    pub snapshotter: Option<Service>,
    /// The image service, if it runs.
    pub service: Option<Service>,
    /// The registry, if it runs.
    pub registry: Option<Service>,
    /// The way to it.
    pub wire: Wire,
    /// Where the registry is, if it is not on this host.
    pub link: Option<Link>,
    folder: TempDir,
}

impl ImageNode {
    /// Starts all of it, with the given `release` of containerd, or the lab's own; `config` is the image service's. The registry
    /// is on a host of its own behind a link if there is to be a `link`.
    pub fn start(release: Option<&str>, config: &str, link: Option<Link>) -> Result<ImageNode> {
        let folder = tempfile::Builder::new().prefix("images").tempdir_in("/var/tmp")?;
        let address = link.as_ref().map_or(REGISTRY.to_owned(), |_| format!("{}:5000", e2e::link::FAR));
        let wire = Wire::new(node::REGISTRY, &address)?;
        let mut it = ImageNode {
            snapshotter: Some(node::snapshotter(folder.path(), Path::new(node::SNAPSHOTTER))?),
            daemon: Daemon::start_with_snapshotter(release)?,
            service: None,
            registry: None,
            wire,
            link,
            folder,
        };
        it.start_registry()?;
        it.serve(config)?;
        Ok(it)
    }

    /// The node's CRI.
    pub fn cri(&self) -> &Cri {
        &self.daemon.cri
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The image service's cache, unless [`ImageNode::serve_in`] was told of another.
    pub fn cache(&self) -> PathBuf {
        self.folder().join("cache")
    }

    /// Where the registry listens.
    pub fn address(&self) -> String {
        self.link.as_ref().map_or(REGISTRY.to_owned(), |_| format!("{}:5000", e2e::link::FAR))
    }

    /// Starts the registry, with what it had before.
    pub fn start_registry(&mut self) -> Result<()> {
        let program = "docker-registry";
        let command = self.link.as_ref().map_or_else(|| Command::new(program), |link| link.command(program));
        self.registry = Some(node::registry_at(self.folder(), &self.address(), command)?);
        Ok(())
    }

    /// `kill -9` for the registry.
    pub fn kill_registry(&mut self) {
        self.registry = None;
    }

    /// Starts the image service with this configuration, after a `kill -9` for the one before.
    pub fn serve(&mut self, config: &str) -> Result<()> {
        let cache = self.cache();
        self.serve_in(&cache, config)
    }

    /// The same with another folder for its cache.
    pub fn serve_in(&mut self, cache: &Path, config: &str) -> Result<()> {
        self.service = None;
        self.service = Some(node::image_service_with(config, cache, &self.folder().join("images.log"))?);
        Ok(())
    }

    /// What the image service has said so far.
    pub fn service_log(&self) -> String {
        fs::read_to_string(self.folder().join("images.log")).unwrap_or_default()
    }

    /// Waits until the image service has said a line with all of `words`, after what it had said `before`.
    pub fn wait_for_line(&self, before: &str, words: &[&str]) -> Result<()> {
        let found = || {
            let log = self.service_log();
            let fresh = log.get(before.len()..).unwrap_or_default();
            Ok(fresh.lines().any(|line| words.iter().all(|word| line.contains(word))))
        };
        wait_at_most(std::time::Duration::from_secs(30), &format!("a line with {words:?}"), found)
            .with_context(|| self.service_log().get(before.len()..).unwrap_or_default().to_owned())
    }

    /// The image service's counters.
    pub fn counters(&self) -> Result<Value> {
        node::counters(self.folder())
    }

    /// One of them.
    pub fn counter(&self, name: &str) -> Result<u64> {
        self.counters()?[name].as_u64().with_context(|| format!("counter {name}"))
    }

    /// Starts the snapshotter, and waits until containerd reaches it.
    pub fn start_snapshotter(&mut self) -> Result<()> {
        self.snapshotter = Some(node::snapshotter(self.folder(), Path::new(node::SNAPSHOTTER))?);
        wait_until("containerd reaches the snapshotter", || {
            let list = ["snapshots", "--snapshotter", "ctvm", "ls"];
            Ok(run(self.daemon.containerd.ctr().args(list))?.code == 0)
        })
    }

    /// Makes an image of these layers and converts it, against `parent` if there is one; its name.
    pub fn push(&self, tag: &str, layers: &[Layer<'_>], parent: Option<&str>) -> Result<String> {
        let folder = self.folder().join(tag);
        let layout = Layout::of(&folder, layers, &json!({"Cmd": ["/bin/sh"]}))?;
        let at = |tag: &str| format!("http://{}/app:{tag}", self.address());
        let mut convert = node::program("ctvm");
        convert.args(["image", "convert", "--chunk-size", &CHUNK.to_string()]);
        convert.args(parent.map(|parent| format!("--parent={}", at(parent))));
        run(convert.args([layout.source(), at(tag)]))?.ok().with_context(|| format!("converting {tag}"))?;
        fs::remove_dir_all(folder)?;
        Ok(format!("{}/app:{tag}", node::REGISTRY))
    }

    /// Bootstraps in the snapshotter's folder.
    pub fn bootstraps(&self) -> Result<Vec<PathBuf>> {
        let snapshots = self.folder().join("snapshots");
        let found = run(Command::new("find").arg(snapshots).args(["-name", "image.boot"]))?.ok()?;
        Ok(found.lines().map(PathBuf::from).collect())
    }

    /// The size of the blobs that the registry has of the images, stored, in bytes.
    pub fn stored(&self) -> Result<u64> {
        let script = "find \"$0\" -name data -size +20k -exec stat -c %s {} +";
        let sizes = run(Command::new("sh").args(["-c", script]).arg(self.folder().join("registry")))?.ok()?;
        sizes.lines().try_fold(0, |sum, size| Ok(sum + size.parse::<u64>()?))
    }

    /// Removes images and all that the snapshotter has of them, in a moment at most, and ends the services in order.
    pub fn end(mut self, images: &[&str]) -> Result<()> {
        wait_until("the images are closed", || Ok(self.counter("images")? == 0))?;
        for image in images {
            self.cri().remove_image(image)?;
        }
        for image in run(self.daemon.containerd.ctr().args(["images", "ls", "-q"]))?.ok()?.lines() {
            run(self.daemon.containerd.ctr().args(["images", "rm", "--sync", image]))?.ok()?;
        }
        let snapshots = self.folder().join("snapshots");
        wait_until("all snapshots are gone", || {
            let left = fs::read_dir(snapshots.join("snapshots"))?.count();
            Ok(left + fs::read_dir(snapshots.join("removed"))?.count() == 0)
        })?;
        drop(self.daemon);
        self.service.take().map_or(Ok(()), Service::stop)?;
        self.snapshotter.take().map_or(Ok(()), Service::stop)
    }
}

/// A folder with busybox and files of noise in `/data`, called `00`, `01` and so on, and their sums.
#[derive(Debug)]
pub struct NoiseTree {
    folder: TempDir,
    sums: Vec<String>,
}

impl NoiseTree {
    /// `files` files of `chunks` chunks each; other bytes for each `seed`.
    pub fn new(seed: u64, files: usize, chunks: usize) -> Result<NoiseTree> {
        let folder = tempfile::Builder::new().prefix("tree").tempdir_in("/var/tmp")?;
        oci::busybox_tree(folder.path(), &["sh", "md5sum", "cat", "dd", "sleep", "true", "sed"])?;
        fs::create_dir(folder.path().join("data"))?;
        let mut tree = NoiseTree { folder, sums: Vec::new() };
        for file in 0..files {
            let number = u64::try_from(file)?;
            tree.add(&format!("{file:02}"), &oci::noise(seed * 1000 + number + 1, chunks * CHUNK))?;
        }
        Ok(tree)
    }

    /// One more file, which may be tried as a program.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.path().join("data").join(name);
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        let sum = run(Command::new("md5sum").arg(path))?.ok()?;
        self.sums.push(sum.split(' ').next().context("a sum")?.to_owned());
        Ok(())
    }

    /// Lists of users and groups, which containerd reads before a container starts.
    pub fn add_users(&self) -> Result<()> {
        fs::write(self.folder.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
        Ok(fs::write(self.folder.path().join("etc/group"), "root:x:0:\n")?)
    }

    /// As a layer.
    pub fn layer(&self) -> Layer<'_> {
        Layer::Tree(self.folder.path())
    }

    /// The sum of a file.
    pub fn sum(&self, file: usize) -> &str {
        &self.sums[file]
    }

    /// What [`SUMS`] prints in a container.
    pub fn sums(&self) -> String {
        self.sums.join("\n")
    }
}

/// Prints the sums of all files of a [`NoiseTree`], in their order, as they are on the disk.
pub const SUMS: &str =
    "for f in /data/*; do dd if=$f bs=256k iflag=direct 2>/dev/null | md5sum | sed 's/ .*//'; done";

/// The daemon's configuration of an image of the node, for who opens it at the image service.
pub fn backend() -> String {
    let registry =
        json!({"type": "registry", "config": {"host": node::REGISTRY, "repo": "app", "scheme": "http"}});
    json!({"device": {"backend": registry}, "mode": "direct"}).to_string()
}

/// A pod whose VM is small.
pub fn small_pod(cri: &Cri) -> Result<Pod> {
    Pod::run_with(cri, "ctvm", |config| {
        config.annotations.insert("io.ctvm.memory_mib".into(), "96".into());
    })
}

/// Tells a story of such nodes, and counts what is left of it.
pub fn story(tell: impl FnOnce() -> Result<()>) -> Result<()> {
    // The kubelet's, which stays.
    fs::create_dir_all("/sys/fs/cgroup/kubepods")?;
    for socket in [node::IMAGES, node::SNAPSHOTTER] {
        // Of a story that failed, and did not end its services in order.
        let _ = fs::remove_file(socket);
    }
    let before = Census::take()?;
    tell()?;
    crate::pod::remove_empty_groups();
    before.settle()
}

/// The configuration of a container of `image`.
pub fn app(pod: &Pod, image: &str, command: &[&str]) -> ContainerConfig {
    let mut config = pod.container(command);
    config.image = Some(ImageSpec { image: image.into(), ..ImageSpec::default() });
    config
}

/// A container that sleeps, for execs.
pub fn idle(pod: &Pod, image: &str) -> Result<String> {
    pod.start(&app(pod, image, &["sh", "-c", "exec sleep 100000"]))
}

/// Whether a container reads a file of a [`NoiseTree`] right.
pub fn read(cri: &Cri, container: &str, tree: &NoiseTree, file: usize) -> Result<()> {
    let said = cri.exec(container, &["md5sum", &format!("/data/{file:02}")], 300)?.ok()?;
    let told = said.split(' ').next().unwrap_or_default();
    ensure!(told == tree.sum(file), "file {file}: {said:?} is not {}", tree.sum(file));
    Ok(())
}
