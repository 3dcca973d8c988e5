//! Images as memory of the guest (virtio-pmem): read, mapped, written in vain, gone, come again, and cut short.
#![cfg(feature = "lab")]

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::image_service::Image;
use e2e::vm::{Guest, GuestSpec, SHELL, scratch_file};
use e2e::{md5, oci, run};
use vmm_api::{Attached, ClientError, DeviceName, ExitReason, MemoryRange, Op, Reply};

const LIMIT: Duration = Duration::from_secs(60);
const TIMEOUT_MS: u32 = 30_000;
const ID: &str = "ctvm-image-0";
/// Files of the image's EROFS, and bytes of each.
const FILES: u64 = 6;
const FILE: usize = 3 << 20;
const EXERCISER: &str = "/opt/ctvm/tests/exerciser";

/// An EROFS of files that repeat nowhere, and two blobs that nobody mounts.
fn image(seed: u64) -> Result<Image> {
    let folder = tempfile::Builder::new().prefix("pmem").tempdir_in("/var/tmp")?;
    let (tree, erofs) = (folder.path().join("tree"), folder.path().join("erofs"));
    fs::create_dir(&tree)?;
    for file in 0..FILES {
        fs::write(tree.join(file.to_string()), oci::noise(seed * 100 + file + 1, FILE))?;
    }
    // Files whose last bytes lie among the metadata are read through the page cache.
    let options = ["--quiet", "-T0", "-Enoinline_data"];
    run(Command::new("mkfs.erofs").args(options).arg(&erofs).arg(&tree))?.ok()?;
    let blobs = vec![oci::noise(seed * 100 + 50, (1 << 20) + 17), oci::noise(seed * 100 + 51, 4096)];
    let image = Image::new(&fs::read(erofs)?, blobs)?;
    image.fill_all()?;
    Ok(image)
}

fn boot() -> Result<Guest> {
    let spec = GuestSpec {
        images: true,
        script: SHELL.into(),
        programs: vec![EXERCISER.into()],
        disks: vec![(scratch_file(1 << 20)?, false, "scratch".into(), 1)],
        ..GuestSpec::default()
    };
    let mut guest = spec.boot()?;
    guest.ask("dmesg -c > /dev/null")?;
    Ok(guest)
}

fn attach(guest: &mut Guest, image: &Image, id: &str) -> Result<Attached> {
    let (device, fds) = image.shown(id)?;
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
    match guest.client().call(Op::Attach { device, timeout_ms: TIMEOUT_MS }, &fds, LIMIT)? {
        (Reply::Attached(attached), _) => Ok(attached),
        (other, _) => bail!("{other:?}"),
    }
}

fn detach(guest: &mut Guest, id: &str) -> Result<()> {
    match guest.call(Op::Detach { device: DeviceName::Disk(id.into()), timeout_ms: TIMEOUT_MS })? {
        Reply::Done => Ok(()),
        other => bail!("{other:?}"),
    }
}

/// The block device that an image is in the guest; what is looked for is on its way, and waited for.
fn node(guest: &mut Guest, attached: &Attached) -> Result<(String, MemoryRange)> {
    let memory = attached.memory.context("no memory")?;
    let found = guest.ask(&format!(
        "cat /sys/class/nd/*/device/wait_probe > /dev/null; for d in /sys/block/pmem*; do \
         [ $(($(cat $d/device/../resource))) = {} ] && echo ${{d##*/}}; done; true",
        memory.start
    ))?;
    ensure!(
        found.starts_with("pmem"),
        "{attached:?}: {found:?}, {}",
        guest.ask("dmesg; ls /sys/block /sys/bus/nd/devices")?
    );
    Ok((found, memory))
}

fn counters(guest: &mut Guest) -> Result<std::collections::BTreeMap<String, u64>> {
    guest.stats()?.devices.remove("pmem0").context("counters of the image")
}

/// The sum of all that the image has, as the guest reads it past what it remembers.
fn sum_in(guest: &mut Guest, node: &str, blocks: usize) -> Result<String> {
    guest.ask(&format!(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{node} bs=4k count={blocks} 2>/dev/null | md5sum | cut -d' ' -f1"
    ))
}

fn cached_kib(guest: &mut Guest) -> Result<u64> {
    Ok(guest.ask("sed -n 's/^Cached: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")?.trim().parse()?)
}

