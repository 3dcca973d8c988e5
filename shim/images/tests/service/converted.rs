//! OCI images converted, pushed, pulled, checked, and read.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use convert::check::check;
use convert::convert::{Done, Request, convert, find};
use convert::layout::Layout;
use convert::name::ImageName;
use convert::oci::{Descriptor, Manifest, annotation, media};
use convert::progress::Progress;
use convert::rafs::Options;
use convert::remote::Credentials;
use convert::store::{Raw, Store};
use images::config::Auth;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::registry::{Registry, Wants};
use crate::sample::{Running, noise};

/// An OCI image of three layers in a layout folder.
struct Source {
    folder: TempDir,
    /// What its files are in the end.
    files: BTreeMap<String, Vec<u8>>,
}

enum Item {
    File(&'static str, Vec<u8>),
    Folder(&'static str),
    Link(&'static str, &'static str),
}

/// An archive as GNU tar makes it: device numbers are blank.
fn archive(items: &[Item]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for item in items {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        match item {
            Item::File(path, bytes) => {
                header.set_size(bytes.len() as u64);
                archive.append_data(&mut header, path, bytes.as_slice()).expect("to memory");
            }
            Item::Folder(path) => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_size(0);
                archive.append_data(&mut header, path, std::io::empty()).expect("to memory");
            }
            Item::Link(path, target) => {
                header.set_entry_type(tar::EntryType::Link);
                header.set_size(0);
                archive.append_link(&mut header, path, target).expect("to memory");
            }
        }
    }
    archive.into_inner().expect("to memory")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(bytes).expect("to memory");
    gzip.finish().expect("to memory")
}

impl Source {
    fn new(extra: &'static str, seed: u64) -> Source {
        let text = b"all work and no play\n".repeat(20_000);
        let long = "a/very/long/name/that/does/not/fit/into/the/hundred/bytes/that/a/header/of/an/archive/has/for/it/at/all";
        let layers = [
            gzip(&archive(&[
                Item::Folder("etc/"),
                Item::File("etc/gone", b"gone".to_vec()),
                Item::File("etc/kept", b"kept".to_vec()),
                Item::Folder("opaque/"),
                Item::File("opaque/below", noise(5, 9000)),
                Item::File("bin/large", noise(6, 1_500_000)),
                Item::File("text", text.clone()),
                Item::Link("linked", "text"),
            ])),
            gzip(&archive(&[
                Item::File("etc/.wh.gone", Vec::new()),
                Item::Folder("opaque/"),
                Item::File("opaque/.wh..wh..opq", Vec::new()),
                Item::File("opaque/above", b"above".to_vec()),
                Item::File(long, b"long".to_vec()),
            ])),
            // Not compressed, with a file that only this image has.
            archive(&[
                Item::File("etc/kept", b"kept, changed".to_vec()),
                Item::File(extra, noise(seed, 200_000)),
            ]),
        ];
        let files = [
            ("etc/kept", b"kept, changed".to_vec()),
            ("bin/large", noise(6, 1_500_000)),
            ("text", text.clone()),
            ("linked", text),
            ("opaque/above", b"above".to_vec()),
            (long, b"long".to_vec()),
            (extra, noise(seed, 200_000)),
        ];
        let files = files.into_iter().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
        let folder = TempDir::new().expect("a temporary folder");
        let source = Source { folder, files };
        let kinds = [media::LAYER_GZIP, media::LAYER_GZIP, "application/vnd.oci.image.layer.v1.tar"];
        let layers: Vec<Descriptor> = layers.iter().zip(kinds).map(|(l, kind)| source.put(kind, l)).collect();
        let config = br#"{"architecture":"amd64","os":"linux","config":{"Cmd":["sh"]},"rootfs":{"type":"layers","diff_ids":[]}}"#;
        let config = source.put(media::CONFIG, config);
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::MANIFEST.into()),
            config,
            layers,
            more: serde_json::Map::new(),
        };
        let raw =
            Raw { media_type: media::MANIFEST.into(), bytes: serde_json::to_vec(&manifest).expect("JSON") };
        Layout::new(source.folder.path()).name(Some("source"), &raw).expect("named");
        source
    }

    fn put(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let hex = format!("{:x}", Sha256::digest(bytes));
        let file = self.folder.path().join("new");
        fs::write(&file, bytes).expect("a file");
        Layout::new(self.folder.path()).put(&hex, &file, &mut Progress::new("test", 0)).expect("stored");
        Descriptor {
            media_type: media_type.into(),
            digest: format!("sha256:{hex}"),
            size: bytes.len() as u64,
            annotations: BTreeMap::new(),
            platform: None,
        }
    }

    fn name(&self, name: &str) -> ImageName {
        format!("oci:{}:{name}", self.folder.path().display()).parse().expect("a name")
    }

    /// Reads every file of a bootstrap through a service and compares.
    fn compare(&self, bootstrap: &Path, config: &str) {
        let running = Running::plain();
        let client = running.open(bootstrap, config);
        assert_eq!(client.fetch_all(), 0);
        let (files, _) = convert::files::of_bootstrap(bootstrap).expect("read");
        let got: BTreeMap<String, Vec<u8>> = files
            .into_iter()
            .map(|file| {
                let bytes = file
                    .pieces
                    .iter()
                    .flat_map(|piece| client.read(piece.blob as usize, piece.offset, piece.len));
                let path = file.path.strip_prefix("/").expect("rooted").display().to_string();
                (path, bytes.collect())
            })
            .collect();
        assert_eq!(got.keys().collect::<Vec<_>>(), self.files.keys().collect::<Vec<_>>());
        for (path, bytes) in &self.files {
            assert!(got[path] == *bytes, "{path} differs");
        }
    }
}

