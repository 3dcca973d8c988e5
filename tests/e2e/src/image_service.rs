//! An image service of the tests' own: cache files whose blocks come when the test says so. What the real one does with
//! registries is not its business.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};
use vmm_api::frame::{self, FrameError};
use vmm_api::image::{
    BLOCK, Blob, Fetch, Fetched, OpenReply, OpenRequest, OpenedImage, ready_map_bytes, ready_map_offset,
};
use vmm_api::{BlobConfig, DiskConfig, FdIndex, ImageConfig, NewDevice, Op};

use crate::command::LIMIT;
use crate::vm::{Guest, scratch_file};

/// An image whose blobs are in memory, and come to their cache files a block at a time.
#[derive(Debug)]
pub struct Image {
    bootstrap: File,
    blobs: Vec<(Vec<u8>, File)>,
}

impl Image {
    /// An image of these bytes. Nothing of its blobs is in the cache, which holds other bytes in their place.
    pub fn new(bootstrap: &[u8], blobs: Vec<Vec<u8>>) -> Result<Self> {
        let file = scratch_file(bootstrap.len() as u64)?;
        file.write_all_at(bootstrap, 0)?;
        let blobs = blobs.into_iter().map(|bytes| {
            let (len, count) = (ready_map_offset(bytes.len() as u64), bytes.len() as u64);
            let cache = scratch_file(len + ready_map_bytes(count))?;
            cache.write_all_at(&vec![0xee; usize::try_from(len)?], 0)?;
            Ok((bytes, cache))
        });
        Ok(Image { bootstrap: file, blobs: blobs.collect::<Result<_>>()? })
    }

    /// The bytes that its disk has.
    pub fn disk(&self) -> Result<Vec<u8>> {
        let mut disk = vec![0; usize::try_from(self.bootstrap.metadata()?.len())?];
        self.bootstrap.read_exact_at(&mut disk, 0)?;
        for (bytes, _) in &self.blobs {
            disk.resize(disk.len().next_multiple_of(usize::try_from(BLOCK)?), 0);
            disk.extend(bytes);
        }
        disk.resize(disk.len().next_multiple_of(usize::try_from(BLOCK)?), 0);
        Ok(disk)
    }

    /// Makes blocks ready.
    pub fn fill(&self, fetch: Fetch) -> Result<()> {
        let (bytes, cache) = &self.blobs[usize::try_from(fetch.blob)?];
        let size = bytes.len() as u64;
        for block in fetch.first..fetch.first + u64::from(fetch.blocks) {
            ensure!(block < size.div_ceil(BLOCK), "{fetch:?} of a blob of {size} bytes");
            let range = usize::try_from(block * BLOCK)?..usize::try_from(size.min((block + 1) * BLOCK))?;
            cache.write_all_at(&bytes[range], block * BLOCK)?;
            let (at, mut bits) = (ready_map_offset(size) + block / 8, [0]);
            cache.read_exact_at(&mut bits, at)?;
            cache.write_all_at(&[bits[0] | 1 << (block % 8)], at)?;
        }
        Ok(())
    }

    /// The whole image for a VM that has not been configured: what it is given, and the service's end of its connection.
    pub fn disk_config(
        &self,
        id: &str,
        wait_ms: u32,
        give: &mut dyn FnMut(OwnedFd) -> FdIndex,
    ) -> Result<(DiskConfig, Service)> {
        let (channel, service) = Service::connect()?;
        let file = give(self.bootstrap.try_clone()?.into());
        let channel = give(channel);
        let blobs = self.blob_configs(give)?;
        let image = Some(ImageConfig { channel, blobs, wait_ms, dax: false });
        Ok((DiskConfig { image, ..DiskConfig::read_only(file, id) }, service))
    }

    /// An image, all of which is in its files, for a running VM: what to attach, and its descriptors.
    pub fn shown(&self, id: &str) -> Result<(NewDevice, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut give = |fd| {
            fds.push(fd);
            FdIndex(u8::try_from(fds.len() - 1).expect("few files"))
        };
        let (mut disk, _) = self.disk_config(id, 1000, &mut give)?;
        disk.image.as_mut().context("an image")?.dax = true;
        Ok((NewDevice::Disk(disk), fds))
    }

    /// Makes all of it ready. Behind a blob's end there are zeros then, as in a cache file of the node's service.
    pub fn fill_all(&self) -> Result<()> {
        for (blob, (bytes, cache)) in (0..).zip(&self.blobs) {
            let len = bytes.len() as u64;
            let blocks = u32::try_from(len.div_ceil(BLOCK))?;
            cache.set_len(ready_map_offset(len) + ready_map_bytes(len))?;
            cache.write_all_at(&vec![0; usize::try_from(ready_map_offset(len) - len)?], len)?;
            self.fill(Fetch { tag: 0, blob, blocks, first: 0 })?;
        }
        Ok(())
    }

