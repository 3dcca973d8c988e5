//! A container whose root file system is an image whose bytes come as they are read, through a real shim, VMM and guest. The
//! image service is the test's own, and at last the node's; the mounts are what a Nydus snapshotter hands over. `ctr` cannot say
//! such mounts, so the container is made by the Task API of a shim that `ctr` has started, beside its first one.
#![cfg(feature = "lab")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use agent_api::task::{CreateTaskRequest, DeleteRequest, Mount, StartRequest, TaskClient, WaitRequest};
use agent_api::ttrpc::r#async::Client;
use agent_api::ttrpc::context::with_duration;
use anyhow::{Context, Result, ensure};
use e2e::image_service::{Image, Server};
use e2e::{Containerd, SHARE, command, node, run, run_with_input};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm_api::image::OpenRequest;

/// Bytes of the one large file.
const BIG: usize = 6 << 20;

/// One test at a time is the node.
static NODE: Mutex<()> = Mutex::new(());

/// A tree of a busybox, small files and a large one, and the sums of what is large.
struct Tree {
    folder: TempDir,
    sums: BTreeMap<&'static str, String>,
}

impl Tree {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let tree = folder.path().join("tree");
        for dir in ["bin", "dir/below", "etc", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(tree.join(dir))?;
        }
        fs::copy(Path::new(SHARE).join("busybox"), tree.join("bin/busybox"))?;
        fs::set_permissions(tree.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::symlink("busybox", tree.join("bin/sh"))?;
        fs::write(tree.join("etc/motd"), "hello from the image\n")?;
        fs::write(tree.join("dir/below/file"), "below\n")?;
        fs::write(tree.join("dir/other"), "other\n")?;
        let mut state = 7_u64;
        let words = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()
        });
        fs::write(tree.join("big"), words.flatten().take(BIG).collect::<Vec<u8>>())?;
        let sum = |name: &str| -> Result<String> {
            let sum = run_with_input(&mut Command::new("md5sum"), fs::read(tree.join(name))?)?.ok()?;
            Ok(sum.split(' ').next().context("a sum")?.to_owned())
        };
        let sums = BTreeMap::from([("big", sum("big")?), ("busybox", sum("bin/busybox")?)]);
        Ok(Tree { folder, sums })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An EROFS of it, and the blob that its data is in.
    fn image(&self) -> Result<Image> {
        let (boot, blob) = (self.path("boot"), self.path("blob"));
        // The program wants it to be there.
        fs::write(&blob, "")?;
        let mut mkfs = Command::new("mkfs.erofs");
        mkfs.args(["--quiet", "-T0", "--chunksize=4096"]).arg(format!("--blobdev={}", blob.display()));
        run(mkfs.arg(&boot).arg(self.path("tree")))?.ok()?;
        Image::new(&fs::read(&boot)?, vec![fs::read(&blob)?])
    }
}

/// A shim with a container that sleeps, and a second one to be made in its VM.
struct Rig {
    containerd: Containerd,
    bundle: PathBuf,
    snapshot: PathBuf,
    address: String,
    _folder: TempDir,
}

impl Rig {
    fn new(script: &str) -> Result<Self> {
        let containerd = Containerd::start()?;
        containerd.run(&["-d"], "first", &["sleep", "1000"])?.ok()?;
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let (bundle, snapshot) = (folder.path().join("bundle"), folder.path().join("snapshot"));
        fs::create_dir_all(bundle.join("rootfs"))?;
        for dir in ["fs", "work"] {
            fs::create_dir_all(snapshot.join(dir))?;
        }
        let first = containerd.bundle("first");
        let mut config: Value = serde_json::from_slice(&fs::read(first.join("config.json"))?)?;
        config["process"]["args"] = json!(["/bin/busybox", "sh", "-ec", script]);
        config["process"]["env"] = json!(["PATH=/bin"]);
        config["process"]["cwd"] = json!("/");
        config["linux"]["cgroupsPath"] = json!("/test/image");
        fs::write(bundle.join("config.json"), config.to_string())?;
        let address = fs::read_to_string(first.join("address"))?;
        Ok(Rig { containerd, bundle, snapshot, address, _folder: folder })
    }

    /// The mount as nydus-snapshotter makes it.
    fn mount(&self, bootstrap: &Path, config: &Value) -> Result<Mount> {
        let described = json!({
            "source": bootstrap, "config": config.to_string(), "snapshotdir": self.snapshot, "fs_version": "v6"
        });
        let base64 =
            run_with_input(Command::new("base64").arg("-w0"), described.to_string().into_bytes())?.ok()?;
        let at = |name: &str| self.snapshot.join(name).display().to_string();
        Ok(Mount {
            type_: "fuse.nydus-overlayfs".into(),
            source: "overlay".into(),
            options: vec![
                format!("workdir={}", at("work")),
                format!("upperdir={}", at("fs")),
                "lowerdir=/var/lib/containerd-nydus/snapshots/2/mnt".into(),
                format!("extraoption={}", base64.trim()),
            ],
            ..Mount::default()
        })
    }

