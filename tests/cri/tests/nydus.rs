//! Nydus images from a registry to a container: converted, pulled without being downloaded, run, and gone again. Real registry, real
//! containerd, its CRI, our snapshotter, image service, shim, VMM and agent.
#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use cri::{Daemon, Pod};
use e2e::command::wait_until;
use e2e::{BIN, Census, SHARE, run};
use k8s_cri::v1::ImageSpec;
use serde_json::{Value, json};
use tempfile::TempDir;

const REGISTRY: &str = "127.0.0.1:5000";
const NAME: &str = "127.0.0.1:5000/app:nydus";
const MIB: u64 = 1 << 20;
/// Files of noise in the image, and the size of each in MiB.
const FILES: u64 = 16;
const FILE_MIB: u64 = 3;

/// A process of the node, killed when dropped.
struct Service(Child);

impl Service {
    fn start(command: &mut Command, ready: impl Fn() -> bool) -> Result<Service> {
        let what = format!("{command:?}");
        let mut service = Service(command.stdin(Stdio::null()).spawn().with_context(|| what.clone())?);
        wait_until(&format!("{what} is ready"), || {
            let ended = service.0.try_wait()?;
            ensure!(ended.is_none(), "{what} has ended: {ended:?}");
            Ok(ready())
        })?;
        Ok(service)
    }
}

impl Service {
    /// In order, as an operator ends it.
    fn stop(mut self) -> Result<()> {
        run(Command::new("kill").arg(self.0.id().to_string()))?.ok()?;
        let status = self.0.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program(name: &str) -> Command {
    Command::new(Path::new(BIN).join(name))
}

fn answers(socket: &str) -> bool {
    // The image service wants packets, the snapshotter a stream: a refusal of the type is an answer.
    fs::metadata(socket).is_ok()
        && !matches!(std::os::unix::net::UnixStream::connect(socket), Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused)
}

fn registry(folder: &Path) -> Result<Service> {
    let config = folder.join("registry.yml");
    let store = folder.join("registry");
    fs::write(
        &config,
        format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {REGISTRY}}}\n",
            store.display()
        ),
    )?;
    let mut serve = Command::new("docker-registry");
    serve.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
    Service::start(&mut serve, || std::net::TcpStream::connect(REGISTRY).is_ok())
}

fn image_service(folder: &Path) -> Result<Service> {
    let mut serve = program("ctvm");
    serve.args(["image", "serve", "--root"]).arg(folder.join("cache"));
    Service::start(&mut serve, || answers("/run/ctvm/images.sock"))
}

fn snapshotter(folder: &Path) -> Result<Service> {
    let mut serve = program("ctvm");
    serve.args(["snapshotter", "--plain-http", REGISTRY, "--root"]).arg(folder.join("snapshots"));
    Service::start(&mut serve, || answers("/run/ctvm/snapshotter.sock"))
}

fn counters(folder: &Path) -> Result<Value> {
    let text =
        run(program("ctvm").args(["image", "stat", "--json", "--root"]).arg(folder.join("cache")))?.ok()?;
    Ok(serde_json::from_str(&text)?)
}

fn fetched(folder: &Path) -> Result<u64> {
    counters(folder)?["chunk_bytes"].as_u64().context("chunk_bytes")
}

/// An OCI layout folder with an image of one layer; what is in it.
fn oci_layout(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let (tree, layout) = (folder.join("tree"), folder.join("oci"));
    for dir in ["bin", "etc", "data", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy(Path::new(SHARE).join("busybox"), tree.join("bin/busybox"))?;
    fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for applet in ["sh", "md5sum", "cat", "sleep", "id", "ls", "find", "sort"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet))?;
    }
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\napp:x:1235:\nmore:x:1300:app\n")?;
    let mut state = 99_u64;
    for file in 0..FILES {
        let noise = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        let bytes: Vec<u8> = noise.flatten().take(usize::try_from(FILE_MIB * MIB)?).collect();
        fs::write(tree.join(format!("data/{file:02}")), bytes)?;
    }
    fs::hard_link(tree.join("data/00"), tree.join("data/same"))?;
    fs::write(tree.join("data/empty"), "")?;
    let sparse = fs::File::create(tree.join("data/sparse"))?;
    sparse.set_len(5 * MIB)?;
    std::os::unix::fs::FileExt::write_at(&sparse, b"end", 4 * MIB)?;

    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let add = |bytes: &[u8]| -> Result<String> {
        let path = layout.join("new");
        fs::write(&path, bytes)?;
        let sum = run(Command::new("sha256sum").arg(&path))?.ok()?;
        let digest = sum.split(' ').next().context("a digest")?.to_owned();
        fs::rename(&path, blobs.join(&digest))?;
        Ok(format!("sha256:{digest}"))
    };
    let tar = folder.join("layer.tar");
    run(Command::new("tar").arg("-cf").arg(&tar).arg("-C").arg(&tree).arg("."))?.ok()?;
    let layer = fs::read(&tar)?;
    let layer_digest = add(&layer)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"], "User": "app"},
        "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": add(config.as_bytes())?, "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer_digest, "size": layer.len()}],
    })
    .to_string();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": add(manifest.as_bytes())?, "size": manifest.len()}],
    });
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    Ok((layout, tree))
}

