//! `ctvm-snapshotter` as the snapshotter of a real containerd, with ordinary images.
#![cfg(feature = "lab")]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::command::wait_until;
use e2e::{Containerd, IMAGE, SHARE, Service, Setup, Status, node, run};

/// The snapshotter's folder and socket in a containerd's folder.
fn places(folder: &Path) -> (PathBuf, PathBuf) {
    (folder.join("snapshots"), folder.join("snapshots.sock"))
}

fn config(folder: &Path) -> Result<String> {
    // containerd 2.1 unpacks imported images only for snapshotters that it is told to.
    let unpack = ["overlayfs", "ctvm"].map(|name| {
        let table = "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]";
        format!("{table}\nplatform = \"linux/amd64\"\nsnapshotter = \"{name}\"\n")
    });
    Ok(format!(
        "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n{}\
         [proxy_plugins.ctvm]\ntype = \"snapshot\"\naddress = \"{}\"\n",
        unpack.concat(),
        places(folder).1.display()
    ))
}

/// The snapshotter, until containerd reaches it: that may still hand out the error of a dial before it was there.
fn serve(containerd: &Containerd) -> Result<Service> {
    let service = node::snapshotter(containerd.folder(), &places(containerd.folder()).1)?;
    wait_until("containerd reaches the snapshotter", || {
        Ok(run(containerd.ctr().args(["snapshots", "--snapshotter", "ctvm", "ls"]))?.code == 0)
    })?;
    Ok(service)
}

/// Under each containerd: images, containers of ours and of runc, a snapshotter that is killed in between, and nothing left at the end.
fn a_whole_life(release: &str) -> Result<()> {
    let containerd = Setup { release: Some(release.to_owned()), config, ..Setup::default() }.start()?;
    let snapshotter = serve(&containerd)?;
    let ctr = |arguments: &[&str]| {
        run(containerd.ctr().args(arguments))?.ok().with_context(|| format!("ctr {}", arguments.join(" ")))
    };
    let archive = Path::new(SHARE).join("image.tar").display().to_string();
    ctr(&["images", "import", "--snapshotter", "ctvm", &archive])?;
    let layers = ctr(&["snapshots", "--snapshotter", "ctvm", "ls"])?;
    ensure!(layers.contains("Committed"), "{layers}");

    let id = format!("snap-{release}");
    let ours = |options: &[&str], id: &str, command: &[&str]| {
        let ran = containerd.run(&[options, &["--snapshotter", "ctvm"]].concat(), id, command)?;
        ran.ok().with_context(|| format!("container {id}"))
    };
    let script = "echo kept > /written; echo $(cat /written); exec sleep 1000";
    ours(&["-d"], &id, &["sh", "-c", script])?;
    // Its writable layer is on the host, where containerd counts it.
    wait_until("the file is in the snapshot", || {
        let folder = places(containerd.folder()).0.join("snapshots");
        let found = fs::read_dir(folder)?
            .any(|snapshot| snapshot.is_ok_and(|s| s.path().join("fs/written").exists()));
        Ok(found)
    })?;
    let by_runc = format!("runc-{release}");
    let runc =
        ["run", "--rm", "--runtime", "io.containerd.runc.v2", "--snapshotter", "ctvm", IMAGE, &by_runc];
    ensure!(ctr(&[&runc[..], &["echo", "by runc"]].concat())? == "by runc");

    drop(snapshotter);
    let snapshotter = serve(&containerd)?;
    ensure!(containerd.exec(&id, "e", &["cat", "/written"])?.ok()? == "kept");
    ensure!(ours(&["--rm"], &format!("{id}-again"), &["echo", "again"])? == "again");
    let usage = ctr(&["snapshots", "--snapshotter", "ctvm", "usage", &id])?;
    ensure!(usage.contains("KiB"), "{usage}");

    containerd.kill_task(&id)?;
    containerd.wait_for(&id, Status::Stopped)?;
    containerd.remove(&id)?;
    for image in ctr(&["images", "ls", "-q"])?.lines() {
        ctr(&["images", "rm", "--sync", image])?;
    }
    wait_until("all snapshots are gone", || {
        let (root, _) = places(containerd.folder());
        Ok(fs::read_dir(root.join("snapshots"))?.count() + fs::read_dir(root.join("removed"))?.count() == 0)
    })?;
    drop(snapshotter);
    Ok(())
}

#[test]
fn containers_live_on_our_snapshots_under_containerd_1_6() -> Result<()> {
    a_whole_life("1.6")
}

#[test]
fn containers_live_on_our_snapshots_under_containerd_1_7() -> Result<()> {
    a_whole_life("1.7")
}

#[test]
fn containers_live_on_our_snapshots_under_containerd_2_1() -> Result<()> {
    a_whole_life("2.1")
}
