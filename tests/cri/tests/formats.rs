//! The forms that Nydus images come in, each from a registry to a container: RAFS version 5, whose chunks lie anywhere in their blobs, and an
//! index over plain OCI layers (zran). Version 6 is what `nydus.rs` is about.
#![cfg(feature = "lab")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use cri::{Daemon, Pod};
use e2e::layer::{Entry, Kind, Layer};
use e2e::oci::{self, Layout};
use e2e::{SHARE, node, run};
use k8s_cri::v1::ImageSpec;
use serde_json::json;

/// Of each form: its name, and how it is asked for.
const FORMS: [(&str, &[&str]); 2] = [
    ("127.0.0.1:5000/forms:v5", &["--fs-version", "5", "--chunk-size", "65536"]),
    ("127.0.0.1:5000/forms:zran", &["--reference", "--chunk-size", "65536"]),
];
const LOOK: &str = "id -u; id -G; cd /data; md5sum noise text small empty other; ls -l link; cat link; md5sum < again; \
    test noise -ef again && echo the same";

/// Files of sizes that leave the next chunk anywhere, and the archives of two layers of them.
fn layers(folder: &Path) -> Result<Vec<PathBuf>> {
    let plain = [folder.join("below.tar"), folder.join("above.tar")];
    let mut layer = Layer::create(&plain[0])?;
    for path in ["bin", "etc", "proc", "sys", "dev", "data"] {
        layer.add(Entry::new(path, Kind::Folder))?;
    }
    let busybox = fs::read(Path::new(SHARE).join("busybox"))?;
    layer.add(Entry::new("bin/busybox", Kind::File(&busybox)).mode(0o755))?;
    for applet in ["sh", "id", "md5sum", "ls", "cat", "test", "echo"] {
        layer.add(Entry::new(&format!("bin/{applet}"), Kind::Symlink(OsStr::new("busybox"))))?;
    }
    layer
        .add(Entry::new("etc/passwd", Kind::File(b"root:x:0:0::/:/bin/sh\napp:x:1234:1235::/:/bin/sh\n")))?;
    layer.add(Entry::new("etc/group", Kind::File(b"root:x:0:\napp:x:1235:\nmore:x:1300:app\n")))?;
    for (name, bytes) in contents() {
        layer.add(Entry::new(&format!("data/{name}"), Kind::File(&bytes)).owner(100_000, 7))?;
    }
    layer.add(Entry::new("data/again", Kind::HardLink("data/noise")))?;
    layer.add(Entry::new("data/gone", Kind::File(b"gone")))?;
    layer.add(Entry::new("data/link", Kind::Symlink(OsStr::new("small"))))?;
    layer.finish()?;
    let mut layer = Layer::create(&plain[1])?;
    layer.add(Entry::new("data", Kind::Folder))?;
    layer.add(Entry::new("data/.wh.gone", Kind::File(b"")))?;
    layer.add(Entry::new("data/other", Kind::File(&oci::noise(8, 70_001))))?;
    layer.finish()?;
    plain.iter().map(|plain| compressed(plain)).collect()
}

fn contents() -> [(&'static str, Vec<u8>); 4] {
    let text = (0..60_000_u32).flat_map(|line| format!("line {}\n", line % 977).into_bytes()).collect();
    [("small", b"small\n".to_vec()), ("noise", oci::noise(7, 300_003)), ("text", text), ("empty", Vec::new())]
}

/// An index is over gzip.
fn compressed(plain: &Path) -> Result<PathBuf> {
    run(Command::new("gzip").arg("-n").arg(plain))?.ok()?;
    let mut name = plain.as_os_str().to_owned();
    name.push(".gz");
    Ok(name.into())
}

/// What a container has to say, from the files themselves.
fn wanted() -> Result<String> {
    let sum = |bytes: Vec<u8>| -> Result<String> {
        Ok(e2e::run_with_input(&mut Command::new("md5sum"), bytes)?
            .ok()?
            .split(' ')
            .next()
            .context("a sum")?
            .to_owned())
    };
    let [small, noise, text, empty] = contents().map(|(_, bytes)| sum(bytes));
    let (small, noise, text, empty, other) = (small?, noise?, text?, empty?, sum(oci::noise(8, 70_001))?);
    Ok(format!(
        "1234\n1235 1300\n{noise}  noise\n{text}  text\n{small}  small\n{empty}  empty\n{other}  other\n\
         lrwxrwxrwx    1 root     root             5 Jan  1  2024 link -> small\nsmall\n{noise}  -\nthe same\n"
    ))
}

#[test]
fn images_of_version_5_and_indexes_over_plain_layers_run() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let folder = folder.path();
    let layout = Layout::of_archives(&folder.join("oci"), &layers(folder)?, &json!({"User": "app"}))?;
    let registry = node::registry(folder)?;
    for (name, how) in FORMS {
        let mut convert = node::program("ctvm");
        convert.args(["image", "convert"]).args(how).arg(layout.source()).arg(format!("http://{name}"));
        run(&mut convert)?.ok().with_context(|| format!("converting to {name}"))?;
    }
    let service = node::image_service(folder)?;
    let snapshotter = node::snapshotter(folder, Path::new(node::SNAPSHOTTER))?;
    let daemon = Daemon::start_with_snapshotter(None)?;
    let pod = Pod::run(&daemon.cri, "ctvm")?;
    let wanted = wanted()?;
    for (name, _) in FORMS {
        let before = node::fetched(folder)?;
        daemon.cri.pull(name)?;
        ensure!(node::fetched(folder)? == before, "pulling {name} fetches chunks");
        let mut config = pod.container(&["sh", "-c", LOOK]);
        config.image = Some(ImageSpec { image: name.into(), ..ImageSpec::default() });
        let said = pod.finish(&config)?.ok().with_context(|| name.to_owned())?;
        ensure!(said.trim_end() == wanted.trim_end(), "{name}: {said}\nwanted: {wanted}");
        ensure!(node::fetched(folder)? > before, "{name} has nothing fetched");
    }
    pod.end()?;
    drop((daemon, registry));
    service.stop()?;
    snapshotter.stop()
}
