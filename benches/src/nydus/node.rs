//! A node: a containerd 2.1 with our snapshotter and image service, all files of images on an ext4, and the registry that it pulls from.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use benches::subject::now_us;
use e2e::containerd::RUNTIME;
use e2e::image_reader::ImageReader;
use e2e::{Containerd, Service, Setup, SmallFs, node, run};

use serde_json::json;

use super::link::{Link, REGISTRY};

/// Of the file system for images: room for the largest one, packed, unpacked and as cache files.
const DISK_BYTES: u64 = 6 << 30;

/// How an image comes to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// As the figures name it.
    pub subject: &'static str,
    /// Tag of the image.
    pub tag: &'static str,
    snapshotter: &'static str,
    runtime: &'static str,
    /// It is to be memory of the VM.
    dax: bool,
}

/// A Nydus image by our snapshotter, a disk of the VM.
pub const NYDUS: Way =
    Way { subject: "ctvm, Nydus", tag: "nydus", snapshotter: "ctvm", runtime: RUNTIME, dax: false };
/// The same, all of it in the cache, as memory of the VM.
pub const DAX: Way = Way { subject: "ctvm, Nydus, DAX", dax: true, ..NYDUS };
/// An ordinary image, unpacked on the node, and shown to the VM by virtio-fs.
pub const OCI: Way =
    Way { subject: "ctvm, OCI", tag: "oci", snapshotter: "overlayfs", runtime: RUNTIME, dax: false };
/// The same without a VM.
pub const RUNC: Way = Way { subject: "runc, OCI", runtime: "io.containerd.runc.v2", ..OCI };

impl Way {
    /// Whether the image service has the image's files.
    pub fn is_nydus(self) -> bool {
        self.tag == NYDUS.tag
    }

    /// An image's name.
    pub fn name(self, image: &str) -> String {
        format!("{REGISTRY}/{image}:{}", self.tag)
    }
}

/// A running node. What is first here ends first.
#[derive(Debug)]
pub struct Node {
    containerd: Containerd,
    snapshotter: Service,
    images: Option<Service>,
    disk: SmallFs,
    /// Where its images come from.
    pub link: Link,
}

impl Node {
    /// Starts all of it.
    pub fn start() -> Result<Node> {
        let link = Link::start()?;
        let disk = SmallFs::ext4(DISK_BYTES)?;
        // What is removed need not stay in memory, which is behind this disk.
        run(Command::new("mount").args(["-o", "remount,discard"]).arg(disk.path()))?.ok()?;
        let images = Some(node::image_service(disk.path())?);
        let snapshotter = node::snapshotter_for(REGISTRY, disk.path(), Path::new(node::SNAPSHOTTER))?;
        let setup = Setup {
            parent: disk.path().to_owned(),
            release: Some("2.1".into()),
            config: |_| Ok(configuration()),
            ..Setup::default()
        };
        let node = Node { containerd: setup.start()?, snapshotter, images, disk, link };
        let usual = fs::read_to_string("/etc/ctvm/config.toml").context("read the shim's configuration")?;
        fs::write(node.dax_config(), format!("image_dax = true\n{usual}"))?;
        Ok(node)
    }

    fn dax_config(&self) -> PathBuf {
        self.containerd.folder().join("dax.toml")
    }

    /// Has all of a Nydus image fetched that a container of it was made of.
    pub fn fetch_all(&self, image: &str) -> Result<()> {
        let snapshots = self.disk.path().join("snapshots");
        let found = run(Command::new("find").arg(snapshots).args(["-name", "image.boot"]))?.ok()?;
        let bootstrap = found.lines().next().context("a bootstrap: no container was made of the image")?;
        let backend =
            json!({"type": "registry", "config": {"host": REGISTRY, "repo": image, "scheme": "http"}});
        let config = json!({"device": {"backend": backend}, "mode": "direct"}).to_string();
        ImageReader::open(Path::new(node::IMAGES), Path::new(bootstrap), &config)?.fetch_all(1024)
    }

    /// Pulls an image, and unpacks it if it is an ordinary one.
    pub fn pull(&self, image: &str, way: Way) -> Result<()> {
        let mut pull = self.containerd.ctr();
        pull.args(["images", "pull", "--plain-http", "--snapshotter", way.snapshotter, &way.name(image)]);
        run(&mut pull)?.ok().with_context(|| format!("pull {}", way.name(image))).map(drop)
    }