/// The sums of all files below `data`, as `md5sum` prints them.
fn sums(tree: &Path) -> Result<String> {
    let script = "cd \"$0\" && find . -type f | sort | xargs md5sum";
    run(Command::new("sh").args(["-c", script]).arg(tree.join("data")))?.ok()
}

const SUMS: &str = "cd /data && for f in $(find . -type f | sort); do md5sum $f; done";

fn app(pod: &Pod, command: &[&str]) -> k8s_cri::v1::ContainerConfig {
    let mut config = pod.container(command);
    config.image = Some(ImageSpec { image: NAME.into(), ..ImageSpec::default() });
    config
}

fn a_whole_life(release: Option<&str>) -> Result<()> {
    // The kubelet's, which stays.
    fs::create_dir_all("/sys/fs/cgroup/kubepods")?;
    let before = Census::take()?;
    let folder = tempfile::tempdir_in("/var/tmp")?;
    within(&folder, release)?;
    drop(folder);
    before.settle()
}

fn within(folder: &TempDir, release: Option<&str>) -> Result<()> {
    let folder = folder.path();
    let (layout, tree) = oci_layout(folder)?;
    let registry_service = registry(folder)?;
    let convert = format!("oci:{}", layout.display());
    run(program("ctvm").args([
        "image",
        "convert",
        "--chunk-size",
        "262144",
        &convert,
        &format!("http://{NAME}"),
    ]))?
    .ok()
    .context("converting")?;
    let service = image_service(folder)?;
    let snapshotter = snapshotter(folder)?;
    let daemon = Daemon::start_with_snapshotter(release)?;
    daemon.cri.pull(NAME)?;
    ensure!(fetched(folder)? == 0, "pulling fetches nothing but the bootstrap");

    // The program runs, as a user whom containerd found in the image.
    let pod = Pod::run(&daemon.cri, "ctvm")?;
    let config = app(&pod, &["sh", "-c", "id -u; id -G; echo written > /tmp/own; sleep 100000"]);
    let first = pod.start(&config)?;
    wait_until("it has said who it is", || Ok(pod.log(&config)?.0 == "1234\n1235 1300\n"))
        .with_context(|| format!("the log is {:?}", pod.log(&config)))?;
    let at_start = fetched(folder)?;
    ensure!(at_start < FILES * FILE_MIB * MIB / 10, "{at_start} bytes came before the first output");
    println!("{release:?}: {at_start} of {} bytes came before the first output", FILES * FILE_MIB * MIB);

    // The node's service dies, and its successor goes on where it was.
    drop(service);
    let service = image_service(folder)?;
    let told = pod.finish(&app(&pod, &["sh", "-c", SUMS]))?.ok()?;
    ensure!(told.trim_end() == sums(&tree)?, "{told}");
    let after = fetched(folder)?;
    let own = daemon.cri.exec(&first, &["cat", "/tmp/own"], 60)?.ok()?;
    ensure!(own == "written", "{own}");

    // All is there: another pod needs neither the registry nor anything fetched.
    drop(registry_service);
    let other = Pod::run(&daemon.cri, "ctvm")?;
    let told = other.finish(&app(&other, &["sh", "-c", SUMS]))?.ok()?;
    ensure!(told.trim_end() == sums(&tree)?, "{told}");
    ensure!(fetched(folder)? == after, "fetched twice");

    for pod in [&pod, &other] {
        daemon.cri.stop_pod(&pod.id)?;
        daemon.cri.remove_pod(&pod.id)?;
    }
    wait_until("the image is closed", || Ok(counters(folder)?["images"] == 0))?;
    daemon.cri.remove_image(NAME)?;
    drop(daemon);
    service.stop()?;
    snapshotter.stop()
}

#[test]
fn a_container_starts_before_its_image_is_downloaded_under_containerd_1_7() -> Result<()> {
    a_whole_life(None)
}

#[test]
fn a_container_starts_before_its_image_is_downloaded_under_containerd_2_1() -> Result<()> {
    a_whole_life(Some("2.1"))
}
