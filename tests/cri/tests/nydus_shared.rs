//! One cache for all: fifty containers of an image fetch each chunk once, images that share chunks share their files, and what is in
//! use stays when there is no room.
#![cfg(feature = "lab")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use cri::image_node::{NoiseTree, SUMS, app, idle, small_pod, story};
use cri::{ImageNode, Pod};
use e2e::command::wait_until;
use e2e::image_reader::ImageReader;
use e2e::wire::Passed;
use e2e::{node, run};

/// All that read an image at once.
const READERS: usize = 50;
/// Those of them that are containers, and in how many VMs. What `xtask test --long` is for is the second.
const CONTAINERS: [(usize, usize); 2] = [(6, 3), (50, 10)];
const MIB: u64 = 1 << 20;
const CONFIG: &str = "[fetch]\nprefetch = false\n";

/// No byte of a blob was asked for twice.
fn nothing_came_twice(passed: &[Passed]) -> Result<()> {
    let mut ranges: Vec<_> = passed.iter().map(|passed| (&passed.blob, passed.range)).collect();
    ranges.sort();
    for pair in ranges.windows(2) {
        let ((blob, first), (other, second)) = (&pair[0], &pair[1]);
        ensure!(blob != other || first.1 <= second.0, "{first:?} and {second:?} of {blob} overlap");
    }
    Ok(())
}

fn fifty_read(node: &ImageNode, name: &str, wanted: &str) -> Result<Vec<Pod>> {
    let (containers, vms) = CONTAINERS[usize::from(e2e::long())];
    let pods = (0..vms).map(|_| small_pod(node.cri())).collect::<Result<Vec<_>>>()?;
    // A bootstrap is there once the first container's snapshot has been asked for; the rest of it is in the image.
    let bootstrap = node.bootstraps()?.pop().context("a bootstrap")?;
    let config = cri::image_node::backend();
    let (start, before) = (Barrier::new(READERS), node.wire.passed().len());
    let began = Instant::now();
    let longest = thread::scope(|scope| {
        let (start, wanted, pods, bootstrap, config) = (&start, wanted, &pods, &bootstrap, &config);
        let in_vms = (0..containers).map(|number| {
            scope.spawn(move || -> Result<Duration> {
                let pod = &pods[number % vms];
                start.wait();
                let told = pod.finish(&app(pod, name, &["sh", "-c", SUMS]))?.ok()?;
                ensure!(told == wanted, "container {number} read {told}");
                Ok(began.elapsed())
            })
        });
        let in_vms: Vec<_> = in_vms.collect();
        let others = (containers..READERS).map(|number| {
            scope.spawn(move || -> Result<Duration> {
                start.wait();
                let reader = ImageReader::open(Path::new(node::IMAGES), bootstrap, config)?;
                reader.fetch_all(u32::try_from(16 + number)?)?;
                Ok(began.elapsed())
            })
        });
        let others: Vec<_> = others.collect();
        let join = |reader: thread::ScopedJoinHandle<'_, Result<Duration>>| {
            reader.join().expect("a reader does not panic")
        };
        let ended = in_vms.into_iter().chain(others).map(join).collect::<Result<Vec<_>>>()?;
        anyhow::Ok(ended.into_iter().max())
    })?;
    eprintln!(
        "{containers} containers in {vms} VMs and {} readers: {longest:.0?} until the last has all",
        READERS - containers
    );
    let passed = node.wire.passed();
    nothing_came_twice(&passed[before..])?;
    let (bytes, stored) = (node.wire.bytes(), node.stored()?);
    ensure!(bytes <= stored, "{bytes} bytes came of a blob that has {stored}");
    ensure!(bytes + MIB > stored, "{bytes} of {stored}: all of it was read");
    let from = &node.counters()?["from"][format!("http://{}/app", node::REGISTRY)];
    ensure!(from["bytes"] == bytes && from["retries"] == 0 && from["failures"] == 0, "{from}");
    Ok(pods)
}

fn fifty_and_two_images() -> Result<()> {
    let mut tree = NoiseTree::new(5, 6, 4)?;
    let node = ImageNode::start(None, CONFIG, None)?;
    let name = node.push("app", &[tree.layer()], None)?;
    node.cri().pull(&name)?;
    let pods = fifty_read(&node, &name, &tree.sums())?;

    // The second image stands on chunks of the first, and has a file of its own.
    tree.add("more", &e2e::oci::noise(77, 1 << 20))?;
    let before = node.stored()?;
    let second = node.push("second", &[tree.layer()], Some("app"))?;
    let own = node.stored()? - before;
    ensure!(own < 2 * MIB, "{own} bytes are stored for a file of one MiB");
    node.cri().pull(&second)?;
    let came = node.wire.bytes();
    let told = pods[0].finish(&app(&pods[0], &second, &["sh", "-c", SUMS]))?.ok()?;
    ensure!(told == tree.sums(), "{told}");
    let more = node.wire.bytes() - came;
    ensure!(more >= MIB && more <= own, "{more} bytes came for a start that lacks {own}");
    nothing_came_twice(&node.wire.passed())?;
    let files = run(Command::new("find").arg(node.cache().join("blobs")).args(["-name", "data"]))?.ok()?;
    ensure!(files.lines().count() == 2, "a cache file a blob: {files}");
    for pod in pods {
        pod.end()?;
    }
    node.end(&[&name, &second])
}

