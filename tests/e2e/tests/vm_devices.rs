//! Each device under load, driven by the guest's own drivers.
#![cfg(feature = "lab")]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use anyhow::Result;
use e2e::SmallFs;
use e2e::vm::{GuestSpec, ScriptOutput, scratch_file};

const MIB: u64 = 1 << 20;

fn run(spec: GuestSpec) -> Result<ScriptOutput> {
    let output = spec.run()?;
    assert_eq!(output.status, 0, "{output:#?}");
    Ok(output)
}

#[test]
fn a_disk_keeps_what_is_written_to_it_on_every_queue() -> Result<()> {
    let disk = scratch_file(64 * MIB)?;
    let script = "dd if=/dev/urandom of=/tmp/pattern bs=1M count=16 2>/dev/null\n\
                  for i in 0 1 2 3; do dd if=/tmp/pattern of=/dev/vdb bs=64k seek=$((i*256)) conv=notrunc 2>/dev/null & done; wait\n\
                  sync; echo 3 > /proc/sys/vm/drop_caches\n\
                  for i in 0 1 2 3; do dd if=/dev/vdb bs=64k skip=$((i*256)) count=256 2>/dev/null | cmp - /tmp/pattern; done\n\
                  echo sum=$(md5sum < /tmp/pattern | cut -d' ' -f1)\n\
                  echo serial=$(cat /sys/block/vdb/serial)\n\
                  echo sectors=$(cat /sys/block/vdb/size)\n\
                  echo queues=$(ls /sys/block/vdb/mq | wc -l)\n";
    let disks = vec![(disk.try_clone()?, false, "ctvm-e2e-disk".into(), 2)];
    let output = run(GuestSpec { vcpus: 2, disks, script: script.into(), ..GuestSpec::default() })?;
    assert_eq!(output.value("serial")?, "ctvm-e2e-disk");
    assert_eq!(output.value("sectors")?, (64 * MIB / 512).to_string());
    assert_eq!(output.value("queues")?, "2");
    let mut bytes = vec![0; 16 << 20];
    for copy in 0..4 {
        disk.read_exact_at(&mut bytes, copy * 16 * MIB)?;
        let host = e2e::run_with_input(&mut std::process::Command::new("md5sum"), bytes.clone())?.ok()?;
        assert_eq!(host.split(' ').next(), Some(output.value("sum")?), "copy {copy} as the host sees it");
    }
    Ok(())
}

#[test]
fn discarded_blocks_go_back_to_the_host_and_read_as_zeros() -> Result<()> {
    let disk = scratch_file(32 * MIB)?;
    disk.write_all_at(&vec![0xa5; 32 << 20], 0)?;
    let before = disk.metadata()?.blocks();
    let script = "blkdiscard -o 1048576 -l 16777216 /dev/vdb\n\
                  echo left=$(dd if=/dev/vdb bs=1M skip=1 count=16 2>/dev/null | tr -d '\\000' | wc -c)\n";
    let disks = vec![(disk.try_clone()?, false, String::new(), 1)];
    let output = run(GuestSpec { disks, script: script.into(), ..GuestSpec::default() })?;
    assert_eq!(output.value("left")?, "0");
    let freed = (before - disk.metadata()?.blocks()) * 512;
    assert!(freed >= 16 * MIB, "{freed} bytes came back");
    let mut edge = [0; 1];
    disk.read_exact_at(&mut edge, MIB - 1)?;
    assert_eq!(edge, [0xa5], "what was not discarded stays");
    Ok(())
}

#[test]
fn a_read_only_disk_refuses_writes() -> Result<()> {
    let disk = scratch_file(MIB)?;
    let script = "echo ro=$(cat /sys/block/vdb/ro)\n\
                  if dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null; then echo wrote=1; fi\n";
    let disks = vec![(disk, true, String::new(), 1)];
    let output = run(GuestSpec { disks, script: script.into(), ..GuestSpec::default() })?;
    assert_eq!(output.value("ro")?, "1");
    assert!(output.value("wrote").is_err(), "{output:#?}");
    Ok(())
}

#[test]
fn a_host_that_is_full_gives_the_guest_io_errors_and_the_vm_goes_on() -> Result<()> {
    let small = SmallFs::mount(4 * MIB)?;
    let disk = File::options().read(true).write(true).create_new(true).open(small.path().join("disk"))?;
    disk.set_len(16 * MIB)?;
    // Blocks that the host gave already can be written and read whatever comes after.
    let script = "write() { dd of=/dev/vdb bs=1M oflag=direct conv=notrunc \"$@\" 2>>/tmp/errors && echo $1 || echo refused; }\n\
                  dd if=/dev/urandom of=/tmp/a bs=1M count=1 2>/dev/null\n\
                  echo first=$(write if=/tmp/a)\n\
                  echo rest=$(write if=/dev/zero seek=1)\n\
                  echo errors=$(grep -ci 'i/o error\\|input/output error' /tmp/errors)\n\
                  echo again=$(write if=/tmp/a)\n\
                  dd if=/dev/vdb bs=1M count=1 iflag=direct 2>/dev/null | cmp - /tmp/a && echo same=yes\n";
    let disks = vec![(disk, false, String::new(), 1)];
    let output = run(GuestSpec { disks, script: script.into(), ..GuestSpec::default() })?;
    let said =
        ["first", "rest", "errors", "again", "same"].map(|name| output.value(name).unwrap_or("nothing"));
    assert_eq!(said, ["if=/tmp/a", "refused", "1", "if=/tmp/a", "yes"], "{output:#?}");
    Ok(())
}

