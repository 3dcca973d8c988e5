//! Images of the test's own, made by the converter, and a service for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use convert::rafs::{self, Built, Layer, Options};
use images::config::Config;
use images::service::Service;
use images::stats::Snapshot;
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::client::Client;

/// A folder of files and images of it.
pub struct Sample {
    pub folder: TempDir,
}

/// Bytes that no compressor makes small, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}

impl Sample {
    /// A few files that are small, large, compressible, and empty.
    pub fn new() -> Sample {
        let folder = TempDir::new().expect("a temporary folder");
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("a/b")).expect("folders");
        let text: Vec<u8> =
            (0..300_000_u32).flat_map(|i| format!("line {}\n", i % 977).into_bytes()).collect();
        for (name, bytes) in [
            ("a/noise", noise(1, 2_500_000)),
            ("a/text", text),
            ("a/b/small", b"small\n".to_vec()),
            ("a/b/block", noise(2, 4096)),
            ("more", noise(3, 700_001)),
            ("empty", Vec::new()),
        ] {
            fs::write(root.join(name), bytes).expect("a file");
        }
        fs::hard_link(root.join("more"), root.join("again")).expect("a link");
        Sample { folder }
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Its files by their paths.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let names = ["a/noise", "a/text", "a/b/small", "a/b/block", "more", "empty", "again"];
        names.map(|name| (name.to_owned(), fs::read(self.root().join(name)).expect("a file"))).into()
    }

    pub fn blobs(&self) -> PathBuf {
        self.folder.path().join("blobs")
    }

    /// An image of the folder.
    pub fn build(&self, name: &str, options: &Options) -> Built {
        let bootstrap = self.folder.path().join(name);
        rafs::build_folder(&self.root(), &bootstrap, &self.blobs(), options).expect("built")
    }

    /// A version 6 image with chunks of 64 KiB, so that there are many.
    pub fn build_v6(&self) -> Built {
        self.build("v6.boot", &Options { chunk_size: 64 << 10, ..Options::default() })
    }

    /// A version 6 image with chunks of `chunk_size` bytes.
    pub fn build_v6_of(&self, chunk_size: u32) -> Built {
        self.build(&format!("v6-{chunk_size}.boot"), &Options { chunk_size, ..Options::default() })
    }

    /// An index over the folder's gzip archive.
    pub fn build_zran(&self) -> Built {
        let archive = self.folder.path().join("layer.tar.gz");
        let tar = std::process::Command::new("tar")
            .args(["--format=posix", "-czf"])
            .arg(&archive)
            .arg("-C")
            .arg(self.root())
            .arg(".")
            .status()
            .expect("tar");
        assert!(tar.success());
        let layer = self.folder.path().join("layer.boot");
        let options = Options { chunk_size: 64 << 10, ..Options::default() };
        rafs::build_layer(Layer::Reference, &archive, &layer, &self.blobs(), &options).expect("an index");
        let bootstrap = self.folder.path().join("zran.boot");
        let built = rafs::merge(&[layer], &bootstrap, None).expect("merged");
        fs::copy(&archive, self.blobs().join(&built.blobs[0])).expect("the layer is a blob");
        built
    }

    /// Compares every file with what its blocks in the cache files are, after fetching all of them.
    pub fn compare(&self, bootstrap: &Path, client: &Client) {
        assert_eq!(client.fetch_all(), 0);
        let (files, blobs) = convert::files::of_bootstrap(bootstrap).expect("read");
        let names: Vec<&str> = client.image.blobs.iter().map(|blob| blob.id.as_str()).collect();
        assert_eq!(blobs, names);
        let mut seen = 0;
        for file in files {
            let path = self.root().join(file.path.strip_prefix("/").expect("from the root"));
            let wanted = fs::read(&path).expect("the file");
            let mut got = Vec::new();
            for piece in &file.pieces {
                for block in piece.offset / 4096..(piece.offset + piece.len).div_ceil(4096) {
                    assert!(client.is_ready(piece.blob as usize, block), "{path:?}: block {block}");
                }
                got.extend(client.read(piece.blob as usize, piece.offset, piece.len));
            }
            assert!(got == wanted, "{} differs", path.display());
            seen += 1;
        }
        assert_eq!(seen, 7, "the files of the folder");
    }
}

/// The daemon's configuration for a folder of blobs.
pub fn folder_config(blobs: &Path) -> String {
    let blobs = blobs.display();
    format!(r#"{{"version": 2, "backend": {{"type": "localfs", "localfs": {{"dir": "{blobs}"}}}}}}"#)
}

/// A service in this process.
pub struct Running {
    pub folder: TempDir,
    pub service: Arc<Service>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// With nothing fetched that nobody asked for.
    pub fn plain() -> Running {
        Running::with(
            "[fetch]\nread_ahead_kib = 0\nprefetch = false\npatience_s = 2\n[cache]\nmin_free_mib = 0",
        )
    }

    pub fn with(config: &str) -> Running {
        Running::at(TempDir::new().expect("a temporary folder"), config)
    }

    pub fn at(folder: TempDir, config: &str) -> Running {
        // libtest keeps back what a test prints, and not what a thread of it logs.
        if std::env::var_os("CTVM_TEST_LOG").is_some() {
            images::logger::install();
        }
        let config: Config = toml::from_str(config).expect("a configuration");
        let service = Arc::new(Service::new(&folder.path().join("cache"), config).expect("a service"));
        let (stop, stopped) = oneshot::channel();
        let (socket, serving) = (folder.path().join("sock"), Arc::clone(&service));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            let stop = async { drop(stopped.await) };
            runtime.expect("a runtime").block_on(serving.serve(&socket, stop)).expect("served");
        });
        let running = Running { folder, service, stop: Some(stop), thread: Some(thread) };
        wait_for(&running.socket());
        running
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    pub fn open(&self, bootstrap: &Path, config: &str) -> Client {
        Client::open(&self.socket(), bootstrap, config).expect("opened")
    }

    pub fn stats(&self) -> Snapshot {
        self.service.snapshot()
    }

    /// Waits until no image is open.
    pub fn closed(&self) {
        self.closed_but(0);
    }

    /// Waits until no more than `left` images are open.
    pub fn closed_but(&self, left: u64) {
        until("images to be closed", || self.stats().images == left);
    }

    /// Ends it as SIGTERM does. What is left of it.
    pub fn stop(mut self) -> TempDir {
        self.end();
        std::mem::replace(&mut self.folder, TempDir::new().expect("a temporary folder"))
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("served");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.end();
        }
    }
}

/// Waits for a socket to be there.
pub fn wait_for(socket: &Path) {
    until("a service", || images::service::socket::connect(socket).is_ok());
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("20 s waited for {what}");
}

/// The cache's files of a blob.
pub fn cache_files(cache: &Path, blob: &str) -> Vec<PathBuf> {
    let variants = fs::read_dir(cache.join("blobs").join(blob)).into_iter().flatten().flatten();
    variants.map(|variant| variant.path().join("data")).filter(|data| data.exists()).collect()
}
