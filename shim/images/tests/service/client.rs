//! The VMM's side of a connection.

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use images::service::socket;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use vmm_api::image::{
    BLOCK, Fetch, Fetched, OpenReply, OpenRequest, OpenedImage, ready_map_bytes, ready_map_offset,
};

/// An open image.
pub struct Client {
    socket: OwnedFd,
    pub image: OpenedImage,
    pub bootstrap: File,
    pub files: Vec<File>,
}

impl Client {
    pub fn open(socket: &Path, bootstrap: &Path, config: &str) -> Result<Client, String> {
        Self::open_and_look(socket, bootstrap, config, false)
    }

    /// Opens an image, and asks whether all of it is there.
    pub fn open_and_look(
        socket: &Path,
        bootstrap: &Path,
        config: &str,
        look: bool,
    ) -> Result<Client, String> {
        let socket = socket::connect(socket).map_err(|error| error.to_string())?;
        let request = OpenRequest::Open { bootstrap: bootstrap.into(), config: config.into(), look };
        let request = serde_json::to_vec(&request).expect("JSON");
        rustix::net::send(&socket, &request, SendFlags::NOSIGNAL).map_err(|error| error.to_string())?;
        let mut buffer = vec![0; 1 << 16];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let got = rustix::net::recvmsg(&socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC);
        let len = got.map_err(|error| error.to_string())?.bytes;
        let mut fds: Vec<File> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds.map(File::from)),
                _ => None,
            })
            .flatten()
            .collect();
        match serde_json::from_slice(&buffer[..len]).map_err(|error| error.to_string())? {
            OpenReply::Refused { reason } => Err(reason),
            OpenReply::Opened(image) => {
                assert_eq!(fds.len(), image.blobs.len() + 1, "a bootstrap, and a file a blob");
                let bootstrap = fds.remove(0);
                Ok(Client { socket, image, bootstrap, files: fds })
            }
        }
    }

    /// What a guest mounts.
    pub fn mounted(&self) -> Vec<u8> {
        let len = self.bootstrap.metadata().expect("a file").len();
        let mut bytes = vec![0; usize::try_from(len).expect("small")];
        self.bootstrap.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    pub fn send(&self, fetch: Fetch) {
        rustix::net::send(&self.socket, &fetch.to_bytes(), SendFlags::NOSIGNAL).expect("a service");
    }

    /// The next answer, or nothing where the service has gone.
    pub fn answer(&self) -> Option<Fetched> {
        let mut buffer = [0; 64];
        let (len, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()).ok()?;
        if len == 0 { None } else { Some(Fetched::from_bytes(&buffer[..len]).expect("an answer")) }
    }

    pub fn fetch(&self, blob: u32, first: u64, blocks: u32) -> u32 {
        self.send(Fetch { tag: first + 7, blob, blocks, first });
        let answer = self.answer().expect("a service");
        assert_eq!(answer.tag, first + 7);
        answer.errno
    }

    pub fn blocks(&self, blob: usize) -> u64 {
        self.image.blobs[blob].bytes.div_ceil(BLOCK)
    }

    /// Fetches everything; the first error's number.
    pub fn fetch_all(&self) -> u32 {
        for blob in 0..self.image.blobs.len() {
            let blocks = self.blocks(blob);
            for first in (0..blocks).step_by(64) {
                let count = u32::try_from((blocks - first).min(64)).expect("few");
                let errno = self.fetch(u32::try_from(blob).expect("few"), first, count);
                if errno != 0 {
                    return errno;
                }
            }
        }
        0
    }

    pub fn ready_map(&self, blob: usize) -> Vec<u8> {
        let bytes = self.image.blobs[blob].bytes;
        let mut map = vec![0; usize::try_from(ready_map_bytes(bytes)).expect("small")];
        self.files[blob].read_exact_at(&mut map, ready_map_offset(bytes)).expect("a map");
        map
    }

    /// How many blocks are ready.
    pub fn ready(&self, blob: usize) -> u32 {
        self.ready_map(blob).iter().map(|byte| byte.count_ones()).sum()
    }

    pub fn is_ready(&self, blob: usize, block: u64) -> bool {
        self.ready_map(blob)[usize::try_from(block / 8).expect("small")] & (1 << (block % 8)) != 0
    }

    pub fn read(&self, blob: usize, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).expect("small")];
        self.files[blob].read_exact_at(&mut bytes, offset).expect("in the file");
        bytes
    }
}
