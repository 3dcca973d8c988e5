//! An image service for tests: cache files whose blocks come when the test says so.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use imagefs::image::{BlobFile, Channel, Files};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmm_api::frame;
use vmm_api::image::{BLOCK, Fetch, Fetched, disk_parts, ready_map_bytes, ready_map_offset};

/// Nothing asked within this time is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// Sizes of the test image's parts, none of them whole blocks.
pub const BOOTSTRAP: u64 = 3 * BLOCK + 100;
pub const BLOBS: [u64; 2] = [3000 * BLOCK - 700, 40 * BLOCK + 513];

/// What a byte of a part is: another one in each part, and at each place for a long way.
pub fn byte(part: usize, at: u64) -> u8 {
    let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 + 2 * part as u64);
    mixed.to_be_bytes()[0]
}

/// Cache files that outlive connections.
#[derive(Debug)]
pub struct Cache {
    bootstrap: File,
    blobs: Vec<(File, u64)>,
}

impl Cache {
    /// With no block ready.
    pub fn new() -> Arc<Self> {
        let bootstrap = tempfile::tempfile().unwrap();
        bootstrap.write_all_at(&content(0, 0..BOOTSTRAP), 0).unwrap();
        let blobs = BLOBS.map(|bytes| {
            let file = tempfile::tempfile().unwrap();
            // What no guest may see.
            let size = ready_map_offset(bytes) + ready_map_bytes(bytes);
            file.write_all_at(&vec![0xee; usize::try_from(ready_map_offset(bytes)).unwrap()], 0).unwrap();
            file.set_len(size).unwrap();
            (file, bytes)
        });
        Arc::new(Cache { bootstrap, blobs: blobs.into() })
    }

    pub fn blobs(&self) -> Vec<BlobFile> {
        let each = self.blobs.iter();
        each.map(|(file, bytes)| BlobFile { file: file.try_clone().unwrap().into(), bytes: *bytes }).collect()
    }

    /// Makes blocks ready.
    pub fn fill(&self, blob: u32, blocks: std::ops::Range<u64>) {
        let (file, bytes) = &self.blobs[blob as usize];
        let range = blocks.start * BLOCK..(blocks.end * BLOCK).min(*bytes);
        file.write_all_at(&content(1 + blob as usize, range.clone()), range.start).unwrap();
        self.mark(blob, blocks, true);
    }

    /// Sets or takes back bits.
    pub fn mark(&self, blob: u32, blocks: std::ops::Range<u64>, ready: bool) {
        let (file, bytes) = &self.blobs[blob as usize];
        for block in blocks {
            let at = ready_map_offset(*bytes) + block / 8;
            let mut bits = [0];
            file.read_exact_at(&mut bits, at).unwrap();
            bits[0] = if ready { bits[0] | 1 << (block % 8) } else { bits[0] & !(1 << (block % 8)) };
            file.write_all_at(&bits, at).unwrap();
        }
    }

    /// Files for the VMM, its end of a new connection, and the service's.
    pub fn open(self: &Arc<Self>) -> (Files, Channel, Service) {
        let files = Files::new(self.bootstrap.try_clone().unwrap().into(), self.blobs()).unwrap();
        let (channel, service) = self.connect();
        (files, Channel::new(channel).unwrap(), service)
    }

    pub fn connect(self: &Arc<Self>) -> (OwnedFd, Service) {
        let (theirs, ours) = frame::pair().unwrap();
        (theirs, Service { cache: self.clone(), socket: ours })
    }
}

/// Bytes of a part.
pub fn content(part: usize, range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(|at| byte(part, at)).collect()
}

/// Bytes of the disk.
pub fn disk(range: std::ops::Range<u64>) -> Vec<u8> {
    let sizes = [BOOTSTRAP, BLOBS[0], BLOBS[1]];
    let parts = disk_parts(BOOTSTRAP, BLOBS).unwrap();
    let each = range.map(|at| {
        let part = parts.iter().position(|part| (part.start..part.end()).contains(&at)).unwrap();
        let at = at - parts[part].start;
        if at < sizes[part] { byte(part, at) } else { 0 }
    });
    each.collect()
}

/// The service's end of a connection.
#[derive(Debug)]
pub struct Service {
    cache: Arc<Cache>,
    socket: OwnedFd,
}

impl Service {
    /// The next wish. Panics if there is none.
    pub fn wish(&self) -> Fetch {
        self.wish_within(PATIENCE).expect("the disk asks")
    }

    /// The next wish, if there is one within this time. `None` also at the end of the connection.
    pub fn wish_within(&self, time: Duration) -> Option<Fetch> {
        let timeout = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: time.subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
            return None;
        }
        let mut bytes = [0; 64];
        let (_, len) = recv(&self.socket, &mut bytes, RecvFlags::empty()).unwrap_or_default();
        if len == 0 {
            return None;
        }
        let fetch = Fetch::from_bytes(&bytes[..len]).expect("a wish is 24 bytes long");
        let (_, bytes) = self.cache.blobs[fetch.blob as usize];
        let end = fetch.first + u64::from(fetch.blocks);
        assert!(
            fetch.blocks > 0 && end <= bytes.div_ceil(BLOCK),
            "{fetch:?} is not in a blob of {bytes} bytes"
        );
        assert!(fetch.blocks <= vmm_api::image::MAX_FETCH_BLOCKS, "{fetch:?}");
        Some(fetch)
    }

    /// Fulfils a wish and says so.
    pub fn fulfil(&self, fetch: Fetch) {
        self.cache.fill(fetch.blob, fetch.first..fetch.first + u64::from(fetch.blocks));
        self.say(fetch.tag, 0);
    }

    /// Answers.
    pub fn say(&self, tag: u64, errno: u32) {
        self.send(&Fetched { tag, errno }.to_bytes());
    }

    /// Sends any packet.
    pub fn send(&self, bytes: &[u8]) {
        send(&self.socket, bytes, SendFlags::NOSIGNAL).unwrap();
    }

    /// Whether the disk has closed its end.
    pub fn is_closed(&self) -> bool {
        let socket = self.socket.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
        let timeout = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
        poll(&mut fds, Some(&timeout)).unwrap() > 0
    }

    /// Fulfils all wishes, on a thread, until the connection ends.
    pub fn serve(self) {
        std::thread::spawn(move || {
            while let Some(fetch) = self.wish_within(PATIENCE * 1000) {
                self.fulfil(fetch);
            }
        });
    }
}
