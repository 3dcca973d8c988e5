//! The disk of an image whose bytes come as the guest reads them, from an image service of the test's own.
#![cfg(feature = "lab")]

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::image_service::{Image, Service};
use e2e::vm::{Guest, GuestSpec, SHELL, ScriptOutput};
use vmm_api::{Event, Op};

const ID: &str = "ctvm-image-0";
/// Blocks of the bootstrap on the disk.
const FIRST: u64 = 3;

/// An image of two blobs, 8 MiB and some, of bytes that repeat nowhere.
fn image() -> Result<Image> {
    let mut state = 1_u64;
    let mut bytes = |len: usize| -> Vec<u8> {
        let words = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()
        });
        words.flatten().take(len).collect()
    };
    let bootstrap = bytes(3 * 4096 - 5);
    Image::new(&bootstrap, vec![bytes((8 << 20) + 4096 * 3 + 17), bytes((1 << 20) + 1)])
}

fn sum_of(image: &Image) -> Result<String> {
    let sum = e2e::run_with_input(&mut Command::new("md5sum"), image.disk()?)?.ok()?;
    Ok(sum.split(' ').next().context("a sum")?.to_owned())
}

/// A guest with the image as `vdb`, whose reads wait at most so long.
fn boot(image: &Image, wait_ms: u32, script: &str) -> Result<(Guest, Service)> {
    let mut service = None;
    let spec = GuestSpec { script: script.into(), ..GuestSpec::default() };
    let guest = spec.boot_with(|give| {
        let (disk, end) = image.disk_config(ID, wait_ms, give)?;
        service = Some(end);
        Ok(vec![disk])
    })?;
    Ok((guest, service.context("a connection")?))
}

fn good(output: &ScriptOutput) {
    assert_eq!(output.status, 0, "{output:#?}");
}

/// Waits for the VMM to say that the image has lost its connection.
fn wait_lost(guest: &mut Guest) -> Result<()> {
    match guest.event()?.0 {
        Event::ImageLost { disk } if disk == ID => Ok(()),
        other => bail!("{other:?}"),
    }
}

const SUM: &str = "echo sum=$(dd if=/dev/vdb bs=256k 2>/dev/null | md5sum | cut -d' ' -f1)\n";

#[test]
fn a_guest_reads_an_image_byte_for_byte() -> Result<()> {
    let image = image()?;
    let facts = "for fact in serial ro size; do echo $(cat /sys/block/vdb/$fact); done";
    let sums = "for size in 256k 4k; do dd if=/dev/vdb bs=$size 2>/dev/null | md5sum | cut -d' ' -f1; done";
    // Its counters go with the VMM, so the guest stays.
    let (mut guest, service) = boot(&image, 60_000, SHELL)?;
    let (facts, sums) = thread::scope(|scope| {
        let serving = scope.spawn(|| service.fulfil(&image, usize::MAX));
        let said = (guest.ask(facts)?, guest.ask(sums)?);
        let counters = guest.stats()?.devices.remove("blk1").context("counters of the image")?;
        let of = |name: &str| counters.get(name).copied().unwrap_or_default();
        ensure!(of("misses") > 0 && of("fetches") > 0 && of("late") == 0 && of("lost") == 0, "{counters:?}");
        ensure!(of("wait_count") == of("misses"), "{counters:?}");
        drop(guest);
        let fulfilled = serving.join().expect("the service does not panic")?;
        ensure!(fulfilled as u64 == of("fetches"), "{fulfilled} wishes, {counters:?}");
        Ok(said)
    })?;
    assert_eq!(facts, format!("{ID}\n1\n{}", image.disk()?.len() / 512));
    let sum = sum_of(&image)?;
    assert_eq!(sums, format!("{sum}\n{sum}"));
    Ok(())
}

#[test]
fn an_image_service_that_dies_and_comes_back_is_not_noticed_in_the_guest() -> Result<()> {
    let image = image()?;
    let (mut guest, mut service) = boot(&image, 60_000, SUM)?;
    for _ in 0..3 {
        ensure!(service.fulfil(&image, 4)? == 4, "the disk asks no more");
        // In the middle of a wish.
        service.wish()?.context("another wish")?;
        drop(service);
        wait_lost(&mut guest)?;
        thread::sleep(Duration::from_millis(300));
        service = image.reconnect(&mut guest, ID)?;
    }
    let output = thread::scope(|scope| {
        scope.spawn(|| service.fulfil(&image, usize::MAX));
        let output = guest.script();
        drop(guest);
        output
    })?;
    good(&output);
    assert_eq!(output.value("sum")?, sum_of(&image)?);
    Ok(())
}

