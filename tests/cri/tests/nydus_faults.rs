//! What a container of a Nydus image sees when the node's parts fail under its reads: nothing, or an I/O error in time, and never a
//! wrong byte. Each test is a story of one node.
#![cfg(feature = "lab")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cri::image_node::{self, NoiseTree, app, idle, small_pod, story};
use cri::{Cri, ImageNode};
use e2e::command::{wait_at_most, wait_until};
use e2e::{SmallFs, node, run};

/// Chunks of a file: 1 MiB.
const CHUNKS: usize = 4;
/// What nobody asked for does not come, so that a file that was not read is not there.
const CONFIG: &str = "[fetch]\nread_ahead_kib = 0\nprefetch = false\n";
/// The patience that [`CONFIG`] is given where there should be little, in seconds.
const PATIENCE: u64 = 4;
/// More than a start has, in seconds.
const MUCH_PATIENCE: u64 = 11;
/// What the operator is told of a program that cannot be read.
const UNREADABLE: &str = "EIO: I/O error: bytes of the container's image cannot be had; the log of the node's image service says why";

fn patient(seconds: u64) -> String {
    format!("{CONFIG}patience_s = {seconds}\n")
}

/// Begins to read a file in a container, and waits until its bytes stand still on their way.
fn begin_to_read<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    node: &ImageNode,
    container: &'scope str,
    tree: &'scope NoiseTree,
    file: usize,
) -> Result<ScopedJoinHandle<'scope, Result<()>>> {
    node.wire.hold();
    let cri: Cri = node.cri().clone();
    let reader = scope.spawn(move || image_node::read(&cri, container, tree, file));
    wait_until("bytes are on their way", || Ok(node.wire.held() > 0))?;
    ensure!(!reader.is_finished(), "it has not read them yet");
    Ok(reader)
}

/// A reader that has not ended after some time; else an error that says how it did.
fn still_waits(
    reader: ScopedJoinHandle<'_, Result<()>>,
    time: Duration,
) -> Result<ScopedJoinHandle<'_, Result<()>>> {
    thread::sleep(time);
    if reader.is_finished() {
        reader.join().expect("a reader does not panic").context("it does not wait")?;
        bail!("it has read what cannot be there");
    }
    Ok(reader)
}

/// A file that cannot be read is an I/O error to the container.
fn is_an_error(node: &ImageNode, container: &str, file: usize) -> Result<()> {
    let said = node.cri().exec(container, &["md5sum", &format!("/data/{file:02}")], 300)?;
    ensure!(said.code != 0 && said.stderr.contains("nput/output error"), "file {file}: {said:?}");
    Ok(())
}

