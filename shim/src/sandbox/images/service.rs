//! The image service's side: an image is asked for, and what comes is taken apart.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use agent_api::image;
use agent_api::task::Mount;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::io::unix::AsyncFd;
use vmm_api::frame::{self, FrameError, Packet};
use vmm_api::image::{DiskPart, MAX_BLOBS, OpenReply, OpenRequest, OpenedImage, disk_parts};
use vmm_api::{Attached, BlobConfig, DiskConfig, FdIndex, ImageConfig};

use super::{By, OpenError};
use crate::watched::watch;

/// The version of the bootstraps that a guest can mount.
const VERSION: u8 = 6;
/// How long a guest's read waits for bytes, in milliseconds, before it fails.
const WAIT_MS: u32 = 60_000;

/// An image as the service opened it.
#[derive(Debug)]
pub struct Opened {
    channel: OwnedFd,
    bootstrap: OwnedFd,
    bootstrap_bytes: u64,
    image: OpenedImage,
    files: Vec<OwnedFd>,
}

/// Opens an image at the service that listens at `path`.
///
/// # Errors
/// [`OpenError`].
pub async fn open(path: &Path, request: &OpenRequest, limit: Duration) -> Result<Opened, OpenError> {
    let exchange = async {
        let channel = dial(path).await?;
        let connection = |source| OpenError::Connection { path: path.to_owned(), source };
        let bytes = serde_json::to_vec(request).expect("our own types serialise");
        send(&channel, &bytes).await.map_err(connection)?;
        let packet = receive(&channel).await.map_err(connection)?;
        taken_apart(packet, channel.into_inner(), request)
    };
    let late = |_| OpenError::Deadline { path: path.to_owned(), after: limit };
    tokio::time::timeout(limit, exchange).await.map_err(late)?
}

/// Connects; a service with a full backlog is waited for.
async fn dial(path: &Path) -> Result<AsyncFd<OwnedFd>, OpenError> {
    const AGAIN: Duration = Duration::from_millis(20);
    let absent = |e: Errno| OpenError::Absent { path: path.to_owned(), source: e.into() };
    let connection =
        |e: std::io::Error| OpenError::Connection { path: path.to_owned(), source: FrameError::Socket(e) };
    let address = SocketAddrUnix::new(path).map_err(absent)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let socket = socket.map_err(|e| connection(e.into()))?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return watch(socket).map_err(connection),
            // The kernel has no event for it.
            Err(Errno::AGAIN) => tokio::time::sleep(AGAIN).await,
            Err(Errno::INTR) => {}
            Err(e @ (Errno::NOENT | Errno::CONNREFUSED)) => return Err(absent(e)),
            Err(e) => return Err(connection(e.into())),
        }
    }
}

async fn send(channel: &AsyncFd<OwnedFd>, bytes: &[u8]) -> Result<(), FrameError> {
    loop {
        let mut ready = channel.writable().await.map_err(FrameError::Socket)?;
        match frame::send(channel.get_ref(), bytes, &[]) {
            Err(e) if e.would_block() => ready.clear_ready(),
            sent => return sent,
        }
    }
}

async fn receive(channel: &AsyncFd<OwnedFd>) -> Result<Packet, FrameError> {
    loop {
        let mut ready = channel.readable().await.map_err(FrameError::Socket)?;
        match frame::recv(channel.get_ref()) {
            Err(e) if e.would_block() => ready.clear_ready(),
            received => return received,
        }
    }
}

/// Checks an answer as far as the shim relies on it. The rest is the VMM's to check.
fn taken_apart(packet: Packet, channel: OwnedFd, request: &OpenRequest) -> Result<Opened, OpenError> {
    let OpenRequest::Open { bootstrap: path, .. } = request;
    let answer = |reason: String| OpenError::Answer { reason };
    let reply = serde_json::from_slice(&packet.bytes).map_err(|e| answer(e.to_string()))?;
    let image = match reply {
        OpenReply::Opened(image) => image,
        OpenReply::Refused { reason } => {
            return Err(OpenError::Refused { bootstrap: path.clone(), reason });
        }
    };
    if image.version != VERSION {
        return Err(OpenError::Version { bootstrap: path.clone(), version: image.version });
    }
    if image.blobs.len() > MAX_BLOBS {
        return Err(answer(format!("{} blobs, must be 0 to {MAX_BLOBS}", image.blobs.len())));
    }
    let count = packet.fds.len();
    let mut fds = packet.fds.into_iter();
    let bootstrap = fds.next().filter(|_| count == image.blobs.len() + 1);
    let bootstrap = bootstrap.ok_or_else(|| {
        answer(format!("{count} descriptors for a bootstrap and {} blobs", image.blobs.len()))
    })?;
    let stat = rustix::fs::fstat(&bootstrap).map_err(|e| answer(format!("the bootstrap: {e}")))?;
    let bootstrap_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    Ok(Opened { channel, bootstrap, bootstrap_bytes, image, files: fds.collect() })
}

impl Opened {
    /// The disk for the VMM, and its descriptors, of which the first is number `first` of the packet.
    pub fn disk(&self, serial: &str, first: u8, by: By) -> (DiskConfig, Vec<BorrowedFd<'_>>) {
        let (blobs, fds) = self.parts(first + 1);
        let dax = by == By::Memory;
        let image = ImageConfig { channel: FdIndex(first + 1), blobs, wait_ms: WAIT_MS, dax };
        let disk = DiskConfig { image: Some(image), ..DiskConfig::read_only(FdIndex(first), serial) };
        (disk, std::iter::once(self.bootstrap.as_fd()).chain(fds).collect())
    }

    /// Connection and cache files; the connection is number `first` of the packet.
    pub fn parts(&self, first: u8) -> (Vec<BlobConfig>, Vec<BorrowedFd<'_>>) {
        let blobs = (first + 1..).zip(&self.image.blobs);
        let blobs = blobs.map(|(file, blob)| BlobConfig { file: FdIndex(file), bytes: blob.bytes }).collect();
        let fds = std::iter::once(&self.channel).chain(&self.files).map(|fd| fd.as_fd()).collect();
        (blobs, fds)
    }

    /// Whether all of it is in the cache.
    pub fn is_ready(&self) -> bool {
        self.image.ready
    }

    fn places(&self) -> Result<Vec<DiskPart>, OpenError> {
        let parts = disk_parts(self.bootstrap_bytes, self.image.blobs.iter().map(|blob| blob.bytes));
        parts.ok_or_else(|| OpenError::Answer {
            reason: "bootstrap and blobs are larger than a disk".to_owned(),
        })
    }

    /// How much it is as a disk.
    pub fn bytes(&self) -> Result<u64, OpenError> {
        Ok(self.places()?.last().map_or(0, |last| last.end()))
    }

    /// The mount for the agent, of what came of attaching it; with `own_users`, for the sandbox's.
    pub fn mount(
        &self,
        attached: &Attached,
        serial: &str,
        target: String,
        own_users: bool,
    ) -> Result<Mount, OpenError> {
        let memory = attached.memory.map(|memory| image::memory(memory.start));
        let parts = self.places()?;
        Ok(Mount {
            type_: image::MOUNT_TYPE.to_owned(),
            source: serial.to_owned(),
            target,
            options: memory
                .into_iter()
                .chain(parts.iter().map(|part| image::part(part.start, part.bytes)))
                .chain(own_users.then(|| image::OWN_USERS.to_owned()))
                .collect(),
            ..Mount::default()
        })
    }
}
