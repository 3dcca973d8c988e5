//! The cache and its protocol, with blobs in a folder.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use convert::rafs::Options;
use images::rafs::lookup;
use vmm_api::image::{Fetch, MAX_FETCH_BLOCKS};

use crate::client::Client;
use crate::sample::{Running, Sample, cache_files, folder_config};

const EIO: u32 = 5;
const EINVAL: u32 = 22;

#[test]
fn version_6_images_of_every_compressor_read_as_the_folder() {
    let sample = Sample::new();
    let running = Running::plain();
    for compressor in ["none", "lz4_block", "gzip", "zstd"] {
        let options = Options { compressor: compressor.into(), chunk_size: 64 << 10, ..Options::default() };
        let built = sample.build(compressor, &options);
        let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
        assert_eq!(client.image.version, 6);
        assert_eq!(client.ready(0), 0, "nothing is ready that nobody asked for");
        sample.compare(&built.bootstrap, &client);
        assert_eq!(u64::from(client.ready(0)), client.blocks(0));
    }
    assert_eq!((running.stats().refused, running.stats().tampered), (0, 0));
}

#[test]
fn an_image_is_whole_when_all_its_chunks_are_there_and_whoever_asks_is_told() {
    let sample = Sample::new();
    let running = Running::plain();
    let options = Options { chunk_size: 64 << 10, ..Options::default() };
    for version in [5, 6] {
        let built = sample.build(&format!("whole-{version}"), &Options { version, ..options.clone() });
        let config = folder_config(&sample.blobs());
        let look = || {
            let client =
                Client::open_and_look(&running.socket(), &built.bootstrap, &config, true).expect("open");
            client.image.ready
        };
        assert!(!look(), "nothing is there");
        let client = running.open(&built.bootstrap, &config);
        // A part of it, with what comes beside it.
        assert_eq!(client.fetch(0, 0, 1), 0);
        assert!(client.ready(0) > 0 && !look());
        assert_eq!(client.fetch_all(), 0);
        assert!(look());
        assert!(!running.open(&built.bootstrap, &config).image.ready, "nobody asked");
        drop(client);
        running.closed();
        assert!(look(), "it is there without anybody who has it open");
    }
}

#[test]
fn version_5_images_read_as_the_folder() {
    let sample = Sample::new();
    let running = Running::plain();
    for compressor in ["none", "lz4_block", "zstd"] {
        let options = Options { version: 5, compressor: compressor.into(), ..Options::default() };
        let built = sample.build(compressor, &options);
        let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
        assert_eq!(client.image.version, 6, "what a guest mounts is an EROFS");
        sample.compare(&built.bootstrap, &client);
        let mounted = client.mounted();
        for (path, wanted) in sample.files() {
            let extents = lookup::extents_of(&mounted, &path).expect("an EROFS").expect(&path);
            let pieces = extents.iter().map(|extent| {
                let blob = extent.blob.expect("no holes") as usize;
                client.read(blob, extent.offset, extent.len)
            });
            assert!(pieces.collect::<Vec<_>>().concat() == wanted, "{path} differs");
        }
        // A service that takes over makes the same bytes.
        drop(client);
        running.closed();
        let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
        assert!(client.mounted() == mounted, "other bytes");
        assert!(client.bootstrap.write_at(b"x", 0).is_err(), "it is sealed");
    }
}

#[test]
fn zran_images_read_out_of_the_plain_layer() {
    let sample = Sample::new();
    let running = Running::plain();
    let built = sample.build_zran();
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    sample.compare(&built.bootstrap, &client);
    assert_eq!(running.stats().tampered, 0);
}

