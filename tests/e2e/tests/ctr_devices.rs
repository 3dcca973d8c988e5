//! Devices of the host in a container: block devices as disks of the VM, those of every Linux as the guest's, others not.
#![cfg(feature = "lab")]

use std::sync::LazyLock;

use anyhow::{Context as _, Result, ensure};
use e2e::{Containerd, Finished, LoopDevice, run};
use serde_json::{Value, json};

/// One containerd for all tests of this file; they use different container ids.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

/// `ctr run --rm` with these options; its record is removed if it could not be made.
fn sh(id: &str, options: &[&str], script: &str) -> Result<Finished> {
    let options: Vec<&str> = ["--rm"].iter().chain(options).copied().collect();
    let finished = CONTAINERD.run(&options, id, &["sh", "-c", script])?;
    CONTAINERD.remove_record(id)?;
    Ok(finished)
}

/// A MiB that differs from block to block.
fn pattern() -> Vec<u8> {
    (0..1 << 20).map(|at: u32| ((at / 512 + at) % 251) as u8).collect()
}

#[test]
fn a_block_device_is_read_and_written_from_both_sides() -> Result<()> {
    let disk = LoopDevice::with(&pattern())?;
    // In reverse, to the second half, by as many bytes as a disk can take at once.
    let script = format!(
        "set -e; d={}; stat -c '%F %t:%T' $d; blockdev --getsize64 $d; md5sum < $d; \
         dd if=$d of=/half bs=512k count=1 2>/dev/null; dd if=/half of=$d bs=512k seek=1 conv=fsync 2>/dev/null",
        disk.name()
    );
    let done = sh("disk", &["--device", disk.name()], &script)?;
    ensure!(done.code == 0, "{done:?}");
    let lines: Vec<String> = done.text().lines().map(str::to_owned).collect();
    ensure!(lines[0].starts_with("block special file ") && !lines[0].ends_with(" 7:0"), "{lines:?}");
    ensure!(lines[1] == (1 << 20).to_string(), "{lines:?}");
    let image = tempfile::NamedTempFile::new()?;
    std::fs::write(image.path(), pattern())?;
    let sum = run(std::process::Command::new("md5sum").arg(image.path()))?.ok()?;
    ensure!(lines[2].split(' ').next() == sum.split(' ').next(), "{lines:?}, on the host {sum}");
    let (before, after) = (pattern(), disk.content()?);
    ensure!(after[..1 << 19] == before[..1 << 19], "the first half changed");
    ensure!(after[1 << 19..] == before[..1 << 19], "the second half is not the first");
    Ok(())
}

#[test]
fn several_block_devices_are_at_their_paths() -> Result<()> {
    let disks = (0..3).map(|n: u8| LoopDevice::with(&[b'a' + n; 4096])).collect::<Result<Vec<_>>>()?;
    let options: Vec<&str> = disks.iter().flat_map(|disk| ["--device", disk.name()]).collect();
    let names: Vec<&str> = disks.iter().map(LoopDevice::name).collect();
    let done = sh("disks", &options, &format!("for d in {}; do head -c 1 $d; done", names.join(" ")))?;
    assert_eq!(done.ok()?, "abc");
    Ok(())
}

#[test]
fn a_block_device_that_is_read_only_stays_so() -> Result<()> {
    let disk = LoopDevice::read_only(&pattern())?;
    let script =
        format!("head -c 4 {0} | wc -c; dd if=/dev/zero of={0} bs=512 count=1 conv=fsync", disk.name());
    let done = sh("disk-ro", &["--device", disk.name()], &script)?;
    ensure!(done.code != 0 && done.text() == "4", "{done:?}");
    ensure!(disk.content()? == pattern(), "it was written to");
    Ok(())
}

#[test]
fn the_guest_has_the_devices_of_every_linux() -> Result<()> {
    let done = sh("fuse", &["--device", "/dev/fuse"], "exec 3<>/dev/fuse; stat -c %t:%T /dev/fuse")?;
    assert_eq!(done.ok()?, "a:e5");
    Ok(())
}

#[test]
fn other_devices_are_refused_by_path() -> Result<()> {
    let done = sh("kvm", &["--device", "/dev/kvm"], "true")?;
    ensure!(
        done.code != 0 && done.errors().contains("device \"/dev/kvm\" (c 10:232) is the host's"),
        "{done:?}"
    );
    // The next one works.
    sh("after-kvm", &[], "true")?.ok()?;
    Ok(())
}

#[test]
fn a_privileged_container_has_no_device_of_the_host() -> Result<()> {
    let disk = LoopDevice::with(&pattern())?;
    let script = format!("ls {0} || echo none; test -c /dev/null && echo null", disk.name());
    let done = sh("privileged", &["--privileged"], &script)?;
    assert_eq!(done.ok()?, "none\nnull");
    Ok(())
}

