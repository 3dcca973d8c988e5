//! Nydus images in pods with users of their own (`hostUsers: false`): owners of files, in the container and on the host, are those
//! of the same image unpacked.
#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use cri::pod::{own_users, security};
use cri::{Daemon, Pod};
use e2e::oci::{self, Layout};
use e2e::{Census, SmallFs, containerd, node, run};
use k8s_cri::v1::{ContainerConfig, ImageSpec, Int64Value};
use serde_json::json;

const NAME: &str = "127.0.0.1:5000/app:nydus";
/// The host's id of the containers' root.
const FIRST: u32 = 200_000;

/// One test at a time: the services of a node are where they always are.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Run as root. `$IMAGE` tells the two apart on the host.
const LOOK_AND_CHANGE: &str = "set -e; cat /proc/self/uid_map | tr -s ' '; cd /data; \
    stat -c '%u:%g %a %n' / /tmp /bin/busybox /etc/passwd /data roots webs private dir dir/file link far gone; \
    cat private; echo more >> webs; chown 7:8 roots; rm dir/file; rm -r gone; mkdir gone; \
    echo $IMAGE > /mark; touch /new dir/new; mkdir /dir; chown 1000:1001 /dir; ln -s new /link; chown -h 5:6 /link; \
    chown 70000 /new 2>/dev/null || echo nobody; stat -c '%u:%g %a %n' webs roots gone /new /dir /link; cat webs; ls gone dir";
/// Run as another user.
const OF_ANOTHER: &str = "id -u; id -g; cat /data/private; touch /data/dir/his; stat -c %u:%g /data/dir/his; \
    touch /data/hers 2>/dev/null || echo refused; cat /data/secret 2>/dev/null || echo refused";

/// A layer with all kinds of owners.
fn layout(folder: &Path) -> Result<Layout> {
    let tree = folder.join("tree");
    oci::busybox_tree(
        &tree,
        &["sh", "cat", "chown", "id", "ln", "ls", "mkdir", "rm", "stat", "touch", "tr"],
    )?;
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n")?;
    fs::write(tree.join("etc/group"), "root:x:0:\n")?;
    let data = tree.join("data");
    fs::create_dir_all(data.join("dir"))?;
    fs::create_dir_all(data.join("gone"))?;
    for (name, owner, mode) in [
        ("roots", (0, 0), 0o644),
        ("secret", (0, 0), 0o600),
        ("webs", (33, 33), 0o640),
        ("private", (1000, 1001), 0o600),
        ("dir/file", (1000, 1001), 0o644),
        ("gone/file", (0, 0), 0o644),
        // Nobody in the pod.
        ("far", (70_000, 70_000), 0o644),
    ] {
        let path = data.join(name);
        fs::write(&path, format!("{name}\n"))?;
        chown(&path, Some(owner.0), Some(owner.1))?;
        fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
    }
    chown(data.join("dir"), Some(1000), Some(1001))?;
    symlink("roots", data.join("link"))?;
    lchown(data.join("link"), Some(5), Some(6))?;
    Layout::new(&folder.join("oci"), &[&tree], &json!({"Cmd": ["/bin/sh"]}))
}

fn convert(layout: &Layout) -> Result<()> {
    let to = format!("http://{NAME}");
    run(node::program("ctvm").args(["image", "convert", &layout.source(), &to]))?
        .ok()
        .context("converting")?;
    Ok(())
}

fn container(pod: &Pod, image: &str, script: &str) -> ContainerConfig {
    let mut config = pod.container(&["sh", "-c", script]);
    config.image = Some(ImageSpec { image: image.into(), ..ImageSpec::default() });
    config
}

/// What the container of `image` has written, as the host sees it: names, owners, modes, kinds.
fn written(folder: &Path, image: &str) -> Result<String> {
    let script = "cd \"$(dirname \"$(grep -lxF \"$1\" \"$0\"/snapshots/snapshots/*/fs/mark)\")\" && \
                  find . -printf '%P %U:%G %m %y %l\\n' | sort";
    run(Command::new("sh").args(["-c", script]).arg(folder).arg(image))?.ok()
}

