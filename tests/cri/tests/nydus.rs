//! Nydus images from a registry to a container: converted, pulled without being downloaded, run, and gone again. Real registry, real
//! containerd, its CRI, our snapshotter, image service, shim, VMM and agent.
#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use cri::{Daemon, Pod};
use e2e::command::wait_until;
use e2e::oci::{self, Layout};
use e2e::{Census, node, run};
use k8s_cri::v1::ImageSpec;
use serde_json::json;
use tempfile::TempDir;

const NAME: &str = "127.0.0.1:5000/app:nydus";
const MIB: u64 = 1 << 20;
/// Files of noise in the image, and the size of each in MiB.
const FILES: u64 = 16;
const FILE_MIB: u64 = 3;

/// An image of one layer, and what is in it.
fn image(folder: &Path) -> Result<(Layout, PathBuf)> {
    let tree = folder.join("tree");
    oci::busybox_tree(&tree, &["sh", "md5sum", "cat", "sleep", "id", "ls", "find", "sort"])?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\napp:x:1235:\nmore:x:1300:app\n")?;
    fs::create_dir(tree.join("data"))?;
    for file in 0..FILES {
        let bytes = oci::noise(file + 1, usize::try_from(FILE_MIB * MIB)?);
        fs::write(tree.join(format!("data/{file:02}")), bytes)?;
    }
    fs::hard_link(tree.join("data/00"), tree.join("data/same"))?;
    fs::write(tree.join("data/empty"), "")?;
    let sparse = fs::File::create(tree.join("data/sparse"))?;
    sparse.set_len(5 * MIB)?;
    sparse.write_at(b"end", 4 * MIB)?;
    let layout = Layout::new(&folder.join("oci"), &[&tree], &json!({"Cmd": ["/bin/sh"], "User": "app"}))?;
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
    let (layout, tree) = image(folder)?;
    let registry = node::registry(folder)?;
    run(node::program("ctvm").args([
        "image",
        "convert",
        "--chunk-size",
        "262144",
        &layout.source(),
        &format!("http://{NAME}"),
    ]))?
    .ok()
    .context("converting")?;
    let service = node::image_service(folder)?;
    let snapshotter = node::snapshotter(folder, Path::new(node::SNAPSHOTTER))?;
    let daemon = Daemon::start_with_snapshotter(release)?;
    daemon.cri.pull(NAME)?;
    ensure!(node::fetched(folder)? == 0, "pulling fetches nothing but the bootstrap");

    // The program runs, as a user whom containerd found in the image.
    let pod = Pod::run(&daemon.cri, "ctvm")?;
    let config = app(&pod, &["sh", "-c", "id -u; id -G; echo written > /tmp/own; sleep 100000"]);
    let first = pod.start(&config)?;
    wait_until("it has said who it is", || Ok(pod.log(&config)?.0 == "1234\n1235 1300\n"))
        .with_context(|| format!("the log is {:?}", pod.log(&config)))?;
    let at_start = node::fetched(folder)?;
    ensure!(at_start < FILES * FILE_MIB * MIB / 10, "{at_start} bytes came before the first output");
    println!("{release:?}: {at_start} of {} bytes came before the first output", FILES * FILE_MIB * MIB);

    // The node's service dies, and its successor goes on where it was.
    drop(service);
    let service = node::image_service(folder)?;
    let told = pod.finish(&app(&pod, &["sh", "-c", SUMS]))?.ok()?;
    ensure!(told.trim_end() == sums(&tree)?, "{told}");
    let after = node::fetched(folder)?;
    let own = daemon.cri.exec(&first, &["cat", "/tmp/own"], 60)?.ok()?;
    ensure!(own == "written", "{own}");

    // All is there: another pod needs neither the registry nor anything fetched.
    drop(registry);
    let other = Pod::run(&daemon.cri, "ctvm")?;
    let told = other.finish(&app(&other, &["sh", "-c", SUMS]))?.ok()?;
    ensure!(told.trim_end() == sums(&tree)?, "{told}");
    ensure!(node::fetched(folder)? == after, "fetched twice");

    for pod in [&pod, &other] {
        daemon.cri.stop_pod(&pod.id)?;
        daemon.cri.remove_pod(&pod.id)?;
    }
    wait_until("the image is closed", || Ok(node::counters(folder)?["images"] == 0))?;
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
