//! Nydus images as memory of VMs: those of which everything is in the node's cache, where the pod may have it so. What is not, is a disk.
#![cfg(feature = "lab")]

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use cri::image_node::{CHUNK, NoiseTree, SUMS, app, backend, idle, small_pod, story};
use cri::{Cri, ImageNode, Pod};
use e2e::command::wait_until;
use e2e::image_reader::ImageReader;
use e2e::{node, run};
use serde_json::Value;

const CONFIG: &str = "[fetch]\nprefetch = false\n";
/// Files of the image, and chunks in each: 16 MiB.
const FILES: usize = 16;
const CHUNKS: usize = 4;

/// A pod that asks for it.
fn pod(cri: &Cri) -> Result<Pod> {
    Pod::run_with(cri, "ctvm-lenient", |config| {
        config.annotations.insert("io.ctvm.memory_mib".into(), "128".into());
        config.annotations.insert("io.ctvm.image_dax".into(), "true".into());
    })
}

/// How a container has its image, by `ctvm ps`.
fn by(container: &str) -> Result<String> {
    let said = run(node::program("ctvm").args(["ps", "--json"]))?.ok()?;
    let all: Value = serde_json::from_str(&said).context("what `ctvm ps` says")?;
    fn find<'a>(value: &'a Value, id: &str) -> Option<&'a Value> {
        match value {
            Value::Object(fields)
                if fields.get("id").is_some_and(|found| found == id) && fields.contains_key("execs") =>
            {
                Some(value)
            }
            Value::Object(fields) => fields.values().find_map(|value| find(value, id)),
            Value::Array(values) => values.iter().find_map(|value| find(value, id)),
            _ => None,
        }
    }
    let found = find(&all, container).with_context(|| format!("{container} in {said}"))?;
    Ok(found["image"].as_str().unwrap_or_default().to_owned())
}

/// How many images a node's VMs have, by how they have them.
fn count(kind: &str) -> Result<u64> {
    let said = run(node::program("ctvm").arg("metrics"))?.ok()?;
    let lines = said
        .lines()
        .filter(|line| line.starts_with("ctvm_images{") && line.contains(&format!("by=\"{kind}\"")));
    lines.map(|line| Ok(line.rsplit(' ').next().context("a value")?.parse::<u64>()?)).sum()
}

/// Page cache of the guest that a container is in, KiB.
fn cached(cri: &Cri, container: &str) -> Result<u64> {
    let said = cri
        .exec(container, &["sed", "-n", "s/^Cached: *\\([0-9]*\\) kB/\\1/p", "/proc/meminfo"], 60)?
        .ok()?;
    said.trim().parse().with_context(|| said.clone())
}

/// All files, through whatever remembers them; how much more the guest remembers afterwards, KiB.
fn read_all(cri: &Cri, container: &str, tree: &NoiseTree) -> Result<u64> {
    const PLAIN: &str = "for f in /data/*; do md5sum < $f | sed 's/ .*//'; done";
    cri.exec(container, &["sh", "-c", "md5sum < /bin/busybox > /dev/null; ls -l /data > /dev/null"], 60)?
        .ok()?;
    let before = cached(cri, container)?;
    let told = cri.exec(container, &["sh", "-c", PLAIN], 300)?.ok()?;
    ensure!(told.trim_end() == tree.sums(), "{told}");
    Ok(cached(cri, container)?.saturating_sub(before))
}

#[test]
fn a_pod_whose_image_is_all_there_has_it_as_memory_and_another_as_a_disk() -> Result<()> {
    story(|| {
        let tree = NoiseTree::new(11, FILES, CHUNKS)?;
        let mut it = ImageNode::start(None, CONFIG, None)?;
        let name = it.push("dax", &[tree.layer()], None)?;
        it.cri().pull(&name)?;
        let all_kib = u64::try_from(FILES * CHUNKS * CHUNK / 1024)?;

        // Nothing is there yet.
        let first = pod(it.cri())?;
        let on_disk = idle(&first, &name)?;
        ensure!(by(&on_disk)? == "disk", "{}", by(&on_disk)?);
        let grown = read_all(it.cri(), &on_disk, &tree)?;
        ensure!(grown > all_kib * 3 / 4, "{grown} KiB of {all_kib} are in the page cache");
        let bootstrap = it.bootstraps()?.pop().context("a bootstrap")?;
        ImageReader::open(Path::new(node::IMAGES), &bootstrap, &backend())?.fetch_all(1024)?;

        // All of it is.
        let second = pod(it.cri())?;
        let in_memory = idle(&second, &name)?;
        ensure!(by(&in_memory)? == "memory", "{}: {}", by(&in_memory)?, it.service_log());
        let grown = read_all(it.cri(), &in_memory, &tree)?;
        ensure!(grown < all_kib / 8, "{grown} KiB of {all_kib} are in the page cache, too");
        let told = it.cri().exec(&in_memory, &["sh", "-c", SUMS], 300)?.ok()?;
        ensure!(told.trim_end() == tree.sums(), "{told}");
        // What is written goes where it always goes.
        let script = "echo new > /data/00 && cat /data/00 && echo more > /data/new && cat /data/new";
        let told = it.cri().exec(&in_memory, &["sh", "-c", script], 60)?.ok()?;
        ensure!(told == "new\nmore", "{told:?}");
        // Another container of the pod, and one that has not asked.
        let beside = idle(&second, &name)?;
        let third = small_pod(it.cri())?;
        let usual = idle(&third, &name)?;
        ensure!(
            (by(&beside)?, by(&usual)?) == ("memory".into(), "disk".into()),
            "{} {}",
            by(&beside)?,
            by(&usual)?
        );
        ensure!((count("memory")?, count("disk")?) == (2, 2), "{} {}", count("memory")?, count("disk")?);

        // Nobody is needed for it: neither registry nor service, and what is evicted is not this.
        it.kill_registry();
        it.service = None;
        read_all(it.cri(), &beside, &tree)?;
        it.serve("[cache]\nmax_mib = 1\n")?;
        std::thread::sleep(std::time::Duration::from_secs(8));
        let told = it.cri().exec(&beside, &["sh", "-c", SUMS], 300)?.ok()?;
        ensure!(told.trim_end() == tree.sums(), "{told}");
        ensure!(it.counter("chunk_bytes")? == 0, "something was fetched");

        // It goes with its container.
        it.cri().stop(&in_memory, 0)?;
        it.cri().remove(&in_memory)?;
        wait_until("the image is taken away", || Ok(count("memory")? == 1))?;
        let told = it.cri().exec(&beside, &["sh", "-c", SUMS], 300)?.ok()?;
        ensure!(told.trim_end() == tree.sums(), "{told}");
        let ended = second.finish(&app(&second, &name, &["sh", "-c", SUMS]))?.ok()?;
        ensure!(ended == tree.sums(), "{ended}");
        for pod in [&first, &second, &third] {
            it.cri().stop_pod(&pod.id)?;
            it.cri().remove_pod(&pod.id)?;
        }
        it.end(&[&name])
    })
}