    /// Makes, starts and waits for the container, and deletes it; its exit code and its output.
    fn run(&self, bootstrap: &Path, config: &Value) -> Result<(u32, String)> {
        self.run_on(self.mount(bootstrap, config)?)
    }

    /// The same on another mount.
    fn run_on(&self, root: Mount) -> Result<(u32, String)> {
        let output = self.bundle.join("output");
        let context = || with_duration(command::LIMIT);
        let id = || "image".to_owned();
        let create = CreateTaskRequest {
            id: id(),
            bundle: self.bundle.display().to_string(),
            rootfs: vec![root],
            stdout: format!("file://{}", output.display()),
            stderr: format!("file://{}", output.display()),
            ..Default::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let status = runtime.block_on(async {
            let task = TaskClient::new(Client::connect(&self.address).await?);
            task.create(context(), &create).await?;
            task.start(context(), &StartRequest { id: id(), ..Default::default() }).await?;
            let ended = task.wait(context(), &WaitRequest { id: id(), ..Default::default() }).await?;
            task.delete(context(), &DeleteRequest { id: id(), ..Default::default() }).await?;
            anyhow::Ok(ended.exit_status)
        })?;
        Ok((status, fs::read_to_string(output)?))
    }
}

/// Whether a directory hides what lies below it, to an overlay of the host.
fn is_opaque(path: &Path) -> Result<bool> {
    let mut value = [0; 8];
    let len = rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut value)?;
    Ok(value[..len] == *b"y")
}

#[test]
fn a_container_runs_from_an_image_while_its_service_dies_and_comes_back() -> Result<()> {
    let _node = NODE.lock();
    let (tree, bootstrap) =
        (Tree::new()?, Path::new("/var/lib/containerd-nydus/snapshots/2/fs/image/image.boot"));
    let image = tree.image()?;
    let rig = Rig::new(
        "cat /etc/motd; md5sum < /big; md5sum < /bin/busybox\n\
         rm /etc/motd; test ! -e /etc/motd\n\
         rm -r /dir; mkdir /dir; test -z \"$(ls /dir)\"; echo new > /dir/new\n\
         echo written > /new; chmod 700 /big; mv /new /renamed; ls -l /big | cut -c1-10\n\
         grep -c erofs /proc/mounts || true; echo done",
    )?;
    let server = Server::listen(Path::new(node::IMAGES))?;
    let (status, output) = thread::scope(|scope| {
        let serving = scope.spawn(|| -> Result<usize> {
            let (request, service) = server.accept(&image)?;
            let OpenRequest::Open { bootstrap: asked, config, .. } = &request;
            ensure!(asked == bootstrap && config.contains("localfs"), "{request:?}");
            // It dies as the program is being read.
            let before = service.fulfil(&image, 6)?;
            drop((service, server));
            thread::sleep(Duration::from_millis(700));
            let server = Server::listen(Path::new(node::IMAGES))?;
            let (again, service) = server.accept(&image)?;
            ensure!(again == request, "{again:?} is opened again for {request:?}");
            // Until the disk has been taken away.
            Ok(before + service.fulfil(&image, usize::MAX)?)
        });
        let ran = rig.run(bootstrap, &json!({"device": {"backend": {"type": "localfs"}}}));
        if ran.is_err() {
            rig.containerd.show_log();
        }
        let ran = ran?;
        let wishes = serving.join().expect("the service does not panic")?;
        ensure!(wishes > 6, "{wishes} wishes");
        anyhow::Ok(ran)
    })?;
    let (big, busybox) = (&tree.sums["big"], &tree.sums["busybox"]);
    let wanted = format!("hello from the image\n{big}  -\n{busybox}  -\n-rwx------\n0\ndone\n");
    if status != 0 {
        rig.containerd.show_log();
    }
    ensure!(status == 0 && output == wanted, "status {status}: {output}\nwanted {wanted}");

    // The snapshot has what the container wrote, as containerd's overlays have it.
    let upper = rig.snapshot.join("fs");
    ensure!(fs::read_to_string(upper.join("renamed"))? == "written\n" && !upper.join("new").exists());
    let removed = fs::symlink_metadata(upper.join("etc/motd"))?;
    ensure!(removed.file_type().is_char_device() && removed.rdev() == 0, "{removed:?}");
    ensure!(is_opaque(&upper.join("dir"))? && fs::read_to_string(upper.join("dir/new"))? == "new\n");
    ensure!(fs::metadata(upper.join("big"))?.len() == BIG as u64);
    rig.containerd.remove("first")?;
    Ok(())
}

