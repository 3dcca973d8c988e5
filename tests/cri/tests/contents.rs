//! All that a layer can say, in an image of three layers: converted, pulled, and listed in a guest. The list has to be the one that the
//! original has, unpacked by containerd's own snapshotter and listed in a container of runc.
#![cfg(feature = "lab")]

mod contents {
    pub mod rich;
}

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use contents::rich;
use cri::{Daemon, Pod};
use e2e::oci::{self, Layout};
use e2e::{SmallFs, node, run};
use k8s_cri::v1::{Capability, ContainerConfig, ImageSpec};
use serde_json::json;

const NAME: &str = "127.0.0.1:5000/rich:nydus";

/// How long a guest may take for 100,000 files.
const LIMIT: Duration = Duration::from_secs(1800);

/// What is listed first, then read; the end is what is done to it, for the copies that an overlay makes of what is changed.
const LOOK: &str = "exerciser list /content && exerciser reads /content/noise 300 && large --version";
const CHANGE: &str = "cd /content && chmod 640 attribute-user attribute-capability attribute-empty folder-secret/file fifo && \
    chown 100001:100002 owner-100000 link folder-setgid && mv name* folder-empty/ && \
    rm -r over/kept && mkdir over/kept && ln hard-two hard-four && \
    mv over/changed over/moved && cat size-4097 >> size-4095 && \
    touch -h -d @1000 . [!bc]* over over/* folder-empty/* folder-secret/* && exerciser list .";

/// Whether a difference is one that has to be, with the reason.
fn is_expected(line: &str) -> bool {
    let differs = |with: &str, without: &str, more: &str| {
        line.starts_with(with) && line.contains(more) || line.starts_with(without) && !line.contains(more)
    };
    // containerd sets no such attributes (`setxattr` in its pkg/archive).
    differs("+ attribute-trusted ", "- attribute-trusted ", " trusted.text=of\\x20root\\'s")
        // The builder reads a time's seconds alone; layers made by containerd, Docker and BuildKit have no more.
        || differs("- time-fraction ", "+ time-fraction ", " 1234567890.123456789 ")
}

/// Lines that only one of the lists has.
///
/// A layer that changes what is in a folder need not say anything of the folder itself. As an image it is then what it was; containerd,
/// which unpacks the layer, leaves it with the time of that. Such times, none of the layers', are not compared.
fn differences(ours: &str, original: &str, since: u64) -> Vec<String> {
    let is_new = |line: &&str| {
        let time = line.split(' ').nth(4).and_then(|time| time.split_once('.')?.0.parse::<u64>().ok());
        line.contains(" folder ") && time.is_some_and(|time| time >= since)
    };
    let name = |line: &'_ str| line.split(' ').next().unwrap_or_default().to_owned();
    let timeless: BTreeSet<String> = original.lines().filter(is_new).map(name).collect();
    let lines = |text: &str| -> BTreeSet<String> {
        let line = |line: &str| {
            let words = line.split(' ').enumerate();
            let kept = words.filter(|(at, _)| *at != 4 || !timeless.contains(&name(line)));
            kept.map(|(_, word)| word).collect::<Vec<_>>().join(" ")
        };
        text.lines().map(line).collect()
    };
    let (ours, original) = (lines(ours), lines(original));
    let missing = original.difference(&ours).map(|line| format!("- {line}"));
    missing.chain(ours.difference(&original).map(|line| format!("+ {line}"))).collect()
}

fn container(pod: &Pod, script: &str) -> ContainerConfig {
    let mut config = pod.container(&["sh", "-c", script]);
    config.image = Some(ImageSpec { image: NAME.into(), ..ImageSpec::default() });
    let context = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    let context = context.expect("a container has a security context");
    // Who has it sees `trusted` attributes.
    let add_capabilities = vec!["SYS_ADMIN".to_owned()];
    context.capabilities = Some(Capability { add_capabilities, ..Capability::default() });
    config
}

/// What a container of the original says, unpacked by containerd.
fn of_original(daemon: &Daemon, script: &str) -> Result<String> {
    let mut ctr = daemon.containerd.ctr();
    ctr.args([
        "run",
        "--rm",
        "--privileged",
        "--snapshotter",
        "overlayfs",
        "--runtime",
        "io.containerd.runc.v2",
    ]);
    ctr.args([oci::NAME, "original", "sh", "-c", script]);
    run(&mut ctr)?.ok()
}

fn compared(many: usize) -> Result<()> {
    // A tmpfs of the lab's kernel has no attributes of users.
    let disk = SmallFs::ext4(4 << 30)?;
    let folder = tempfile::tempdir_in(disk.path())?;
    let folder = folder.path();
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let mut step = steps();
    let archives = rich::layers(folder, many)?;
    let layout = Layout::of_archives(&folder.join("oci"), &archives, &json!({"Env": ["PATH=/bin"]}))?;
    step("made the image");
    let registry = node::registry(folder)?;
    let mut convert = node::program("ctvm");
    convert.args(["image", "convert", "--chunk-size", "262144", &layout.source(), &format!("http://{NAME}")]);
    run(&mut convert)?.ok().context("converting")?;
    step("converted it");
    let service = node::image_service(folder)?;
    let snapshotter = node::snapshotter(folder, Path::new(node::SNAPSHOTTER))?;
    let daemon = Daemon::start_with_snapshotter_in(None, disk.path())?;
    layout.pack(&folder.join("original.tar"))?;
    let mut import = daemon.containerd.ctr();
    import.args(["images", "import", "--snapshotter", "overlayfs"]).arg(folder.join("original.tar"));
    run(&mut import)?.ok().context("importing the original")?;
    daemon.cri.pull(NAME)?;
    step("containerd has both");

    let pod = Pod::run(&daemon.cri, "ctvm")?;
    for script in [LOOK, CHANGE] {
        let original = of_original(&daemon, script).context("in the original")?;
        step("listed the original");
        let ours = pod.finish_within(LIMIT, &container(&pod, script))?.ok().context("in the guest")?;
        step("listed in the guest");
        ensure!(original.lines().count() > many, "{original}");
        let mut differences = differences(&ours, &original, since);
        differences.retain(|line| !is_expected(line));
        ensure!(differences.is_empty(), "{script}\n{}", differences.join("\n"));
    }
    pod.end()?;
    drop((daemon, registry));
    service.stop()?;
    snapshotter.stop()
}

/// Prints how long each step took.
fn steps() -> impl FnMut(&str) {
    let mut began = Instant::now();
    move |what| {
        println!("{what} in {:.1} s", began.elapsed().as_secs_f64());
        began = Instant::now();
    }
}

#[test]
fn everything_that_a_layer_can_say_is_in_the_guest_as_containerd_unpacks_it() -> Result<()> {
    compared(if e2e::long() { 100_000 } else { 2_000 })
}