fn story(handlers: &[&str]) -> Result<()> {
    // A tmpfs of the lab's kernel cannot show other owners on another mount.
    let disk = SmallFs::ext4(1 << 30)?;
    let folder = tempfile::tempdir_in(disk.path())?;
    let folder = folder.path();
    let layout = layout(folder)?;
    let registry = node::registry(folder)?;
    convert(&layout)?;
    let service = node::image_service(folder)?;
    let snapshotter = node::snapshotter(folder, Path::new(node::SNAPSHOTTER))?;
    let daemon = Daemon::start_with_snapshotter_in(Some("2.1"), disk.path())?;
    let cri = &daemon.cri;
    layout.pack(&folder.join("original.tar"))?;
    run(daemon.containerd.ctr().args(["images", "import"]).arg(folder.join("original.tar")))?.ok()?;
    e2e::command::wait_until("CRI sees the original", || cri.has_image(oci::NAME))?;
    cri.pull(NAME)?;

    for handler in handlers {
        let pod = Pod::run_with(cri, handler, |config| own_users(config, FIRST))?;
        let outcome = |image: &str| -> Result<(String, String, String)> {
            let script = format!("IMAGE={image}; {LOOK_AND_CHANGE}");
            let config = container(&pod, image, &script);
            let id = pod.start(&config)?;
            let code = pod.exit_code(&id)?;
            let (said, complaints) = pod.log(&config)?;
            ensure!(code == 0, "it ended with {code}: {said}{complaints}");
            let on_host = written(folder, image)?;
            cri.remove(&id)?;
            let mut config = container(&pod, image, OF_ANOTHER);
            security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
            security(&mut config).run_as_group = Some(Int64Value { value: 1001 });
            let of_another = pod.finish(&config)?.ok()?;
            Ok((said, of_another, on_host))
        };
        let original = outcome(oci::NAME).with_context(|| format!("{handler}, the original"))?;
        let ours = outcome(NAME).with_context(|| format!("{handler}, the Nydus image"))?;
        ensure!(ours.0 == original.0, "{handler}: {}\n{}", original.0, ours.0);
        ensure!(ours.1 == original.1, "{handler}: {}\n{}", original.1, ours.1);
        ensure!(ours.2 == original.2, "{handler}: {}\n{}", original.2, ours.2);

        let lines: Vec<&str> = ours.0.lines().collect();
        ensure!(lines[0].trim() == format!("0 {FIRST} 65536"), "{handler}: {}", ours.0);
        for line in
            ["0:0 755 /", "0:0 755 /bin/busybox", "33:33 640 webs", "1000:1001 600 private", "5:6 777 link"]
        {
            ensure!(lines.contains(&line), "{handler}: no {line:?} in {}", ours.0);
        }
        for line in ["65534:65534 644 far", "nobody", "33:33 640 webs", "7:8 644 roots", "1000:1001 755 /dir"]
        {
            ensure!(lines.contains(&line), "{handler}: no {line:?} in {}", ours.0);
        }
        ensure!(
            ours.1.trim_end() == "1000\n1001\nprivate\n1000:1001\nrefused\nrefused",
            "{handler}: {}",
            ours.1
        );
        for line in [
            "new 200000:200000 644 f",
            "dir 201000:201001 755 d",
            "link 200005:200006 777 l new",
            "data/roots 200007:200008 644 f",
            "data/webs 200033:200033 640 f",
            "data/dir/new 200000:200000 644 f",
        ] {
            ensure!(
                ours.2.lines().any(|found| found.trim_end() == line),
                "{handler}: no {line:?} in {}",
                ours.2
            );
        }
        pod.end()?;
    }

    // The same pod without users of its own, and a container by hand, which has some.
    let pod = Pod::run(cri, "ctvm")?;
    let plain = pod.finish(&container(&pod, NAME, "stat -c %u:%g /data/far /data/webs"))?.ok()?;
    ensure!(plain.trim_end() == "70000:70000\n33:33", "{plain}");
    pod.end()?;
    let map = format!("0:{FIRST}:65536");
    let mut ctr = daemon.containerd.ctr();
    ctr.args(["run", "--rm", "--snapshotter", "ctvm", "--runtime", containerd::RUNTIME]);
    ctr.args(["--remap-labels", "--uidmap", &map, "--gidmap", &map, NAME, "by-hand", "sh", "-c"]);
    let by_hand = run(ctr.arg("touch /new; stat -c %u:%g /new /data/webs"))?.ok()?;
    ensure!(by_hand == "0:0\n33:33", "{by_hand}");

    for image in [NAME, oci::NAME] {
        cri.remove_image(image)?;
    }
    drop((daemon, registry));
    service.stop()?;
    snapshotter.stop()
}

#[test]
fn owners_are_those_of_the_same_image_unpacked() -> Result<()> {
    let _alone = alone();
    // The kubelet's, and that of `ctr` in the namespace of CRI; they stay.
    for group in ["kubepods", "k8s.io"] {
        fs::create_dir_all(Path::new("/sys/fs/cgroup").join(group))?;
    }
    let before = Census::take()?;
    story(&["ctvm", "ctvm-pod"])?;
    before.settle()
}

/// Debian's nydus-snapshotter, of which containerd was told that it can.
#[test]
fn owners_that_nobody_shifts_are_refused_in_words() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let folder = folder.path();
    let registry = node::registry(folder)?;
    convert(&layout(folder)?)?;
    let service = node::image_service(folder)?;
    let snapshotter = node::nydus_snapshotter(folder, "fusedev")?;
    let daemon = Daemon::start_with_nydus_snapshotter(Some("2.1"))?;
    daemon.cri.pull(NAME)?;
    // Without a pause container, whose image nobody shifts either.
    let pod = Pod::run_with(&daemon.cri, "ctvm-pod", |config| own_users(config, FIRST))?;
    let refused = pod.start(&container(&pod, NAME, "true")).expect_err("it would own none of its files");
    let refused = format!("{refused:#}");
    for words in
        ["users of its own", "does not shift owners", "capabilities = [\\\"remap-ids\\\"]", "hostUsers"]
    {
        ensure!(refused.contains(words), "no {words:?} in {refused}");
    }
    pod.end()?;
    drop((daemon, registry));
    service.stop()?;
    snapshotter.stop()?;
    // Its daemon outlives it by design.
    containerd::pids_of("ctvm-nydusd")?.into_iter().try_for_each(containerd::kill_9)
}
