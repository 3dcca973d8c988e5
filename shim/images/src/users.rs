//! What containerd looks up in an image before a container of it starts: the lists of users and groups. It mounts the image to read them;
//! here nothing of it is mounted, and these files are fetched alone.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::net::sockopt::Timeout;
use rustix::net::sockopt::set_socket_timeout;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vmm_api::frame::{self, FrameError};
use vmm_api::image::{BLOCK, Fetch, Fetched, MAX_FETCH_BLOCKS, OpenReply, OpenRequest, OpenedImage};

use crate::rafs::lookup::{Extent, extents_of};
use crate::rafs::{MAX_BOOTSTRAP, RafsError};

/// What is looked up, from the image's root.
pub const FILES: [&str; 2] = ["etc/passwd", "etc/group"];

/// How long the service may take for each answer.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The image service is not there.
    #[error("no image service at {path}: start it with `ctvm-images serve`")]
    Connect {
        /// Where it was looked for.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It does not open the image.
    #[error("the image service: {0}")]
    Refused(String),
    /// It answers something else than it should, or not.
    #[error("the image service's answer: {0}")]
    Answer(String),
    /// Bytes could not be had.
    #[error("the image service cannot fetch {blocks} blocks from {first} of blob {blob}: errno {errno}")]
    Fetch {
        /// Which blob.
        blob: u32,
        /// First block.
        first: u64,
        /// How many.
        blocks: u32,
        /// Why.
        errno: u32,
    },
    /// The bootstrap is broken.
    #[error(transparent)]
    Rafs(#[from] RafsError),
    /// The connection or a file.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<FrameError> for UsersError {
    fn from(error: FrameError) -> Self {
        UsersError::Answer(error.to_string())
    }
}

/// An open image.
#[derive(Debug)]
pub struct Reader {
    service: OwnedFd,
    bootstrap: Vec<u8>,
    opened: OpenedImage,
    files: Vec<fs::File>,
}

impl Reader {
    /// Opens the image at the service behind `socket`.
    pub fn open(socket: &Path, bootstrap: &Path, config: &str) -> Result<Reader, UsersError> {
        let service = dial(socket)
            .map_err(|source| UsersError::Connect { path: socket.display().to_string(), source })?;
        let open =
            OpenRequest::Open { bootstrap: bootstrap.to_owned(), config: config.to_owned(), look: false };
        frame::send(&service, &serde_json::to_vec(&open).expect("strings can be written"), &[])?;
        let packet = frame::recv(&service)?;
        let reply = serde_json::from_slice(&packet.bytes).map_err(|e| UsersError::Answer(e.to_string()))?;
        let opened = match reply {
            OpenReply::Opened(opened) => opened,
            OpenReply::Refused { reason } => return Err(UsersError::Refused(reason)),
        };
        let mut files = packet.fds.into_iter().map(fs::File::from);
        let first = files.next().ok_or_else(|| UsersError::Answer("no bootstrap".to_owned()))?;
        let bytes = first.metadata()?.len();
        let len = usize::try_from(bytes).ok().filter(|_| bytes <= MAX_BOOTSTRAP);
        let len = len.ok_or_else(|| UsersError::Answer(format!("a bootstrap of {bytes} bytes")))?;
        // The service has read it by the same description, which stands at its end.
        let mut bootstrap = vec![0; len];
        first.read_exact_at(&mut bootstrap, 0)?;
        Ok(Reader { service, bootstrap, opened, files: files.collect() })
    }

    /// A file's bytes, by its path from the root. None where the image has no such file.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, UsersError> {
        let Some(extents) = extents_of(&self.bootstrap, path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        for extent in extents {
            self.append(&extent, &mut bytes)?;
        }
        Ok(Some(bytes))
    }

    fn append(&self, extent: &Extent, bytes: &mut Vec<u8>) -> Result<(), UsersError> {
        let (start, len) = (bytes.len(), usize::try_from(extent.len).expect("at most 4 MiB"));
        bytes.resize(start + len, 0);
        let Some(blob) = extent.blob else { return Ok(()) };
        let file = self.files.get(blob as usize).filter(|_| self.opened.blobs.len() > blob as usize);
        let file = file.ok_or_else(|| UsersError::Answer(format!("no file for blob {blob}")))?;
        // A wish for what is there already is answered at once.
        let (mut first, behind) = (extent.offset / BLOCK, (extent.offset + extent.len).div_ceil(BLOCK));
        while first < behind {
            let blocks = u32::try_from(behind - first).unwrap_or(u32::MAX).min(MAX_FETCH_BLOCKS);
            self.fetch(blob, first, blocks)?;
            first += u64::from(blocks);
        }
        Ok(file.read_exact_at(&mut bytes[start..], extent.offset)?)
    }

    fn fetch(&self, blob: u32, first: u64, blocks: u32) -> Result<(), UsersError> {
        let wish = Fetch { tag: first, blob, blocks, first };
        frame::send(&self.service, &wish.to_bytes(), &[])?;
        let packet = frame::recv(&self.service)?;
        let answer = Fetched::from_bytes(&packet.bytes).filter(|answer| answer.tag == wish.tag);
        match answer {
            Some(Fetched { errno: 0, .. }) => Ok(()),
            Some(Fetched { errno, .. }) => Err(UsersError::Fetch { blob, first, blocks, errno }),
            None => Err(UsersError::Answer("another than the one to our wish".to_owned())),
        }
    }
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for which in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(socket.as_fd(), which, Some(LIMIT))?;
    }
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