fn is_content(guest: &mut Guest) -> Result<()> {
    let complaints = guest
        .ask("dmesg | grep -iE 'warn|bug:|stall|lockup|call trace|leak' | grep -v EXPERIMENTAL || true")?;
    ensure!(complaints.is_empty(), "{complaints}");
    Ok(())
}

#[test]
fn an_image_as_memory_is_read_byte_for_byte_and_cached_once() -> Result<()> {
    let image = image(1)?;
    let mut guest = boot()?;
    let attached = attach(&mut guest, &image, ID)?;
    let (node, memory) = node(&mut guest, &attached)?;
    let disk = image.disk()?;
    ensure!(memory.bytes == (disk.len() as u64).next_multiple_of(2 << 20), "{memory:?}");
    let size = guest.ask(&format!("cat /sys/block/{node}/size"))?;
    ensure!(size == (memory.bytes / 512).to_string(), "{size}, {memory:?}");
    guest.ask(&format!("mount -t erofs -o ro,dax=always /dev/{node} /mnt"))?;
    let mounts = guest.ask("grep ' /mnt ' /proc/mounts")?;
    ensure!(mounts.contains("dax=always"), "{mounts}: {}", guest.ask("dmesg")?);
    // What it takes to look is in memory then.
    guest.ask("md5sum /bin/busybox > /dev/null; ls -l /mnt > /dev/null")?;
    let before = cached_kib(&mut guest)?;
    for file in 0..FILES {
        let sum = guest.ask(&format!("md5sum < /mnt/{file} | cut -d' ' -f1"))?;
        ensure!(sum == md5(oci::noise(100 + file + 1, FILE))?, "file {file}: {sum}");
    }
    let after = cached_kib(&mut guest)?;
    println!("cached before {before} KiB, after {after} KiB, of {} KiB read", FILES * (FILE as u64) / 1024);
    ensure!(after < before + 512, "{before} KiB cached before, {after} KiB after");
    let whole = sum_in(&mut guest, &node, disk.len() / 4096)?;
    ensure!(whole == md5(disk)?, "{whole}");
    // Behind the last part are zeros.
    let behind = guest.ask(&format!("tail -c 512 /dev/{node} | od -An -tx1 | sort -u"))?;
    ensure!(behind.split_whitespace().all(|word| word == "00" || word == "*"), "{behind}");
    is_content(&mut guest)
}

#[test]
fn a_page_of_an_image_goes_to_a_disk_as_any_memory() -> Result<()> {
    let image = image(2)?;
    let mut guest = boot()?;
    let attached = attach(&mut guest, &image, ID)?;
    let (node, _) = node(&mut guest, &attached)?;
    guest.ask(&format!("mount -t erofs -o ro,dax=always /dev/{node} /mnt"))?;
    let said = guest.ask("exerciser direct /mnt/3 /dev/vdb && echo good")?;
    ensure!(said == "good", "{said}: {}", guest.ask("dmesg | tail -n 5")?);
    is_content(&mut guest)
}

#[test]
fn what_a_guest_writes_to_an_image_in_memory_is_dropped() -> Result<()> {
    let image = image(3)?;
    let (disk, mut guest) = (image.disk()?, boot()?);
    let attached = attach(&mut guest, &image, ID)?;
    let (node, _) = node(&mut guest, &attached)?;
    // To the bootstrap, across the seam to the first blob, and to the zeros behind all.
    let erofs = disk.len() - (1 << 20) - 2 * 4096 - 4096;
    for block in [0, erofs / 4096, disk.len() / 4096] {
        guest.ask(&format!(
            "dd if=/dev/urandom of=/dev/{node} bs=4k seek={block} count=2 conv=fsync,notrunc 2>&1"
        ))?;
    }
    let sum = sum_in(&mut guest, &node, disk.len() / 4096)?;
    ensure!(sum == md5(disk)?, "other bytes: {sum}");
    let counters = counters(&mut guest)?;
    println!("{counters:?}");
    ensure!(counters["refused_writes"] >= 3 * 2 * 512 && counters["flushes"] > 0, "{counters:?}");
    ensure!(counters["bad_requests"] == 0, "{counters:?}");
    Ok(())
}