#[test]
fn an_index_that_is_not_its_digests_is_not_believed() {
    let sample = Sample::new();
    let running = Running::plain();
    let built = sample.build_zran();
    let image = images::rafs::Image::parse(&fs::read(&built.bootstrap).expect("read")).expect("an image");
    let index = sample.blobs().join(&image.blobs[0].zran.as_ref().expect("an index").blob);
    let right = fs::read(&index).expect("read");
    let mut wrong = right.clone();
    wrong[100] ^= 1;
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    for bytes in [&wrong[..], &right[..right.len() - 1]] {
        fs::write(&index, bytes).expect("written");
        assert_eq!(client.fetch(0, 0, 1), EIO);
    }
    fs::write(&index, right).expect("written");
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn a_block_brings_its_chunk_and_no_more() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    assert_eq!(client.fetch(0, 20, 1), 0);
    assert_eq!((client.ready(0), running.stats().chunks), (16, 1), "a chunk of 64 KiB");
    assert!(client.is_ready(0, 16) && client.is_ready(0, 31) && !client.is_ready(0, 32));
    // Neighbours with it, if the service is to.
    let running = Running::with("[fetch]\nread_ahead_kib = 200\nprefetch = false");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    assert_eq!(client.fetch(0, 20, 1), 0);
    crate::sample::until("the neighbours", || running.stats().chunks == 4);
}

#[test]
fn wrong_wishes_are_refused_and_the_connection_lives() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    let blocks = client.blocks(0);
    for (blob, first, count) in [
        (1, 0, 1),
        (u32::MAX, 0, 1),
        (0, blocks, 1),
        (0, blocks - 1, 2),
        (0, u64::MAX, 1),
        (0, u64::MAX / 4096, MAX_FETCH_BLOCKS),
        (0, 0, 0),
        (0, 0, MAX_FETCH_BLOCKS + 1),
    ] {
        client.send(Fetch { tag: 1, blob, blocks: count, first });
        assert_eq!(client.answer().expect("a service").errno, EINVAL, "{count} at {first} of {blob}");
    }
    assert_eq!(client.fetch(0, blocks - 1, 1), 0);
}

#[test]
fn many_openers_fetch_each_chunk_once() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::plain();
    let config = folder_config(&sample.blobs());
    let clients: Vec<Client> = (0..50).map(|_| running.open(&built.bootstrap, &config)).collect();
    let start = Arc::new(std::sync::Barrier::new(clients.len()));
    let threads: Vec<_> = clients
        .into_iter()
        .map(|client| {
            let start = Arc::clone(&start);
            std::thread::spawn(move || {
                start.wait();
                assert_eq!(client.fetch_all(), 0);
                client
            })
        })
        .collect();
    let clients: Vec<Client> = threads.into_iter().map(|thread| thread.join().expect("fetched")).collect();
    let chunks = images::rafs::Image::parse(&fs::read(&built.bootstrap).expect("read")).expect("an image");
    assert_eq!(running.stats().chunks, chunks.blobs[0].chunks.len() as u64);
    sample.compare(&built.bootstrap, &clients[49]);
}

#[test]
fn tampered_and_truncated_blobs_are_errors_for_their_blocks_only() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let image = images::rafs::Image::parse(&fs::read(&built.bootstrap).expect("read")).expect("an image");
    let chunks = &image.blobs[0].chunks;
    let blob = sample.blobs().join(&built.blobs[0]);
    let file = fs::OpenOptions::new().write(true).open(&blob).expect("the blob");
    let (bad, cut) = (&chunks[3], &chunks[chunks.len() - 2]);
    file.write_all_at(&[0x55; 64], bad.stored_offset + 100).expect("tampered");
    file.set_len(cut.stored_offset + 10).expect("truncated");
    let running = Running::with("[fetch]\nread_ahead_kib = 512\nprefetch = false\npatience_s = 1");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    for chunk in chunks {
        let wrong = chunk.offset == bad.offset || chunk.offset >= cut.offset;
        let wanted = if wrong { EIO } else { 0 };
        assert_eq!(client.fetch(0, chunk.offset / 4096, 1), wanted, "the chunk at {}", chunk.offset);
        assert_eq!(client.is_ready(0, chunk.offset / 4096), !wrong);
    }
    assert!(running.stats().tampered > 0 && running.stats().refused > 0);
    fs::remove_file(&blob).expect("removed");
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    assert_eq!(client.fetch(0, 0, 1), EIO, "there is no blob");
}