#[test]
fn fifty_fetch_each_chunk_once_and_a_second_image_its_own() -> Result<()> {
    story(fifty_and_two_images)
}

/// Bytes that the cache's files take on the disk.
fn on_disk(cache: &Path) -> Result<u64> {
    let script = "find \"$0\" -name data -exec stat -c %b {} +";
    let blocks = run(Command::new("sh").args(["-c", script]).arg(cache.join("blobs")))?.ok()?;
    blocks.lines().try_fold(0, |sum, blocks| Ok(sum + blocks.parse::<u64>()? * 512))
}

/// Each image has 6 MiB, and the cache may have these.
const LIMIT_MIB: u64 = 15;

fn eviction() -> Result<()> {
    let trees = (10..14).map(|seed| NoiseTree::new(seed, 4, 4)).collect::<Result<Vec<_>>>()?;
    let node =
        ImageNode::start(None, &format!("{CONFIG}[cache]\nmax_mib = {LIMIT_MIB}\nmin_free_mib = 0\n"), None)?;
    let mut names = Vec::new();
    for (number, tree) in trees.iter().enumerate() {
        names.push(node.push(&format!("app{number}"), &[tree.layer()], None)?);
        node.cri().pull(&names[number])?;
    }
    // Two that are read all the time, by containers that keep nothing in memory.
    let pods = [small_pod(node.cri())?, small_pod(node.cri())?];
    let held = [idle(&pods[0], &names[0])?, idle(&pods[1], &names[1])?];
    let (ends, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seconds = if e2e::long() { 300 } else { 0 };
    let rounds = thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|number| {
                let (tree, container, cri) = (&trees[number], &held[number], node.cri());
                let (ends, reads) = (&ends, &reads);
                scope.spawn(move || -> Result<()> {
                    while !ends.load(Ordering::Relaxed) {
                        let told = cri.exec(container, &["sh", "-c", SUMS], 300)?.ok()?;
                        ensure!(told == tree.sums(), "image {number} read {told}");
                        reads.fetch_add(1, Ordering::Relaxed);
                        // The two that come and go need the CPUs too.
                        thread::sleep(Duration::from_millis(500));
                    }
                    Ok(())
                })
            })
            .collect();
        // And two that come and go, for which there is no room.
        let churn = || -> Result<usize> {
            let (began, mut rounds) = (Instant::now(), 0);
            while rounds < 4 || began.elapsed() < Duration::from_secs(seconds) {
                let number = 2 + rounds % 2;
                let pod = &pods[rounds % 2];
                let config = app(pod, &names[number], &["sh", "-c", SUMS]);
                let id = pod.start(&config)?;
                let code = pod.exit_code(&id)?;
                let told = pod.log(&config)?.0;
                ensure!(code == 0 && told.trim_end() == trees[number].sums(), "{code}: {told}");
                node.cri().remove(&id)?;
                rounds += 1;
            }
            Ok(rounds)
        };
        let rounds = churn();
        ends.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader does not panic")?;
        }
        rounds
    })?;
    let (evicted, came) = (node.counter("evicted")?, node.wire.passed());
    eprintln!(
        "{rounds} containers came and went beside {} reads of two images, {evicted} files evicted",
        reads.load(Ordering::Relaxed)
    );
    ensure!(evicted >= 2, "{evicted} files were evicted");
    // What runs lost nothing: of the first two images each byte came once.
    let blobs = |image: usize| -> Result<Vec<Passed>> {
        let only = |passed: &&Passed| passed.blob == blob(&node, image).unwrap_or_default();
        Ok(came.iter().filter(only).cloned().collect())
    };
    for image in 0..2 {
        let came = blobs(image)?;
        ensure!(!came.is_empty(), "image {image} came");
        nothing_came_twice(&came)?;
    }
    for pod in pods {
        pod.end()?;
    }
    // The bound holds when nobody is left. `stat` fails when a file is evicted before it gets there: then we look again.
    wait_until("the cache is within its limit", || {
        let is_within = || on_disk(&node.cache()).is_ok_and(|bytes| bytes <= LIMIT_MIB * MIB);
        Ok(node.counter("images")? == 0 && is_within())
    })?;
    let told = node.counter("cache_bytes")?;
    ensure!(told <= LIMIT_MIB * MIB, "{told} bytes are told of a cache of {LIMIT_MIB} MiB");
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    node.end(&names)
}

/// The digest of an image's one blob, from its manifest in the registry.
fn blob(node: &ImageNode, image: usize) -> Result<String> {
    let link = node
        .folder()
        .join("registry/docker/registry/v2/repositories/app/_manifests/tags")
        .join(format!("app{image}/current/link"));
    let digest = fs::read_to_string(link)?;
    let digest = digest.trim().trim_start_matches("sha256:");
    let store = node.folder().join("registry/docker/registry/v2/blobs/sha256");
    let manifest = fs::read(store.join(&digest[..2]).join(digest).join("data"))?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    let layers = manifest["layers"].as_array().context("layers")?;
    let blob =
        layers.iter().find(|layer| layer["mediaType"].as_str().is_some_and(|t| t.contains("nydus.blob")));
    let digest = blob.context("a blob")?["digest"].as_str().context("a digest")?;
    Ok(digest.trim_start_matches("sha256:").to_owned())
}

#[test]
fn what_runs_loses_nothing_to_eviction() -> Result<()> {
    story(eviction)
}