#[test]
fn the_entropy_source_gives_bytes() -> Result<()> {
    let script = "echo name=$(cat /sys/class/misc/hw_random/rng_current)\n\
                  dd if=/dev/hwrng of=/tmp/a bs=64k count=4 iflag=fullblock 2>/dev/null\n\
                  echo size=$(wc -c < /tmp/a)\n\
                  echo packed=$(gzip -c /tmp/a | wc -c)\n";
    let output = run(GuestSpec { script: script.into(), ..GuestSpec::default() })?;
    assert!(output.value("name")?.starts_with("virtio_rng"), "{output:#?}");
    assert_eq!(output.value("size")?, "262144");
    assert!(output.value("packed")?.parse::<u32>()? > 262_000, "random bytes do not compress");
    Ok(())
}

#[test]
fn the_console_loses_nothing() -> Result<()> {
    let script = "i=0; while [ $i -lt 400 ]; do echo line=$i; i=$((i+1)); done";
    let output = run(GuestSpec { script: script.into(), ..GuestSpec::default() })?;
    let lines = output.lines.iter().filter_map(|l| l.strip_prefix("line="));
    assert!(lines.eq((0..400).map(|i| i.to_string())), "lines were lost or torn");
    Ok(())
}

#[test]
fn a_shared_directory_is_the_same_on_both_sides() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    std::fs::write(folder.path().join("from-host"), vec![b'h'; 3 << 20])?;
    std::fs::create_dir(folder.path().join("many"))?;
    for i in 0..100 {
        std::fs::write(folder.path().join("many").join(format!("f{i}")), i.to_string())?;
    }
    let script = "mount -t virtiofs ctvm /mnt; cd /mnt/share\n\
                  echo host=$(md5sum < from-host | cut -d' ' -f1)\n\
                  echo many=$(ls many | wc -l) sum=$(cat many/* | wc -c)\n\
                  dd if=/dev/urandom of=from-guest bs=1M count=4 2>/dev/null\n\
                  echo guest=$(md5sum < from-guest | cut -d' ' -f1)\n\
                  ln from-guest hard; ln -s from-guest soft; mv hard moved; mkdir -p a/b/c; touch a/b/c/d\n\
                  chmod 4751 moved; chown 12:34 moved; rm -r many\n\
                  echo '#!/bin/busybox sh' > tool; echo 'echo ran=$1' >> tool; cp /bin/busybox busybox; chmod +x tool busybox\n\
                  ./busybox echo exec=1\n\
                  cd /; umount /mnt\n";
    let share = Some((File::open(folder.path())?, false));
    let output = run(GuestSpec { share, script: script.into(), ..GuestSpec::default() })?;
    let md5 = |name: &str| -> Result<String> {
        let path = folder.path().join(name);
        let sum = e2e::run(std::process::Command::new("md5sum").arg(path))?.ok()?;
        Ok(sum.split(' ').next().unwrap_or_default().to_owned())
    };
    assert_eq!(output.value("host")?, md5("from-host")?);
    assert_eq!(output.value("guest")?, md5("from-guest")?);
    assert_eq!(output.value("exec")?, "1");
    assert!(output.lines.iter().any(|l| l == "many=100 sum=190"), "{output:#?}");
    assert!(!folder.path().join("many").exists());
    let moved = folder.path().join("moved").metadata()?;
    // chown by root clears the set-uid bit, as it does on any file system.
    assert_eq!(moved.permissions().mode() & 0o7777, 0o751);
    assert_eq!((moved.uid(), moved.gid(), moved.nlink()), (12, 34, 2));
    assert_eq!(std::fs::read_link(folder.path().join("soft"))?.to_str(), Some("from-guest"));
    Ok(())
}

#[test]
fn a_shared_directory_holds_the_guest_inside_it() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    std::os::unix::fs::symlink("/etc/hostname", folder.path().join("absolute"))?;
    std::os::unix::fs::symlink("../../../../../../etc/hostname", folder.path().join("relative"))?;
    std::fs::write(folder.path().join("file"), "x")?;
    let script = "mount -t virtiofs ctvm /mnt; cd /mnt/share\n\
                  for f in absolute relative; do cat $f 2>/dev/null && echo escaped=$f; done\n\
                  ls /mnt/share/.. | tr '\\n' ' '; echo\n\
                  if touch new 2>/tmp/error; then echo wrote=new; fi; echo error=$(cat /tmp/error)\n\
                  if echo y > file 2>/dev/null; then echo wrote=file; fi\n\
                  cat file; echo\n";
    let share = Some((File::open(folder.path())?, true));
    let output = run(GuestSpec { share, script: script.into(), ..GuestSpec::default() })?;
    assert!(output.value("escaped").is_err(), "{output:#?}");
    assert!(output.value("wrote").is_err(), "{output:#?}");
    assert!(output.value("error")?.contains("Read-only"), "{output:#?}");
    assert_eq!(std::fs::read(folder.path().join("file"))?, b"x");
    Ok(())
}
