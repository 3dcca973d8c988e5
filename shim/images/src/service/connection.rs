//! One connection: an image is opened, then its VM's wishes are answered until the end.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use vmm_api::image::{BLOCK, Fetch, Fetched, MAX_FETCH_BLOCKS, OpenReply, OpenRequest};

use super::ahead;
use super::open::{OpenImage, Opened, open};
use super::socket::Packets;
use super::{Service, chain};
use crate::cache::{Failure, blocking};
use crate::fetch::Why;
use crate::rafs::ChunkRef;

/// Most bytes of an opening request.
const MAX_REQUEST: usize = 256 << 10;

/// Most wishes of one VM at a time; further ones wait in its socket.
const MAX_WISHES: usize = 128;

/// Serves a connection to its end.
pub async fn serve(service: Arc<Service>, packets: Packets, closing: watch::Receiver<bool>) {
    if let Err(error) = talk(&service, Arc::new(packets), closing).await {
        log::warn!("a connection ends: {error}");
    }
}

async fn talk(
    service: &Arc<Service>,
    packets: Arc<Packets>,
    mut closing: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut request = vec![0; MAX_REQUEST];
    let len = packets.receive(&mut request).await?;
    if len == 0 {
        return Ok(());
    }
    let request: Option<OpenRequest> =
        request.get(..len).and_then(|request| serde_json::from_slice(request).ok());
    let Some(OpenRequest::Open { bootstrap, config, look }) = request else {
        let reason = format!("the request of {len} bytes is none");
        return refuse(&packets, reason).await;
    };
    let Opened { image, mut answer, fds, ahead } = match open(service, &bootstrap, &config).await {
        Ok(opened) => opened,
        Err(error) => {
            let reason = chain(&error);
            log::error!("image {}: {reason}", bootstrap.display());
            return refuse(&packets, reason).await;
        }
    };
    if look {
        // After the locks were taken: nothing of it goes any more.
        let image = Arc::clone(&image);
        answer.ready = blocking(move || image.is_whole()).await;
    }
    let answer = serde_json::to_vec(&OpenReply::Opened(answer)).map_err(io::Error::other)?;
    packets.send(&answer, &fds).await?;
    // From here on the descriptors' locks are the VMM's.
    drop(fds);
    let mut tasks = JoinSet::new();
    tasks.spawn(ahead::run(Arc::clone(&image), ahead));
    let ended = tokio::select! {
        ended = wishes(&packets, &image, &mut tasks) => ended,
        _ = closing.wait_for(|closing| *closing) => Ok(()),
    };
    tasks.shutdown().await;
    close(image).await;
    ended
}

async fn refuse(packets: &Packets, reason: String) -> io::Result<()> {
    let answer = serde_json::to_vec(&OpenReply::Refused { reason }).map_err(io::Error::other)?;
    packets.send(&answer, &[]).await
}

async fn wishes(packets: &Arc<Packets>, image: &Arc<OpenImage>, tasks: &mut JoinSet<()>) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(MAX_WISHES));
    // One byte more than a wish: a longer one is seen to be longer.
    let mut buffer = [0; Fetch::LEN + 1];
    loop {
        let place = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
        let len = packets.receive(&mut buffer).await?;
        if len == 0 {
            return Ok(());
        }
        let Some(fetch) = buffer.get(..len).and_then(Fetch::from_bytes) else {
            return Err(io::Error::other(format!("{}: a wish of {len} bytes", image.name)));
        };
        let (packets, image) = (Arc::clone(packets), Arc::clone(image));
        tasks.spawn(async move {
            let errno = answer(&image, fetch).await;
            let errno = errno.err().map_or(0, |errno| errno.raw_os_error().unsigned_abs());
            // The VM may be gone; `receive` tells.
            let _ = packets.send(&Fetched { tag: fetch.tag, errno }.to_bytes(), &[]).await;
            drop(place);
        });
        while tasks.try_join_next().is_some() {}
    }
}

async fn answer(image: &OpenImage, fetch: Fetch) -> Result<(), Errno> {
    let began = Instant::now();
    let blob = image.blobs.get(fetch.blob as usize).ok_or(Errno::INVAL)?;
    if fetch.blocks == 0 || fetch.blocks > MAX_FETCH_BLOCKS {
        return Err(Errno::INVAL);
    }
    let start = fetch.first.checked_mul(BLOCK).ok_or(Errno::INVAL)?;
    let end = start.checked_add(u64::from(fetch.blocks) * BLOCK).ok_or(Errno::INVAL)?;
    if end > blob.table.bytes.next_multiple_of(BLOCK) {
        return Err(Errno::INVAL);
    }
    let wanted = blob.table.chunks_in(start, end);
    if let (Ok(first), Ok(behind)) = (u32::try_from(wanted.start), u32::try_from(wanted.end)) {
        image.trace.missed((first..behind).map(|chunk| ChunkRef { blob: fetch.blob, chunk }));
    }
    let waiting = image.fetcher.waits();
    let landed = blob.ensure(wanted, Why::Asked).await;
    drop(waiting);
    image.fetcher.stats.waited(began.elapsed(), landed.is_ok());
    landed.map_err(|failure| {
        let (errno, word) = match failure {
            Failure::Bad(_) | Failure::Denied(_) => (Errno::IO, "EIO"),
            Failure::NoSpace => (Errno::NOSPC, "ENOSPC"),
        };
        let Fetch { first, blocks, .. } = fetch;
        log::error!(
            "image {}: {word} for blob {} blocks {first}+{blocks}: {failure}",
            image.name,
            blob.table.id
        );
        errno
    })
}

async fn close(image: Arc<OpenImage>) {
    blocking(move || {
        image.trace.save();
        // The last one cleans up: until then others write.
        for blob in image.blobs.iter().filter(|blob| Arc::strong_count(&blob.file) == 1) {
            blob.file.make_clean();
        }
        log::info!("image {}: closed", image.name);
    })
    .await;
}
