//! The service killed at any moment, a host that lost power, and VMMs that go on meanwhile.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use images::cache::scrub;
use tempfile::TempDir;
use vmm_api::image::{Fetch, ready_map_offset};

use crate::client::Client;
use crate::sample::{Running, Sample, cache_files, folder_config, wait_for};

/// The service as a process of its own, which can be killed.
struct Process {
    folder: TempDir,
    child: Child,
}

impl Process {
    fn start(folder: TempDir) -> Process {
        let config = folder.path().join("config.toml");
        fs::write(&config, "[fetch]\nread_ahead_kib = 0\nprefetch = false\n").expect("a file");
        let child = Command::new(env!("CARGO_BIN_EXE_ctvm-images"))
            .args(["serve", "--root"])
            .arg(folder.path().join("cache"))
            .arg("--socket")
            .arg(folder.path().join("sock"))
            .arg("--config")
            .arg(&config)
            .stderr(Stdio::null())
            .spawn()
            .expect("the program");
        wait_for(&folder.path().join("sock"));
        Process { folder, child }
    }

    fn open(&self, bootstrap: &Path, config: &str) -> Client {
        Client::open(&self.folder.path().join("sock"), bootstrap, config).expect("opened")
    }

    /// kill -9. What is left.
    fn kill(mut self) -> TempDir {
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
        self.folder
    }
}

#[test]
fn killed_anywhere_it_goes_on_with_what_is_there() {
    let sample = Sample::new();
    let built = sample.build_v6_of(16 << 10);
    let config = folder_config(&sample.blobs());
    let mut folder = TempDir::new().expect("a temporary folder");
    let mut kept = 0;
    for round in 0..12_u64 {
        let process = Process::start(folder);
        let client = process.open(&built.bootstrap, &config);
        assert!(client.ready(0) >= kept, "nothing that was ready is lost");
        kept = client.ready(0);
        // Wishes without waiting for their ends, and a kill somewhere in between.
        for wish in 0..8 {
            let first = (round * 8 + wish) * 10 % client.blocks(0);
            client.send(Fetch { tag: wish, blob: 0, blocks: 1, first });
        }
        std::thread::sleep(Duration::from_micros(300 * round));
        folder = process.kill();
        // What a VMM sees as ready is right, with the service gone.
        assert_ready_is_right(&sample, &built.bootstrap, &client);
        while client.answer().is_some() {}
    }
    let process = Process::start(folder);
    let client = process.open(&built.bootstrap, &config);
    sample.compare(&built.bootstrap, &client);
    process.kill();
}

/// Compares each ready block with the folder's files.
fn assert_ready_is_right(sample: &Sample, bootstrap: &Path, client: &Client) {
    let (files, _) = convert::files::of_bootstrap(bootstrap).expect("read");
    for file in files {
        let wanted =
            fs::read(sample.root().join(file.path.strip_prefix("/").expect("rooted"))).expect("a file");
        for piece in &file.pieces {
            let blocks = piece.offset / 4096..(piece.offset + piece.len).div_ceil(4096);
            if blocks.clone().all(|block| client.is_ready(piece.blob as usize, block)) {
                let at = usize::try_from(piece.file_offset).expect("small");
                let len = usize::try_from(piece.len).expect("small");
                let got = client.read(piece.blob as usize, piece.offset, piece.len);
                assert!(got == wanted[at..at + len], "{}", file.path.display());
            }
        }
    }
}

#[test]
fn a_vmm_keeps_its_files_over_the_services_end() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let process = Process::start(TempDir::new().expect("a temporary folder"));
    let client = process.open(&built.bootstrap, &config);
    assert_eq!(client.fetch(0, 0, 64), 0);
    let folder = process.kill();
    // A service with no room at all for what nobody uses: the VMM's lock holds although nobody has opened the image yet.
    let running = Running::at(folder, "[cache]\nmax_mib = 0\nmin_free_mib = 0\n[fetch]\nprefetch = false");
    let other = sample.build_v6_of(4 << 20);
    let second = running.open(&other.bootstrap, &config);
    assert_eq!(second.fetch(0, 0, 64), 0);
    assert_eq!(cache_files(&running.cache(), &built.blobs[0]).len(), 1);
    // The image opened again is the same file: what one connection fetches, the other's VMM sees.
    let again = running.open(&built.bootstrap, &config);
    assert_eq!(again.fetch(0, 128, 16), 0);
    assert!(client.is_ready(0, 128));
    drop((client, again));
    running.closed_but(1);
    assert_eq!(second.fetch(0, 64, 64), 0);
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(second.fetch(0, 512, 64), 0);
    assert_eq!(cache_files(&running.cache(), &built.blobs[0]).len(), 0, "now it can go");
}