    /// The same, unless an earlier part has left it here.
    pub fn pull_if_absent(&self, image: &str, way: Way) -> Result<()> {
        let names = run(self.containerd.ctr().args(["images", "ls", "--quiet"]))?.ok()?;
        if names.lines().any(|name| name == way.name(image)) {
            return Ok(());
        }
        self.pull(image, way)
    }

    /// `ctr run` with `options` before the image and `command` behind it.
    pub fn run_command(
        &self,
        image: &str,
        way: Way,
        options: &[&str],
        id: &str,
        command: &[&str],
    ) -> Command {
        let mut ctr = self.containerd.ctr();
        ctr.args(["run", "--snapshotter", way.snapshotter, "--runtime", way.runtime]).args(options);
        if way.dax {
            ctr.arg("--runtime-config-path").arg(self.dax_config());
        }
        ctr.args([&way.name(image), id]).args(command);
        ctr
    }

    /// Runs a container to its end; when its first line of output came, CLOCK_MONOTONIC µs, and what had come over the link by then.
    pub fn first_output(&self, image: &str, way: Way, id: &str, command: &[&str]) -> Result<(u64, u64)> {
        let mut ctr = self.run_command(image, way, &["--rm"], id, command);
        let mut child = ctr.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start ctr")?;
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().context("stdout is piped")?);
        output.read_line(&mut line)?;
        let found = (now_us(), self.link.received()?);
        let status = child.wait()?;
        ensure!(status.success() && line == "ready\n", "{id} of {}: {status}, {line:?}", way.subject);
        Ok(found)
    }

    /// Starts a container that goes on.
    pub fn start_container(
        &self,
        image: &str,
        way: Way,
        options: &[&str],
        id: &str,
        command: &[&str],
    ) -> Result<()> {
        let options: Vec<&str> = ["-d"].iter().chain(options).copied().collect();
        run(&mut self.run_command(image, way, &options, id, command))?.ok().map(drop)
    }

    /// Runs a command in a container; its output.
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<String> {
        self.containerd.exec(id, "exec", command)?.ok().with_context(|| format!("{command:?} in {id}"))
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.containerd.remove(id)
    }

    /// Has the node be one that has never seen the image. No container of it may run.
    pub fn forget(&mut self, image: &str, way: Way) -> Result<()> {
        let mut remove = self.containerd.ctr();
        // Returns when what it referred to is collected as well.
        run(remove.args(["images", "rm", "--sync", &way.name(image)]))?.ok()?;
        if way.is_nydus() {
            self.empty_cache()?;
        }
        Ok(())
    }

    /// Forgets all chunks, and which of them were missed when containers started.
    pub fn empty_cache(&mut self) -> Result<()> {
        if let Some(images) = self.images.take() {
            images.stop()?;
        }
        fs::remove_dir_all(self.disk.path().join("cache")).context("remove the cache")?;
        self.images = Some(node::image_service(self.disk.path())?);
        Ok(())
    }

    /// Processes that a node has once for all of its Nydus images.
    pub fn services(&self) -> Result<[u32; 2]> {
        let images = self.images.as_ref().context("the image service runs")?;
        Ok([images.pid(), self.snapshotter.pid()])
    }

    /// Where the files of images are on this machine: as cache files, or unpacked.
    pub fn files(&self, way: Way) -> PathBuf {
        if way.is_nydus() {
            self.disk.path().join("cache")
        } else {
            self.containerd.folder().join("root/io.containerd.snapshotter.v1.overlayfs/snapshots")
        }
    }

    /// For more files on its disk.
    pub fn disk(&self) -> &Path {
        self.disk.path()
    }
}

fn configuration() -> String {
    let unpack = |snapshotter| {
        format!(
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = \"linux/amd64\"\nsnapshotter = \"{snapshotter}\"\n"
        )
    };
    format!(
        "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[proxy_plugins.ctvm]\ntype = \"snapshot\"\naddress = \"{}\"\n\
         [proxy_plugins.ctvm.exports]\nenable_remote_snapshot_annotations = \"true\"\n{}{}",
        node::SNAPSHOTTER,
        unpack("ctvm"),
        unpack("overlayfs")
    )
}