#[test]
fn images_in_memory_come_and_go_and_leave_nothing() -> Result<()> {
    let images = [image(4)?, image(5)?];
    let mut guest = boot()?;
    let shown = |guest: &Guest| -> Result<usize> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.vmm_pid()))?;
        Ok(maps.lines().filter(|line| line.contains("/var/tmp/")).count())
    };
    let fds = |guest: &Guest| -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", guest.vmm_pid()))?.count())
    };
    let before = (shown(&guest)?, fds(&guest)?);
    let free = |guest: &mut Guest| -> Result<u64> {
        guest.ask("sync; echo 3 > /proc/sys/vm/drop_caches; sed -n 's/^MemFree: *\\([0-9]*\\).*/\\1/p' /proc/meminfo")?.trim().parse().map_err(Into::into)
    };
    let mut left = vec![];
    for round in 0..4 {
        let mut nodes = vec![];
        for (id, image) in ["first", "second"].into_iter().zip(&images) {
            let attached = attach(&mut guest, image, id)?;
            nodes.push(node(&mut guest, &attached)?);
            println!("round {round}, {id}: attached in {} us", attached.took_us);
        }
        ensure!(nodes[0].1.start + nodes[0].1.bytes <= nodes[1].1.start, "{nodes:?}");
        ensure!(shown(&guest)? == before.0 + 6, "{}", shown(&guest)?);
        for ((node, _), image) in nodes.iter().zip(&images) {
            let disk = image.disk()?;
            let sum = sum_in(&mut guest, node, disk.len() / 4096)?;
            ensure!(sum == md5(disk)?, "round {round}, {node}: {sum}");
        }
        for id in ["first", "second"] {
            detach(&mut guest, id)?;
        }
        let nodes = guest.ask("ls -d /sys/block/pmem* 2>/dev/null || true")?;
        ensure!(nodes.is_empty(), "round {round}: {nodes}");
        let after = (shown(&guest)?, fds(&guest)?);
        ensure!(after == before, "round {round}: {after:?}, {before:?} before");
        left.push(free(&mut guest)?);
    }
    println!("free in the guest after each round: {left:?} KiB");
    ensure!(left[3] + 1024 > left[0], "the guest's kernel keeps memory of what is gone: {left:?}");
    is_content(&mut guest)
}

#[test]
fn an_image_in_memory_that_is_cut_short_ends_its_vm_with_a_reason() -> Result<()> {
    let image = image(6)?;
    let mut guest = boot()?;
    let attached = attach(&mut guest, &image, ID)?;
    let (node, _) = node(&mut guest, &attached)?;
    let disk = image.disk()?;
    image.cache_file(0).set_len(0)?;
    // The bootstrap is still there.
    let erofs = disk.len() - (1 << 20) - 3 * 4096;
    ensure!(guest.ask(&format!("dd if=/dev/{node} bs=4k count=1 2>/dev/null | wc -c"))? == "4096");
    // The guest does not come back from this one.
    let lost = guest.ask(&format!("dd if=/dev/{node} bs=4k skip={} count=1 | wc -c", erofs / 4096 + 10));
    ensure!(lost.is_err(), "{lost:?}");
    match guest.exit_reason()? {
        ExitReason::VcpuFailed { detail, .. } if detail.contains("that the host could not give") => Ok(()),
        other => bail!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_shown_is_refused_and_costs_nothing() -> Result<()> {
    let image = image(7)?;
    let mut guest = boot()?;
    image.cache_file(1).set_len(4096)?;
    let said = |ended: Result<Attached>| -> Result<String> {
        match ended.err().context("it was attached")?.downcast::<ClientError>()? {
            ClientError::Api(error) => Ok(error.to_string()),
            other => bail!("{other:?}"),
        }
    };
    let short = said(attach(&mut guest, &image, ID))?;
    ensure!(short.contains("take 4097"), "{short}");
    ensure!(guest.stats()?.devices.keys().all(|name| !name.starts_with("pmem")));
    image.fill_all()?;
    attach(&mut guest, &image, ID)?;
    // A VM that was not made for images.
    let mut guest = GuestSpec { script: SHELL.into(), ..GuestSpec::default() }.boot()?;
    let nowhere = said(attach(&mut guest, &image, ID))?;
    ensure!(nowhere.contains("no guest addresses for images"), "{nowhere}");
    ensure!(guest.ask("echo alive")? == "alive");
    Ok(())
}
