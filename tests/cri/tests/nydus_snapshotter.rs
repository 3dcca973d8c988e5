//! Debian's nydus-snapshotter in the place of ours, with the configuration of `shim/snapshotter/README.md`: containerd pulls by it, and its
//! mounts become containers in a VM, whose bytes our image service fetches.
#![cfg(feature = "lab")]

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use cri::{Daemon, Pod};
use e2e::oci::{self, Layout};
use e2e::{containerd, node, run};
use k8s_cri::v1::ImageSpec;
use serde_json::json;

const NAME: &str = "127.0.0.1:5000/app:nydus";
const MIB: usize = 1 << 20;

/// A converted image in the registry.
fn convert(folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    oci::busybox_tree(&tree, &["sh", "id", "ls", "md5sum"])?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\napp:x:1235:\nmore:x:1300:app\n")?;
    fs::write(tree.join("large"), oci::noise(3, 8 * MIB))?;
    let layout = Layout::new(&folder.join("oci"), &[&tree], &json!({"Cmd": ["/bin/sh"], "User": "app"}))?;
    let mut convert = node::program("ctvm");
    convert.args(["image", "convert", "--chunk-size", "65536", &layout.source(), &format!("http://{NAME}")]);
    run(&mut convert)?.ok()?;
    Ok(())
}

#[test]
fn images_of_debians_nydus_snapshotter_run() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let folder = folder.path();
    let registry = node::registry(folder)?;
    convert(folder)?;
    let service = node::image_service(folder)?;
    let snapshotter = node::nydus_snapshotter(folder, "fusedev")?;
    let daemon = Daemon::start_with_nydus_snapshotter(None)?;
    daemon.cri.pull(NAME)?;
    let pod = Pod::run(&daemon.cri, "ctvm")?;
    let script = "id -u; id -G; echo own > /tmp/own; ls /tmp; md5sum < /bin/busybox > /dev/null && echo read";
    let mut config = pod.container(&["sh", "-c", script]);
    config.image = Some(ImageSpec { image: NAME.into(), ..ImageSpec::default() });
    let said = pod.finish(&config).and_then(|done| done.ok());
    if said.is_err() {
        daemon.containerd.show_log();
    }
    ensure!(said.context("the container")?.trim_end() == "1234\n1235 1300\nown\nread");
    // By parts, by our service alone: the snapshotter's daemon mounts and fetches nothing.
    let fetched = node::fetched(folder)?;
    ensure!((1..6 * MIB as u64).contains(&fetched), "{fetched} bytes are fetched");
    ensure!(!fs::read_to_string("/proc/self/mounts")?.contains("fuse"), "something is mounted on the host");
    ensure!(containerd::pids_of("ctvm-nydusd")?.len() == 1, "one stands for all daemons");

    // The same without CRI, and without a place to write to.
    let mut ctr = daemon.containerd.ctr();
    ctr.args(["run", "--rm", "--read-only", "--snapshotter", "nydus", "--runtime", containerd::RUNTIME]);
    let told = run(ctr.args([NAME, "by-hand", "sh", "-c", "id -u; touch /x || echo read-only"]))?.ok();
    ensure!(told.as_ref().is_ok_and(|told| told == "1234\nread-only"), "{told:?}");
    pod.end()?;
    daemon.cri.remove_image(NAME)?;
    drop((daemon, registry));
    service.stop()?;
    snapshotter.stop()
}
