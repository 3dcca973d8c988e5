//! What a VMM does with the node's image service, without a VM: it opens an image and has blocks fetched.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vmm_api::frame;
use vmm_api::image::{BLOCK, Fetch, Fetched, MAX_FETCH_BLOCKS, OpenReply, OpenRequest, OpenedImage};

use crate::command::LIMIT;

/// An image that is open at the service.
#[derive(Debug)]
pub struct ImageReader {
    service: OwnedFd,
    image: OpenedImage,
    /// Their locks keep the cache files.
    _files: Vec<File>,
}

impl ImageReader {
    /// Opens an image at the service of `socket`.
    pub fn open(socket: &Path, bootstrap: &Path, config: &str) -> Result<ImageReader> {
        let service = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&service, &SocketAddrUnix::new(socket)?)?;
        set_socket_timeout(&service, Timeout::Recv, Some(LIMIT))?;
        let request = OpenRequest::Open { bootstrap: bootstrap.into(), config: config.into(), look: false };
        frame::send(&service, &serde_json::to_vec(&request)?, &[])?;
        let answer = frame::recv(&service)?;
        match serde_json::from_slice(&answer.bytes)? {
            OpenReply::Refused { reason } => bail!("{reason}"),
            OpenReply::Opened(image) => {
                // The first is the bootstrap.
                let files: Vec<File> = answer.fds.into_iter().skip(1).map(File::from).collect();
                ensure!(files.len() == image.blobs.len(), "{} files for {image:?}", files.len());
                Ok(ImageReader { service, image, _files: files })
            }
        }
    }

    /// Has all of it fetched, `step` blocks at a time, [`MAX_FETCH_BLOCKS`] at most.
    pub fn fetch_all(&self, step: u32) -> Result<()> {
        let step = step.clamp(1, MAX_FETCH_BLOCKS);
        for (blob, described) in (0..).zip(&self.image.blobs) {
            let end = described.bytes.div_ceil(BLOCK);
            for first in (0..end).step_by(usize::try_from(step)?) {
                let blocks = u32::try_from(u64::from(step).min(end - first))?;
                frame::send(&self.service, &Fetch { tag: first, blob, blocks, first }.to_bytes(), &[])?;
                let answer = Fetched::from_bytes(&frame::recv(&self.service)?.bytes).context("an answer")?;
                ensure!(answer == Fetched { tag: first, errno: 0 }, "{answer:?} for block {first}");
            }
        }
        Ok(())
    }
}