/// Two layers of the host between the image and what is written, as a snapshotter hands over what was committed on top of an image.
#[test]
fn layers_over_an_image_are_seen_in_their_order() -> Result<()> {
    let _node = NODE.lock();
    let tree = Tree::new()?;
    let converted = tree.path("converted");
    let mut convert = node::program("ctvm-convert");
    run(convert.args(["folder", "--chunk-size", "65536"]).arg(tree.path("tree")).arg(&converted))?.ok()?;
    let (below, above) = (tree.path("below"), tree.path("above"));
    for layer in [&below, &above] {
        fs::create_dir_all(layer.join("etc"))?;
        fs::create_dir_all(layer.join("dir"))?;
    }
    fs::write(below.join("etc/motd"), "of the layer below\n")?;
    fs::write(below.join("etc/below"), "below\n")?;
    fs::write(above.join("etc/motd"), "of the layer above\n")?;
    // Marks as containerd leaves them: a file of the layer below is gone, and all of a folder of the image's.
    run(Command::new("mknod").arg(above.join("etc/below")).args(["c", "0", "0"]))?.ok()?;
    rustix::fs::setxattr(above.join("dir"), "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty())?;
    fs::write(above.join("dir/new"), "new\n")?;
    let service = node::image_service(tree.folder.path())?;
    let rig = Rig::new(
        "cat /etc/motd; test ! -e /etc/below && echo gone; ls /dir; md5sum < /big; echo own > /etc/motd; cat /etc/motd",
    )?;
    let config =
        json!({"device": {"backend": {"type": "localfs", "config": {"dir": converted.join("blobs")}}}});
    let mut mount = rig.mount(&converted.join("image.boot"), &config)?;
    let image = "/var/lib/containerd-nydus/snapshots/2/mnt";
    mount.options[2] = format!("lowerdir={}:{}:{image}", above.display(), below.display());
    let (status, output) = rig.run_on(mount)?;
    let wanted = format!("of the layer above\ngone\nnew\n{}  -\nown\n", tree.sums["big"]);
    ensure!(status == 0 && output == wanted, "status {status}: {output}\nwanted {wanted}");
    ensure!(fs::read_to_string(rig.snapshot.join("fs/etc/motd"))? == "own\n");
    ensure!(fs::read_to_string(above.join("etc/motd"))? == "of the layer above\n", "a layer is written to");
    rig.containerd.remove("first")?;
    service.stop()
}

#[test]
fn an_image_without_a_service_is_told_how_to_get_one() -> Result<()> {
    let _node = NODE.lock();
    let rig = Rig::new("true")?;
    let try_it = || rig.run(Path::new("/image.boot"), &json!({}));
    let error = format!("{:#}", try_it().expect_err("there is no service"));
    ensure!(error.contains("ctvm-images serve") && error.contains(node::IMAGES), "{error}");
    // Nothing of it is left: the same name can be had again, and the first container is well.
    let again = format!("{:#}", try_it().expect_err("there is still none"));
    ensure!(again.contains("ctvm-images serve"), "{again}");
    rig.containerd.exec("first", "look", &["true"])?.ok()?;
    rig.containerd.remove("first")?;
    Ok(())
}

/// Bytes that files below `folder` take on its disk.
fn taken(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let stat = entry.metadata()?;
        bytes += if stat.is_dir() { taken(&entry.path())? } else { stat.blocks() * 512 };
    }
    Ok(bytes)
}

#[test]
fn a_container_runs_from_an_image_before_it_is_there_by_the_nodes_own_service() -> Result<()> {
    let _node = NODE.lock();
    let tree = Tree::new()?;
    let (converted, cache) = (tree.path("converted"), tree.path("cache"));
    let mut convert = node::program("ctvm-convert");
    run(convert.args(["folder", "--chunk-size", "65536"]).arg(tree.path("tree")).arg(&converted))?.ok()?;
    let service = node::image_service(tree.folder.path())?;
    let rig = Rig::new(
        "cat /etc/motd; dd if=/big bs=64k skip=3 count=1 2>/dev/null | md5sum; echo new > /etc/motd",
    )?;
    let config = json!({
        "device": {
            "backend": {"type": "localfs", "config": {"dir": converted.join("blobs")}},
            "cache": {"type": "blobcache", "config": {"work_dir": cache}}
        },
        "mode": "direct", "digest_validate": false
    });
    let (status, output) = rig.run(&converted.join("image.boot"), &config)?;
    let big = fs::read(tree.path("tree/big"))?[3 << 16..4 << 16].to_vec();
    let sum = run_with_input(&mut Command::new("md5sum"), big)?.ok()?;
    let wanted = format!("hello from the image\n{}\n", sum.trim_end());
    ensure!(status == 0 && output == wanted, "status {status}: {output}\nwanted {wanted}");
    ensure!(fs::read_to_string(rig.snapshot.join("fs/etc/motd"))? == "new\n");
    // The program is read whole, of the large file a chunk and what the service takes along.
    let (taken, all) = (taken(&cache)?, u64::try_from(BIG)?);
    let program = fs::metadata(tree.path("tree/bin/busybox"))?.len();
    ensure!(taken < program + all / 4, "{taken} bytes of an image of {} are there", program + all);
    rig.containerd.remove("first")?;
    service.stop()
}