#[test]
fn a_bind_of_a_block_device_is_refused_and_one_of_what_is_mounted_from_it_works() -> Result<()> {
    let disk = LoopDevice::with(&vec![0; 16 << 20])?;
    let bind = |source: &str| format!("type=bind,src={source},dst=/data,options=rbind:rw");
    let done = sh("bind-node", &["--mount", &bind(disk.name())], "true")?;
    ensure!(done.code != 0 && done.errors().contains("give it to the container as a device"), "{done:?}");
    ensure!(done.errors().contains(disk.name()), "{done:?}");

    run(std::process::Command::new("mkfs.ext4").arg("-q").arg(disk.node()))?.ok()?;
    let folder = tempfile::tempdir_in("/var/tmp")?;
    run(std::process::Command::new("mount").arg(disk.node()).arg(folder.path()))?.ok()?;
    let done =
        sh("bind-mounted", &["--mount", &bind(&folder.path().display().to_string())], "echo x > /data/f");
    let written = std::fs::read_to_string(folder.path().join("f"));
    run(std::process::Command::new("umount").arg(folder.path()))?.ok()?;
    done?.ok()?;
    assert_eq!(written?, "x\n");
    Ok(())
}

#[test]
fn more_block_devices_than_a_vm_can_have_are_refused_with_the_limit() -> Result<()> {
    let disks = (0..12).map(|_| LoopDevice::with(&[0; 512])).collect::<Result<Vec<_>>>()?;
    let options: Vec<&str> = disks.iter().flat_map(|disk| ["--device", disk.name()]).collect();
    let done = sh("too-many", &options, "true")?;
    ensure!(done.code != 0 && done.errors().contains("at most 11 become disks of a VM"), "{done:?}");
    Ok(())
}

/// Whether the guest's kernel has huge pages.
fn has_huge_pages(id: &str) -> Result<bool> {
    Ok(sh(id, &[], "grep -c hugetlbfs /proc/filesystems")?.text() == "1")
}

/// What a guest without them says.
const NO_HUGE_PAGES: &str = "the guest's kernel has no huge pages (CONFIG_HUGETLBFS)";

#[test]
fn huge_pages_are_the_guests_or_refused_with_the_reason() -> Result<()> {
    let mount = "type=hugetlbfs,src=none,dst=/huge,options=pagesize=2M";
    let script = "grep -q ' /huge hugetlbfs ' /proc/mounts && echo mounted";
    let done = sh("huge", &["--mount", mount], script)?;
    if has_huge_pages("has-huge")? {
        assert_eq!(done.ok()?, "mounted");
    } else {
        let said = format!("volume of huge pages at \"/huge\": {NO_HUGE_PAGES}");
        ensure!(done.code != 0 && done.errors().contains(&said), "{done:?}");
    }
    Ok(())
}

#[test]
fn a_limit_of_huge_pages_is_a_pool_of_the_guest_or_refused_with_the_reason() -> Result<()> {
    // `ctr` has no option for it, but takes a whole configuration: that of another container, changed.
    CONTAINERD.run(&["-d"], "huge-model", &["sleep", "1000"])?.ok()?;
    let config = std::fs::read(CONTAINERD.bundle("huge-model").join("config.json"));
    CONTAINERD.remove("huge-model")?;
    let mut config: Value = serde_json::from_slice(&config?)?;
    config["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 4 << 20}]);
    config["mounts"].as_array_mut().context("a container has mounts")?.push(json!(
        {"destination": "/huge", "type": "hugetlbfs", "source": "none", "options": ["pagesize=2M"]}
    ));
    // All of them, and one more than there are.
    let script = "grep HugePages_Total /proc/meminfo; fallocate -l 4194304 /huge/a && echo both; \
                  fallocate -l 2097152 /huge/b 2>/dev/null || echo full";
    config["process"]["args"] = json!(["sh", "-c", script]);
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let (root, file) = (folder.path().join("root"), folder.path().join("config.json"));
    config["root"]["path"] = root.display().to_string().into();
    std::fs::write(&file, config.to_string())?;
    std::fs::create_dir(&root)?;
    run(CONTAINERD.ctr().args(["images", "mount", "--rw", e2e::IMAGE]).arg(&root))?.ok()?;
    let mut ctr = CONTAINERD.ctr();
    ctr.args(["run", "--rm", "--runtime", e2e::containerd::RUNTIME, "--config"]).arg(&file).arg("huge-limit");
    let done = run(&mut ctr);
    CONTAINERD.remove_record("huge-limit")?;
    run(CONTAINERD.ctr().args(["images", "unmount", "--rm"]).arg(&root))?.ok()?;
    let done = done?;
    if has_huge_pages("has-huge-limit")? {
        let text = done.ok()?;
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words, ["HugePages_Total:", "2", "both", "full"]);
    } else {
        let said = format!("huge pages of 2MB: {NO_HUGE_PAGES}");
        ensure!(done.code != 0 && done.errors().contains(&said), "{done:?}");
    }
    Ok(())
}