#[test]
fn what_is_no_image_is_refused_in_words() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::plain();
    let config = folder_config(&sample.blobs());
    let open = |path: &std::path::Path, config: &str| {
        Client::open(&running.socket(), path, config).err().expect("refused")
    };
    let missing = sample.folder.path().join("none");
    assert!(open(&missing, &config).contains("read the bootstrap"));
    assert!(open(sample.folder.path(), &config).contains("regular file"));
    assert!(open(&built.bootstrap, "{").contains("not JSON"));
    assert!(open(&built.bootstrap, "").contains("names no folders"));
    fs::write(&missing, b"neither").expect("a file");
    assert!(open(&missing, &config).contains("not a RAFS bootstrap"));
    let mut bytes = fs::read(&built.bootstrap).expect("read");
    bytes.truncate(4096);
    fs::write(&missing, &bytes).expect("a file");
    assert!(open(&missing, &config).contains("outside the bootstrap"));
}

#[test]
fn an_image_that_lies_about_a_blob_has_a_file_of_its_own() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::plain();
    let config = folder_config(&sample.blobs());
    let image = images::rafs::Image::parse(&fs::read(&built.bootstrap).expect("read")).expect("an image");
    // The same image with the digests of two chunks exchanged: what one block is to be, the other is.
    let mut bytes = fs::read(&built.bootstrap).expect("read");
    let at = |bytes: &[u8], digest: &[u8]| bytes.windows(32).position(|w| w == digest).expect("a digest");
    let (one, two) = (image.blobs[0].chunks[0].digest, image.blobs[0].chunks[1].digest);
    let (a, b) = (at(&bytes, &one), at(&bytes, &two));
    bytes[a..a + 32].copy_from_slice(&two);
    bytes[b..b + 32].copy_from_slice(&one);
    let liar = sample.folder.path().join("liar.boot");
    fs::write(&liar, bytes).expect("a file");
    let first = running.open(&liar, &config);
    assert_eq!(first.fetch(0, 0, 1), EIO);
    let second = running.open(&built.bootstrap, &config);
    sample.compare(&built.bootstrap, &second);
    assert_eq!(cache_files(&running.cache(), &built.blobs[0]).len(), 2);
    assert_eq!(first.ready(0), 0, "the honest image's bytes are not the liar's to read");
}

#[test]
fn a_trace_of_the_first_start_is_fetched_ahead_at_the_second() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let config = folder_config(&sample.blobs());
    let running = Running::with("[fetch]\nread_ahead_kib = 0\n");
    let client = running.open(&built.bootstrap, &config);
    for block in [40, 3, 300] {
        assert_eq!(client.fetch(0, block, 1), 0);
    }
    drop(client);
    running.closed();
    let folder = running.stop();
    fs::remove_dir_all(folder.path().join("cache/blobs")).expect("removed");
    let running = Running::at(folder, "[fetch]\nread_ahead_kib = 0\n");
    let client = running.open(&built.bootstrap, &config);
    crate::sample::until("the trace", || running.stats().chunks == 3);
    assert_eq!(client.ready(0), 48);
    assert_eq!((running.stats().wishes, running.stats().ahead_bytes), (0, 3 * (64 << 10)));
}

#[test]
fn a_background_fill_brings_all_of_it() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::with("[fetch]\nbackground_fill = true\n");
    let client = running.open(&built.bootstrap, &folder_config(&sample.blobs()));
    crate::sample::until("all of it", || u64::from(client.ready(0)) == client.blocks(0));
    assert_eq!(running.stats().wishes, 0);
}