fn registry_service_and_snapshotter_are_killed() -> Result<()> {
    let tree = NoiseTree::new(1, 10, CHUNKS)?;
    let mut node = ImageNode::start(Some("2.1"), CONFIG, None)?;
    let name = node.push("app", &[tree.layer()], None)?;
    let cold = NoiseTree::new(2, 1, 1)?;
    let bare_name = node.push("bare", &[cold.layer()], None)?;
    cold.add_users()?;
    let cold_name = node.push("cold", &[cold.layer()], None)?;
    for name in [&name, &bare_name, &cold_name] {
        node.cri().pull(name)?;
    }
    let pod = small_pod(node.cri())?;
    let id = idle(&pod, &name)?;

    // The registry is killed in the middle of an answer, and comes back.
    thread::scope(|scope| {
        let reader = begin_to_read(scope, &node, &id, &tree, 0)?;
        node.kill_registry();
        node.wire.cut();
        node.wire.release();
        let reader = still_waits(reader, Duration::from_secs(2))?;
        node.start_registry()?;
        let back = Instant::now();
        reader.join().expect("a reader does not panic")?;
        // Five seconds are the longest pause; the rest is the lab's.
        eprintln!("the reader went on {:.1?} after the registry was back", back.elapsed());
        ensure!(back.elapsed() < Duration::from_secs(60), "it went on after {:?}", back.elapsed());
        anyhow::Ok(())
    })
    .context("the registry killed")?;
    let from = node.counters()?["from"].to_string();
    ensure!(from.contains("\"failures\":0") && !from.contains("\"retries\":0"), "{from}");

    // The image service is killed while it fetches, and its successor goes on.
    thread::scope(|scope| {
        let reader = begin_to_read(scope, &node, &id, &tree, 1)?;
        node.service = None;
        node.wire.release();
        let reader = still_waits(reader, Duration::from_secs(1))?;
        node.serve(CONFIG)?;
        reader.join().expect("a reader does not panic")
    })
    .context("the image service killed")?;

    // Without the snapshotter what runs goes on, and with it again there is more.
    node.snapshotter = None;
    image_node::read(node.cri(), &id, &tree, 2).context("no snapshotter")?;
    let refused = idle(&pod, &name).expect_err("nothing new without a snapshotter");
    let refused = format!("{refused:#}");
    ensure!(refused.contains(node::SNAPSHOTTER) && refused.contains("refused"), "{refused}");
    node.start_snapshotter()?;
    image_node::read(node.cri(), &id, &tree, 3).context("another snapshotter")?;
    let second = wait_for_container(&pod, &name)?;
    image_node::read(node.cri(), &second, &tree, 4).context("a container of another snapshotter")?;
    node.snapshotter.take().context("a snapshotter")?.stop()?;
    image_node::read(node.cri(), &second, &tree, 5).context("a snapshotter that was stopped")?;
    node.start_snapshotter()?;
    node.cri().remove(&second)?;

    // A registry that stays away is an error in time, and one that is back is not remembered for it.
    node.serve(&patient(PATIENCE))?;
    node.kill_registry();
    let (log, began) = (node.service_log(), Instant::now());
    is_an_error(&node, &id, 6).context("no registry")?;
    let took = began.elapsed();
    eprintln!("without a registry: an error after {took:.1?}");
    // The guest's kernel reads ahead, and what failed so once more by itself.
    ensure!((PATIENCE..PATIENCE * 12).contains(&took.as_secs()), "an error after {took:?}");
    node.wait_for_line(&log, &["level=error", "EIO", "snapshots/"])?;
    node.wait_for_line(&log, &["level=error", "chunk at", "127.0.0.1:5000"])?;
    ensure!(node.counter("refused")? > 0);
    // An image of which nothing is there: containerd lacks its list of users, or the guest its program.
    let refused = idle(&pod, &cold_name).expect_err("nothing of the image is there");
    let refused = format!("{refused:#}");
    ensure!(refused.contains("reading etc/passwd: the image service cannot fetch"), "{refused}");
    programs_that_cannot_be_read(&mut node, &pod, &bare_name, &id)?;
    node.start_registry()?;
    image_node::read(node.cri(), &id, &tree, 6).context("the registry is back")?;
    let late = wait_for_container(&pod, &cold_name)?;
    image_node::read(node.cri(), &late, &cold, 0).context("an image of a registry that is back")?;

    pod.end()?;
    node.end(&[&name, &bare_name, &cold_name])
}

/// What is said of a container of an image of which nothing is there, and of an exec of a file that is not, in `container`.
fn programs_that_cannot_be_read(
    node: &mut ImageNode,
    pod: &cri::Pod,
    image: &str,
    container: &str,
) -> Result<()> {
    let bare = || app(pod, image, &["sh", "-c", "echo runs"]);
    let in_words = |error: anyhow::Error, program: &str| {
        let error = format!("{error:#}");
        ensure!(error.contains("exec ") && error.contains(program) && error.contains(UNREADABLE), "{error}");
        Ok(())
    };
    // Known in time, it is the start that fails.
    node.serve(&patient(1))?;
    in_words(pod.start(&bare()).expect_err("a program that is not there"), "sh")?;
    let refused = node.cri().exec(container, &["/data/07"], 60).expect_err("bytes that are not there");
    in_words(refused, "/data/07")?;
    // Later, it is logged: by the container itself, and by containerd.
    node.serve(&patient(MUCH_PATIENCE))?;
    let before = node.daemon.containerd.log().len();
    let ended = pod.finish(&bare())?;
    let words = format!("exec \"sh\": {UNREADABLE}");
    ensure!(ended.code == 255 && ended.stdout.is_empty() && ended.stderr.contains(&words), "{ended:?}");
    let logged = || Ok(node.daemon.containerd.log()[before..].contains(UNREADABLE));
    wait_until("a line of containerd's log", logged)
}

/// A container of an image, as soon as containerd gets through to those that were away.
fn wait_for_container(pod: &cri::Pod, name: &str) -> Result<String> {
    let mut last = None;
    let _ = wait_at_most(Duration::from_secs(60), "a container", || {
        last = Some(idle(pod, name));
        Ok(last.as_ref().is_some_and(Result::is_ok))
    });
    last.context("an attempt")?
}

#[test]
fn reads_outlive_registry_service_and_snapshotter() -> Result<()> {
    story(registry_service_and_snapshotter_are_killed)
}

/// The one blob that the registry has of an image, and its file.
fn blob_of_registry(node: &ImageNode, blob: &str) -> PathBuf {
    let store = node.folder().join("registry/docker/registry/v2/blobs/sha256");
    store.join(&blob[..2]).join(blob).join("data")
}