#[test]
fn what_an_image_lacks_is_an_error_to_the_guest_and_nothing_else_is() -> Result<()> {
    let image = image()?;
    let (mut guest, service) = boot(&image, 60_000, SHELL)?;
    thread::scope(|scope| {
        let serving = scope.spawn(|| -> Result<()> {
            // Block 100 of the first blob is broken.
            while let Some(fetch) = service.wish()? {
                let broken =
                    fetch.blob == 0 && (fetch.first..fetch.first + u64::from(fetch.blocks)).contains(&100);
                if !broken {
                    image.fill(fetch)?;
                }
                service.say(fetch.tag, if broken { 5 } else { 0 })?;
            }
            Ok(())
        });
        let mut read = |block: u64, count: u64| {
            let from = FIRST + block;
            guest.ask(&format!(
                "dd if=/dev/vdb bs=4k skip={from} count={count} iflag=direct 2>/tmp/e | md5sum; grep -ci 'i/o error\\|input/output error' /tmp/e || true"
            ))
        };
        let disk = image.disk()?;
        let at = |block: u64| usize::try_from((FIRST + block) * 4096).expect("small");
        let sum = |blocks: std::ops::Range<u64>| -> Result<String> {
            let bytes = disk[at(blocks.start)..at(blocks.end)].to_vec();
            Ok(e2e::run_with_input(&mut Command::new("md5sum"), bytes)?.ok()?.trim_end().to_owned())
        };
        for blocks in [99..100, 101..110, 0..50] {
            let said = read(blocks.start, blocks.end - blocks.start)?;
            ensure!(said == format!("{}\n0", sum(blocks.clone())?), "{blocks:?}: {said}");
        }
        let said = read(100, 1)?;
        ensure!(said.ends_with("\n1"), "{said}");
        drop(guest);
        serving.join().expect("the service does not panic")
    })
}

#[test]
fn an_answer_that_makes_no_sense_costs_the_image_service_its_connection_alone() -> Result<()> {
    let image = image()?;
    let (mut guest, mut service) = boot(&image, 60_000, SUM)?;
    for nonsense in [&[0; 3][..], &[0xff; 16], &[0; 60_000]] {
        service.wish()?.context("a wish")?;
        service.send(nonsense)?;
        wait_lost(&mut guest)?;
        service = image.reconnect(&mut guest, ID)?;
    }
    let output = thread::scope(|scope| {
        scope.spawn(|| service.fulfil(&image, usize::MAX));
        let output = guest.script();
        drop(guest);
        output
    })?;
    good(&output);
    assert_eq!(output.value("sum")?, sum_of(&image)?);
    Ok(())
}

#[test]
fn a_read_of_an_image_fails_when_nobody_answers_in_time() -> Result<()> {
    let image = image()?;
    let (mut guest, service) = boot(&image, 500, SHELL)?;
    let read = "dd if=/dev/vdb bs=4k skip=10 count=1 iflag=direct 2>/tmp/e | wc -c; grep -ci 'i/o error\\|input/output error' /tmp/e || true";
    ensure!(guest.ask(read)? == "0\n1", "{:?}", guest.lines());
    let late = service.wish()?.context("a wish")?;
    image.fill(late)?;
    service.say(late.tag, 0)?;
    ensure!(guest.ask(read)? == "4096\n0", "{:?}", guest.lines());
    let counters = guest.stats()?.devices.remove("blk1").context("counters of the image")?;
    ensure!(counters["late"] == 1 && counters["lost"] == 0, "{counters:?}");
    Ok(())
}

#[test]
fn a_vm_is_paused_while_it_waits_for_an_image() -> Result<()> {
    let image = image()?;
    let (mut guest, service) = boot(&image, 60_000, SUM)?;
    let fetch = service.wish()?.context("a wish")?;
    guest.call(Op::Pause)?;
    image.fill(fetch)?;
    service.say(fetch.tag, 0)?;
    thread::sleep(Duration::from_millis(200));
    guest.call(Op::Resume)?;
    let output = thread::scope(|scope| {
        scope.spawn(|| service.fulfil(&image, usize::MAX));
        let output = guest.script();
        drop(guest);
        output
    })?;
    good(&output);
    assert_eq!(output.value("sum")?, sum_of(&image)?);
    Ok(())
}