fn request(source: &ImageName, destination: &ImageName) -> Request {
    Request {
        source: source.clone(),
        destination: destination.clone(),
        parent: None,
        reference: false,
        options: Options { chunk_size: 64 << 10, ..Options::default() },
        architecture: "amd64".into(),
        credentials: Credentials::default(),
    }
}

fn run<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

fn manifest(name: &ImageName, credentials: &Credentials) -> Manifest {
    run(find(&Store::of(name, credentials).expect("a store"), name, "amd64")).expect("found")
}

fn bootstrap(name: &ImageName, to: &Path) {
    let store = Store::of(name, &Credentials::default()).expect("a store");
    let manifest = manifest(name, &Credentials::default());
    run(convert::convert::fetch_bootstrap(&store, name, &manifest, to)).expect("a bootstrap");
}

#[test]
fn an_image_is_converted_in_a_folder_and_reads_as_its_layers() {
    let source = Source::new("extra", 7);
    for version in [6, 5] {
        let new = source.name(&format!("v{version}"));
        let mut request = request(&source.name("source"), &new);
        request.options.version = version;
        run(convert(&request)).expect("converted");
        let checked = run(check(&new, "amd64", &Credentials::default())).expect("fine");
        assert_eq!((checked.version, checked.files, checked.blobs), (version, 7, 3));
        let boot = source.folder.path().join("boot");
        bootstrap(&new, &boot);
        let layout = source.folder.path().display();
        let config = format!(r#"{{"backend": {{"type": "localfs", "localfs": {{"dir": "{layout}"}}}}}}"#);
        source.compare(&boot, &config);
    }
}

#[test]
fn its_manifest_is_what_snapshotters_look_for() {
    let source = Source::new("extra", 7);
    let new = source.name("new");
    run(convert(&request(&source.name("source"), &new))).expect("converted");
    let manifest = manifest(&new, &Credentials::default());
    let (last, blobs) = manifest.layers.split_last().expect("layers");
    for blob in blobs {
        assert_eq!(blob.media_type, "application/vnd.oci.image.layer.nydus.blob.v1");
        assert_eq!(blob.annotations["containerd.io/snapshot/nydus-blob"], "true");
    }
    assert_eq!(last.media_type, "application/vnd.oci.image.layer.v1.tar+gzip");
    assert_eq!(last.annotations["containerd.io/snapshot/nydus-bootstrap"], "true");
    assert_eq!(last.annotations["containerd.io/snapshot/nydus-fs-version"], "6");
    let config = source.folder.path().join("blobs/sha256").join(manifest.config.hex().expect("a digest"));
    let config: serde_json::Value = serde_json::from_slice(&fs::read(config).expect("read")).expect("JSON");
    let ids = config["rootfs"]["diff_ids"].as_array().expect("a list");
    assert_eq!(ids.len(), manifest.layers.len());
    assert_eq!(ids[0], blobs[0].digest.as_str());
    assert_eq!(config["config"]["Cmd"][0], "sh", "the rest is as it was");
    assert!(run(convert(&request(&new, &source.name("again")))).is_err(), "it is one already");
}

#[test]
fn registries_with_tokens_are_pulled_from_and_pushed_to() {
    let source = Source::new("extra", 7);
    let registry = Registry::new();
    registry.state().wants = Wants::Bearer;
    let name = |tag: &str| -> ImageName {
        format!("http://{}/a/b:{tag}", registry.address).parse().expect("a name")
    };
    let mut ask = request(&source.name("source"), &name("nydus"));
    assert!(run(convert(&ask)).is_err(), "nobody without a name");
    let auth = Auth::Basic { user: "user".into(), password: "password".into() };
    ask.credentials = Credentials { auth: Some(auth), ca: None };
    let done = run(convert(&ask)).expect("converted");
    assert!(registry.state().manifests.contains_key(&format!("a/b:{}", done.manifest)));
    run(check(&name("nydus"), "amd64", &ask.credentials)).expect("fine");
    registry.state().wants = Wants::Nothing;
    let boot = source.folder.path().join("boot");
    bootstrap(&name("nydus"), &boot);
    source.compare(&boot, &registry.config(""));
    // What is there is not sent again.
    let before = registry.state().log.len();
    run(convert(&ask)).expect("converted");
    assert!(!registry.state().log[before..].iter().any(|line| line.starts_with("POST")));
}

#[test]
fn chunks_of_a_parent_are_not_stored_again() {
    let (first, second) = (Source::new("one", 7), Source::new("two", 8));
    let registry = Registry::new();
    let name = |tag: &str| -> ImageName {
        format!("http://{}/a/b:{tag}", registry.address).parse().expect("a name")
    };
    let whole = run(convert(&request(&first.name("source"), &name("one")))).expect("converted");
    let mut ask = request(&second.name("source"), &name("two"));
    ask.parent = Some(name("one"));
    let more: Done = run(convert(&ask)).expect("converted");
    assert_eq!(more.parent_blobs, 3);
    assert!(more.new_bytes < 250_000 && whole.new_bytes > 1_500_000, "{more:?} after {whole:?}");
    run(check(&name("two"), "amd64", &Credentials::default())).expect("fine");
    let boot = second.folder.path().join("boot");
    bootstrap(&name("two"), &boot);
    second.compare(&boot, &registry.config(""));
}

#[test]
fn plain_layers_get_indexes_and_stay_as_they_are() {
    let source = Source::new("extra", 7);
    let registry = Registry::new();
    let new: ImageName = format!("http://{}/a/b:ref", registry.address).parse().expect("a name");
    let mut ask = request(&source.name("source"), &new);
    ask.reference = true;
    let refused = run(convert(&ask)).expect_err("a layer without compression");
    assert!(format!("{refused:#}").contains("cannot be indexed"), "{refused:#}");
    // The two gzip layers alone, written by a tar that fills in device numbers.
    let layer = |items: &[Item]| {
        let mut plain = Vec::new();
        convert::tar::normalise(
            archive(items).as_slice(),
            &mut plain,
            &mut Default::default(),
            &mut Default::default(),
        )
        .expect("fine");
        gzip(&plain)
    };
    let text = b"all work and no play\n".repeat(20_000);
    let one = source.put(
        media::LAYER_GZIP,
        &layer(&[
            Item::File("large", noise(6, 1_500_000)),
            Item::File("text", text.clone()),
            Item::File("gone", b"gone".to_vec()),
        ]),
    );
    let two = source.put(
        media::LAYER_GZIP,
        &layer(&[Item::File(".wh.gone", Vec::new()), Item::File("x", b"x".to_vec())]),
    );
    let mut changed = manifest(&source.name("source"), &Credentials::default());
    changed.layers = vec![one.clone(), two];
    let raw = Raw { media_type: media::MANIFEST.into(), bytes: serde_json::to_vec(&changed).expect("JSON") };
    Layout::new(source.folder.path()).name(Some("source"), &raw).expect("named");
    run(convert(&ask)).expect("converted");
    let manifest = manifest(&new, &Credentials::default());
    assert_eq!(manifest.layers[0].annotations[annotation::REFERENCE], one.digest);
    assert!(registry.state().blobs.contains_key(one.hex().expect("a digest")), "the plain layer is there");
    run(check(&new, "amd64", &Credentials::default())).expect("fine");
    let boot = source.folder.path().join("boot");
    bootstrap(&new, &boot);
    let files = [("large", noise(6, 1_500_000)), ("text", text), ("x", b"x".to_vec())];
    let files = files.into_iter().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
    Source { folder: source.folder, files }.compare(&boot, &registry.config(""));
}

#[test]
fn a_check_finds_what_is_wrong() {
    let source = Source::new("extra", 7);
    let new = source.name("new");
    run(convert(&request(&source.name("source"), &new))).expect("converted");
    let blob = manifest(&new, &Credentials::default()).layers[0].hex().expect("a digest").to_owned();
    let path = source.folder.path().join("blobs/sha256").join(&blob);
    let right = fs::read(&path).expect("read");
    let mut wrong = right.clone();
    wrong[1000] ^= 1;
    for bytes in [&wrong[..], &right[..right.len() - 1], &[]] {
        fs::write(&path, bytes).expect("written");
        assert!(run(check(&new, "amd64", &Credentials::default())).is_err());
    }
    fs::remove_file(&path).expect("removed");
    assert!(run(check(&new, "amd64", &Credentials::default())).is_err());
    assert!(run(check(&source.name("source"), "amd64", &Credentials::default())).is_err(), "no Nydus image");
}

#[test]
fn of_several_architectures_the_right_one_is_taken() {
    let source = Source::new("extra", 7);
    let layout = Layout::new(source.folder.path());
    let one = layout.named(Some("source")).expect("named");
    let digest = format!("sha256:{:x}", Sha256::digest(&one.bytes));
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
        { "mediaType": media::MANIFEST, "digest": format!("sha256:{}", "0".repeat(64)), "size": 1,
          "platform": { "os": "linux", "architecture": "arm64" } },
        { "mediaType": media::MANIFEST, "digest": digest, "size": one.bytes.len(),
          "platform": { "os": "linux", "architecture": "amd64", "variant": "v1" } },
    ]});
    let raw = Raw { media_type: media::INDEX.into(), bytes: serde_json::to_vec(&index).expect("JSON") };
    layout.name(Some("several"), &raw).expect("named");
    run(convert(&request(&source.name("several"), &source.name("new")))).expect("converted");
    let mut other = request(&source.name("several"), &source.name("other"));
    other.architecture = "riscv64".into();
    assert!(format!("{:#}", run(convert(&other)).expect_err("none")).contains("no image for linux/riscv64"));
}
