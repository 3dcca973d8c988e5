//! Too little room: eviction, and a disk that is full.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::sample::{Running, Sample, cache_files, folder_config};

const ENOSPC: u32 = 28;

#[test]
fn the_least_recently_used_goes_and_what_is_open_stays() {
    let sample = Sample::new();
    let images: Vec<_> = [16, 32, 64, 128].into_iter().map(|kib| sample.build_v6_of(kib << 10)).collect();
    let config = folder_config(&sample.blobs());
    // Each image is some 5 MiB.
    let running = Running::with("[cache]\nmax_mib = 12\nmin_free_mib = 0\n[fetch]\nprefetch = false");
    let held = running.open(&images[0].bootstrap, &config);
    assert_eq!(held.fetch_all(), 0);
    for image in &images[1..] {
        let client = running.open(&image.bootstrap, &config);
        assert_eq!(client.fetch_all(), 0);
        drop(client);
        running.closed_but(1);
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    let there: Vec<usize> =
        images.iter().map(|image| cache_files(&running.cache(), &image.blobs[0]).len()).collect();
    assert_eq!(there, [1, 0, 0, 1], "the first is open, the last fits beside it");
    assert_eq!(running.stats().evicted, 2);
    sample.compare(&images[0].bootstrap, &held);
    assert!(running.stats().cache_bytes < 13 << 20);
    assert_eq!(fs::read_dir(running.cache().join("trash")).expect("a folder").count(), 0);
}

#[test]
fn what_vms_use_may_be_more_than_the_limit() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::with("[cache]\nmax_mib = 1\nmin_free_mib = 0\n[fetch]\nprefetch = false");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn what_was_over_the_limit_goes_when_its_vms_have_ended() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::with("[cache]\nmax_mib = 1\nmin_free_mib = 0\n[fetch]\nprefetch = false");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    assert_eq!(client.fetch_all(), 0);
    assert!(running.stats().cache_bytes > 1 << 20, "it is in use");
    drop(client);
    crate::sample::until("a cache within its limit", || running.stats().cache_bytes <= 1 << 20);
    assert_eq!(cache_files(&running.cache(), &built.blobs[0]).len(), 0);
}

#[test]
fn a_disk_that_shall_stay_free_is_an_error_of_its_own() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::with("[cache]\nmin_free_mib = 1000000000\n[fetch]\nprefetch = false");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    assert_eq!(client.fetch(0, 0, 1), ENOSPC);
}

/// A file system of 8 MiB, if this process may mount one.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn new() -> Option<Tmpfs> {
        let folder = TempDir::new().expect("a temporary folder");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(folder.path()).output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Tmpfs(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy"]).arg(self.path()).status(); // then it goes with the machine
    }
}

#[test]
fn a_full_disk_is_an_error_until_there_is_room() {
    let Some(disk) = Tmpfs::new() else {
        eprintln!("not run: this process may not mount a tmpfs");
        return;
    };
    let sample = Sample::new();
    let (first, second) = (sample.build_v6_of(64 << 10), sample.build_v6_of(128 << 10));
    let config = folder_config(&sample.blobs());
    let running = Running::with("[cache]\nmin_free_mib = 0\n[fetch]\nread_ahead_kib = 0\nprefetch = false");
    // The cache of a service that runs, moved onto the small disk.
    let folder = running.stop();
    fs::remove_dir_all(folder.path().join("cache")).expect("removed");
    std::os::unix::fs::symlink(disk.path(), folder.path().join("cache")).expect("a link");
    let running =
        Running::at(folder, "[cache]\nmin_free_mib = 0\n[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let one = running.open(&first.bootstrap, &config);
    assert_eq!(one.fetch_all(), 0);
    let two = running.open(&second.bootstrap, &config);
    assert_eq!(two.fetch_all(), ENOSPC, "5 MiB twice do not fit into 8");
    // What is there can be read, and is right.
    sample.compare(&first.bootstrap, &one);
    drop(one);
    running.closed_but(1);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    sample.compare(&second.bootstrap, &two);
    assert_eq!(cache_files(&running.cache(), &first.blobs[0]).len(), 0);
}