/// Changes a byte of a file; twice, and it is what it was.
fn change_byte(path: &Path, offset: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(path);
    let file = file.with_context(|| path.display().to_string())?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], offset)?)
}

fn wrong_bytes_and_no_room() -> Result<()> {
    let tree = NoiseTree::new(3, 8, CHUNKS)?;
    let mut node = ImageNode::start(None, CONFIG, None)?;
    let name = node.push("app", &[tree.layer()], None)?;
    node.cri().pull(&name)?;
    let pod = small_pod(node.cri())?;
    let id = idle(&pod, &name)?;

    // A byte that is changed on its way, once: it is asked for again.
    let (log, before) = (node.service_log(), node.counter("tampered")?);
    node.wire.spoil(1);
    image_node::read(node.cri(), &id, &tree, 0).context("a byte changed on its way")?;
    ensure!(node.counter("tampered")? == before + 1 && node.counter("refused")? == 0);
    node.wait_for_line(&log, &["level=warn", "wrong bytes", "asking again"])?;
    // And each time: an error, soon.
    node.wire.spoil(usize::MAX);
    let asked = node.wire.passed().len();
    is_an_error(&node, &id, 1).context("bytes changed each time")?;
    let passed = node.wire.passed();
    ensure!(passed.len() - asked <= 40, "{} requests for what is wrong", passed.len() - asked);
    node.wait_for_line(&log, &["level=error", "digest is wrong"])?;
    node.wait_for_line(&log, &["level=error", "EIO"])?;
    node.wire.spoil(0);

    // The same chunk altered in the registry's own store; then it is as it was.
    let last = passed.last().context("a request")?;
    let (start, _) = last.range;
    let stored = blob_of_registry(&node, &last.blob);
    change_byte(&stored, start + 1000)?;
    let before = node.counter("tampered")?;
    is_an_error(&node, &id, 1).context("a chunk altered at its source")?;
    ensure!(node.counter("tampered")? > before);
    image_node::read(node.cri(), &id, &tree, 2).context("the blob's other chunks")?;
    change_byte(&stored, start + 1000)?;
    image_node::read(node.cri(), &id, &tree, 1).context("a source that was mended")?;

    // A full disk: an error, and afterwards it goes on.
    let disk = SmallFs::mount(32 << 20)?;
    let room = format!("{CONFIG}[cache]\nmin_free_mib = 0\n");
    node.serve_in(disk.path(), &room)?;
    image_node::read(node.cri(), &id, &tree, 3).context("a cache that was lost")?;
    disk.fill()?;
    let log = node.service_log();
    is_an_error(&node, &id, 4).context("a full disk")?;
    node.wait_for_line(&log, &["level=error", "ENOSPC", "no room in the cache"])?;
    fs::remove_file(disk.path().join("filler"))?;
    image_node::read(node.cri(), &id, &tree, 4).context("a disk with room again")?;
    pod.end()?;
    wait_until("the image is closed", || Ok(node::counters_of(disk.path())?["images"] == 0))?;
    node.serve(CONFIG)?;
    drop(disk);

    // A byte that changes in the cache after it was verified is found when somebody looks, and nothing new reads it then.
    let data = cache_file(&node)?;
    change_byte(&data, first_data(&data)? + 77)?;
    let scrub = || run(node::program("ctvm").args(["image", "scrub", "--root"]).arg(node.cache()));
    let scrubbed = scrub()?;
    ensure!(scrubbed.code != 0 && scrubbed.text().contains(" 1 wrong"), "{scrubbed:?}");
    let log = node.service_log();
    let pod = small_pod(node.cri())?;
    let id = idle(&pod, &name)?;
    for file in 0..3 {
        image_node::read(node.cri(), &id, &tree, file).context("a cache with a wrong chunk")?;
    }
    node.wait_for_line(&log, &["not left clean", " 1 dropped"])?;
    eprintln!("{}", scrub()?.ok()?);
    pod.end()?;
    node.end(&[&name])
}

/// The one cache file of the node.
fn cache_file(node: &ImageNode) -> Result<PathBuf> {
    let found = run(Command::new("find").arg(node.cache().join("blobs")).args(["-name", "data"]))?.ok()?;
    ensure!(found.lines().count() == 1, "{found}");
    Ok(found.into())
}

/// Where the first block of a cache file is that is there.
fn first_data(data: &Path) -> Result<u64> {
    let bytes = fs::read(data)?;
    let block = bytes.chunks(4096).position(|block| block.iter().any(|byte| *byte != 0));
    Ok(u64::try_from(block.context("an empty cache file")?)? * 4096)
}

#[test]
fn wrong_bytes_and_full_disks_do_not_reach_containers() -> Result<()> {
    story(wrong_bytes_and_no_room)
}