#[test]
fn after_a_power_loss_nothing_is_believed_unseen() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let process = Process::start(TempDir::new().expect("a temporary folder"));
    let client = process.open(&built.bootstrap, &config);
    assert_eq!(client.fetch(0, 0, 64), 0);
    drop(client);
    let folder = process.kill();
    let data = cache_files(&folder.path().join("cache"), &built.blobs[0]).remove(0);
    // As a power loss leaves it: another boot, a lost page, and a bit of a page that never came.
    fs::write(data.with_file_name("boot"), "another-boot").expect("written");
    let file = fs::OpenOptions::new().write(true).read(true).open(&data).expect("the cache file");
    file.write_all_at(&[0; 4096], 20 * 4096).expect("written");
    let image = images::rafs::Image::parse(&fs::read(&built.bootstrap).expect("read")).expect("an image");
    let map = ready_map_offset(image.blobs[0].bytes);
    file.write_all_at(&[0xff; 4], map + 8).expect("written");
    let running = Running::at(folder, "[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &config);
    let ready: Vec<u64> = (0..client.blocks(0)).filter(|block| client.is_ready(0, *block)).collect();
    let wanted: Vec<u64> = (0..16).chain(32..64).collect();
    assert_eq!(ready, wanted, "a chunk lost, those of the bits without bytes dropped");
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn a_chunk_that_changed_on_the_disk_is_found_and_not_read_by_the_next() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &config);
    assert_eq!(client.fetch(0, 0, 64), 0);
    let fine = scrub(&running.cache()).expect("looked at");
    assert_eq!((fine.files, fine.chunks, fine.wrong.len()), (1, 4, 0));
    let data = cache_files(&running.cache(), &built.blobs[0]).remove(0);
    let file = fs::OpenOptions::new().write(true).open(&data).expect("the cache file");
    file.write_all_at(&[0xaa], 20 * 4096 + 5).expect("written");
    let found = scrub(&running.cache()).expect("looked at");
    let folder = data.parent().expect("a folder").to_owned();
    assert_eq!(found.wrong, [(folder, 16 * 4096)]);
    // Written to and closed, it stays suspect.
    assert_eq!(client.fetch(0, 64, 1), 0);
    drop(client);
    running.closed();
    assert_eq!(fs::read_to_string(data.with_file_name("boot")).expect("read"), "suspect");
    let client = running.open(&built.bootstrap, &config);
    assert!(!client.is_ready(0, 20) && client.is_ready(0, 64), "only what is wrong is dropped");
    sample.compare(&built.bootstrap, &client);
    assert_eq!(scrub(&running.cache()).expect("looked at").wrong.len(), 0);
}

#[test]
fn a_file_left_clean_is_believed_after_a_boot() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &config);
    assert_eq!(client.fetch(0, 0, 64), 0);
    let folder = running.stop();
    drop(client);
    let data = cache_files(&folder.path().join("cache"), &built.blobs[0]).remove(0);
    assert_eq!(fs::read_to_string(data.with_file_name("boot")).expect("read"), "clean");
    let running = Running::at(folder, "[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &config);
    assert_eq!(client.ready(0), 64);
    // Written to again, it is not clean while it is open.
    assert_eq!(client.fetch(0, 64, 1), 0);
    assert_ne!(fs::read_to_string(data.with_file_name("boot")).expect("read"), "clean");
    drop(client);
    running.closed();
    crate::sample::until("a clean file", || {
        fs::read_to_string(data.with_file_name("boot")).is_ok_and(|boot| boot == "clean")
    });
}

#[test]
fn broken_cache_files_are_made_anew() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let mut folder = TempDir::new().expect("a temporary folder");
    for broken in ["chunks", "data", "boot", "used"] {
        let running = Running::at(folder, "[fetch]\nread_ahead_kib = 0\nprefetch = false");
        let client = running.open(&built.bootstrap, &config);
        sample.compare(&built.bootstrap, &client);
        folder = running.stop();
        drop(client);
        let data = cache_files(&folder.path().join("cache"), &built.blobs[0]).remove(0);
        let file = fs::OpenOptions::new().write(true).open(data.with_file_name(broken)).expect("a file");
        file.set_len(7).expect("cut");
    }
    let running = Running::at(folder, "[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &config);
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn two_services_do_not_share_a_cache() {
    let running = Running::plain();
    let second = images::service::Service::new(&running.cache(), images::config::Config::default());
    assert!(second.expect_err("refused").to_string().contains("another image service"));
}