    /// Whether all of it is ready.
    fn is_whole(&self) -> Result<bool> {
        for (bytes, cache) in &self.blobs {
            let blocks = (bytes.len() as u64).div_ceil(BLOCK);
            let mut map = vec![0; usize::try_from(ready_map_bytes(bytes.len() as u64))?];
            cache.read_exact_at(&mut map, ready_map_offset(bytes.len() as u64))?;
            if map.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>() < blocks {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A blob's cache file, to do harm to it.
    pub fn cache_file(&self, blob: usize) -> &File {
        &self.blobs[blob].1
    }

    fn blob_configs(&self, give: &mut dyn FnMut(OwnedFd) -> FdIndex) -> Result<Vec<BlobConfig>> {
        let each = self.blobs.iter().map(|(bytes, cache)| {
            Ok(BlobConfig { file: give(cache.try_clone()?.into()), bytes: bytes.len() as u64 })
        });
        each.collect()
    }

    /// Gives a running VM's disk a new connection.
    pub fn reconnect(&self, guest: &mut Guest, id: &str) -> Result<Service> {
        let (channel, service) = Service::connect()?;
        let mut fds = vec![channel];
        let blobs = self.blob_configs(&mut |fd| {
            fds.push(fd);
            FdIndex(u8::try_from(fds.len() - 1).expect("few files"))
        })?;
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let op = Op::ImageChannel { disk: id.into(), channel: FdIndex(0), blobs };
        guest.client().call(op, &borrowed, LIMIT).context("a new connection")?;
        Ok(service)
    }
}

/// The service's end of a connection.
#[derive(Debug)]
pub struct Service(OwnedFd);

impl Service {
    fn connect() -> Result<(OwnedFd, Service)> {
        let (theirs, ours) = frame::pair()?;
        set_time_limit(&ours)?;
        Ok((theirs, Service(ours)))
    }

    /// The next wish; `None` at the end of the connection.
    pub fn wish(&self) -> Result<Option<Fetch>> {
        match frame::recv(&self.0) {
            Ok(packet) => Ok(Some(Fetch::from_bytes(&packet.bytes).context("a wish of another length")?)),
            Err(FrameError::Closed) => Ok(None),
            Err(e) => Err(e).context("no wish"),
        }
    }

    /// Answers.
    pub fn say(&self, tag: u64, errno: u32) -> Result<()> {
        self.send(&Fetched { tag, errno }.to_bytes())
    }

    /// Sends any packet.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        Ok(frame::send(&self.0, bytes, &[])?)
    }

    /// Fulfils wishes as `image` has them, `count` of them at most; how many it fulfilled before that or the connection's end.
    pub fn fulfil(&self, image: &Image, count: usize) -> Result<usize> {
        for done in 0..count {
            let Some(fetch) = self.wish()? else { return Ok(done) };
            image.fill(fetch)?;
            // The end may come between wish and answer.
            if self.say(fetch.tag, 0).is_err() {
                return Ok(done);
            }
        }
        Ok(count)
    }
}

/// A service that shims connect to.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    path: PathBuf,
}

impl Server {
    /// Listens at `path`.
    pub fn listen(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        bind(&listener, &SocketAddrUnix::new(path)?).with_context(|| path.display().to_string())?;
        listen(&listener, 8)?;
        Ok(Server { listener, path: path.to_owned() })
    }

    /// Waits for a shim, and opens `image` for it. What it asked for, and the service's end of the connection.
    pub fn accept(&self, image: &Image) -> Result<(OpenRequest, Service)> {
        set_time_limit(&self.listener)?;
        let connection = accept_with(&self.listener, SocketFlags::CLOEXEC).context("no shim")?;
        set_time_limit(&connection)?;
        let request: OpenRequest = serde_json::from_slice(&frame::recv(&connection)?.bytes)?;
        let blobs = image.blobs.iter();
        let blobs = blobs.map(|(bytes, _)| Blob { id: "00".into(), bytes: bytes.len() as u64 }).collect();
        let OpenRequest::Open { look, .. } = &request;
        let ready = *look && image.is_whole()?;
        let reply = serde_json::to_vec(&OpenReply::Opened(OpenedImage { version: 6, blobs, ready }))?;
        let files = std::iter::once(&image.bootstrap).chain(image.blobs.iter().map(|(_, cache)| cache));
        let fds: Vec<BorrowedFd<'_>> = files.map(AsFd::as_fd).collect();
        frame::send(&connection, &reply, &fds)?;
        Ok((request, Service(connection)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The worst that a failure leaves is a name.
        let _ = fs::remove_file(&self.path);
    }
}

/// Has waits end some day.
fn set_time_limit(socket: &OwnedFd) -> Result<()> {
    Ok(set_socket_timeout(socket, Timeout::Recv, Some(LIMIT))?)
}
